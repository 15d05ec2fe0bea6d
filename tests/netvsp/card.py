"""A card of the embedded host whose worker is held still: tests run its kernels one call at a time.

The guest is an `Attacker`, which can send anything; what its transfers become is read out of the switch's own table.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.frames import BURST, FRAME, mac_value
from vfio_vmbus.host.netvsp.state import NIC, WORKER
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.host.switch.ports import port_deliver, port_finish, port_poll
from vfio_vmbus.host.switch.state import PORT, PORT_SIZE
from vfio_vmbus.iommu.dma import DmaBuffer
from vfio_vmbus.iommu.translation import READ
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.attacker import Attacker, marked_message
from vfio_vmbus.vfio.inprocess import InProcessDevice
from vfio_vmbus.wire import nvsp
from vfio_vmbus.wire.frame import Frame, parse_packet
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_XFER_PAGES, Packet

_STATE_AT: int = PORT.fields["state"][1]  # type: ignore[index]
MAC = bytes.fromhex("00155d0a0b0c")


@dataclass(frozen=True)
class Transfer:
    """What the guest got in one packet: the transaction to complete, where each message lies, and what it says."""

    transaction: int
    ranges: tuple[tuple[int, int], ...]
    frames: tuple[Frame, ...]


class Card:
    """The host's kernels of one card, and its guest."""

    def __init__(self, host: EmbeddedHost, function: InProcessDevice, nic: Netvsp, guest: Attacker, pages: DmaBuffer) -> None:
        assert nic.port is not None
        self.host = host
        self.function = function
        self.nic = nic
        self.guest = guest
        self.pages = pages
        """The guest's memory for GPA-direct packets."""
        self._port = host.switch.state["ports"] + nic.port.index * PORT_SIZE
        self._address = host.switch.state["frames"]
        raw = (ctypes.c_uint8 * (BURST * FRAME.itemsize)).from_address(self._address)
        self._table = np.frombuffer(raw, FRAME)
        self._memory = Block("u1", BURST * 9216)
        state = np.frombuffer((ctypes.c_int64).from_address(self._port + _STATE_AT), np.int64)
        self.record: Any = np.frombuffer((ctypes.c_uint8 * NIC.itemsize).from_address(int(state[0])), NIC)[0]
        """The NIC record that the kernels share with the control plane."""
        self.still = ExitStack()
        """What holds the worker still."""

    def let_the_control_plane_work(self) -> None:
        """After a poll that handed the record over: until it comes back, or the card is closed. The worker runs meanwhile."""
        if self.record["owner"] == WORKER:
            return
        self.still.close()
        while self.nic.port is not None and self.record["owner"] != WORKER:
            time.sleep(0.0002)
        self.still.enter_context(self.host.switch.worker.paused())

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """All frames that the guest sent, where they lie, as (address, size, flags), however many polls that takes."""
        idle = 0
        while idle < 3:  # a poll can come to nothing because what it took failed
            count = port_poll(self._port, self._address, 0)
            for row in self._table[:count]:
                yield int(row["address"]), int(row["size"]), int(row["flags"])
            if count:
                port_finish(self._port)
            idle = 0 if count else idle + 1

    def poll(self) -> list[tuple[bytes, int]]:
        """The same, as (bytes, flags)."""
        return [(ctypes.string_at(address, size), flags) for address, size, flags in self.rows()]

    def deliver(self, frames: list[tuple[bytes, int]], rewritten: bytes = b"") -> None:
        """Give frames, as (bytes, flags), to the guest, a burst of the switch's at most.

        rewritten: what their sender makes of their beginning once the switch has looked.
        """
        at = 0
        for index, (data, flags) in enumerate(frames):
            self._memory.array[at : at + len(data)] = np.frombuffer(data, np.uint8)
            row = self._table[index]
            row["address"], row["size"], row["flags"] = self._memory.address + at, len(data), flags
            row["destination"], row["source"] = mac_value(data[:6]), mac_value(data[6:12])
            self._memory.array[at : at + len(rewritten)] = np.frombuffer(rewritten, np.uint8)
            at += len(data)
        longest = max(len(data) for data, _ in frames)
        port_deliver(self._port, self._address, len(frames), at, longest)

    def message(self) -> bytes:
        """A frame of the guest's as an RNDIS message."""
        return marked_message(self.guest.mac)

    def packets(self) -> list[Packet]:
        """All that the card put into the guest's ring."""
        found = []
        while (packet := self.guest.channel.incoming.receive()) is not None:
            found.append(packet)
        return found

    def statuses(self) -> list[tuple[int, int]]:
        """The completions among them: (transaction, status)."""
        return [
            (packet.transaction_id, int.from_bytes(packet.payload[4:8], "little"))
            for packet in self.packets()
            if packet.packet_type == PACKET_COMPLETION
        ]

    def transfers(self) -> list[Transfer]:
        """The transfers of frames among them."""
        return [self._transfer(packet) for packet in self.packets() if packet.packet_type == PACKET_XFER_PAGES]

    def _transfer(self, packet: Packet) -> Transfer:
        assert packet.pageset_id == nvsp.RECEIVE_BUFFER_ID
        assert packet.completion_requested
        memory = self.guest.received()
        ranges = tuple((item.byte_offset, item.byte_count) for item in packet.ranges)
        frames = tuple(parse_packet(memory[offset : offset + size]) for offset, size in ranges)
        return Transfer(packet.transaction_id, ranges, frames)


@contextmanager
def card(**options: Any) -> Iterator[Card]:
    """A card with its worker parked. options: of the guest's driver."""
    with EmbeddedHost(poll="interrupt") as host:
        nic = host.add_nic("card", MAC)
        function = host.attach(nic)
        with open_device(function) as device:
            guest = Attacker(device, **options)
            pages = device.dma_buffer(256 * PAGE, READ, "pages")
            made = Card(host, function, nic, guest, pages)
            guest.nic.queue.rx_burst()  # gives the section of the last answer back
            with made.still:
                made.still.enter_context(host.switch.worker.paused())
                made.poll()
                assert made.record["free_count"] == made.record["receive_sections"]
                yield made
