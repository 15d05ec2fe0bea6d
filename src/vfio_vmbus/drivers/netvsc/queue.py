"""One queue of the card: its channel, its share of the buffers, and bursts of frames over them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ...channel.device import Channel, DmaBuffer, SharedBuffer
from ...dataplane.rndis import MESSAGE_RULES, PARSED
from ...errors import ClosedError, RingError, UsageError
from ...memory.block import Block
from ...ring.state import BAD_MOVE, RING
from ...wire.gpa import PAGE_SIZE, PageRange, pages_spanned
from ...wire.ring import Packet
from . import kernels
from .state import DONE_SLOTS, FRAME, MAIL_SLOT, MAIL_SLOTS, QUEUE

BURST = 64
"""Frames that one call hands out at most, unless told otherwise."""


@dataclass(frozen=True)
class Counters:
    """What passed through a queue."""

    tx_frames: int
    tx_bytes: int
    tx_failed: int
    """Transfers that the host refused."""
    tx_too_long: int
    rx_frames: int
    rx_bytes: int
    rx_bad_ranges: int
    """Announcements of the host outside of the receive buffer."""
    rx_bad_messages: int
    """RNDIS messages of the host that contradict themselves."""
    bad_completions: int
    """Completions of the host for what was not sent."""
    mail_lost: int
    """Control messages of the host that there was no place for."""


def _address_of(table: Block | NDArray[np.void]) -> int:
    """Where a table of FRAME rows lies. Raises UsageError for anything else."""
    array = table.array if isinstance(table, Block) else table
    if array.dtype != FRAME or array.ndim != 1 or not array.flags.c_contiguous:
        raise UsageError("tx_burst takes a contiguous table of FRAME rows")
    return table.address if isinstance(table, Block) else int(array.ctypes.data)


class Queue:
    """Send and receive. One thread at a time; `address` is what kernels of applications get (see `transmit` and `receive`).

    check: raises what has become of the card; whatever here finds a ring broken asks it first.
    """

    def __init__(self, channel: Channel, check: Callable[[], None], burst: int = BURST) -> None:
        self.channel = channel
        self.burst = burst
        self._check_card = check
        self._closed = False
        self._state = Block(QUEUE)
        self._received = Block(FRAME, burst)
        # What a loop in Python would pay for in each burst: slices of the table, and numbers that never change.
        self._bursts = [self._received.array[:count] for count in range(burst + 1)]
        self._address = self._state.address
        self._received_address = self._received.address
        self._buffer: SharedBuffer | None = None
        self._tables: dict[str, Block] = {}
        for name, value in {
            "incoming": channel.incoming.address,
            "outgoing": channel.outgoing.address,
            "open": -1,
            "slot": -1,
            "align": 8,
            "done": self._table("done", "i8", DONE_SLOTS),
            "mail": self._table("mail", np.uint8, MAIL_SLOTS * MAIL_SLOT),
            "parsed": self._table("parsed", PARSED, 1),
        }.items():
            self._state[name] = value

    @property
    def address(self) -> int:
        """Address of the QUEUE record, for kernels."""
        return self._address

    @property
    def receive_buffer(self) -> SharedBuffer:
        """Where received frames lie: what `rx_burst` hands out are addresses in it. The frames of a burst may be changed in place."""
        if self._buffer is None:
            raise UsageError("this queue has no receive buffer yet")
        return self._buffer

    def use_receive_buffer(self, buffer: SharedBuffer, longest: int) -> None:
        """Frames of up to `longest` bytes come through this buffer."""
        self._buffer = buffer
        self._state["longest"] = longest
        self._state["receive"] = buffer.address
        self._state["receive_size"] = buffer.size

    def use_send_buffer(self, buffer: SharedBuffer, section: int, pool: DmaBuffer, slot: int) -> None:
        """Send through sections of `section` bytes, longer frames through slots of `slot` bytes of the pool."""
        sections, slots = buffer.size // section, pool.size // slot
        for name, value in {
            "send": buffer.address,
            "send_section": section,
            "send_sections": sections,
            "pool": pool.mapping.address,
            "pool_iova": pool.iova,
            "pool_slot": slot,
            "pool_slots": slots,
            "free": self._table("free", "i8", sections, range(sections - 1, -1, -1)),
            "free_count": sections,
            "pool_free": self._table("pool_free", "i8", slots, range(slots - 1, -1, -1)),
            "pool_free_count": slots,
            "busy": self._table("busy", "i8", sections + slots),
        }.items():
            self._state[name] = value

    def set_limits(self, max_messages: int, align: int) -> None:
        """What the host takes in one transfer: messages, each on a multiple of `align` bytes."""
        self._state["max_messages"] = max_messages
        self._state["align"] = max(align, 8)

    def rx_burst(self, count: int | None = None) -> NDArray[np.void]:
        """Frames received: a table of (address, size, flags, checksum), valid until the next call, at most `burst`.

        Raises RingError when the host broke the ring, ClosedError when the queue is closed.
        """
        capacity = self.burst if count is None or count > self.burst else count
        received: int = kernels.receive_burst(self._address, self._received_address, capacity)
        if received == 0 and self._state["attention"]:
            self._check()
        return self._bursts[received]

    def tx_burst(self, table: Block | NDArray[np.void]) -> int:
        """Send copies of the frames in a table as `rx_burst` gives it (or a Block of FRAME rows). How many there was room for.

        Every row's memory must be readable: a row of addresses of your own must come from memory that you keep. Raises RingError
        when the host broke the ring, ClosedError when the queue is closed.
        """
        count = len(table.array if isinstance(table, Block) else table)
        received_here = count <= self.burst and table is self._bursts[count]
        address = self._received_address if received_here else _address_of(table)
        sent: int = kernels.transmit_burst(self._address, address, count)
        if sent < count:
            self._check()
            kernels.reap(self._address)
        return sent

    def receive(self, count: int | None = None) -> list[bytes]:
        """Copies of received frames, at most `count`: for convenience where a table of addresses is not worth it. Raises as `rx_burst`."""
        return [ctypes.string_at(address, size) for address, size, _, _ in self.rx_burst(count).tolist()]

    def send(self, frames: Sequence[bytes]) -> int:
        """Send frames given as bytes, Ethernet header first: for convenience, as `receive`. How many there was room for."""
        if not frames:
            return 0
        sizes = np.array([len(frame) for frame in frames], np.int64)
        memory = Block(np.uint8, max(int(sizes.sum()), 1))
        memory.array[: sizes.sum()] = np.frombuffer(b"".join(frames), np.uint8)
        table = Block(FRAME, len(frames))
        table.array["address"] = memory.address + np.cumsum(sizes) - sizes
        table.array["size"] = sizes
        return self.tx_burst(table)

    @property
    def unanswered(self) -> int:
        """Transfers that the host has not answered yet: their frames may still be on this side. Answers stand behind received frames."""
        state = self._state
        return state["send_sections"] - state["free_count"] + state["pool_slots"] - state["pool_free_count"]

    def wait(self, seconds: float) -> bool:
        """Sleep until the host has something for this queue, at most `seconds`. True when there is something."""
        deadline = time.monotonic() + seconds
        while True:
            if kernels.arm(self.address, 1):
                break
            left = deadline - time.monotonic()
            if left <= 0 or not self.channel.wait(left):
                kernels.arm(self.address, 0)
                return False
        kernels.arm(self.address, 0)
        return True

    def take_mail(self) -> list[bytes]:
        """RNDIS control messages that came between frames."""
        found = []
        while self._state["mail_taken"] < self._state["mail_put"]:
            start = (self._state["mail_taken"] % MAIL_SLOTS) * MAIL_SLOT
            slot = self._mail[start : start + MAIL_SLOT]
            size = int.from_bytes(slot[:8].tobytes(), "little")
            found.append(slot[8 : 8 + size].tobytes())
            self._state["mail_taken"] += 1
        return found

    def take_control(self) -> Packet | None:
        """The packet at the ring's head, if it is one for Python. Raises RingError, ProtocolError."""
        if not self._state["attention"]:
            return None
        self._check()
        self._state["attention"] = 0
        with self._sensible():
            return self.channel.incoming.receive()

    def send_packet(self, packet: Packet) -> bool:
        """A packet of Python's; False where there is no room. Raises RingError, UsageError."""
        with self._sensible():
            return self.channel.outgoing.send_packet(packet)

    def note_bad_completion(self) -> None:
        """Count a completion that nothing was waiting for."""
        self._state["bad_completions"] += 1

    def take_slot(self, data: bytes) -> tuple[int, tuple[PageRange, ...]] | None:
        """Put a control message into a free slot, now the host's: its transaction and pages. None while there is none."""
        slot_size = self._state["pool_slot"]
        if len(data) > slot_size:
            raise UsageError(f"control message of {len(data)} bytes, limit {slot_size}")
        if self._state["pool_free_count"] == 0:
            return None
        self._state["pool_free_count"] -= 1
        slot = int(self._tables["pool_free"].array[self._state["pool_free_count"]])
        ctypes.memmove(self._state["pool"] + slot * slot_size, data, len(data))
        transaction = self._state["send_sections"] + slot
        self._tables["busy"].array[transaction] = 1
        first = (self._state["pool_iova"] + slot * slot_size) // PAGE_SIZE
        return transaction, (PageRange(len(data), 0, tuple(range(first, first + pages_spanned(len(data), 0)))),)

    def close(self) -> None:
        """Before the memory goes: whatever is called on this queue from now on finds two ended rings and no buffers."""
        dead = self._table("dead", RING, 1)
        self._tables["dead"].array["broken"] = BAD_MOVE
        self._tables["dead"].array["control"] = self._table("dead control page", np.uint8, PAGE_SIZE)
        for name, value in {"incoming": dead, "outgoing": dead, "open": -1, "attention": 1}.items():
            self._state[name] = value
        for name in ("free_count", "pool_free_count", "done_count", "receive_size"):
            self._state[name] = 0
        self._closed = True

    def _check(self) -> None:
        """Raise RingError when the host broke a ring, ClosedError after `close`."""
        if self._closed:
            raise ClosedError(f"channel {self.channel.relid}: its queue is closed")
        with self._sensible():
            self.channel.incoming.check()
            self.channel.outgoing.check()

    @contextmanager
    def _sensible(self) -> Iterator[None]:
        """Rings of a card that is gone may hold nothing that makes sense; what counts then is that it is gone."""
        try:
            yield
        except RingError:
            self._check_card()
            raise

    def counters(self) -> Counters:
        """The counters now."""
        return Counters(**{field.name: self._state[field.name] for field in fields(Counters)})

    def last_rule(self) -> str:
        """The RNDIS rule that the host broke last, or ""."""
        return MESSAGE_RULES.get(self._state["last_rule"], "")

    @property
    def _mail(self) -> NDArray[np.uint8]:
        return self._tables["mail"].array

    def _table(self, name: str, dtype: object, count: int, values: object = None) -> int:
        """Private memory that the record points at under `name`."""
        block = self._tables[name] = Block(dtype, count)
        if values is not None:
            block.array[:] = values
        return block.address
