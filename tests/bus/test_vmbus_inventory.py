"""What sysfs shows of VMBus devices, on kernels new and old, and whatever its files contain."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.trees import BALLOON, NETWORK, NIC0, SCSI, link, machine, put, uio_device, vmbus_channel, vmbus_device
from vfio_vmbus.bus import vmbus
from vfio_vmbus.bus.policy import Isolation
from vfio_vmbus.wire.guids import CLASS_GUIDS

DISK0 = "f8b3781a-1e82-4818-a1c3-63d806ec15bb"


def test_no_vmbus_is_no_device(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert not vmbus.present(here)
    assert vmbus.devices(here) == []


def test_a_network_card_that_the_kernel_drives(tmp_path: Path) -> None:
    here = machine(tmp_path)
    device = vmbus_device(here, NIC0, NETWORK, driver="hv_netvsc", relid=14)
    (device / "net/eth0").mkdir(parents=True)
    vmbus_channel(device, 21, index=1, cpu=3)
    put(device / "monitor_id", "1\n")
    put(device / "channels/21/monitor_id", "9\n")
    (nic,) = vmbus.devices(here)
    assert (nic.name, nic.instance, nic.class_guid, nic.kind) == (NIC0, NIC0, NETWORK, "network")
    assert (nic.driver, nic.isolation, nic.state, nic.relid) == ("hv_netvsc", Isolation.KERNEL, "opened", 14)
    assert (nic.networks, nic.disks, nic.shows) == (("eth0",), (), ("eth0",))
    assert (nic.monitor, nic.numa_node, nic.override, nic.can_override) == (1, 0, None, True)
    assert (nic.ring_out, nic.ring_in) == (32 * 4096, 32 * 4096)
    assert [(channel.relid, channel.index, channel.cpu, channel.monitor) for channel in nic.channels] == [
        (14, 0, 0, None),
        (21, 1, 3, 9),
    ]
    assert (nic.channels[0].out_masked, nic.channels[0].in_masked, nic.channels[0].interrupts) == (False, True, 17)
    assert nic.problems == {}


def test_a_device_in_user_space(tmp_path: Path) -> None:
    here = machine(tmp_path)
    device = vmbus_device(here, NIC0, BALLOON, driver="uio_hv_generic")
    uio_device(here, device, 3)
    put(device / "channels/1/ring")
    (found,) = vmbus.devices(here)
    assert (found.kind, found.isolation, found.uio) == ("balloon", Isolation.UNSAFE, ("uio3",))
    assert (found.ring_out, found.ring_in) == (0x200000, 0x200000)
    assert found.channels[0].ring_file
    assert found.monitor is None


def test_a_device_that_nobody_drives(tmp_path: Path) -> None:
    here = machine(tmp_path)
    vmbus_device(here, NIC0, NETWORK)
    (found,) = vmbus.devices(here)
    assert (found.driver, found.isolation, found.state, found.ring_out) == (None, None, "offered", None)
    assert (found.channels[0].out_masked, found.channels[0].read_bytes) == (None, None)
    assert found.problems == {}


def test_disks_and_functions_passed_through(tmp_path: Path) -> None:
    here = machine(tmp_path)
    device = vmbus_device(here, DISK0, SCSI, driver="hv_storvsc")
    for name in ("host0/target0:0:0/0:0:0:0/block/sda", "host0/target0:0:0/0:0:0:1/block/sdb"):
        (device / name).mkdir(parents=True)
    passed = vmbus_device(here, NIC0, str(CLASS_GUIDS["pci"]), driver="hv_pci")
    (passed / "pci0001:00/0001:00:00.0").mkdir(parents=True)
    shown = {found.name: found for found in vmbus.devices(here)}
    assert shown[DISK0].disks == ("sda", "sdb")
    assert shown[NIC0].functions == ("0001:00:00.0",)


@pytest.mark.parametrize("kind", CLASS_GUIDS)
def test_every_class_has_its_name(tmp_path: Path, kind: str) -> None:
    here = machine(tmp_path)
    vmbus_device(here, NIC0, str(CLASS_GUIDS[kind]).upper())
    (found,) = vmbus.devices(here)
    assert found.kind == kind


def test_classes_beyond_linux_and_none_at_all(tmp_path: Path) -> None:
    here = machine(tmp_path)
    vmbus_device(here, NIC0, "00000400-facb-11e6-bd58-64006a7986d3", name="a")
    vmbus_device(here, NIC0, "8b60ccf6-709f-4c11-90b5-229c959a9e6a", name="b")
    vmbus_device(here, NIC0, "6e382d18-3336-4f4b-acc4-2b7703d4df4a", name="c")
    vmbus_device(here, NIC0, "01234567-0000-0000-0000-000000000000", name="d")
    kinds = [found.kind for found in vmbus.devices(here)]
    assert kinds == ["socket:1024", "serial", "gpu", "01234567-0000-0000-0000-000000000000"]


def test_an_old_kernel(tmp_path: Path) -> None:
    """4.14: folders named by number, no channels, no override, a monitor number whether there is a monitor or not."""
    here = machine(tmp_path)
    device = vmbus_device(here, NIC0, NETWORK, name="vmbus_15", driver="hv_netvsc")
    for gone in ("numa_node", "driver_override", "vendor"):
        (device / gone).unlink()
    for path in sorted((device / "channels").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    put(device / "monitor_id", "255\n")
    (found,) = vmbus.devices(here)
    assert (found.name, found.instance, found.channels, found.monitor) == ("vmbus_15", NIC0, (), None)
    assert (found.can_override, found.numa_node) == (False, None)
    assert found.problems == {}


def test_one_broken_device_hides_no_other_and_says_what_is_wrong(tmp_path: Path) -> None:
    here = machine(tmp_path)
    vmbus_device(here, NIC0, NETWORK, driver="hv_netvsc")
    broken = vmbus_device(here, DISK0, SCSI)
    put(broken / "class_id", "{not-a-guid}\n")
    put(broken / "device_id", "")
    put(broken / "id", "7" * 5000)
    put(broken / "state", b"\xff\xfe\x00")
    link(here.sysfs / "bus/vmbus/devices/gone", tmp_path / "nowhere")
    found = {device.name: device for device in vmbus.devices(here)}
    assert found[NIC0].problems == {}
    assert found[DISK0].problems == {
        "class_id": "no GUID: '{not-a-guid}'",
        "device_id": "empty",
        "id": "longer than 4096 bytes",
        "state": "binary",
    }
    assert found[DISK0].kind == "unknown"
    assert found["gone"].problems == dict.fromkeys(("class_id", "device_id", "id", "state"), "missing")


def test_what_may_not_be_read_is_said(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    here = machine(tmp_path)
    (vmbus_device(here, NIC0, NETWORK) / "id").chmod(0)
    (found,) = vmbus.devices(here)
    assert found.problems == {"id": "permission denied"}


def test_a_file_that_would_block_does_not(tmp_path: Path) -> None:
    here = machine(tmp_path)
    device = vmbus_device(here, NIC0, NETWORK)
    (device / "id").unlink()
    os.mkfifo(device / "id")
    (device / "state").unlink()
    (device / "state").mkdir()
    (found,) = vmbus.devices(here)
    assert set(found.problems) == {"id", "state"}


FILES = ["id", "state", "class_id", "device_id", "monitor_id", "numa_node", "driver_override", "out_read_bytes_avail"]
CHANNEL_FILES = ["cpu", "subchannel_id", "out_mask", "monitor_id", "interrupts"]
CONTENT = st.one_of(st.binary(max_size=80), st.integers().map(lambda value: f"{value}\n".encode()), st.just(b"1" * 5000))


@given(files=st.dictionaries(st.sampled_from(FILES), CONTENT), channel=st.dictionaries(st.sampled_from(CHANNEL_FILES), CONTENT))
def test_whatever_is_in_the_files_there_is_a_device_to_print(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], channel: dict[str, bytes]
) -> None:
    here = machine(tmp_path_factory.mktemp("machine"))
    device = vmbus_device(here, NIC0, NETWORK, driver="hv_netvsc")
    for name, content in files.items():
        put(device / name, content)
    for name, content in channel.items():
        put(device / "channels/1" / name, content)
    (found,) = vmbus.devices(here)
    assert found.driver == "hv_netvsc"
    assert len(found.channels) == 1
    assert msgspec.json.decode(msgspec.json.encode(asdict(found)))["name"] == NIC0
    assert all(value.isprintable() for value in (found.kind, found.override or "", *found.problems.values()))
