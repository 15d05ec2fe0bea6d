"""One flow of messages, packets or interrupts on its way through its faults: lost, late, twice, with a bit turned round."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .fate import UNHARMED, Gate, Stream

MAX_HELD = 1000
"""Things that one passage holds back at a time (tc-netem's default as well); what is to be late beyond that is not, nor counted."""


class Passage:
    """Leads what is put into it to `deliver`, at once or later, on the loop that made it.

    What is late is overtaken by what comes behind it. spared: bytes at the front of a thing that are not corrupted. gap: seconds between
    the copies of one. kick: called when something came out later.
    """

    def __init__(
        self,
        gate: Gate,
        deliver: Callable[[bytes], None],
        *,
        spared: int = 0,
        gap: float = 0.0,
        kick: Callable[[], None] = lambda: None,
    ) -> None:
        self._gate = gate
        self._deliver = deliver
        self._spared = spared
        self._gap = gap
        self._kick = kick
        self._loop = asyncio.get_running_loop()
        self._held: dict[int, asyncio.TimerHandle] = {}
        self._number = 0

    @property
    def held(self) -> int:
        """How many things are held back."""
        return len(self._held)

    @property
    def free(self) -> bool:
        """Is nothing ordered here?"""
        return not self._gate.streams

    def put(self, thing: bytes) -> None:
        """Send it on its way. It is a private copy: what its sender does to it afterwards changes nothing."""
        fate = self._gate.judge()
        if fate is UNHARMED:
            self._deliver(thing)
            return
        if fate.drop:
            return
        for stream in fate.corrupt:
            thing = self._corrupted(thing, stream)
        delay = 0.0
        if fate.delay is not None and len(self._held) + fate.copies <= MAX_HELD:
            fate.delay.hit()
            delay = fate.delay.fault.delay
        for copy in range(fate.copies):
            self._at(delay + copy * self._gap, thing)

    def close(self) -> None:
        """Let go of what is held back: whom it was for is gone."""
        for timer in self._held.values():
            timer.cancel()
        self._held.clear()

    def _corrupted(self, thing: bytes, stream: Stream) -> bytes:
        """With one bit turned round, if there is one behind what is spared."""
        bits = 8 * (len(thing) - self._spared)
        bit = 8 * self._spared + int(stream.how.random() * bits)
        if bits <= 0:
            return thing
        changed = bytearray(thing)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    def _at(self, delay: float, thing: bytes) -> None:
        if delay <= 0:
            self._deliver(thing)
            return
        self._number += 1
        self._held[self._number] = self._loop.call_later(delay, self._ripe, self._number, thing)

    def _ripe(self, number: int, thing: bytes) -> None:
        del self._held[number]
        self._deliver(thing)
        self._kick()
