"""Linux's hv_netvsc on a host with faults, in virtual machines of ours: what a driver has to take, and what this one is known not to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from .conftest import PAYLOADS
from .kernels import compiled
from .kvm import KvmGuest
from .packages import CACHE, Tools
from .shell import shell_image

PAYLOAD = PAYLOADS / "vm_faults.py"
SECONDS = 400.0


@pytest.fixture(scope="module")
def rig(programs: Tools) -> Iterator[tuple[KvmGuest, dict[str, str]]]:
    """A guest with /dev/kvm, and what machines in it boot from."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rig-")))
        image = folder / "inner.cpio"
        shell_image(programs, image)
        guest = stack.enter_context(KvmGuest(programs, folder, compiled(CACHE / "kernels")))
        yield guest, {"kernel": str(programs.kernel), "initrd": str(image)}


def reports(rig: tuple[KvmGuest, dict[str, str]], function: str, count: int, **more: Any) -> dict[str, Any]:
    guest, images = rig
    payload = guest.start(PAYLOAD, function, SECONDS, **images, **more)
    found = dict(payload.report(SECONDS) for _ in range(count))
    payload.result(SECONDS)
    return found


def test_what_networks_do_as_well_is_taken(rig: tuple[KvmGuest, dict[str, str]]) -> None:
    """Frames are lost and late, completions come twice: TCP gets its bytes, and the driver comes up again."""
    seen = reports(rig, "mild", 4)
    assert seen["ping"] > 80
    assert {"fault_duplicate_completions", "fault_delay_interrupts"} <= set(seen["hits"])
    assert seen["again"] > 30


def test_a_lost_completion_is_waited_for_without_end(rig: tuple[KvmGuest, dict[str, str]]) -> None:
    seen = reports(rig, "lost_completion", 2)
    assert seen["ping"] == 50
    assert seen["rmmod"].startswith("D")


def test_a_lost_interrupt_makes_it_deaf(rig: tuple[KvmGuest, dict[str, str]]) -> None:
    assert reports(rig, "lost_interrupt", 2) == {"ping": 0, "after sending": 0}
