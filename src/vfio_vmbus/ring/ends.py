"""The two ends of a ring as Python objects, over a mapping of a control page and a data area that is mapped twice in a row.

One thread at a time uses an end. Its `address` is what bigger kernels get: the RING record (`state`), which these objects own;
whoever runs a kernel on it does not call the methods meanwhile. Full and empty are answers (False, None, 0), not errors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np

from ..errors import ClosedError, RingError, UsageError
from ..memory.block import Block
from ..memory.mapping import PAGE, Mapping
from ..memory.signal import signal_record
from ..wire.gpa import PageRange
from ..wire.ring import PACKET_ALIGNMENT, PACKET_GPA_DIRECT, PACKET_INBAND, Packet, parse_packet
from . import bursts
from .bursts import PACKET
from .primitives import FOOTER, READ_INDEX, WRITE_INDEX, packet_length
from .state import BAD_INDEX, RING, RULES

_INDEX = struct.Struct("<I")


class Memory(Protocol):
    """What bursts are sent from and received into: a Block, a Mapping, an Area."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Area:
    """`size` bytes at `address`, which somebody else keeps mapped."""

    address: int
    size: int


@dataclass(frozen=True)
class RingStatistics:
    """What passed through one end: packets, bytes with descriptors and footers, signals given, and sends that found no room."""

    packets: int
    bytes: int
    signals: int
    full: int


class _End:
    """What both ends have: the record, its memory (`data`: the data area, twice), the rule that the other side broke."""

    def __init__(self, mapping: Mapping, doorbell: int, name: str, own_index: int) -> None:
        size = mapping.size - PAGE
        if size < PAGE or size % PAGE:
            raise UsageError(f"{name}: a ring of {mapping.size} bytes; it is a control page and whole pages of {PAGE} bytes")
        if mapping.wrap_from != PAGE:
            raise UsageError(f"{name}: map the ring with wrap_from={PAGE}, its data area twice in a row")
        self.name = name
        self.mapping = mapping
        self.size = size
        self._signal = signal_record()
        self._state = Block(RING)
        self.data = Area(mapping.address + PAGE, 2 * size)
        (index,) = _INDEX.unpack(mapping.read(own_index, 4))
        for field, value in {
            "control": mapping.address,
            "data": self.data.address,
            "size": size,
            "index": index,
            "shown": index,
            "doorbell": doorbell,
            "signal": self._signal.address,
        }.items():
            self._state[field] = value
        if index >= size or index % 8:
            self._fail(BAD_INDEX, index, size)

    @property
    def address(self) -> int:
        """Address of the RING record, for kernels. Raises ClosedError when the ring's memory is unmapped."""
        if self.mapping.closed:
            raise ClosedError(f"{self.name}: its memory is unmapped")
        return self._state.address

    @property
    def shown(self) -> int:
        """This end's index, in bytes, as the other side is shown it."""
        return self._state["shown"]

    def lead_to(self, doorbell: int) -> None:
        """Signal another eventfd from now on; -1: none. Kernels may be running on the ring."""
        self._state["doorbell"] = doorbell

    @property
    def broken(self) -> bool:
        """Has the other side broken a rule? Then nothing passes through this end any more."""
        return self._state["broken"] != 0

    def check(self) -> None:
        """Raise RingError when the other side has broken a rule."""
        if self.broken:
            self._fail(self._state["broken"], self._state["bad_value"], self._state["bad_limit"])

    def _fail(self, rule: int, value: int, limit: int) -> NoReturn:
        raise RingError(f"{self.name}: {RULES[rule]}: {value} bytes, limit {limit} bytes")

    def statistics(self) -> RingStatistics:
        """Counters of this end since it was made."""
        state = self._state
        return RingStatistics(state["packets"], state["bytes"], state["signals"], state["full"])


def _rows(table: Block, count: int | None) -> int:
    """How many rows of a table a burst may use."""
    if table.array.dtype != PACKET:
        raise UsageError(f"a burst needs a Block of PACKET rows, not of {table.array.dtype}")
    rows = len(table.array)
    if count is not None and not 0 <= count <= rows:
        raise UsageError(f"a burst of {count} packets; this table has {rows} rows")
    return rows if count is None else count


class OutgoingRing(_End):
    """The writer's end.

    mapping: control page and data area (a whole number of 4096-byte pages) with wrap_from=4096; it stays its
    maker's, who closes it after the last use of this end. doorbell: eventfd that signals the other side, or -1.
    Raises UsageError for a mapping that is no ring, RingError when the write index in the control page cannot be.
    """

    def __init__(self, mapping: Mapping, doorbell: int = -1, name: str = "outgoing ring") -> None:
        super().__init__(mapping, doorbell, name, WRITE_INDEX)

    @property
    def room(self) -> int:
        """Bytes free now; a packet fits when it takes less: descriptor, data padded to 8, and 8 more. Raises RingError."""
        free: int = bursts.room(self.address)
        self.check()
        return free

    def want(self, size: int) -> int:
        """Ask for a signal once more than `size` bytes are free (0: no more); the bytes free now. Raises RingError.

        Look at the answer before sleeping: what came free before the request gives no signal.
        """
        if not 0 <= size < self.size:
            raise UsageError(f"{self.name}: a signal at {size} bytes free; take 0..{self.size - 1}")
        free: int = bursts.want(self.address, size)
        self.check()
        return free

    def send(
        self, payload: bytes, *, packet_type: int = PACKET_INBAND, transaction_id: int = 0, completion_requested: bool = False
    ) -> bool:
        """Send a packet without lists, as `send_packet`. For control messages; data goes in bursts."""
        return self.send_packet(
            Packet(
                packet_type=packet_type,
                transaction_id=transaction_id,
                completion_requested=completion_requested,
                payload=payload,
            )
        )

    def send_gpa_direct(self, pages: Iterable[PageRange], payload: bytes = b"", *, transaction_id: int = 0) -> bool:
        """Send a packet whose further data lies in guest pages, and ask for its completion; as `send_packet`."""
        return self.send_packet(
            Packet(
                packet_type=PACKET_GPA_DIRECT,
                transaction_id=transaction_id,
                completion_requested=True,
                pages=tuple(pages),
                payload=payload,
            )
        )

    def send_packet(self, packet: Packet) -> bool:
        """Send any packet and show it at once; False when there is no room.

        Raises UsageError for a packet that can never pass, RingError when the reader broke a rule.
        """
        return self.send_raw(packet.pack())

    def send_raw(self, packed: bytes) -> bool:
        """Send a packet that is laid out already, descriptor included: a multiple of 8 bytes. As `send_packet`.

        What it says of itself is not looked at, so who wants to can send nonsense.
        """
        if len(packed) + FOOTER >= self.size:
            limit = self.size - FOOTER - PACKET_ALIGNMENT
            raise UsageError(f"{self.name}: a packet of {len(packed)} bytes, this ring's limit is {limit} bytes")
        staged = Block("u1", len(packed))
        staged.array[:] = np.frombuffer(packed, np.uint8)
        sent = bursts.send_packet(self.address, staged.address, len(packed))
        self.check()
        return bool(sent)

    def signal(self) -> None:
        """Signal the other side, whether it needs to know or not."""
        bursts.ring_doorbell(self.address)

    def send_burst(self, memory: Memory, table: Block, count: int | None = None) -> int:
        """Send `count` rows (all by default) of a Block of PACKET rows out of `memory`; how many there was room for.

        Raises UsageError for a row that is outside the memory or no packet (those before it are sent), RingError when the reader
        broke a rule.
        """
        count = _rows(table, count)
        sent: int = bursts.send_burst(self.address, memory.address, memory.size, table.address, count)
        if sent < 0:
            row = table.array[-sent - 1]
            raise UsageError(f"{self.name}: row {-sent - 1} is no packet within {memory.size} bytes of memory: {row}")
        self.check()
        return sent


class IncomingRing(_End):
    """The reader's end. Arguments and errors as for OutgoingRing; here it is the read index that is taken over."""

    def __init__(self, mapping: Mapping, doorbell: int = -1, name: str = "incoming ring") -> None:
        super().__init__(mapping, doorbell, name, READ_INDEX)

    def receive(self) -> Packet | None:
        """The next packet, copied, its space given back; None when there is none.

        What is still held in place is given back, too. Raises RingError when the writer broke a rule, and
        ProtocolError for a packet whose lists do not add up: that one is skipped, and the ring goes on.
        """
        raw = self.receive_raw()
        return None if raw is None else parse_packet(raw)

    def receive_raw(self) -> bytearray | None:
        """The next packet as it is laid out, descriptor included, copied, its space given back; None when there is none.

        Its descriptor is sound, its lists may not be. Raises RingError when the writer broke a rule.
        """
        header = bursts.next_header(self.address)
        self.check()
        if header == 0:
            return None
        copy = bytearray(self.mapping.read(PAGE + self._state["index"], packet_length(header)))
        copy[:8] = header.to_bytes(8, "little")  # as checked; the writer may have changed it since
        bursts.finish(self.address, header)
        return copy

    def receive_burst(self, memory: Memory, table: Block, count: int | None = None) -> int:
        """Copy up to `count` packets (by default as many as the table, a Block of PACKET rows, has) into `memory`; how many.

        Packets before a broken rule are delivered, the next call raises RingError. Raises UsageError when `memory`
        cannot hold the next packet.
        """
        count = _rows(table, count)
        received: int = bursts.receive_burst(self.address, memory.address, memory.size, table.address, count)
        if received == 0 and count:
            self.check()
            if self._state["room"]:
                raise UsageError(f"{self.name}: the next packet is longer than {memory.size} bytes of memory")
        return received

    def receive_in_place(self, table: Block, count: int | None = None) -> int:
        """Note up to `count` packets where they lie in the data area (`self.data`); `commit` gives their space back; how many.

        The other side can change them meanwhile. Errors as for `receive_burst`.
        """
        received: int = bursts.receive_in_place(self.address, table.address, _rows(table, count))
        if received == 0:
            self.check()
        return received

    def commit(self) -> bool:
        """Give back the space of everything received in place; whether the writer was signalled. Raises RingError."""
        signalled = bursts.commit(self.address)
        self.check()
        return bool(signalled)

    def mask(self) -> None:
        """Tell the writer that it need not signal."""
        bursts.mask(self.address, 1)

    def unmask(self) -> bool:
        """Let the writer signal again; is there something to read already? Then do not sleep. Raises RingError."""
        ready = bursts.mask(self.address, 0)
        self.check()
        return bool(ready)
