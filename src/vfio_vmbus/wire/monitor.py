"""The monitor page: how a guest signals a channel without a hypercall. The host looks at it every so many microseconds.

A guest has two, and signals in the second one of its INITIATE_CONTACT.

A channel whose offer says so has a number; its group of 32 is number / 32, its bit number % 32. The guest sets that bit in `pending` of
the group, atomically: all channels of the guest share the page. Source: drivers/hv/hyperv_vmbus.h of Linux 6.12 (struct hv_monitor_page).
"""

from typing import Annotated

from vfio_vmbus.errors import UsageError
from vfio_vmbus.wire.layout import U32, Array, Raw, Struct, struct

GROUPS = 4
BITS_PER_GROUP = 32


@struct(size=8)
class TriggerGroup(Struct):
    """pending: a bit for each channel that was signalled. armed: the host's."""

    pending: U32 = 0
    armed: U32 = 0


@struct(size=4096)
class MonitorPage(Struct):
    """The page, as far as guests write it."""

    trigger_state: U32 = 0
    reserved: U32 = 0
    groups: Annotated[tuple[TriggerGroup, ...], Array(TriggerGroup, GROUPS)] = (TriggerGroup(),) * GROUPS
    rest: Annotated[bytes, Raw(4056)] = bytes(4056)


def number_of(relid: int) -> int | None:
    """The number that our host gives a channel in the page; None for those that it has no bit for."""
    return relid - 1 if relid <= GROUPS * BITS_PER_GROUP else None


def pending_bit(number: int) -> tuple[int, int]:
    """Where a channel's bit is: the offset of its 32-bit word in the page, and the mask. UsageError for a number that cannot be."""
    if not 0 <= number < GROUPS * BITS_PER_GROUP:
        raise UsageError(f"monitor number {number}: take 0 to {GROUPS * BITS_PER_GROUP - 1}")
    return MonitorPage.OFFSETS["groups"] + number // BITS_PER_GROUP * TriggerGroup.SIZE, 1 << number % BITS_PER_GROUP
