"""Every fuzz target of wire/ for a moment: any bytes, and good messages with a few bytes changed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import fuzz_wire

TARGETS = [function for name, function in vars(fuzz_wire).items() if name.startswith("fuzz_")]


@st.composite
def changed(draw, seeds):
    """A good input with a few bytes changed and perhaps an end cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300) | changed(fuzz_wire.SEEDS))
def test_the_invariant_holds_for_any_bytes(target, data):
    target(data)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_the_invariant_holds_for_good_messages(target):
    assert target.__doc__
    for seed in fuzz_wire.SEEDS:
        target(seed)
