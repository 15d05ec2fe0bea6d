"""Whom the faults hit: seeded decisions, one after the other for each flow of each device, and the counts of what they did.

Decisions come from Python's Mersenne Twister, seeded by text, whose numbers are the same everywhere; a second one says how a thing is
corrupted or forged, so that this does not shift who is hit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .plan import Fault, FaultPlan, Flow


@dataclass(frozen=True)
class FaultCount:
    """What a fault has done. device: its name; messages are counted under those of all of a client's devices, joined by "+". flow: in
    the words of `Flow`. seen: events that it could have hit. hits: those that it did."""

    device: str
    flow: str
    kind: str
    fault: str
    seen: int
    hits: int


class Stream:
    """One fault on one flow of one device."""

    def __init__(self, fault: Fault, position: int, device: str, flow: Flow, seed: int) -> None:
        self.fault = fault
        self.device = device
        self.flow = flow
        self.seen = 0
        self.hits = 0
        key = f"{seed} {position} {device} {flow.value}"
        self._which = random.Random(f"{key} which")
        self.how = random.Random(f"{key} how")
        """For who needs to know more than that something is hit."""

    def due(self) -> bool:
        """Is the next event hit? Who lets it be says so by `hit`."""
        number, fault = self.seen, self.fault
        self.seen += 1
        chosen = self._which.random() < fault.rate  # drawn in any case: `after` and `times` choose among the same ones
        return chosen and number >= fault.after and (fault.times is None or self.hits < fault.times)

    def hit(self) -> None:
        """Count it."""
        self.hits += 1

    def count(self) -> FaultCount:
        return FaultCount(self.device, self.flow.value, self.fault.kind, str(self.fault), self.seen, self.hits)


@dataclass(frozen=True)
class Fate:
    """What becomes of one event. delay: seconds. corrupt: who says which bits. A dropped one has no other fate."""

    drop: bool = False
    copies: int = 1
    delay: Stream | None = None
    corrupt: tuple[Stream, ...] = ()


UNHARMED = Fate()


class Gate:
    """All faults on one flow of one device."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = tuple(streams)

    def judge(self) -> Fate:
        """The fate of the next event. The longest delay counts; each duplicate adds a copy. All but a delay are counted here: whether there
        is room to hold something back, its passage knows."""
        due = [stream for stream in self.streams if stream.due()]  # all draw: none depends on what others do
        if not due:
            return UNHARMED
        by_kind = {
            kind: [stream for stream in due if stream.fault.kind == kind] for kind in ("drop", "duplicate", "corrupt", "delay")
        }
        if by_kind["drop"]:
            by_kind["drop"][0].hit()
            return Fate(drop=True)
        for stream in (*by_kind["duplicate"], *by_kind["corrupt"]):
            stream.hit()
        longest = max(by_kind["delay"], key=lambda stream: stream.fault.delay, default=None)
        return Fate(copies=1 + len(by_kind["duplicate"]), delay=longest, corrupt=tuple(by_kind["corrupt"]))


class Desk:
    """Hands out the gates of a host's devices, and keeps their counts for as long as the host lives: a channel that opens again goes on
    where it was."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self._streams: dict[tuple[str, Flow], tuple[Stream, ...]] = {}

    def streams(self, device: str, flow: Flow) -> tuple[Stream, ...]:
        """The faults on this flow, in the order in which they were ordered."""
        key = (device, flow)
        if key not in self._streams:
            self._streams[key] = tuple(
                Stream(fault, position, device, flow, self.plan.seed)
                for position, fault in enumerate(self.plan.faults)
                if flow in fault.flows
            )
        return self._streams[key]

    def gate(self, device: str, flow: Flow) -> Gate:
        return Gate(self.streams(device, flow))

    def touches(self, device: str, *flows: Flow) -> bool:
        """Is anything ordered for one of these?"""
        return any(self.streams(device, flow) for flow in flows)

    def counts(self) -> list[FaultCount]:
        """What all faults have done so far."""
        return [stream.count() for streams in self._streams.values() for stream in streams]
