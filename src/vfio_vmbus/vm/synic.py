"""The SynIC of a virtual processor: its message slot and its event flags, in pages of the guest's own choice.

KVM has the MSRs and the interrupt (an irqfd of SINT 2, `prepare_vcpu`); what the pages hold is ours. The guest may write both at any
time, and move them. All methods are called on the host's loop; kernels of the data plane set event flags by `bell`.
Source: TLFS, "Inter-Partition Communication"; drivers/hv/hv.c and vmbus_drv.c of Linux 6.12.
"""

from __future__ import annotations

import numpy as np

from ..memory.access import copy, load32, load32_ordered, or32, store32, store32_release, store64
from ..memory.bell import Bell
from ..memory.block import Block
from ..memory.kernel import kernel
from ..vfio import eventfd
from ..wire import hyperv
from ..wire.hyperv import SlotHeader
from ..wire.vmbus import MESSAGE_SINT

_SLOT_AT = MESSAGE_SINT * hyperv.MESSAGE_SLOT
_FLAGS_AT = MESSAGE_SINT * hyperv.EVENT_FLAGS

_HEADER = SlotHeader.SIZE
_SENDER = SlotHeader.OFFSETS["sender"]
_VMBUS = hyperv.MESSAGE_VMBUS
_PENDING = hyperv.MESSAGE_PENDING


@kernel("i8(i8, i8, i8)")
def put_message(slot: int, payload: int, size: int) -> int:
    """Put a message into a slot, if the last one was taken: 1. Else 0: the guest says so when it takes that one (EOM)."""
    if load32(slot) != 0:
        or32(slot + 4, _PENDING)
        if load32_ordered(slot) != 0:
            return 0
    copy(slot + _HEADER, payload, size)
    store64(slot + _SENDER, 0)
    store32(slot + 4, size)
    store32_release(slot, _VMBUS)
    return 1


class Synic:
    """Of one processor. interrupt: the irqfd's eventfd. taken: the eventfd that says that an interrupt or a message was taken."""

    def __init__(self, interrupt: int, taken: int) -> None:
        self.interrupt = interrupt
        self.taken = taken
        self._slot = 0
        self._flags = 0
        self._nowhere = Block("u4", 1)
        """Where event flags go while the guest has no page for them."""
        self._payload = Block("u1", hyperv.MAX_PAYLOAD)
        self._bells: dict[int, Bell] = {}

    def place(self, messages: int, events: int) -> bool:
        """The pages are at these addresses from now on; 0: there is none. Were there bells that kernels may just be ringing elsewhere?"""
        self._slot = messages + _SLOT_AT if messages else 0
        flags = events + _FLAGS_AT if events else 0
        if flags == self._flags:
            return False
        self._flags = flags
        for relid, bell in self._bells.items():
            bell.move(self._word(relid))
        return bool(self._bells)

    def post(self, message: bytes) -> bool:
        """Give the guest a message. False when it has not taken the last one, or has no page; `taken` is signalled when it has."""
        if not self._slot:
            return False
        self._payload.array[: len(message)] = np.frombuffer(message, np.uint8)
        if not put_message(self._slot, self._payload.address, len(message)):
            return False
        eventfd.ring(self.interrupt)
        return True

    def bell(self, relid: int) -> int:
        """What sets a channel's event flag, and interrupts when it was not set; as rings take a doorbell. Good as long as this object."""
        if relid not in self._bells:
            bit = 1 << relid % 32
            self._bells[relid] = Bell(word=self._word(relid), bits=bit, file=self.interrupt, width=8)
        return self._bells[relid].number

    def _word(self, relid: int) -> int:
        return self._flags + relid // 32 * 4 if self._flags else self._nowhere.address
