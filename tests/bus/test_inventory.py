"""What `list` shows: VMBus, PCI devices in the hands of user space, what is served, who uses something unsafe."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.test_policy import prepared
from tests.bus.trees import NETWORK, NIC0, link, machine, pci_device, put, uio_device, vmbus_device
from vfio_vmbus.bus import inventory
from vfio_vmbus.bus.inventory import Item, items
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.policy import Isolation, allow_unsafe
from vfio_vmbus.bus.uevents import concerns_us

CARD = "0000:00:04.0"


def one(here: Machine) -> Item:
    (found,) = items(here)
    return found


def test_an_empty_machine_has_nothing(tmp_path: Path) -> None:
    assert items(machine(tmp_path)) == []


def test_vmbus_comes_first_with_its_node_and_why(tmp_path: Path) -> None:
    here = machine(tmp_path)
    pci_device(here, CARD, driver="vfio-pci", group=7)
    device = vmbus_device(here, NIC0, NETWORK, driver="uio_hv_generic")
    uio_device(here, device, 1)
    first, second = items(here)
    assert (first.device, first.kind, first.isolation, first.nodes) == (
        f"vmbus:{NIC0}",
        "network",
        Isolation.UNSAFE,
        (str(here.dev / "uio1"),),
    )
    assert first.why == inventory.NO_IOMMU_OF_VMBUS
    assert (second.device, second.isolation, second.why) == (f"pci:{CARD}", Isolation.ISOLATED, "IOMMU group 7")


@pytest.mark.parametrize("driver", [None, "e1000e", "pcieport"])
def test_pci_devices_of_the_kernel_are_not_shown(tmp_path: Path, driver: str | None) -> None:
    here = machine(tmp_path)
    pci_device(here, CARD, driver=driver)
    assert items(here) == []


@pytest.mark.parametrize(
    ("driver", "group", "command", "isolation", "why"),
    [
        ("vfio-pci", 7, 0x6, Isolation.ISOLATED, "IOMMU group 7"),
        ("mlx5_vfio_pci", 7, 0x6, Isolation.ISOLATED, "IOMMU group 7"),
        ("vfio-pci", None, 0x6, None, "in no IOMMU group"),
        ("uio_pci_generic", None, 0x2, Isolation.NO_DMA, "bus mastering is off"),
        ("uio_pci_generic", 7, 0x6, Isolation.UNSAFE, "bus mastering is on"),
        ("uio_pci_generic", None, None, Isolation.UNSAFE, "bus mastering is on"),
        ("igb_uio", None, 0x2, Isolation.UNSAFE, "igb_uio turns bus mastering on"),
    ],
)
def test_isolation_of_pci(
    tmp_path: Path, driver: str, group: int | None, command: int | None, isolation: Isolation | None, why: str
) -> None:
    here = machine(tmp_path)
    device = pci_device(here, CARD, driver=driver, group=group, command=command or 0)
    if command is None:
        put(device / "config", b"")
    found = one(here)
    assert (found.driver, found.isolation) == (driver, isolation)
    assert why in found.why


def test_a_noiommu_group_is_unsafe(tmp_path: Path) -> None:
    here = machine(tmp_path)
    pci_device(here, CARD, driver="vfio-pci", group=0)
    put(here.dev / "vfio/noiommu-0")
    found = one(here)
    assert found.isolation == Isolation.UNSAFE
    assert found.nodes == (str(here.dev / "vfio/noiommu-0"),)


def test_a_served_device(tmp_path: Path) -> None:
    here = machine(tmp_path)
    put(
        here.proc / "net/unix",
        "Num       RefCount Protocol Flags    Type St Inode Path\n"
        "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/nic 0.sock\n"
        "0000000000000000: 00000002 00000000 00010000 0001 01 4712 /run/dbus.sock\n"
        "0000000000000000: 00000003 00000000 00000000 0001 03 4713 /run/nic 0.sock\n",
    )
    for pid, command, inode in ((77, b"python\0/usr/bin/vfio-vmbus\0serve\0--listen\0x", 4711), (78, b"dbus-daemon\0", 4712)):
        put(here.proc / str(pid) / "cmdline", command)
        link(here.proc / str(pid) / "fd/5", f"socket:[{inode}]")
    found = one(here)
    assert (found.device, found.isolation, found.shows) == ("socket:/run/nic 0.sock", Isolation.ISOLATED, ("process 77",))


def test_an_unsafe_use_stays_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    here = prepared(tmp_path)
    allow_unsafe("uio_hv_generic of eth1", enabled=True, machine=here)
    found = one(here)
    assert (found.device, found.isolation) == (f"process:{os.getpid()}", Isolation.UNSAFE)
    assert found.shows == ("uio_hv_generic of eth1",)


def test_a_listening_socket_of_this_process_is_found(tmp_path: Path) -> None:
    """The real /proc."""
    path = tmp_path / "nic0.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        found = [one for one in inventory.holders.listening() if one.path == str(path)]
        assert [holder.pid for holder in inventory.holders.of_sockets(found).holders] == [os.getpid()]


@given(files=st.dictionaries(st.sampled_from(["vendor", "device", "class", "config", "driver_override"]), st.binary(max_size=80)))
def test_whatever_a_pci_device_says_it_is_listed(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    here = machine(tmp_path_factory.mktemp("machine"))
    device = pci_device(here, CARD, driver="uio_pci_generic")
    pci_device(here, "0000:00:05.0", driver="vfio-pci", group=1)
    put(here.sysfs / "bus/pci/devices/not-an-address/vendor", "")
    for name, content in files.items():
        put(device / name, content)
    assert [found.device for found in items(here)] == [f"pci:{CARD}", "pci:0000:00:05.0"]


def test_uevents_of_other_kinds_are_not_ours() -> None:
    assert concerns_us(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=vmbus\0")
    assert not concerns_us(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=tty\0")
    assert not concerns_us(b"")


@given(message=st.binary(max_size=200))
def test_no_uevent_breaks_it(message: bytes) -> None:
    concerns_us(message)


def test_a_link_that_comes_is_noticed() -> None:
    """The real kernel: the loopback's neighbour comes and goes in a network namespace of its own, where this user may have one."""
    program = (
        "import ctypes, socket, struct, fcntl, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x40000000): sys.exit(77)\n"
        "from vfio_vmbus.bus.uevents import Uevents\n"
        "with Uevents() as uevents:\n"
        "    assert not uevents.wait(0)\n"
        "    tun = open('/dev/net/tun', 'r+b', buffering=0)\n"
        "    fcntl.ioctl(tun, 0x400454CA, struct.pack('16sH14x', b'seen0', 0x1002))\n"
        "    assert uevents.wait(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "/dev/net/tun" in done.stderr:
        pytest.skip("no network namespace, or no TAP, for this user")
    assert (done.returncode, done.stderr) == (0, "")
