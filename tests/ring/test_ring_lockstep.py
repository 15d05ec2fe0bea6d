"""The ends do what the reference does, operation by operation and byte by byte, with honest and with hostile peers."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ring.lockstep import ROWS, Lockstep, Sample

PAGES = st.sampled_from([1, 1, 2, 5])
KINDS = [(True, True), (True, False), (False, True)]
EXAMPLES = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

samples = st.builds(
    Sample,
    kind=st.integers(0, 0xFFFF),
    flags=st.integers(0, 0x7FFF),
    trans_id=st.integers(0, 2**64 - 1),
    words=st.integers(0, 5),
    length=st.one_of(st.integers(0, 300), st.integers(0, 5000)),
    seed=st.integers(0, 255),
)
counts = st.integers(0, ROWS)
sends = st.tuples(st.just("send"), st.lists(samples, max_size=ROWS // 2))
honest = st.one_of(
    sends,
    sends,
    st.tuples(st.just("receive"), counts),
    st.tuples(st.just("hold"), counts),
    st.tuples(st.just("commit")),
    st.tuples(st.just("look")),
    st.tuples(st.just("mask"), st.integers(0, 1)),
    st.tuples(st.just("want"), st.integers(0, 4095)),
)
numbers = st.one_of(
    st.integers(0, 600).map(lambda units: 8 * units),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 7, 4088, 4095, 4096, 4104, 2**31, 2**32 - 8, 2**32 - 1]),
)
pokes = st.tuples(st.just("poke"), st.sampled_from([0, 4, 8, 12, 64]), numbers.map(lambda value: value.to_bytes(4, "little")))
scribbles = st.tuples(st.just("poke"), st.integers(4096, 8180), st.binary(min_size=1, max_size=8))
forgeries = st.tuples(
    st.just("forge"), st.integers(0, 3), st.one_of(st.integers(0, 0xFFFF), st.integers(0, 20), st.integers(500, 520))
)
hostile = st.one_of(honest, honest, honest, pokes, scribbles, forgeries)


def run(pages: int, operations: list[tuple[Any, ...]], writer: bool, reader: bool) -> None:
    with Lockstep(pages, writer, reader) as pair:
        for name, *arguments in operations:
            pair.do(name, *arguments)


@pytest.mark.parametrize(("writer", "reader"), KINDS)
@EXAMPLES
@given(pages=PAGES, operations=st.lists(honest, min_size=5, max_size=40))
def test_honest_peers(writer: bool, reader: bool, pages: int, operations: list[tuple[Any, ...]]) -> None:
    run(pages, operations, writer, reader)


@pytest.mark.parametrize(("writer", "reader"), KINDS)
@EXAMPLES
@given(pages=PAGES, operations=st.lists(hostile, min_size=5, max_size=40))
def test_hostile_peers(writer: bool, reader: bool, pages: int, operations: list[tuple[Any, ...]]) -> None:
    run(pages, operations, writer, reader)


@pytest.mark.parametrize(("writer", "reader"), KINDS)
def test_many_times_around(writer: bool, reader: bool) -> None:
    """Sizes that share no factor with the ring's meet its end at every offset."""
    with Lockstep(1, writer, reader) as pair:
        for turn in range(200):
            burst = [Sample(trans_id=turn, length=(turn * 37 + place * 101) % 700, seed=turn) for place in range(5)]
            sent = pair.do("send", burst)
            assert [packet[16:] for packet in pair.do("receive", ROWS)] == [sample.raw[16:] for sample in burst[:sent]]


def test_filled_to_the_last_packet() -> None:
    """Equal indices mean empty, so 8 bytes always stay free; then nothing passes until something is read."""
    with Lockstep(1) as pair:
        assert pair.do("send", [Sample(length=4096 - 24 - 8)]) == 1
        assert pair.do("look") == 8
        assert pair.do("send", [Sample()]) == 0
        assert len(pair.do("receive", 1)) == 1
        assert pair.do("send", [Sample(length=4096 - 24)]) == 0
        assert pair.do("send", [Sample(length=4096 - 24 - 8)]) == 1
