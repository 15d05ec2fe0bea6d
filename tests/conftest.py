"""For all tests: none fails by being slow (CONTRIBUTING.md), nor does an example of hypothesis'."""

from __future__ import annotations

import gc

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_left_alone() -> None:
    """A test that looks for what it has left behind collects garbage: not through all that the compiler has made meanwhile."""
    gc.collect()
    gc.freeze()
