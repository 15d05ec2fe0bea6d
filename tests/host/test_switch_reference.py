"""The switch against a switch in plain Python: the same frames at the same ports, in the same order, counted alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from switch_rig import BROADCAST, Station, bind, close_all, frame, mac, step

from vfio_vmbus.host.switch.port import Counters
from vfio_vmbus.host.switch.switch import Switch
from vfio_vmbus.memory.kernel import INTERPRETED

PORTS = 4
MAX_FRAMES = [9216, 100, 64, 9216]
"""Bytes of the longest frame at each port."""
BOUND = 3
"""The port that may only send from its own address."""
AGE = 300 * 10**9
MULTICAST = bytes.fromhex("01005e000001")
RESERVED = bytes.fromhex("0180c200000e")
STATIONS = [mac(number) for number in range(5)]
OWN = STATIONS[0]
START = 10**12


@dataclass
class Reference:
    """A learning switch, frame by frame."""

    now: int = START
    known: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    out: list[list[bytes]] = field(default_factory=lambda: [[] for _ in range(PORTS)])
    counts: list[dict[str, int]] = field(
        default_factory=lambda: [dict.fromkeys(Counters.__dataclass_fields__, 0) for _ in range(PORTS)]
    )

    def count(self, port: int, direction: str, size: int) -> None:
        self.counts[port][f"{direction}_frames"] += 1
        self.counts[port][f"{direction}_bytes"] += size

    def send(self, port: int, data: bytes) -> None:
        self.count(port, "rx", min(len(data), (MAX_FRAMES[port] // 64 + 1) * 64))  # no more than that is read of a frame
        targets = self.targets(port, data)
        if isinstance(targets, str):
            self.counts[port][targets] += 1
            return
        for target in targets:
            if len(data) > MAX_FRAMES[target]:
                self.counts[target]["too_long"] += 1
            else:
                self.count(target, "tx", len(data))
                self.out[target].append(data)

    def targets(self, port: int, data: bytes) -> list[int] | str:
        if len(data) < 14:
            return "too_short"
        if len(data) > MAX_FRAMES[port]:
            return "too_long"
        destination, source = data[:6], data[6:12]
        if port == BOUND and source != OWN:
            return "spoofed"
        if source[0] & 1 or not any(source):
            return "filtered"
        if source != OWN:
            self.known[source] = (port, self.now)
        if destination[:5] == RESERVED[:5] and destination[5] < 16:
            return "filtered"
        where, seen = (BOUND, self.now) if destination == OWN else self.known.get(destination, (-1, 0))
        if destination[0] & 1 or where < 0 or self.now - seen > AGE:
            return [target for target in range(PORTS) if target != port]
        return "filtered" if where == port else [where]


addresses = st.sampled_from([*STATIONS, BROADCAST, MULTICAST, RESERVED, bytes(6)])
sizes = st.sampled_from([60, 60, 60, 14, 13, 1, 64, 65, 100, 101, 300])
runs = st.lists(st.tuples(addresses, addresses, sizes, st.integers(1, 3)), max_size=8)
"""Runs of equal frames, as the switch treats those together."""
moves = st.tuples(st.sampled_from([0, 1, AGE // 2, AGE, AGE + 1]), st.lists(runs, min_size=PORTS, max_size=PORTS))
"""Time passes, then every port gets a burst."""


@settings(max_examples=25 if INTERPRETED else 100, deadline=None)
@given(st.lists(moves, max_size=4 if INTERPRETED else 6))
def test_like_the_reference(story: list[tuple[int, list[list[tuple[bytes, bytes, int, int]]]]]) -> None:
    reference = Reference()
    switch = Switch(age_s=AGE / 1e9)
    stations = [Station(switch, f"port{index}", max_frame=limit) for index, limit in enumerate(MAX_FRAMES)]
    mark = 0
    try:
        bind(switch, stations[BOUND].port, OWN)
        for wait, bursts in story:
            reference.now += wait
            for port, burst in enumerate(bursts):
                for destination, source, size, repeat in burst:
                    for _ in range(repeat):
                        mark += 1
                        data = frame(source, destination, size, mark)
                        stations[port].send(data)
                        reference.send(port, data)
            step(switch, reference.now)
            assert [station.received() for station in stations] == reference.out
            reference.out = [[] for _ in range(PORTS)]
        assert [vars(station.port.counters()) for station in stations] == reference.counts
        known = {entry.mac: entry.port for entry in switch.fdb(reference.now)}
        fresh = {at: f"port{port}" for at, (port, seen) in reference.known.items() if reference.now - seen <= AGE}
        assert known == fresh | {OWN: f"port{BOUND}"}
    finally:
        close_all(switch, stations)
