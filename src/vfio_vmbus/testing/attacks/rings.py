"""Rings whose indices and packet headers contradict themselves."""

from __future__ import annotations

from collections.abc import Callable

from ...ring.primitives import READ_INDEX, WRITE_INDEX
from ...wire import nvsp
from ...wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND
from ..attacker import WHOLE, Attack, Attacker, Outcome, marked_message

_ANSWER = 64
"""Bytes of a completion in the ring."""


def _write_index(value: Callable[[int], int]) -> Callable[[Attacker], Outcome]:
    """Forge the index of what was written; `value` gets the ring's size."""

    def run(attacker: Attacker) -> Outcome:
        attacker.forge(WRITE_INDEX, value(attacker.channel.outgoing.size), outgoing=True)
        return attacker.outcome()

    return run


def _read_index(value: Callable[[int], int]) -> Callable[[Attacker], Outcome]:
    """Forge the index of what was read, then ask for more answers than fit into the ring before its writer looks at the index."""

    def run(attacker: Attacker) -> Outcome:
        size = attacker.channel.incoming.size
        attacker.listening = False  # reading would put the index right again
        attacker.fill_section(0, marked_message(attacker.mac, attacker.mac))
        attacker.forge(READ_INDEX, value(size), outgoing=False)
        for _ in range(size // _ANSWER + 1):
            if attacker.gone() or not attacker.in_section(0, WHOLE):
                break
        return attacker.outcome()

    return run


def backwards(attacker: Attacker) -> Outcome:
    """A write index behind what the host has read: nearly a whole ring of stale packets."""
    attacker.say(marked_message(attacker.mac, attacker.mac))
    attacker.outcome()
    attacker.forge(WRITE_INDEX, 0, outgoing=True)
    return attacker.outcome()


def _header(
    *, offset8: int | None = None, length8: int | None = None, kind: int = PACKET_INBAND
) -> Callable[[Attacker], Outcome]:
    """A data packet with this in its header."""

    def run(attacker: Attacker) -> Outcome:
        attacker.fill_section(0, attacker.trap.mapping.read(0, WHOLE))
        payload = nvsp.encode_message(nvsp.SendRndisPacket(section_index=0, section_size=WHOLE))
        attacker.post(attacker.packet(kind, payload=payload, offset8=offset8, length8=length8))
        return attacker.outcome()

    return run


def unknown_types(attacker: Attacker) -> Outcome:
    for kind in (0, 1, 7, 8, 12, 0x7FFF, 0xFFFF):
        attacker.post(attacker.packet(kind, payload=nvsp.encode_message(nvsp.SendRndisPacket())))
    return attacker.outcome()


RINGS = (
    Attack("ring/write-beyond", "a write index at the ring's end", _write_index(lambda size: size)),
    Attack("ring/write-huge", "a write index of 4 GiB", _write_index(lambda size: 0xFFFFFFF8)),
    Attack("ring/write-odd", "a write index that is no multiple of 8", _write_index(lambda size: 12)),
    Attack("ring/read-beyond", "a read index at the ring's end", _read_index(lambda size: size)),
    Attack("ring/read-huge", "a read index of 2 GiB", _read_index(lambda size: 1 << 31)),
    Attack("ring/read-odd", "a read index that is no multiple of 8", _read_index(lambda size: 7)),
    Attack("ring/backwards", "a write index that moves backwards", backwards),
    Attack("header/no-length", "a packet of length 0", _header(length8=0)),
    Attack("header/short", "a packet shorter than its header", _header(length8=1)),
    Attack("header/long", "a packet longer than what is in the ring", _header(length8=500)),
    Attack("header/longest", "a packet longer than the ring", _header(length8=0xFFFF)),
    Attack("header/offset", "data behind the packet's end", _header(offset8=0xFFFF)),
    Attack("header/in-header", "data inside the packet's header", _header(offset8=1)),
    Attack("header/no-list", "a GPA-direct packet without a list", _header(kind=PACKET_GPA_DIRECT)),
    Attack("header/tiny-completion", "a completion without contents", _header(kind=PACKET_COMPLETION, length8=2)),
    Attack("header/types", "packet types that no card knows", unknown_types),
)
