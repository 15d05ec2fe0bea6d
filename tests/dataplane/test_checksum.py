"""The checksum kernels do what RFC 1071 says, word by word in plain Python, and stay inside the frame."""

import struct

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dataplane.checksums import UDP, Sample, internet_checksum, ipv4_filled, l4_filled, made, samples
from tests.dataplane.kernels import fill_l3_checksum, fill_l4_checksum
from vfio_vmbus.memory.block import Block

EXAMPLES = settings(max_examples=250, deadline=None)


def run(kernel, frame: bytes) -> tuple[int, bytes]:
    """A kernel's answer, and the frame after it, in memory of exactly its size."""
    block = Block("u1", len(frame))
    block.array[:] = np.frombuffer(frame, np.uint8)
    answer = kernel(block.address, len(frame))
    return answer, block.array.tobytes()


def agree(kernel, oracle, frame: bytes) -> None:
    expected = oracle(frame)
    assert run(kernel, frame) == ((0, frame) if expected is None else (1, expected))


@EXAMPLES
@given(sample=samples)
def test_frames_get_the_checksums_of_the_oracle(sample: Sample) -> None:
    assert l4_filled(sample.frame) is not None
    assert (ipv4_filled(sample.frame) is None) == sample.ipv6
    agree(fill_l3_checksum, ipv4_filled, sample.frame)
    agree(fill_l4_checksum, l4_filled, sample.frame)


@EXAMPLES
@given(sample=samples, cuts=st.integers(0, 80), changes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4))
@example(sample=made(False, False, 5, 0, b"", 0, 1), cuts=20, changes=[])  # a tagged frame of 38 bytes: all of an IPv4 header
@example(
    sample=made(False, False, 5, 0, b"", 0, 1), cuts=23, changes=[]
)  # 35 bytes: less than one, though an untagged one would fit
def test_frames_that_lie_about_their_lengths(sample: Sample, cuts: int, changes: list[tuple[int, int]]) -> None:
    frame = bytearray(sample.frame[: max(len(sample.frame) - cuts, 14)])
    for at, value in changes:
        if at < len(frame):
            frame[at] = value
    agree(fill_l3_checksum, ipv4_filled, bytes(frame))
    agree(fill_l4_checksum, l4_filled, bytes(frame))


@given(frame=st.binary(min_size=14, max_size=120))
@EXAMPLES
def test_any_bytes(frame: bytes) -> None:
    agree(fill_l3_checksum, ipv4_filled, frame)
    agree(fill_l4_checksum, l4_filled, frame)


def test_a_udp_checksum_is_never_zero() -> None:
    """Zero means that there is none (RFC 768)."""
    frame = made(False, True, None, 0, b"\0\0 and so on", 0, 1).frame
    cleared = frame[:40] + b"\0\0" + frame[42:]
    value = internet_checksum(frame[26:34] + struct.pack(">HH", UDP, len(frame) - 34) + cleared[34:])
    frame = cleared[:42] + value.to_bytes(2, "big") + cleared[44:]
    assert run(fill_l4_checksum, frame)[1][40:42] == b"\xff\xff"


def test_what_was_filled_verifies() -> None:
    """The other definition: over all of it, checksum included, the sum is all ones."""
    for ipv6 in (False, True):
        for udp in (False, True):
            frame = run(fill_l4_checksum, made(ipv6, udp, None, 0, b"odd", 0, 77).frame)[1]
            l4 = frame[54:] if ipv6 else frame[34:]
            addresses = frame[22:54] if ipv6 else frame[26:34]
            assert internet_checksum(addresses + struct.pack(">HH", 17 if udp else 6, len(l4)) + l4) == 0
