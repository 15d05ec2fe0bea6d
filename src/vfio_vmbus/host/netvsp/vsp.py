"""The virtual network card as a device of the embedded host: its offer, its link, and its channel on the switch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from uuid import UUID, uuid4

import numpy as np

from ...dataplane.rndis import PARSED
from ...errors import LocalError, PeerError, UsageError
from ...memory.block import Block
from ...wire import nvsp, oid
from ...wire.guids import CLASS_NETWORK
from ...wire.vmbus import ChannelOffer
from ..switch.port import Port
from ..switch.switch import Switch
from ..vsp import ChannelContext
from .control import Control
from .dataplane import give_to_worker
from .objects import Objects
from .state import MAX_PAGES, MAX_PENDING, NIC, PAIR, STAGE_SLOT, STAGE_SLOTS, WORKER

_BUDGET = 64
_RETRY_SECONDS = 0.001
_LONGEST_RETRY_SECONDS = 0.1
"""Answers that wait for room are tried again after the first, then twice as late each time up to the second."""


class Netvsp:
    """One card, plugged into a port of `switch` while its channel is open. All methods are called on the host's loop.

    mac: 6 bytes. max_mtu: bytes, up to 9000. versions: NVSP versions that it speaks, newest first.
    """

    def __init__(
        self,
        switch: Switch,
        mac: bytes,
        *,
        name: str = "nic",
        max_mtu: int = 9000,
        bits_per_second: int = 40_000_000_000,
        versions: tuple[int, ...] = nvsp.SUPPORTED_VERSIONS,
        instance: UUID | None = None,
        allow_spoofing: bool = False,
    ) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise UsageError(f"MAC address {mac.hex(':')}: take 6 bytes of a unicast address")
        self.mac = mac
        self.name = name
        self.mtu = _checked_mtu(max_mtu)
        self.link = True
        self.bits_per_second = bits_per_second
        self.offer = ChannelOffer(class_guid=CLASS_NETWORK, instance_guid=instance or uuid4(), server_context_size=0)
        self.port: Port | None = None
        self._switch = switch
        self._versions = versions
        self._allow_spoofing = allow_spoofing
        self._control: Control | None = None
        self._nic = Block(NIC)
        self._memory: list[Block] = []
        self._totals: dict[str, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._delay = _RETRY_SECONDS

    def counter(self, name: str) -> int:
        """A counter of the data plane, over all times that the channel was open."""
        return self._totals.get(name, 0) + self._nic[name]

    def counters(self) -> dict[str, int]:
        """All of them."""
        return {name: self.counter(name) for name in _COUNTERS}

    @property
    def version(self) -> int | None:
        """The NVSP version agreed on, while the channel is open."""
        return self._control.version if self._control else None

    def open(self, context: ChannelContext) -> None:
        """Plug in: the worker watches the channel from now on, and hands what is not a frame over to `_handle`."""
        self.close()
        self._loop = asyncio.get_running_loop()
        self._nic = Block(NIC)
        control_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fill(context, control_fd)
        self._control = Control(context, self._nic, Objects(self), self._versions, self.mtu, self._switch.worker.paused)
        self._loop.add_reader(control_fd, context.guarded(self._handle))
        self.port = self._switch.add_nic(
            self._nic.address, context.doorbell, self.mac, self.name, allow_spoofing=self._allow_spoofing
        )

    def close(self) -> None:
        """Pull the plug: when this returns no kernel and no handler touches the channel's memory."""
        if self.port is not None:
            self._switch.remove(self.port)
            self.port = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._control is None:
            return
        self._control = None
        for name in _COUNTERS:
            self._totals[name] = self.counter(name)
            self._nic[name] = 0
        if self._loop is not None:
            self._loop.remove_reader(self._nic["control_fd"])
        os.close(self._nic["control_fd"])
        self._memory.clear()

    def gpadl_gone(self, handle: int) -> None:
        """Stop using a buffer that the guest tears down."""
        control = self._control
        if control is None:
            return
        with self._switch.worker.paused():
            if control.receive is not None and control.receive.handle == handle:
                control.drop_receive_buffer()
            if control.send is not None and control.send.handle == handle:
                control.drop_send_buffer()

    def set_link(self, up: bool) -> None:
        """Plug the virtual cable in or out, and tell the guest."""
        if up == self.link:
            return
        self.link = up
        if self._control is not None:
            with self._switch.worker.paused():
                self._nic["link"] = int(up)
            self._control.indicate(oid.STATUS_MEDIA_CONNECT if up else oid.STATUS_MEDIA_DISCONNECT)
            self._retry_answers()

    def set_mtu(self, size: int) -> None:
        """The next guest that opens the channel gets frames with up to `size` bytes of payload. Raises UsageError for other than 68 to
        9000, and while the channel is open: there is no message for it, so that the card is to be rescinded, and offered again."""
        if self._control is not None:
            raise UsageError(f"{self.name}: its MTU is fixed while its channel is open")
        self.mtu = _checked_mtu(size)

    def _fill(self, context: ChannelContext, control_fd: int) -> None:
        def table(dtype: object, count: int) -> int:
            block = Block(dtype, count)
            self._memory.append(block)
            return block.address

        fields = {
            "owner": WORKER,
            "link": int(self.link),
            "incoming": context.pair.incoming.address,
            "outgoing": context.pair.outgoing.address,
            "domain": context.domain.address,
            "control_fd": control_fd,
            "scratch": table("i8", 2),
            "longest": 1518,
            "max_messages": 1,
            "mac_low": int.from_bytes(self.mac, "little"),
            "pending": table(PAIR, MAX_PENDING),
            "stage": table(np.uint8, STAGE_SLOTS * STAGE_SLOT),
            "pages": table(PAIR, MAX_PAGES),
            "parsed": table(PARSED, 1),
        }
        for name, value in fields.items():
            self._nic[name] = value

    def _handle(self) -> None:
        """The worker handed the channel over."""
        control = self._control
        if control is None:
            return
        try:
            os.eventfd_read(self._nic["control_fd"])
        except BlockingIOError:
            return
        if self._work(control, lambda: control.work(_BUDGET)):
            give_to_worker(self._nic.address)
            self._switch.worker.wake()

    def _work(self, control: Control, step: Callable[[], bool]) -> bool:
        """One step of the control plane; it says whether answers wait for room. False when the channel's use ended over it.

        What goes wrong on account of the guest ends its use of the channel, and nothing else.
        """
        try:
            later = step()
        except (PeerError, LocalError, OSError) as error:
            self.close()
            control.context.failed(error)
            return False
        self._nic["full"] = int(control.full)
        if not later:
            self._delay = _RETRY_SECONDS
        elif self._retry is None and self._loop is not None:
            self._retry = self._loop.call_later(self._delay, control.context.guarded(self._retry_answers))
            self._delay = min(2 * self._delay, _LONGEST_RETRY_SECONDS)
        return True

    def _retry_answers(self) -> None:
        """Answers wait for room: try again."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        control = self._control
        if control is not None and self._work(control, lambda: not control.flush()):
            self._switch.worker.wake()


def _checked_mtu(size: int) -> int:
    if not 68 <= size <= 9000:
        raise UsageError(f"MTU {size}: take 68 to 9000 bytes")
    return size


_COUNTERS = (
    "sent_frames",
    "sent_bytes",
    "received_frames",
    "received_bytes",
    "no_buffer",
    "filtered",
    "unplugged",
    "bad_sections",
    "bad_messages",
    "bad_ranges",
    "bad_completions",
    "faults",
)
