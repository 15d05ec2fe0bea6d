"""The fuzz target, for a fixed number of streams."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_vmbus import TARGETS, stream


@pytest.mark.parametrize("sender", TARGETS)
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=600))
def test_any_bytes(sender, data):
    TARGETS[sender](data)


@pytest.mark.parametrize("sender", TARGETS)
@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_mutated_messages(sender, seed):
    TARGETS[sender](stream(random.Random(seed), sender))
