"""For all tests: none fails by being slow (CONTRIBUTING.md), nor does an example of hypothesis'."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
