"""DPDK's own netvsc PMD over our host, in a guest of our virtual machine: one boot, in which every step is told apart."""

from __future__ import annotations

from typing import Any

import pytest

from vfio_vmbus.errors import UnavailableError

from .conftest import PAYLOADS
from .dpdk import dpdk_disk
from .kvm import KvmGuest, steps_of
from .packages import Tools
from .payloads.vm_dpdk import FRAMES, STEPS
from .shell import shell_image

MODULES = ("hv_vmbus", "uio_hv_generic", "hv_netvsc", "nd_e820", "nd_pmem")
PATIENCE = 1200.0
"""Seconds for all steps on a loaded machine."""


@pytest.fixture(scope="module")
def images(programs: Tools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        disk = dpdk_disk()
    except UnavailableError as error:
        pytest.skip(f"DPDK cannot be had: {error}")
    image = tmp_path_factory.mktemp("image") / "shell.cpio"
    shell_image(programs, image, MODULES)
    return {"kernel": str(programs.kernel), "initrd": str(image), "disk": str(disk)}


@pytest.fixture(scope="module")
def steps(kvm: KvmGuest, images: dict[str, str]) -> dict[str, tuple[Any, str]]:
    return steps_of(kvm.start(PAYLOADS / "vm_dpdk.py", "card", PATIENCE, **images), STEPS, PATIENCE)


@pytest.mark.parametrize("name", STEPS)
def test_step(steps: dict[str, tuple[Any, str]], name: str) -> None:
    why = steps[name][1]
    if why:
        pytest.fail(why, pytrace=False)


def test_what_the_steps_found(steps: dict[str, tuple[Any, str]]) -> None:
    assert steps["bind"][0] == [31, 16]
    for name in ("swap", "jumbo"):
        counted = steps[name][0]
        assert [counted[word] for word in ("RX-packets", "RX-dropped", "TX-dropped")] == [FRAMES, 0, 0]
    assert [steps[name][0] for name in ("quit", "kill", "after_a_kill")] == [0, 128 + 9, 0]
    assert steps["power_off"][0] == "power-off"
