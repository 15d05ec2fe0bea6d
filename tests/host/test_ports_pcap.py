"""Hostile capture files: the fuzz targets for a moment, and the mistakes that people make, in one line each."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import dpkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import fuzz_pcap
from vfio_vmbus.dataplane.pcapfile import MAX_BLOCK, read_frames
from vfio_vmbus.errors import UsageError
from vfio_vmbus.memory.kernel import INTERPRETED

TARGETS = [function for name, function in vars(fuzz_pcap).items() if name.startswith("fuzz_")]


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A good file with a few bytes changed and perhaps an end cut off."""
    data = bytearray(draw(st.sampled_from(fuzz_pcap.SEEDS)))
    for _ in range(draw(st.integers(0, 4)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
@settings(max_examples=100 if INTERPRETED else 300, deadline=None)
@given(data=st.binary(max_size=300) | changed())
def test_the_invariant_holds_for_any_bytes(target: Callable[[bytes], None], data: bytes) -> None:
    target(data)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_the_invariant_holds_for_good_files(target: Callable[[bytes], None]) -> None:
    for seed in fuzz_pcap.SEEDS:
        target(seed)


def pcap(*frames: bytes, linktype: int = 1) -> bytes:
    file = io.BytesIO()
    writer = dpkt.pcap.Writer(file, linktype=linktype)
    for number, data in enumerate(frames):
        writer.writepkt_time(data, 1e9 + number)
    return file.getvalue()


def pcapng(blocks: bytes) -> bytes:
    return bytes(dpkt.pcapng.SectionHeaderBlockLE()) + bytes(dpkt.pcapng.InterfaceDescriptionBlockLE()) + blocks


GOOD = pcap(bytes(60), bytes(60))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a pcap or pcapng file"),
        (b"#!/bin/sh\n" * 10, "not a pcap or pcapng file"),
        (pcap(), "holds no frames"),
        (pcap(bytes(60), linktype=105), r"link type 105; only Ethernet \(1\)"),
        (GOOD[:-1], "ends within frame 2"),
        (GOOD[:-60], "ends within frame 2"),
        (GOOD[:-61], "damaged one"),
        (pcap(bytes(60), bytes(13)), "frame 2 has 13 bytes; 14 to 1514 can be replayed"),
        (pcap(bytes(1515)), "frame 1 has 1515 bytes"),
        (GOOD[:32] + struct.pack("<I", 0xFFFFFFFF) + GOOD[36:], "ends within frame 1"),
        (pcap(bytes(MAX_BLOCK + 1)), f"the limit is {MAX_BLOCK}"),
        (pcapng(b""), "holds no frames"),
        (pcapng(struct.pack("<II", 6, 7)), "shorter than its own header"),
        (pcapng(struct.pack("<II", 6, 0xFFFFFFF0) + bytes(100)), "not a pcap"),
        (pcapng(bytes(dpkt.pcapng.EnhancedPacketBlockLE(pkt_data=bytes(60))) + b"\x06\0\0"), "ends within frame 2"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "some.pcap"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_frames(path, 1514)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.pcap", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=message):
            read_frames(path, 1514)


def test_a_file_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_vmbus.dataplane.pcapfile.MAX_FILE", 1 << 20)
    with pytest.raises(UsageError, match="/dev/zero: more than 1048576 bytes"):
        read_frames("/dev/zero", 1514)
