"""Fuzz target of the embedded card's data plane: bytes become packets of a guest, contents of its memory, and frames for it.

The host's worker stands still; its kernels run here, one call at a time. With NUMBA_DISABLE_JIT=1 an access outside of registered
memory raises at once.
"""

from __future__ import annotations

import atexit
import struct
from contextlib import ExitStack

from tests.fuzz.streams import Ended, Stream
from tests.netvsp.card import MAC, Card, card
from vfio_vmbus.host.netvsp.state import STAGE_SLOT, STAGE_SLOTS
from vfio_vmbus.iommu.translation import READ
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.attacker import marked_message
from vfio_vmbus.wire import nvsp
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND

_GOOD = marked_message(bytes(6), size=60)

SEEDS = [
    bytes([0, 0, 0, 104, 0, 0]),
    bytes([0, 1, 0, 104, 2, 4, 0, 104, 0, 8, 0, 36, 1]) * 3,
    bytes([1, 2, 40, 0, 0, 0, 1, 64, 0, 8, 0, 2, 5, 5, 0]),
    bytes([2, 0, 2, 7, 0, 16]) + bytes(16) + bytes([3, 1, 0, 0, 0, 0, 0, 0, 0]),
    bytes([4, 9, 60, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4, 200, 5, 3, 1]),
]


class _Rig:
    """A card that is used for many runs, and made anew when a guest got it closed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._card: Card | None = None
        atexit.register(self._stack.close)

    def get(self) -> Card:
        if self._card is None or self._card.nic.port is None:
            self._stack.close()
            self._card = self._stack.enter_context(
                card(ring_pages=3, receive_buffer=40 * 1792, send_buffer=8 * 6144, patience=0.0)
            )
        return self._card


_RIG = _Rig()


def fuzz_netvsp(data: bytes) -> None:
    """Whatever a guest sends, frames come out of what it may send from only, sections are never lost, and the card goes on or is closed."""
    rig = _RIG.get()
    stream = Stream(data)
    try:
        while rig.nic.port is not None:
            _step(rig, stream)
    except Ended:
        pass
    if rig.nic.port is not None:
        _check(rig)


def _step(rig: Card, stream: Stream) -> None:
    choice = stream.number() % 6
    guest = rig.guest
    if choice == 0:
        index = stream.pick(0, 1, 7, 8) if stream.number() & 1 else 0
        guest.fill_section(index % 8, _message(stream))
        guest.in_section(index, stream.pick(len(_GOOD), 2 * len(_GOOD), 6144))
    elif choice == 1:
        words: list[int] = []
        ranges = stream.number() % 5
        rig.pages.mapping.write(0, _message(stream))
        for _ in range(ranges):
            words += [stream.pick(len(_GOOD), 40, PAGE) | stream.pick(0, 8, PAGE - 40) << 32]
            words += [_page(rig, stream) for _ in range(stream.number() % 4)]
        guest.pages(words, ranges=stream.pick(ranges, 1), section=(stream.pick(0, nvsp.NO_SECTION), stream.number()))
    elif choice == 2:
        kind = (PACKET_INBAND, PACKET_GPA_DIRECT, PACKET_COMPLETION, stream.number())[stream.number() % 4]
        body = stream.bytes(8 * (stream.number() % 9))
        head = nvsp.encode_message(nvsp.SendRndisPacket(section_index=0, section_size=len(_GOOD)))[: 8 * (stream.number() % 6)]
        guest.post(guest.packet(kind, payload=head + body, offset8=2 + stream.number() % 4, flags=stream.number() & 1))
    elif choice == 3:
        guest.complete(stream.number() if stream.number() & 1 else stream.number(8))
    elif choice == 4:
        size = 14 + stream.number(2) % 1505
        rig.deliver([(MAC + struct.pack("<HI", 2, 0) + bytes(size - 12), stream.number() & 3)] * (1 + stream.number() % 70))
    else:
        _check(rig)


def _message(stream: Stream) -> bytes:
    """Two good messages with some bytes changed."""
    data = bytearray(2 * _GOOD)
    for _ in range(stream.number() % 4):
        at = stream.number() % (len(data) - 4)
        data[at : at + 4] = struct.pack("<I", stream.pick(0, 8, 36, len(_GOOD), 1 << 31, (1 << 32) - 1))
    return bytes(data)


def _page(rig: Card, stream: Stream) -> int:
    own = rig.pages.pfns
    choices = (own[0], own[1], own[-1] + 1, rig.guest.deaf.pfns[0], 1 << 51, own[0] + (1 << 52), (1 << 64) - 1)
    return choices[stream.number() % len(choices)]


def _check(rig: Card) -> None:
    """Let the host take everything, and look at where its frames lie."""
    record = rig.record
    domain = rig.host.connection(rig.function).domain
    allowed = [(entry.address, entry.size) for entry in domain.maps if entry.access & READ]
    allowed += [(int(record["send"]), int(record["send_sections"]) * int(record["send_section"]))]
    allowed += [(int(record["stage"]), STAGE_SLOTS * STAGE_SLOT)]
    for address, size, _ in rig.rows():
        assert 14 <= size <= 1522
        assert any(start <= address and address + size <= start + length for start, length in allowed), "a frame from nowhere"
    rig.let_the_control_plane_work()
    if rig.nic.port is None:
        return
    rig.guest.take_answers()
    for _ in range(3):
        list(rig.rows())
        rig.guest.take_answers()
    assert 0 <= record["free_count"] <= record["receive_sections"]
    assert 0 <= record["pending_count"] <= 256
