"""Our own netvsc, `list`, `bind`, `net tap` and `audit` in a guest of our own virtual machine, over the kernel's real VMBus."""

from __future__ import annotations

from typing import Any

import pytest

from vfio_vmbus.errors import UnavailableError

from .conftest import PAYLOADS
from .kernels import compiled
from .kvm import KvmGuest
from .packages import CACHE, Tools
from .python_disk import FOLDER, project_files, python_disk, python_init
from .shell import shell_image

IMPORTS = (
    "vfio_vmbus.cli.main",
    "vfio_vmbus.apps.tap",
    "vfio_vmbus.bus.uio_device",
    "vfio_vmbus.drivers.netvsc.driver",
    "pyroute2",
)
MODULES = ("hv_vmbus", "uio_hv_generic", "hv_netvsc", "tun", "nd_e820", "nd_pmem")
PATIENCE = 2400.0
"""Seconds: Python two emulations deep, on a loaded machine."""


@pytest.fixture(scope="module")
def images(programs: Tools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        disk = python_disk(IMPORTS)
    except UnavailableError as error:
        pytest.skip(f"no file system for the guest: {error}")
    folder = tmp_path_factory.mktemp("image")
    image = folder / "python.cpio"
    project_files(folder / "project", compiled(CACHE / "kernels"))
    shell_image(programs, image, MODULES, python_init({}), {FOLDER: folder / "project"})
    return {"kernel": str(programs.kernel), "initrd": str(image), "disk": str(disk)}


@pytest.fixture(scope="module")
def found(kvm: KvmGuest, images: dict[str, str]) -> dict[str, Any]:
    """There and back, in one boot."""
    result: dict[str, Any] = kvm.run(PAYLOADS / "vm_uio.py", "outside", PATIENCE, **images)
    return result


def test_bound_and_back(found: dict[str, Any]) -> None:
    assert (found["before"], found["list"]) == ("hv_netvsc", ["hv_netvsc", "kernel"])
    assert (found["bind"], found["bound"], found["list bound"]) == (0, "uio_hv_generic", ["uio_hv_generic", "unsafe"])
    assert (found["unbind"], found["back"]) == (0, "hv_netvsc")
    assert found["interface"].startswith("eth")


def test_only_with_the_switch(found: dict[str, Any]) -> None:
    said = found["without the switch"]
    assert said["status"] == 2
    assert "--enable-unsafe-noiommu-mode" in said["complained"]


def test_netvsc_drives_the_card(found: dict[str, Any]) -> None:
    assert found["mac"] == found["mac of the host"]


def test_the_kernels_stack_reaches_the_namespace(found: dict[str, Any]) -> None:
    assert found["first"]


def test_audit_says_unsafe(found: dict[str, Any]) -> None:
    assert found["audit"] == [1, ["unsafe"]]


def test_a_driver_that_is_killed_is_started_again(found: dict[str, Any]) -> None:
    assert (found["killed"], found["second"]) == (-9, True)


def test_a_card_that_is_pulled_ends_its_driver_with_a_line(found: dict[str, Any]) -> None:
    status, said = found["pulled"]
    assert status == 1
    assert "taken away by its host" in said.splitlines()[-1]


def test_a_card_that_is_plugged_in_again_is_driven_again(found: dict[str, Any]) -> None:
    """The kernel gives what is new to its own driver: it is to be bound again."""
    assert (found["bound again"], found["third"], found["ended"]) == (0, True, 0)


def test_the_host_saw_nothing_wrong(found: dict[str, Any]) -> None:
    assert found["host"] == [False, [], 0]
