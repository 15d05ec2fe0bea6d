"""The capture port: every forwarded frame, once, as it was forwarded, in a file that others can read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import dpkt
import numpy as np
import pytest
from switch_rig import BROADCAST, Station, bind, close_all, eventually, frame, mac, step

from vfio_vmbus.errors import UnavailableError, UsageError
from vfio_vmbus.host.frames import FRAME, mac_value
from vfio_vmbus.host.switch.capture import capture_take
from vfio_vmbus.host.switch.capture_file import CaptureFile
from vfio_vmbus.host.switch.state import FILTERED, FLOOD, PORT
from vfio_vmbus.host.switch.switch import Switch
from vfio_vmbus.host.switch.template import udp_frame
from vfio_vmbus.memory.block import Block

A, B, C = mac(1), mac(2), mac(3)


@pytest.fixture
def switch() -> Iterator[Switch]:
    switch = Switch()
    yield switch
    switch.close()


def read(path: Path) -> list[tuple[float, bytes]]:
    with open(path, "rb") as file:
        return [(float(moment), data) for moment, data in dpkt.pcap.Reader(file)]


@pytest.mark.parametrize("nanoseconds", [True, False])
def test_all_that_is_forwarded_and_nothing_else(switch: Switch, tmp_path: Path, nanoseconds: bool) -> None:
    left, right = Station(switch), Station(switch)
    bind(switch, right.port, B)
    capture = switch.add_capture(tmp_path / "all.pcap", nanoseconds=nanoseconds)
    begun = time.time()
    good = [frame(A, BROADCAST, 60, 1), frame(A, B, 1514, 2), frame(A, B, 14, 3)]
    left.send(good[0], b"too short", good[1], good[2])
    right.send(frame(C, A, 60, 4), frame(B, A, 60, 5))  # the first is not from its own address
    step(switch)
    switch.remove(capture)
    records = read(tmp_path / "all.pcap")
    assert [data for _, data in records] == [*good, frame(B, A, 60, 5)]
    assert all(begun - 1 < moment < time.time() + 1 for moment, _ in records)
    counters = capture.counters()
    assert (counters.tx_frames, counters.tx_bytes, counters.no_room) == (4, 60 + 1514 + 14 + 60, 0)
    assert len(left.received()) == 1, "a capture is no station: nothing is flooded to it, nothing comes from it"
    close_all(switch, [left, right])


def test_snaplen_cuts_what_is_kept_and_tells_how_long_it_was(switch: Switch, tmp_path: Path) -> None:
    station = Station(switch)
    capture = switch.add_capture(tmp_path / "cut.pcap", snaplen=64)
    station.send(frame(A, B, 63), frame(A, B, 64), frame(A, B, 1500))
    step(switch)
    switch.remove(capture)
    data = (tmp_path / "cut.pcap").read_bytes()
    at, lengths = 24, []
    while at < len(data):
        header = dpkt.pcap.LEPktHdr(data[at : at + 16])
        lengths.append((header.caplen, header.len))
        at += 16 + header.caplen
    assert lengths == [(63, 63), (64, 64), (64, 1500)]
    assert read(tmp_path / "cut.pcap")[2][1] == frame(A, B, 1500)[:64]
    close_all(switch, [station])


def test_a_running_switch_writes_the_file_while_frames_come(tmp_path: Path) -> None:
    path = tmp_path / "running.pcap"
    with Switch() as switch:
        station = Station(switch)
        switch.add_capture(path)
        expected = []
        for number in range(5):
            expected.append(frame(A, B, 100, number))
            station.send(expected[-1])
            eventually(lambda: len(read_what_is_there(path)) == len(expected), "the frame in the file")
        assert [data for _, data in read(path)] == expected
    station.close()


def read_what_is_there(path: Path) -> list[tuple[float, bytes]]:
    return read(path) if path.stat().st_size > 24 else []


def test_around_the_ring_of_bytes_nothing_is_lost(switch: Switch, tmp_path: Path) -> None:
    """More bytes than the buffer has, in odd lengths, so that records lie across its end."""
    station = Station(switch)
    capture = switch.add_capture(tmp_path / "default.pcap")
    with closing(CaptureFile(tmp_path / "small.pcap", buffer=4096)) as file:
        switch._records.array["state"][capture.index] = file.state.address
        expected, written = [], 0
        for number in range(60):
            expected.append(frame(A, B, 401 + number, number))
            station.send(expected[-1])
            step(switch)
            written += 16 + len(expected[-1])
            eventually(lambda: file._words.array[16] == written, "the frame in the file")  # noqa: B023 - called at once
        switch.remove(capture)
    assert [data for _, data in read(tmp_path / "small.pcap")] == expected
    station.close()


def test_what_the_file_is_too_slow_for_is_counted(switch: Switch, tmp_path: Path) -> None:
    """A pipe whose reader waits until the buffer is full; what then comes out is a valid file of just what was counted."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    sink = switch.add_sink()
    capture = switch.add_capture(pipe)
    switch.add_generator(A, B, size=9000, count=1200)
    step(switch)
    counters = capture.counters()
    assert counters.no_room > 0
    assert counters.tx_frames + counters.no_room == 1200 == sink.counters().tx_frames
    wanted = 24 + counters.tx_frames * 9016
    data = bytearray()

    def pulled() -> bool:
        try:
            data.extend(os.read(reader, 1 << 20))
        except BlockingIOError:
            return False
        return len(data) == wanted

    eventually(pulled, "the rest of the pipe")
    switch.remove(capture)
    os.close(reader)
    (tmp_path / "pulled.pcap").write_bytes(data)
    assert {data for _, data in read(tmp_path / "pulled.pcap")} == {udp_frame(A, B, 9000)}


def test_a_reader_that_goes_away_is_told_at_the_end(switch: Switch, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    capture = switch.add_capture(pipe)
    os.close(reader)
    switch.add_generator(A, B, count=1)
    step(switch)
    with pytest.raises(UnavailableError, match=r"pipe: Broken pipe"):
        switch.remove(capture)
    assert capture not in switch.ports


def test_a_reader_that_takes_nothing_does_not_hold_up_the_end(
    switch: Switch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfio_vmbus.host.switch.capture_file.GRACE_SECONDS", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    capture = switch.add_capture(pipe)
    switch.add_generator(A, B, size=9000, count=30)
    step(switch)
    with pytest.raises(UnavailableError, match="Resource temporarily unavailable"):
        switch.remove(capture)
    os.close(reader)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("", {}, "Is a directory"),
        ("no/such/folder", {}, "No such file"),
        ("/dev/full", {}, "No space left"),
        ("x", {"snaplen": 13}, "snaplen of 13 bytes: take 14 to 262144"),
    ],
)
def test_a_file_that_cannot_be(switch: Switch, tmp_path: Path, path: str, options: dict[str, int], message: str) -> None:
    fds = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=message):
        switch.add_capture(tmp_path / path, **options)
    assert switch.ports == []
    assert sorted(os.listdir("/proc/self/fd")) == fds


def test_a_buffer_that_cannot_be(tmp_path: Path) -> None:
    for size in (2048, 5000):
        with pytest.raises(UsageError, match=f"buffer of {size} bytes"):
            CaptureFile(tmp_path / "x", buffer=size)


def test_the_addresses_that_were_checked_are_recorded_whatever_the_memory_says_by_now(tmp_path: Path) -> None:
    file = CaptureFile(tmp_path / "stamped.pcap")
    port, table = Block(PORT), Block(FRAME, 3)
    port["state"] = file.state.address
    memory = Block("u1", 64)
    memory.array[:60] = np.frombuffer(frame(C, C), np.uint8)
    table.array["address"] = memory.address
    table.array["size"] = 60
    table.array["destination"], table.array["source"] = mac_value(B), mac_value(A)
    table.array["target"] = [FLOOD, FILTERED, 3]
    capture_take(port.address, table.address, 3)
    file.close()
    assert [data for _, data in read(tmp_path / "stamped.pcap")] == [B + A + frame(C, C)[12:]] * 2
