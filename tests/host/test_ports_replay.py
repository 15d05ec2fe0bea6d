"""The replay port: the frames of a file, in order, as fast as possible or each at its time, on a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dpkt
import pytest
from switch_rig import Station, close_all, eventually, frame, mac, step

from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.switch.switch import Switch

A, B = mac(1), mac(2)
MS = 1_000_000
START = 10**12


@pytest.fixture
def switch() -> Iterator[Switch]:
    switch = Switch()
    yield switch
    switch.close()


def write(path: Path, *times: float, first: int = 0) -> list[bytes]:
    """A file with a frame for each of the times, in seconds; the frames."""
    frames = [frame(A, B, 60 + number % 9, first + number) for number in range(len(times))]
    with open(path, "wb") as file:
        writer = dpkt.pcap.Writer(file, nano=True)
        for moment, data in zip(times, frames, strict=True):
            writer.writepkt_time(data, moment)
    return frames


def counts_over_time(switch: Switch, station: Station, *milliseconds: float) -> list[int]:
    """How many frames have come by each of the moments, from START."""
    total, counts = 0, []
    for moment in milliseconds:
        step(switch, START + int(moment * MS))
        total += len(station.received())
        counts.append(total)
    return counts


@pytest.mark.parametrize("loops", [1, 3])
def test_as_fast_as_possible(switch: Switch, tmp_path: Path, loops: int) -> None:
    frames = write(tmp_path / "x.pcap", *range(30))
    station = Station(switch)
    replay = switch.add_replay(tmp_path / "x.pcap", loops=loops)
    assert step(switch) == 30 * loops
    assert station.received() == frames * loops
    assert replay.done
    assert (replay.counters().rx_frames, replay.counters().dropped) == (30 * loops, 0)
    close_all(switch, [station])


def test_at_the_recorded_pace(switch: Switch, tmp_path: Path) -> None:
    write(tmp_path / "x.pcap", 5.0, 5.0, 5.010, 5.040)
    station = Station(switch)
    replay = switch.add_replay(tmp_path / "x.pcap", pace="recorded", loops=2)
    seen = counts_over_time(switch, station, 0, 9, 10, 39, 40, 53, 54, 63, 64, 93, 94, 1000)
    assert seen == [2, 2, 3, 3, 4, 4, 6, 6, 7, 7, 8, 8], "the second pass begins a mean gap (40 ms / 3) after the first one's end"
    assert replay.done
    close_all(switch, [station])


def test_time_that_runs_back_in_a_file_stands_still(switch: Switch, tmp_path: Path) -> None:
    frames = write(tmp_path / "x.pcap", 5.0, 5.020, 3.0, 5.010, 5.030)
    station = Station(switch)
    switch.add_replay(tmp_path / "x.pcap", pace="recorded")
    step(switch, START)
    step(switch, START + 20 * MS)
    assert station.received() == frames[:4]
    step(switch, START + 30 * MS)
    assert station.received() == frames[4:]
    close_all(switch, [station])


def test_at_a_rate(switch: Switch, tmp_path: Path) -> None:
    write(tmp_path / "x.pcap", 0, 0, 1000)
    station = Station(switch)
    switch.add_replay(tmp_path / "x.pcap", pace=100, loops=None)
    assert counts_over_time(switch, station, 0, 9.9, 10, 49, 50, 100) == [1, 1, 2, 5, 6, 11]
    close_all(switch, [station])


def test_a_worker_that_sleeps_wakes_up_in_time_for_the_next_frame(tmp_path: Path) -> None:
    frames = write(tmp_path / "x.pcap", 1.0, 1.05, 1.1)
    with Switch(poll="interrupt") as switch:
        station = Station(switch)
        replay = switch.add_replay(tmp_path / "x.pcap", pace="recorded", enabled=False)
        begun = time.monotonic()
        replay.enabled = True
        assert [station.receive() for _ in frames] == frames
        assert time.monotonic() - begun >= 0.1
        eventually(lambda: replay.done, "the end")
        assert switch.worker.control["sleeps"] > 0
    station.close()


def test_pcapng_is_read_too(switch: Switch, tmp_path: Path) -> None:
    station = Station(switch)
    with open(tmp_path / "x.pcapng", "wb") as file:
        dpkt.pcapng.Writer(file).writepkts([(1.0, frame(A, B)), (1.01, frame(A, B, 14))])
    switch.add_replay(tmp_path / "x.pcapng", pace="recorded")
    assert counts_over_time(switch, station, 0, 9, 10.1) == [1, 1, 2]
    close_all(switch, [station])


def test_a_capture_can_be_replayed(switch: Switch, tmp_path: Path) -> None:
    left, right = Station(switch), Station(switch)
    capture = switch.add_capture(tmp_path / "x.pcap")
    frames = [frame(A, B, 60 + number, number) for number in range(10)]
    left.send(*frames)
    step(switch)
    switch.remove(capture)
    assert right.received() == frames
    switch.add_replay(tmp_path / "x.pcap")
    step(switch)
    assert right.received() == frames
    close_all(switch, [left, right])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pace": "slowly"}, "pace 'slowly': take 'recorded'"),
        ({"pace": 0}, "0 frames a second: take 0.001 to 1e9"),
        ({"pace": float("nan")}, "nan frames a second"),
        ({"loops": 0}, "replay 0 times: take 1 or more"),
    ],
)
def test_what_cannot_be_asked_of_a_replay(switch: Switch, tmp_path: Path, options: dict[str, object], message: str) -> None:
    write(tmp_path / "x.pcap", 1.0)
    with pytest.raises(UsageError, match=message):
        switch.add_replay(tmp_path / "x.pcap", **options)
    assert switch.ports == []


def test_a_pace_of_more_than_a_year_is_refused(switch: Switch, tmp_path: Path) -> None:
    write(tmp_path / "x.pcap", 1.0, 4e9)
    with pytest.raises(UsageError, match="recorded over 3999999999 s; at most 31622400 s"):
        switch.add_replay(tmp_path / "x.pcap", pace="recorded")
    station = Station(switch)
    switch.add_replay(tmp_path / "x.pcap")
    assert step(switch) == 2
    close_all(switch, [station])
