"""What a VSP is to the embedded host, and what the host gives it for a channel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import PeerError
from ..iommu.domain import Domain
from ..memory.mapping import Mapping
from ..ring.pair import RingPair
from ..wire.vmbus import ChannelOffer

log = logging.getLogger("vfio_vmbus.host")


@dataclass(frozen=True)
class HostGpadl:
    """A guest's shared memory as the host sees it: contiguous. access: what the guest lets the host do (READ, WRITE)."""

    handle: int
    mapping: Mapping
    access: int


@dataclass(frozen=True)
class ChannelContext:
    """An open channel, for the VSP behind it. All calls and callbacks are on the host's loop."""

    relid: int
    pair: RingPair
    domain: Domain
    doorbell: int
    """eventfd that the guest signals."""
    gpadl: Callable[[int], HostGpadl]
    """The channel's GPADL with this handle. Raises ProtocolError where there is none."""
    failed: Callable[[Exception], None]
    """The guest broke the device's protocol: note why. The VSP has stopped using the channel."""
    guarded: Callable[[Callable[[], None]], Callable[[], None]] = lambda callback: callback
    """Wraps each callback that the VSP gives to the loop: what it raises is logged and ends this guest's connection, no other's."""


def guarded(callback: Callable[[], None], name: str, fail: Callable[[Exception], None]) -> Callable[[], None]:
    """For callbacks of the loop: what one raises goes to `fail`, which ends that client's use of the device. A defect of ours is logged as
    such. name: of the client, for the log."""

    def call() -> None:
        try:
            callback()
        except PeerError as error:
            fail(error)
        except Exception as error:
            log.exception("%s: defect of the host", name)
            fail(error)

    return call


class Vsp(Protocol):
    """A device of the embedded host. name: of its own at its host."""

    name: str

    @property
    def offer(self) -> ChannelOffer: ...

    def open(self, context: ChannelContext) -> None:
        """The guest opened the primary channel."""

    def close(self) -> None:
        """The guest closed it, or is gone. Afterwards nothing of its memory is touched. Harmless when nothing is open."""

    def gpadl_gone(self, handle: int) -> None:
        """A GPADL is about to be unmapped. Afterwards it is not touched."""
