"""KernelDevice on machines where it cannot be had: on trees of files that look like them, and on this one. The real kernel: tests/guest."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.bus.sysfs_tree import SysfsTree
from vfio_vmbus.errors import ClosedError, DmaError, LocalError, ProtocolError, RescindedError, UnavailableError, UsageError
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.kernel import Container, Ioas, KernelDevice
from vfio_vmbus.vfio.kernel.container import capabilities
from vfio_vmbus.vfio.kernel.group import Group
from vfio_vmbus.vfio.kernel.ioctl import call, errno_of, refusal
from vfio_vmbus.wire import vfio_ioctl as uapi
from vfio_vmbus.wire.vfio import CapabilityHeader

ADDRESS = "0000:00:04.0"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    tree = SysfsTree.make(tmp_path)
    tree.add_driver("vfio-pci")
    tree.add_driver("e1000e")
    return tree


def test_a_machine_without_vfio_says_so() -> None:
    if Path("/dev/vfio/vfio").exists():
        pytest.skip("this machine has VFIO")
    with (
        nothing_left(objects=False),
        pytest.raises(UnavailableError, match=r"VFIO, /dev/vfio/vfio: No such file.*modprobe vfio-pci"),
    ):
        Container()


def test_a_machine_without_iommufd_says_so() -> None:
    if Path("/dev/iommu").exists():
        pytest.skip("this machine has iommufd")
    with (
        nothing_left(objects=False),
        pytest.raises(UnavailableError, match=r"iommufd, /dev/iommu: No such file.*modprobe iommufd"),
    ):
        Ioas()


def test_an_address_is_checked_first(tree: SysfsTree) -> None:
    with pytest.raises(UsageError, match="is no address of a PCI device"):
        KernelDevice("nic0", roots=tree)
    with pytest.raises(UnavailableError, match=r"no PCI device 0000:00:04\.0"):
        KernelDevice("00:04.0", roots=tree)


@pytest.mark.parametrize(
    ("group", "driver", "says"),
    [
        (None, "vfio-pci", "is in no IOMMU group: turn the IOMMU on"),
        (1, None, "has driver none: bind it"),
        (1, "e1000e", "has driver e1000e: bind it"),
        (1, "vfio-pci", "modprobe vfio-pci"),  # as there is no node of VFIO's
    ],
)
def test_a_device_that_cannot_be_opened_says_why(tree: SysfsTree, group: int | None, driver: str | None, says: str) -> None:
    tree.add_device(ADDRESS, group=group, driver=driver)
    with nothing_left(objects=False), pytest.raises(UnavailableError, match=says):
        KernelDevice(ADDRESS, roots=tree)


@pytest.mark.parametrize("by", ["node", "name"])
@pytest.mark.parametrize("iommufd", [None, False, True])
def test_a_group_without_an_iommu_is_never_opened(tree: SysfsTree, by: str, iommufd: bool | None) -> None:
    tree.add_device(ADDRESS, group=5, driver="vfio-pci")
    if by == "node":
        (tree.dev / "vfio/noiommu-5").touch()
    else:
        (tree.sysfs / "kernel/iommu_groups/5/name").write_text("vfio-noiommu\n")
    with pytest.raises(UnavailableError, match="unsafe switch enable_unsafe_noiommu_mode"):
        KernelDevice(ADDRESS, iommufd=iommufd, roots=tree)


def test_what_is_no_vfio_is_not_taken_for_it(tree: SysfsTree) -> None:
    """A plain file answers no ioctl."""
    tree.add_device(ADDRESS, driver="vfio-pci")
    for name in ("vfio/vfio", "vfio/1", "iommu"):
        (tree.dev / name).touch()
    with nothing_left(objects=False):
        for wrong in (False, True, None):
            with pytest.raises(UnavailableError, match=r"Inappropriate ioctl for device \(ENOTTY\)"):
                KernelDevice(ADDRESS, iommufd=wrong, roots=tree)
        with pytest.raises(UnavailableError, match="VFIO_GROUP_GET_STATUS for IOMMU group 1"):
            Group(1, tree)


def test_a_node_that_may_not_be_opened_says_who_may(tree: SysfsTree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.add_device(ADDRESS, driver="vfio-pci")
    (tree.dev / "vfio/vfio").mkdir()  # which not even root opens for writing
    with pytest.raises(UnavailableError, match="Is a directory"):
        KernelDevice(ADDRESS, roots=tree)

    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnavailableError, match=rf"Permission denied; this process \(uid {os.geteuid()}\) may not: run as root"):
        KernelDevice(ADDRESS, roots=tree)


def test_a_devices_own_node_is_found(tree: SysfsTree) -> None:
    folder = tree.add_device(ADDRESS, driver="vfio-pci")
    assert tree.cdev(ADDRESS) is None
    (folder / "vfio-dev/vfio3").mkdir(parents=True)
    assert tree.cdev(ADDRESS) is None
    (tree.dev / "vfio/devices").mkdir()
    (tree.dev / "vfio/devices/vfio3").touch()
    assert tree.cdev(ADDRESS) == tree.dev / "vfio/devices/vfio3"
    with pytest.raises(UnavailableError, match=r"iommufd, .*/dev/iommu"):
        KernelDevice(ADDRESS, roots=tree)


def test_which_devices_spoil_a_group(tree: SysfsTree) -> None:
    tree.add_device(ADDRESS, driver="vfio-pci")
    tree.add_device("0000:00:05.0", driver="e1000e")
    tree.add_device("0000:00:06.0")
    assert tree.not_viable(1) == (
        "IOMMU group 1 has 0000:00:04.0 (vfio-pci), 0000:00:05.0 (e1000e), 0000:00:06.0 (no driver): all must have vfio-pci, or no driver"
    )


@pytest.mark.parametrize(
    ("name", "code", "kind", "says"),
    [
        ("VFIO_IOMMU_MAP_DMA", errno.ENOMEM, DmaError, "RLIMIT_MEMLOCK is "),
        ("VFIO_IOMMU_MAP_DMA", errno.ENOSPC, DmaError, "dma_entry_limit"),
        ("IOMMU_IOAS_MAP", errno.ENOMEM, DmaError, "RLIMIT_MEMLOCK is "),
        ("IOMMU_IOAS_UNMAP", errno.ENOENT, DmaError, "ENOENT"),
        ("VFIO_SET_IOMMU", errno.EPERM, UnavailableError, "allow_unsafe_interrupts"),
        ("VFIO_GROUP_GET_DEVICE_FD", errno.ENODEV, UnavailableError, "vfio-vmbus bind"),
        ("VFIO_DEVICE_SET_IRQS", errno.EINVAL, UsageError, "EINVAL"),
        ("VFIO_DEVICE_BIND_IOMMUFD", errno.EINVAL, UnavailableError, "is open already"),
        ("VFIO_DEVICE_GET_INFO", errno.ENODEV, RescindedError, "gone"),
        ("VFIO_DEVICE_IOEVENTFD", errno.ENOTTY, UnavailableError, "this kernel, or this device, does not have it"),
        ("VFIO_DEVICE_RESET", errno.EAGAIN, LocalError, "try again"),
        ("VFIO_DEVICE_RESET", 4000, LocalError, "4000"),
    ],
)
def test_a_refusal_names_the_ioctl_the_errno_and_what_to_do(name: str, code: int, kind: type[Exception], says: str) -> None:
    error = refusal(name, code, "this")
    assert type(error) is kind
    assert str(error).startswith(f"{name} for this: ")
    assert says in str(error)
    assert errno_of(error) == code


def test_a_descriptor_that_is_closed_is_told() -> None:
    for fd in (-1, 1 << 20):
        with pytest.raises(ClosedError, match="VFIO_DEVICE_RESET: Bad file descriptor"):
            call(fd, uapi.DEVICE_RESET)
    assert errno_of(ValueError()) == 0


def test_a_chain_of_capabilities_that_bites_its_tail_is_refused() -> None:
    answer = bytes(8) + CapabilityHeader(id=1, next=16).pack() + CapabilityHeader(id=2, next=8).pack()
    with pytest.raises(ProtocolError, match="the capability at 0x8 comes after itself"):
        list(capabilities(answer, 8))
    assert [(header.id, at) for header, at in capabilities(answer[:20] + bytes(4), 8)] == [(1, 8), (2, 16)]
    with pytest.raises(ProtocolError):
        list(capabilities(answer, 22))
    assert list(capabilities(answer, 0)) == []
