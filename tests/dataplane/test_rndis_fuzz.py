"""The fuzz target, briefly: whatever bytes there are, behind a seed's beginning or not."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_rndis import SEEDS, fuzz_messages


@settings(max_examples=300, deadline=None)
@given(seed=st.sampled_from(SEEDS), cut=st.integers(0, 120), data=st.binary(max_size=80))
def test_any_bytes(seed: bytes, cut: int, data: bytes) -> None:
    fuzz_messages(seed[:cut] + data)
    fuzz_messages(seed[:cut] + data + seed[cut + len(data) :])
