"""Numba takes its time: it is imported where the data plane starts, and not before. The rules of layers are in pyproject.toml."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

LIGHT = ["vfio_vmbus", "vfio_vmbus.errors", "vfio_vmbus.wire", "vfio_vmbus.vmbus", "vfio_vmbus.apps.lab", "vfio_vmbus.cli.main"]
LIGHT += [
    "vfio_vmbus.vfio.kernel",
    *(f"vfio_vmbus.bus.{name}" for name in ("assign", "audit", "doctor", "inventory", "policy", "uevents")),
]


def modules_of(name: str) -> list[str]:
    """A package and what lies directly in it; a module alone."""
    package = __import__(name, fromlist=["__name__"])
    if name == "vfio_vmbus" or not hasattr(package, "__path__"):
        return [name]
    return [name, *(f"{name}.{found.name}" for found in pkgutil.iter_modules(package.__path__))]


@pytest.mark.parametrize("name", LIGHT)
def test_control_plane_and_command_line_do_not_import_numba(name: str) -> None:
    wanted = modules_of(name)
    script = (
        f"import importlib, sys\nfor name in {wanted!r}: importlib.import_module(name)\n"
        "print(sorted({'numba', 'llvmlite'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_that_test_would_notice() -> None:
    script = "import sys, vfio_vmbus.memory.access\nprint('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")
