"""The example in examples/edu.py drives an edu behind a socket as it drives one that the kernel has (tests/guest/test_kernel_vfio.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_vmbus.testing.edu import serving_edu
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.user.client import UserDevice

PATH = Path(__file__).parents[2] / "examples/edu.py"
SPEC = importlib.util.spec_from_file_location("example_edu", PATH)
assert SPEC is not None
assert SPEC.loader is not None
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


@pytest.fixture
def served() -> Iterator[Path]:
    """The socket at which an edu is served."""
    with tempfile.TemporaryDirectory(prefix="edu-") as folder, serving_edu(Path(folder, "edu")):
        yield Path(folder, "edu")


def test_the_example_drives_an_edu_behind_a_socket(served: Path) -> None:
    with nothing_left(objects=False), UserDevice(served) as device:
        lines = list(example.show(device))
    assert lines[0].startswith("edu 1.0 at ")
    assert lines[2].startswith("10! = 3628800")
    assert len(lines) == 7
    assert "did not see it" in lines[-1]


def test_the_example_says_what_it_wants() -> None:
    for arguments, status, says in (
        ([], 2, "usage: "),
        (["nic0"], 1, "edu: 'nic0' is no address"),
        (["ff:1f.7"], 1, "edu: no PCI device"),
    ):
        done = subprocess.run([sys.executable, PATH, *arguments], capture_output=True, text=True)
        assert done.returncode == status
        assert done.stdout == ""
        assert done.stderr.startswith(says)
        assert done.stderr.count("\n") == 1
