"""What the tests of this folder share: the programs, one guest for all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_vmbus.errors import UnavailableError

from .kernels import compiled
from .packages import CACHE, Tools, tools
from .run import Guest, edu_device

PAYLOADS = Path(__file__).with_name("payloads")


@pytest.fixture(scope="session")
def programs() -> Tools:
    try:
        return tools()
    except UnavailableError as error:
        pytest.skip(f"QEMU and a guest's kernel cannot be had: {error}")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for logs and sockets, whose names must be short."""
    with tempfile.TemporaryDirectory(prefix="rig-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def guest(programs: Tools) -> Iterator[Guest]:
    """A guest that has booted, with QEMU's edu device at EDU_ADDRESS."""
    kernels = compiled(CACHE / "kernels")
    with tempfile.TemporaryDirectory(prefix="guest-") as folder, Guest(programs, Path(folder), kernels, edu_device()) as guest:
        print(guest.hello)
        yield guest
