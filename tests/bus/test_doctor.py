"""The doctor: what is missing on machines that lack one thing or another, and the command that mends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.trees import ALL_CAPABILITIES, INITIAL, NETWORK, NIC0, link, machine, pci_device, put, uio_device, vmbus_device
from vfio_vmbus.bus.doctor import Check, State, examine
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.errors import UnavailableError, UsageError

RELEASE = "6.12.1-cloud-amd64"
CARD = "0000:00:04.0"


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    """A Hyper-V guest on which everything is there: eth0 with uio_hv_generic, a card with vfio-pci."""
    made = machine(tmp_path)
    put(made.proc / "sys/kernel/osrelease", f"{RELEASE}\n")
    put(made.proc / "self/status", f"CapEff:\t{ALL_CAPABILITIES:016x}\n")
    link(made.proc / "self/ns/user", INITIAL)
    put(made.proc / "self/limits", "Max locked memory         unlimited            unlimited            bytes     \n")
    put(made.proc / "meminfo", "HugePages_Free:       64\nHugepagesize:       2048 kB\n")
    put(made.proc / "cpuinfo", "processor\t: 0\nflags\t\t: fpu hypervisor\n")
    put(made.sysfs / "class/dmi/id/sys_vendor", "Microsoft Corporation\n")
    put(made.sysfs / "class/dmi/id/product_name", "Virtual Machine\n")
    put(made.sysfs / "kernel/security/lockdown", "[none] integrity confidentiality\n")
    for module in ("uio_hv_generic", "vfio_pci"):
        (made.sysfs / "module" / module).mkdir(parents=True)
    nic = vmbus_device(made, NIC0, NETWORK, driver="uio_hv_generic")
    put(nic / "channels/1/ring")
    uio_device(made, nic)
    pci_device(made, CARD, driver="vfio-pci", group=7)
    for node in ("net/tun", "vfio/vfio", "vfio/7", "iommu"):
        put(made.dev / node)
    return made


def missing(here: Machine, device: str | None) -> list[Check]:
    return [check for check in examine(device, here, {}) if check.state is State.MISSING]


@pytest.mark.parametrize("device", [None, NIC0, CARD])
def test_where_all_is_there_nothing_is_missing(here: Machine, device: str | None) -> None:
    assert missing(here, device) == []
    states = {check.what: check.state for check in examine(device, here, {})}
    assert states["hypervisor"] is State.OK


def test_every_line_says_why_and_nothing_is_changed(here: Machine) -> None:
    for device in (None, NIC0, CARD):
        for check in examine(device, here, {}):
            assert check.what
            assert check.found
            assert check.why
            assert check.mend or check.state is not State.MISSING


def lacks(here: Machine, device: str | None, what: str, mend: str) -> None:
    (check,) = missing(here, device)
    assert check.what == what
    assert mend in check.mend


def test_a_module_that_is_on_disk_is_loaded_by_modprobe(here: Machine) -> None:
    (here.sysfs / "module/uio_hv_generic").rmdir()
    put(here.modules / RELEASE / "modules.dep", "kernel/drivers/uio/uio_hv_generic.ko.xz: kernel/drivers/uio/uio.ko.xz\n")
    lacks(here, NIC0, "module uio_hv_generic", "modprobe uio_hv_generic")
    assert "apt" not in missing(here, NIC0)[0].mend


def test_a_module_that_is_built_in_is_there(here: Machine) -> None:
    (here.sysfs / "module/vfio_pci").rmdir()
    put(here.modules / RELEASE / "modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n")
    assert missing(here, CARD) == []


def test_a_module_that_is_nowhere_comes_in_a_package(here: Machine) -> None:
    (here.sysfs / "module/uio_hv_generic").rmdir()
    lacks(here, NIC0, "module uio_hv_generic", "apt install linux-modules-extra-$(uname -r)")
    assert missing(here, None) == []  # nobody asked for a real device


def test_a_kernel_that_is_too_old(here: Machine) -> None:
    put(here.proc / "sys/kernel/osrelease", "4.15.0-1-amd64\n")
    lacks(here, NIC0, "kernel", "take a kernel of 4.18 or later")


def test_a_device_that_the_kernel_has_is_to_be_bound(here: Machine) -> None:
    other = "ed963694-e847-4b2a-85af-bc9cfc11d6f4"
    vmbus_device(here, other, NETWORK, driver="hv_netvsc")
    lacks(here, other, "driver", f"vfio-vmbus bind {other}")


def test_no_rawio(here: Machine) -> None:
    put(here.proc / "self/status", f"CapEff:\t{ALL_CAPABILITIES & ~(1 << 17):016x}\n")
    lacks(here, NIC0, "CAP_SYS_RAWIO", "setpriv")
    assert missing(here, CARD) == []


def test_locked_memory(here: Machine) -> None:
    put(
        here.proc / "self/limits",
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max locked memory         8388608              8388608              bytes\n",
    )
    assert missing(here, CARD) == []  # CAP_IPC_LOCK
    put(here.proc / "self/status", f"CapEff:\t{1 << 17:016x}\n")
    lacks(here, CARD, "locked memory", "ulimit -l unlimited")
    assert missing(here, CARD)[0].found == "8 MiB"


def test_no_iommu(here: Machine) -> None:
    pci_device(here, "0000:00:05.0", driver="vfio-pci")
    lacks(here, "00:05.0", "IOMMU group", "intel_iommu=on")


def test_a_driver_without_iommu_needs_none_and_is_unsafe(here: Machine) -> None:
    pci_device(here, "0000:00:05.0", driver="igb_uio")
    lacks(here, "00:05.0", "module igb_uio", "dpdk-kmods")
    assert any("igb_uio turns bus mastering on" in check.found for check in examine("00:05.0", here, {}))


def test_no_tun_and_no_user_namespaces(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (here.dev / "net/tun").unlink()
    put(here.proc / "sys/user/max_user_namespaces", "0\n")
    assert [check.what for check in missing(here, None)] == [str(here.dev / "net/tun"), "user namespaces"]


def test_a_machine_without_vmbus_lacks_nothing_for_the_embedded_host(tmp_path: Path) -> None:
    here = machine(tmp_path)
    put(here.dev / "net/tun")
    put(here.proc / "sys/kernel/osrelease", "6.1.0\n")
    assert missing(here, None) == []


def test_a_device_that_is_not_there_is_an_error(here: Machine) -> None:
    with pytest.raises(UnavailableError, match="no device eth7"):
        examine("eth7", here)
    with pytest.raises(UsageError, match="is no device"):
        examine("../eth0", here)


def test_what_is_in_use_is_said(here: Machine) -> None:
    link(here.proc / "77/fd/5", here.dev / "uio0")
    assert [check.found.split(" ")[1:6] for check in examine(NIC0, here, {}) if check.what == "in use"] == [
        ["is", "held", "open", "by", "process"]
    ]


FILES = ["sys/kernel/osrelease", "self/status", "self/limits", "meminfo", "cpuinfo", "sys/user/max_user_namespaces"]


@given(
    files=st.dictionaries(st.sampled_from(FILES), st.binary(max_size=200)),
    lines=st.sampled_from(["Max locked memory", "HugePages_Free:", "CapEff:"]),
)
def test_no_file_breaks_it(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], lines: str) -> None:
    here = machine(tmp_path_factory.mktemp("machine"))
    vmbus_device(here, NIC0, NETWORK)
    for name, content in files.items():
        put(here.proc / name, lines.encode() + b" " + content)
    assert examine(None, here, {})
    assert examine(NIC0, here, {})
