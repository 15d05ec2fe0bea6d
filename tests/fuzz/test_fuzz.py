"""Runs every fuzz target of this folder for a moment: any bytes, and good messages with a few bytes changed.

A target is a function fuzz_*(data: bytes) in a file fuzz_*.py; SEEDS there are good inputs. For a long run, with
coverage as its guide, install atheris and say: python tests/fuzz/long_run.py fuzz_wire fuzz_frame
"""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def find_targets():
    for path in sorted(Path(__file__).parent.glob("fuzz_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, function in vars(module).items():
            if name.startswith("fuzz_"):
                yield pytest.param(function, getattr(module, "SEEDS", [b""]), id=f"{path.stem}.{name}")


TARGETS = list(find_targets())


@st.composite
def changed(draw, seeds):
    """A good input with a few bytes changed and perhaps an end cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@pytest.mark.parametrize(("target", "seeds"), TARGETS)
def test_the_invariant_holds_for_any_bytes(target, seeds):
    assert target.__doc__

    @settings(max_examples=300, deadline=None)
    @given(data=st.binary(max_size=300) | changed(seeds))
    def run(data):
        target(data)

    run()


@pytest.mark.parametrize(("target", "seeds"), TARGETS)
def test_the_invariant_holds_for_the_seeds(target, seeds):
    for seed in seeds:
        target(seed)
