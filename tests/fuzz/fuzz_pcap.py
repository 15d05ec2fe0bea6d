"""Fuzz targets of capture files as they are read for a replay. Each takes the bytes of a file; its docstring is what must hold."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import dpkt

from vfio_vmbus.dataplane.pcapfile import read_frames
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.frames import BURST, FRAME
from vfio_vmbus.host.switch.recording import Recording
from vfio_vmbus.host.switch.replay import NEVER, replay_due, replay_poll
from vfio_vmbus.host.switch.state import PORT
from vfio_vmbus.memory.block import Block

LONGEST = 1514


def _pcap(nano: bool, *frames: tuple[float, bytes]) -> bytes:
    file = io.BytesIO()
    writer = dpkt.pcap.Writer(file, nano=nano)
    for moment, data in frames:
        writer.writepkt_time(data, moment)
    return file.getvalue()


def _pcapng(*frames: tuple[float, bytes]) -> bytes:
    file = io.BytesIO()
    option = dpkt.pcapng.PcapngOptionLE(code=dpkt.pcapng.PCAPNG_OPT_IF_TSRESOL, data=b"\x09")
    interface = dpkt.pcapng.InterfaceDescriptionBlockLE(opts=[option, dpkt.pcapng.PcapngOptionLE()])
    writer = dpkt.pcapng.Writer(file, idb=interface)
    for moment, data in frames:
        writer.writepkt_time(data, moment / 1000)
    return file.getvalue()


_FRAMES = ((1.5, bytes(range(60))), (1.25, bytes(14)), (4.0, bytes(70)))
SEEDS = [_pcap(False, *_FRAMES), _pcap(True, *_FRAMES), _pcapng(*_FRAMES), _pcap(False), b""]


@contextmanager
def _file(data: bytes) -> Iterator[str]:
    fd = os.memfd_create("capture")
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def fuzz_read_frames(data: bytes) -> None:
    """A file gives frames of possible lengths, all of them bytes of the file in order, or one line that says what is wrong."""
    with _file(data) as path:
        frames: list[tuple[int, bytes]] = []
        wrong = ""
        try:
            frames = read_frames(path, LONGEST)
        except UsageError as error:
            wrong = str(error)
    assert len(wrong.splitlines()) == (0 if frames else 1)
    at = 0
    for _, frame in frames:
        assert 14 <= len(frame) <= LONGEST
        at = data.index(frame, at) + len(frame)


def fuzz_recording(data: bytes) -> None:
    """What is replayed at its own pace comes in the file's order, no frame before its time, none twice, and comes to an end."""
    with _file(data) as path:
        try:
            expected = [frame for _, frame in read_frames(path, 9216)]
            recording = Recording(path, pace="recorded", loops=1)
        except UsageError:
            return
    port, table = Block(PORT), Block(FRAME, BURST)
    port["state"] = recording.state.address
    now = 10**12
    got: list[bytes] = []
    while recording.state["left"] != 0:
        count = replay_poll(port.address, table.address, BURST, now)
        got += [_bytes_at(recording, row) for row in table.array[:count]]
        due = replay_due(port.address)
        assert due > now
        now = due
    assert due == NEVER
    assert got == expected


def _bytes_at(recording: Recording, row: object) -> bytes:
    start = int(row["address"]) - recording._memory.address  # type: ignore[index]
    assert start >= 0
    return recording._memory.array[start : start + int(row["size"])].tobytes()  # type: ignore[index]
