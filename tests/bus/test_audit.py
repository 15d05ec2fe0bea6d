"""The audit: all that user space drives, whoever has it open, what weakens isolation, and what this user could not see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.test_policy import prepared
from tests.bus.trees import NETWORK, NIC0, link, machine, pci_device, put, uio_device, vmbus_device
from vfio_vmbus.bus import kernel_facts
from vfio_vmbus.bus.audit import Audit, audit
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.policy import Isolation, allow_unsafe

CARD = "0000:00:04.0"


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    """A machine whose log may be read and which is not tainted."""
    made = machine(tmp_path)
    put(made.proc / "sys/kernel/tainted", "0\n")
    put(made.dev / "kmsg", "6,1,0,-;Linux version 6.12\n")
    put(made.proc / "stat", "cpu 1 2 3\nbtime 1700000000\n")
    return made


def held_by(here: Machine, pid: int, node: Path, command: bytes = b"testpmd\0-l\x001\0") -> None:
    put(here.proc / str(pid) / "cmdline", command)
    link(here.proc / str(pid) / "fd/7", node)


def test_a_machine_that_does_nothing_unsafe(here: Machine) -> None:
    vmbus_device(here, NIC0, NETWORK, driver="hv_netvsc")
    pci_device(here, CARD, driver="e1000e")
    found = audit(here)
    assert (found.findings, found.uses, found.weaknesses, found.unseen, found.unsafe) == ((), (), (), (), [])
    assert (found.taint.value, found.taint.bits) == (0, ())


def test_vmbus_in_user_space_and_who_has_it(here: Machine) -> None:
    device = vmbus_device(here, NIC0, NETWORK, driver="uio_hv_generic")
    uio_device(here, device, 4)
    held_by(here, 77, here.dev / "uio4")
    (found,) = audit(here).findings
    assert found.item.isolation is Isolation.UNSAFE
    assert [(holder.pid, holder.command, holder.path) for holder in found.holders] == [
        (77, "testpmd -l 1", str(here.dev / "uio4"))
    ]
    assert found.advice is not None
    assert f"vfio-vmbus unbind {NIC0}" in found.advice
    assert audit(here).unsafe == [f"vmbus:{NIC0}: {found.item.why}"]


def test_vfio_with_an_iommu_is_shown_and_is_safe(here: Machine) -> None:
    pci_device(here, CARD, driver="vfio-pci", group=7)
    put(here.dev / "vfio/7")
    held_by(here, 78, here.dev / "vfio/7")
    result = audit(here)
    (found,) = result.findings
    assert (found.item.isolation, found.advice, [holder.pid for holder in found.holders]) == (Isolation.ISOLATED, None, [78])
    assert result.unsafe == []


@pytest.mark.parametrize("name", ["vfio/noiommu-3", "vfio/devices/noiommu-vfio0", "uio9"])
def test_nodes_that_belong_to_no_device_of_ours_are_found_too(here: Machine, name: str) -> None:
    put(here.dev / name)
    put(here.dev / "vfio/vfio")
    put(here.dev / "vfio/12")
    held_by(here, 79, here.dev / name)
    result = audit(here)
    unsafe = [found for found in result.findings if found.item.isolation is Isolation.UNSAFE]
    assert [(found.item.nodes, [holder.pid for holder in found.holders]) for found in unsafe] == [((str(here.dev / name),), [79])]
    assert len(result.findings) == 2
    assert len(result.unsafe) == 1


def test_a_process_that_was_allowed_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    here = prepared(tmp_path)
    put(here.proc / str(os.getpid()) / "cmdline", b"vfio-vmbus\0console\0eth1\0")
    use = allow_unsafe("uio_hv_generic of eth1", enabled=True, machine=here)
    result = audit(here)
    assert result.uses == ((use, "vfio-vmbus console eth1"),)
    assert result.taint.user
    assert result.unsafe == [
        f"process {os.getpid()} (vfio-vmbus console eth1) was allowed uio_hv_generic of eth1",
        "the kernel is tainted by user space (U): something unsafe was done since it started",
    ]


@pytest.mark.parametrize(
    ("file", "content", "where", "unsafe"),
    [
        ("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n", "enable_unsafe_noiommu_mode", True),
        ("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n", None, False),
        ("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n", "allow_unsafe_interrupts", True),
        ("sys/module/iommufd/parameters/allow_unsafe_interrupts", "1\n", "iommufd", True),
        ("proc/cmdline", "root=/dev/sda iommu=pt quiet\n", "cmdline", False),
        ("proc/cmdline", "intel_iommu=on,strict_off\n", "cmdline", False),
        ("proc/cmdline", "iommu.strict=0\n", "cmdline", False),
        ("proc/cmdline", "pcie_acs_override=downstream\n", "cmdline", True),
        ("proc/cmdline", "intel_iommu=on iommu=strict iommu.strict=1\n", None, False),
        ("etc/modprobe.d/vfio.conf", "# off\noptions vfio enable_unsafe_noiommu_mode=1\n", "vfio.conf", True),
        ("etc/modprobe.d/vfio.conf", "options vfio-iommu-type1 allow_unsafe_interrupts=Y\n", "vfio.conf", True),
        ("etc/modprobe.d/vfio.conf", "options vfio enable_unsafe_noiommu_mode\n", "vfio.conf", True),
        ("etc/modprobe.d/vfio.conf", "options vfio enable_unsafe_noiommu_mode=0\n", None, False),
        ("etc/modprobe.d/vfio.conf", "options\noptions vfio\n\n", None, False),
        ("run/modprobe.d/vfio.conf", "options vfio x=1 enable_unsafe_noiommu_mode=on\n", "vfio.conf", True),
        ("modprobe.d/vfio.conf", "options iommufd allow_unsafe_interrupts=1\n", "vfio.conf", True),
        ("proc/cmdline", "quiet vfio.enable_unsafe_noiommu_mode=1\n", "cmdline", True),
        ("proc/cmdline", "vfio-iommu-type1.allow-unsafe-interrupts\n", "cmdline", True),
        ("proc/cmdline", "vfio.enable_unsafe_noiommu_mode=N vfio.x=1\n", None, False),
        ("etc/modprobe.d/vfio.conf", "#options vfio enable_unsafe_noiommu_mode=1\n", None, False),
        ("etc/modprobe.d/vfio.conf.old", "options vfio enable_unsafe_noiommu_mode=1\n", None, False),
    ],
)
def test_settings_that_weaken_isolation(
    here: Machine, tmp_path: Path, file: str, content: str, where: str | None, unsafe: bool
) -> None:
    put(tmp_path / file, content)
    result = audit(here)
    assert len(result.weaknesses) == (where is not None)
    for weakness in result.weaknesses:
        assert where is not None
        assert where in weakness.where
        assert weakness.unsafe is unsafe
        assert weakness.advice
    assert bool(result.unsafe) is unsafe


@pytest.mark.parametrize(
    "message",
    [
        "vfio-pci 0000:00:04.0: Adding kernel taint for vfio-noiommu group on device",
        "vfio-vmbus: eth1 opened by user (a:1): unsafe, x",
    ],
)
def test_the_taint_and_since_when(here: Machine, message: str) -> None:
    put(here.proc / "sys/kernel/tainted", f"{1 << 12 | 1 << 6 | 1 << 40}\n")
    put(
        here.dev / "kmsg", f"6,1,0,-;Linux version 6.12\n4,700,12500000,-;{message}\n SUBSYSTEM=pci\n4,701,99000000,-;{message}\n"
    )
    taint = audit(here).taint
    assert taint.bits == ("U (user space asked for it)", "O (module from outside of the kernel's tree)", "? (bit 40)")
    assert (taint.user, taint.since, taint.said) == (True, 1700000012.5, message)


def test_a_taint_that_the_log_does_not_explain(here: Machine) -> None:
    put(here.proc / "sys/kernel/tainted", "64\n")
    assert (audit(here).taint.user, audit(here).taint.since) == (True, None)


def test_what_could_not_be_seen_is_said(here: Machine) -> None:
    (here.dev / "kmsg").unlink()
    assert audit(here).unseen == ("the kernel's log, so since when it is tainted (run as root, or with CAP_SYSLOG)",)


def test_processes_of_others_are_said_to_be_unseen(here: Machine) -> None:
    if os.geteuid() == 0:
        child = os.fork()
        if child == 0:  # another user, who may not look into root's process
            os.setresuid(65534, 65534, 65534)
            os._exit(0 if holders_unseen() else 1)
        assert os.waitpid(child, 0)[1] == 0
    else:
        assert holders_unseen()


def holders_unseen() -> bool:
    from vfio_vmbus.bus import holders

    return holders.of_nodes(["/dev/uio0"]).unseen > 0


def test_this_machine_can_be_audited() -> None:
    """The real one, whatever is on it."""
    assert isinstance(audit(), Audit)


def test_the_real_log_is_read_or_said_to_be_closed() -> None:
    log = kernel_facts.log(Machine())
    if log is None:
        assert any("log" in what for what in audit().unseen)
    else:
        assert log[0].seconds >= 0
        assert log[-1].seconds < float(Path("/proc/uptime").read_text().split()[0]) + 1


FILES = [
    "proc/sys/kernel/tainted",
    "proc/cmdline",
    "proc/stat",
    "dev/kmsg",
    "etc/modprobe.d/a.conf",
    "proc/net/unix",
    "proc/77/cmdline",
]


@given(files=st.dictionaries(st.sampled_from(FILES), st.binary(max_size=300)), taint=st.integers())
def test_no_file_breaks_it(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], taint: int) -> None:
    root = tmp_path_factory.mktemp("machine")
    put(root / "proc/sys/kernel/tainted", f"{taint}\n")
    put(root / "dev/uio0")
    link(root / "proc/77/fd/1", root / "dev/uio0")
    for name, content in files.items():
        put(root / name, content)
    result = audit(machine(root))
    assert all(text.isprintable() for text in result.unsafe)


WORDS = [
    "options",
    "vfio",
    "enable_unsafe_noiommu_mode=1",
    "=",
    "",
    "iommu=,",
    "4,1,2,-;x unsafe",
    "vfio-vmbus: a unsafe",
    "btime",
    "x,",
    "-1",
]


@given(words=st.lists(st.sampled_from(WORDS), max_size=8))
def test_no_line_of_almost_the_right_form_breaks_it(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    root = tmp_path_factory.mktemp("machine")
    for name in FILES:
        put(root / name, " ".join(words) + "\n")
    put(root / "proc/sys/kernel/tainted", "64\n")
    audit(machine(root))
