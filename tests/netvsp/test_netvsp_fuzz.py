"""The fuzz target, briefly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_netvsp import SEEDS, fuzz_netvsp


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed: bytes) -> None:
    fuzz_netvsp(seed)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    fuzz_netvsp(data)
