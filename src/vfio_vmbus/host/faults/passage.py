"""One flow of messages, packets or interrupts on its way through its faults: lost, late, twice, with a bit turned round."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable

from .fate import Gate, Stream

_CLOCK_SECONDS = 1e-6
"""The loop may call a little early: by its clock's resolution."""

MAX_HELD = 1000
"""Things that one passage holds back at a time, which is tc-netem's default as well."""


class Passage:
    """Leads what is put into it to `deliver`, at once or later, on the loop that made it.

    in_order: what comes behind something late waits for it; else it overtakes it. spared: bytes at the front of a thing that are not
    corrupted. gap: seconds between the copies of one. dropped: is told of what is lost. kick: called when something came out later.

    When it holds as much as it may, nothing more is late: then a thing passes at once, or, in order, all that was held with it.
    """

    def __init__(
        self,
        gate: Gate,
        deliver: Callable[[bytes], None],
        *,
        in_order: bool = False,
        spared: int = 0,
        gap: float = 0.0,
        dropped: Callable[[bytes], None] = lambda thing: None,
        kick: Callable[[], None] = lambda: None,
    ) -> None:
        self._gate = gate
        self._deliver = deliver
        self._in_order = in_order
        self._spared = spared
        self._gap = gap
        self._dropped = dropped
        self._kick = kick
        self._loop = asyncio.get_running_loop()
        self._held: list[tuple[float, int, bytes]] = []
        """A heap: when it is due, its number, the thing."""
        self._number = 0
        self._last = 0.0
        """When what was put in last is due, if order is kept."""
        self._timer: asyncio.TimerHandle | None = None

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
        if fate.drop:
            self._dropped(thing)
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
        self._held.clear()
        self._set_timer()

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
        if self._in_order and len(self._held) >= MAX_HELD:
            self._release(math.inf)
        waits = delay > 0 or (self._in_order and self._held)
        if not waits or len(self._held) >= MAX_HELD:
            self._deliver(thing)
            return
        due = self._loop.time() + delay
        if self._in_order:
            due = self._last = max(due, self._last)
        self._number += 1
        heapq.heappush(self._held, (due, self._number, thing))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._held[0][0], self._ripe) if self._held else None

    def _ripe(self) -> None:
        self._timer = None
        self._release(self._loop.time() + _CLOCK_SECONDS)
        self._set_timer()
        self._kick()

    def _release(self, until: float) -> None:
        while self._held and self._held[0][0] <= until:
            self._deliver(heapq.heappop(self._held)[2])
