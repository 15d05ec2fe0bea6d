"""What a user calls a device, and what the machine would lose with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.trees import NETWORK, NIC0, SCSI, link, machine, put, uio_device, vmbus_device
from vfio_vmbus.bus import holders, inuse, names
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.names import Target, resolve
from vfio_vmbus.errors import UnavailableError, UsageError

DISK0 = "f8b3781a-1e82-4818-a1c3-63d806ec15bb"
CARD = "0000:00:04.0"
ROUTE_HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    """A guest: eth0 on VMBus, eth1 a virtio card on PCI, sda with sda1 on VMBus."""
    made = machine(tmp_path)
    nic = vmbus_device(made, NIC0, NETWORK, driver="hv_netvsc", name="vmbus_1")
    disk = vmbus_device(made, DISK0, SCSI, driver="hv_storvsc")
    uio_device(made, disk)
    card = made.sysfs / "devices/pci0000:00" / CARD
    put(card / "vendor", "0x1af4\n")
    link(card / "subsystem", made.sysfs / "bus/pci")
    link(made.sysfs / "bus/pci/devices" / CARD, card)
    put(card / "virtio0/net/eth1/address", "52:54:00:00:00:01\n")
    link(card / "virtio0/subsystem", made.sysfs / "bus/virtio")
    link(made.sysfs / "class/net/eth1", card / "virtio0/net/eth1")
    put(nic / "net/eth0/address", "00:15:5d:00:00:01\n")
    link(made.sysfs / "class/net/eth0", nic / "net/eth0")
    put(made.sysfs / "devices/virtual/net/lo/address", "")
    link(made.sysfs / "class/net/lo", made.sysfs / "devices/virtual/net/lo")
    block = disk / "host0/target0:0:0/0:0:0:0/block/sda"
    for name, number in (("sda", "8:0"), ("sda/sda1", "8:1")):
        put(block.parent / name / "dev", f"{number}\n")
        link(made.sysfs / "class/block" / Path(name).name, block.parent / name)
    return made


@pytest.mark.parametrize(
    ("text", "bus", "name"),
    [
        (NIC0, "vmbus", "vmbus_1"),
        (f"{{{NIC0.upper()}}}", "vmbus", "vmbus_1"),
        ("vmbus_1", "vmbus", "vmbus_1"),
        ("vmbus:vmbus_1", "vmbus", "vmbus_1"),
        ("eth0", "vmbus", "vmbus_1"),
        (DISK0, "vmbus", DISK0),
        ("sda", "vmbus", DISK0),
        ("sda1", "vmbus", DISK0),
        ("uio0", "vmbus", DISK0),
        ("00:04.0", "pci", CARD),
        (CARD, "pci", CARD),
        (f"pci:{CARD}", "pci", CARD),
        ("eth1", "pci", CARD),
    ],
)
def test_all_the_names_of_a_device(here: Machine, text: str, bus: str, name: str) -> None:
    assert resolve(text, here) == Target(bus, name)


@pytest.mark.parametrize("text", ["", " ", ".", "..", "../vmbus_1", "/dev/uio0", "eth0/device", "a\nb", "vmbus:../x"])
def test_what_looks_like_a_path_is_no_device(here: Machine, text: str) -> None:
    with pytest.raises(UsageError, match="is no device: take an instance GUID"):
        resolve(text, here)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("eth7", r"no device eth7 \(this machine has 2 VMBus devices"),
        ("lo", "lo is on no bus"),
        ("00:05.0", "no PCI device 0000:00:05.0: there are 1, near it 0000:00:04.0"),
        ("00000000-0000-0000-0000-000000000000", "no device 00000000"),
        ("pci:eth0", "eth0 is on no bus"),
    ],
)
def test_what_is_not_there_is_said(here: Machine, text: str, says: str) -> None:
    with pytest.raises(UnavailableError, match=says):
        resolve(text, here)


@given(text=st.text(max_size=40))
def test_no_name_breaks_it(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    here = machine(tmp_path_factory.mktemp("machine"))
    with pytest.raises((UsageError, UnavailableError)):
        resolve(text, here)


NIC, DISK = Target("vmbus", "vmbus_1"), Target("vmbus", DISK0)


def test_nothing_in_use_is_no_reason(here: Machine) -> None:
    for target in (NIC, DISK, Target("pci", CARD)):
        assert inuse.reasons(target, here) == []


def test_the_default_route(here: Machine) -> None:
    put(here.proc / "net/route", ROUTE_HEAD + "eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n")
    assert inuse.reasons(NIC, here) == ["eth0 carries the default route"]
    assert inuse.reasons(Target("pci", CARD), here) == []


def test_the_default_route_of_ipv6_alone(here: Machine) -> None:
    zero, via = "0" * 32, "fe80" + "0" * 27 + "1"
    reject = f"{zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n"
    lines = f"{zero} 00 {zero} 00 {via} 00000400 00000001 00000000 00450003     eth1\n{reject}"
    put(here.proc / "net/ipv6_route", lines)
    assert inuse.reasons(Target("pci", CARD), here) == ["eth1 carries the default route"]
    assert inuse.reasons(NIC, here) == []


def test_a_route_through_what_is_built_on_it(here: Machine) -> None:
    """A virtual function under its synthetic card, a port of a bridge of a bond."""
    link(here.sysfs / "class/net/eth1/upper_bond0", "../bond0")
    (here.sysfs / "class/net/bond0").mkdir()
    link(here.sysfs / "class/net/bond0/upper_br0", "../br0")
    put(here.proc / "net/route", ROUTE_HEAD + "br0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n")
    assert inuse.reasons(Target("pci", CARD), here) == ["eth1 carries the default route (by br0)"]


LAN = ROUTE_HEAD + (
    "eth1\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    "eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"  # 192.168.2.0/24
    "eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
)


def test_the_remote_login(here: Machine) -> None:
    put(here.proc / "net/route", LAN)
    session = {"SSH_CONNECTION": "192.168.2.77 50022 192.168.2.5 22"}
    assert inuse.reasons(NIC, here, session) == ["eth0 carries the remote login from 192.168.2.5"]
    assert inuse.reasons(NIC, here, {"SSH_CONNECTION": "::ffff:192.168.2.77 50022 ::ffff:192.168.2.5 22"}) != []
    assert inuse.reasons(NIC, here, {"SSH_CONNECTION": "192.168.3.77 50022 192.168.3.5 22"}) == []
    assert inuse.reasons(NIC, here, {"SSH_CONNECTION": "fe80::1%eth0 50022 fe80::2%eth0 22"}) != []


def test_the_remote_login_above_sudo(here: Machine) -> None:
    put(here.proc / "net/route", LAN)
    put(here.proc / "self/environ", "HOME=/root\0")
    put(here.proc / "self/status", "Name:\tpython\nPPid:\t41\n")
    put(here.proc / "41/environ", b"LANG=C\0SSH_CONNECTION=192.168.2.77 50022 192.168.2.5 22\0")
    put(here.proc / "41/status", "PPid:\t41\n")  # a parent of itself, which no kernel shows
    assert inuse.reasons(NIC, here, {}) == ["eth0 carries the remote login from 192.168.2.5"]


def test_a_mounted_disk_its_partition_and_what_is_built_on_it(here: Machine) -> None:
    put(here.proc / "self/mountinfo", "29 1 8:1 / /boot\\040here rw,relatime shared:1 - ext4 /dev/sda1 rw\n")
    assert inuse.reasons(DISK, here) == ["sda1 is mounted at /boot here"]
    (here.sysfs / "class/block/sda1/holders/dm-0").mkdir(parents=True)
    put(here.sysfs / "class/block/dm-0/dev", "253:0\n")
    put(here.dev / "dm-0")
    link(here.dev / "mapper/root", "../dm-0")
    put(here.proc / "self/mountinfo", "29 1 0:44 / / rw - btrfs /dev/mapper/root rw\n")
    assert inuse.reasons(DISK, here) == ["dm-0 is mounted at /"]
    put(here.proc / "self/mountinfo", "")
    put(here.proc / "swaps", "Filename\t\t\t\tType\t\tSize\n/dev/sda1                               partition\t102396\t0\t-2\n")
    assert inuse.reasons(DISK, here) == ["sda1 is swapped to"]
    assert inuse.reasons(NIC, here) == []


def test_a_disk_of_several_paths(here: Machine) -> None:
    card = here.sysfs / "devices/pci0000:00" / CARD
    (card / "nvme/nvme0").mkdir(parents=True)
    subsystem = here.sysfs / "devices/virtual/nvme-subsystem/nvme-subsys0"
    put(subsystem / "nvme0n1/dev", "259:0\n")
    put(subsystem / "nvme0n1/nvme0n1p1/dev", "259:1\n")
    link(subsystem / "nvme0", card / "nvme/nvme0")
    link(here.sysfs / "class/nvme-subsystem/nvme-subsys0", subsystem)
    for name in ("nvme0n1", "nvme0n1/nvme0n1p1"):
        link(here.sysfs / "class/block" / Path(name).name, subsystem / name)
    put(here.proc / "self/mountinfo", "29 1 259:1 / / rw - xfs /dev/nvme0n1p1 rw\n")
    assert inuse.reasons(Target("pci", CARD), here) == ["nvme0n1p1 is mounted at /"]


def test_who_has_it_open(here: Machine) -> None:
    device = names.real(here.sysfs / "bus/vmbus/devices/vmbus_1")
    uio_device(here, device, 2)
    put(here.proc / "77/cmdline", b"/usr/bin/testpmd\0-l\x001\0\x1b[31m\0")
    link(here.proc / "77/fd/5", here.dev / "uio2")
    (said,) = inuse.reasons(NIC, here)
    assert said.startswith(f"{here.dev / 'uio2'} is held open by process 77 (/usr/bin/testpmd -l 1 ?[31m, ")


def test_a_node_of_this_machine_is_found_in_this_process(tmp_path: Path) -> None:
    """The real /proc: a file that this process has open is found, with who has it."""
    file = put(tmp_path / "node")
    with open(file):
        held = holders.of_nodes([str(file)])
    assert [(holder.pid, holder.path) for holder in held.holders] == [(os.getpid(), str(file))]
    assert "python" in held.holders[0].command
    assert holders.of_nodes([str(file)]).holders == []


TABLES = ["net/route", "net/ipv6_route", "net/if_inet6", "self/mountinfo", "swaps", "self/environ", "self/status", "net/unix"]


@given(files=st.dictionaries(st.sampled_from(TABLES), st.binary(max_size=300)), session=st.text(max_size=60))
def test_no_table_of_the_kernel_breaks_it(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], session: str
) -> None:
    here = machine(tmp_path_factory.mktemp("machine"))
    nic = vmbus_device(here, NIC0, NETWORK)
    put(nic / "net/eth0/address")
    link(here.sysfs / "class/net/eth0", nic / "net/eth0")
    put(nic / "block/sda/dev", "8:0")
    link(here.sysfs / "class/block/sda", nic / "block/sda")
    for name, content in files.items():
        put(here.proc / name, b"head\n" + content)
    inuse.reasons(Target("vmbus", NIC0), here, {"SSH_CONNECTION": session})
    holders.listening(here)


@given(
    line=st.lists(
        st.sampled_from(["eth0", "0", "-1", "FFFFFFFF", "00000000", "1", "::", "8:0", "/", "-", "\\777", "/dev/\\000"]),
        max_size=12,
    )
)
def test_no_line_of_almost_the_right_form_breaks_it(tmp_path_factory: pytest.TempPathFactory, line: list[str]) -> None:
    here = machine(tmp_path_factory.mktemp("machine"))
    for name in TABLES:
        put(here.proc / name, "head\n" + " ".join(line) + "\n")
    inuse.routes(here)
    list(inuse.mounts(here))
    holders.listening(here)
