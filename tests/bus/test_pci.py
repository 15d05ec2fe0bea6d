"""What sysfs says of PCI devices: on a made tree, and on this machine's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bus.sysfs_tree import SysfsTree
from vfio_vmbus.bus import pci
from vfio_vmbus.errors import UnavailableError, UsageError


def test_a_device_is_what_its_files_say(tmp_path: Path) -> None:
    tree = SysfsTree.make(tmp_path)
    tree.add_driver("nvme", (0x1B36, 0x10))
    tree.add_device("0000:00:04.0", group=3)
    tree.add_device("0000:00:05.0", (0x1B36, 0x10), group=3, driver="nvme")
    tree.add_device("0001:80:1f.7", group=None)
    edu, nvme, alone = pci.devices(tree)
    assert edu == pci.look("00:04.0", tree)
    assert (edu.vendor, edu.device, edu.class_code) == (0x1234, 0x11E8, 0x00FF00)
    assert (edu.driver, edu.override, edu.group) == (None, None, 3)
    assert edu.members == nvme.members == ("0000:00:04.0", "0000:00:05.0")
    assert edu.name == "0000:00:04.0 (1234:11e8)"
    assert nvme.driver == "nvme"
    assert (alone.group, alone.members) == (None, ())


@pytest.mark.parametrize("text", ["", "4", "00:04", "00:04.8", "00:20.0", "0:0:4.0", "0000:00:04.0/..", "../../x", "zz:04.0"])
def test_what_is_no_address_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text!r} is no address of a PCI device")):
        pci.look(text, SysfsTree.make(tmp_path))


def test_an_unknown_device_is_told_with_its_neighbours(tmp_path: Path) -> None:
    tree = SysfsTree.make(tmp_path)
    with pytest.raises(UnavailableError, match=r"no PCI device 0000:00:04.0: there is none at all"):
        pci.look("00:04.0", tree)
    for number in range(3):
        tree.add_device(f"0000:00:0{number}.0")
    with pytest.raises(UnavailableError, match=r"there are 3, near it 0000:00:0[012].0, "):
        pci.look("00:04.0", tree)


def test_this_machines_devices_are_read() -> None:
    if not Path("/sys/bus/pci/devices").is_dir():
        pytest.skip("this machine has no PCI bus")
    for device in pci.devices():
        assert device == pci.look(device.address)
        assert 0 < device.vendor < 1 << 16
