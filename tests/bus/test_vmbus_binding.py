"""Binding VMBus devices on a kernel's model, with driver_override and without: whatever goes wrong, everything is as it was."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bus.trees import BALLOON, NETWORK, NIC0, SCSI, uio_device
from tests.bus.vmbus_kernel import VmbusKernel
from vfio_vmbus.bus import handover, vmbus, vmbus_binding
from vfio_vmbus.bus.records import Binding
from vfio_vmbus.errors import UnavailableError, UsageError

NIC1 = "ed963694-e847-4b2a-85af-bc9cfc11d6f4"
IDLE = "ed963694-e847-4b2a-85af-bc9cfc11d6f5"
BALLOON0 = "fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"
OLD_AND_NEW = pytest.mark.parametrize("override", [True, False], ids=["with override", "without"])


def made(root: Path, override: bool = True) -> VmbusKernel:
    """Two cards and a balloon that the kernel drives, and a card that nobody does."""
    kernel = VmbusKernel.make(root)
    kernel.offer(NIC0, NETWORK, "hv_netvsc", override=override)
    kernel.offer(NIC1, NETWORK, "hv_netvsc", override=override)
    kernel.offer(IDLE, NETWORK, override=override)
    kernel.offer(BALLOON0, BALLOON, "hv_balloon", override=override)
    return kernel


@OLD_AND_NEW
def test_bound_and_given_back_and_nobody_else_noticed(tmp_path: Path, override: bool) -> None:
    kernel, state = made(tmp_path, override), tmp_path / "run"
    before = kernel.state()
    binding = vmbus_binding.bind(NIC0, machine=kernel, state=state)
    assert binding == Binding(NIC0, "uio_hv_generic", "hv_netvsc", None, "vmbus")
    after = kernel.state()
    assert after.pop(NIC0)[0] == "uio_hv_generic"
    assert after == {name: had for name, had in before.items() if name != NIC0}
    assert kernel.taught["uio_hv_generic"] == set()
    assert vmbus.look(NIC0, kernel).isolation == "unsafe"
    assert [file.name for file in state.iterdir()] == [f"bound-{NIC0}.json"]
    assert vmbus_binding.unbind(NIC0, machine=kernel, state=state) == binding
    assert kernel.state() == before
    assert list(state.iterdir()) == []


@OLD_AND_NEW
def test_what_nobody_had_nobody_has_again(tmp_path: Path, override: bool) -> None:
    kernel, state = made(tmp_path, override), tmp_path / "run"
    before = kernel.state()
    vmbus_binding.bind(IDLE, machine=kernel, state=state)
    assert kernel.state()[IDLE][0] == "uio_hv_generic"
    vmbus_binding.unbind(IDLE, machine=kernel, state=state)
    assert kernel.state() == before


def test_an_id_that_somebody_else_taught_the_driver_stays(tmp_path: Path) -> None:
    kernel, state = made(tmp_path, False), tmp_path / "run"
    kernel.taught["uio_hv_generic"].add(NETWORK)
    before = kernel.state()
    vmbus_binding.bind(NIC0, machine=kernel, state=state)
    vmbus_binding.unbind(NIC0, machine=kernel, state=state)
    assert kernel.state() == before
    assert kernel.taught["uio_hv_generic"] == {NETWORK}


def test_bound_twice_it_still_goes_back_to_what_was_first(tmp_path: Path) -> None:
    kernel, state = made(tmp_path), tmp_path / "run"
    before = kernel.state()
    vmbus_binding.bind(BALLOON0, machine=kernel, state=state)
    written = len(kernel.written)
    assert vmbus_binding.bind(BALLOON0, machine=kernel, state=state).driver_before == "hv_balloon"
    assert not any(name.endswith("unbind") for name, _ in kernel.written[written:])
    vmbus_binding.unbind(BALLOON0, machine=kernel, state=state)
    assert kernel.state() == before


@OLD_AND_NEW
def test_a_driver_whose_probe_fails_leaves_everything_as_it_was(tmp_path: Path, override: bool) -> None:
    """As uio_hv_generic's does on kernels before 6.2 with a device that has no monitor."""
    kernel, state = made(tmp_path, override), tmp_path / "run"
    before = kernel.state()
    kernel.refuses.add(("uio_hv_generic", NIC0))
    with pytest.raises(UnavailableError):
        vmbus_binding.bind(NIC0, machine=kernel, state=state)
    assert kernel.state() == before
    assert kernel.taught["uio_hv_generic"] == set()
    assert list(state.iterdir()) == []


@OLD_AND_NEW
@pytest.mark.parametrize("file", ["driver_override", "unbind", "drivers_probe", "new_id", "bind"])
@pytest.mark.parametrize("times", [0, 1])
def test_any_write_that_fails_once_leaves_everything_as_it_was(tmp_path: Path, override: bool, file: str, times: int) -> None:
    kernel, state = made(tmp_path, override), tmp_path / "run"
    before = kernel.state()
    kernel.deaf[file] = times

    class Once(VmbusKernel):
        def write(self, path: Path, text: str) -> None:
            deaf = self.deaf.get(path.name, 1) <= 0
            try:
                super().write(path, text)
            finally:
                if deaf:
                    del self.deaf[path.name]

    once = Once(**vars(kernel))
    try:
        vmbus_binding.bind(NIC0, machine=once, state=state)
    except UnavailableError:
        assert once.state() == before
        assert list(state.iterdir()) == []
    else:
        once.deaf.clear()
        vmbus_binding.unbind(NIC0, machine=once, state=state)
        assert once.state() == before


def test_a_failure_to_put_back_is_said_with_the_first(tmp_path: Path) -> None:
    kernel, state = made(tmp_path), tmp_path / "run"
    kernel.refuses.update({("uio_hv_generic", NIC0), ("hv_netvsc", NIC0)})
    with pytest.raises(UnavailableError, match=r"does not take .*; and its driver hv_netvsc does not take it back"):
        vmbus_binding.bind(NIC0, machine=kernel, state=state)


def test_everything_is_checked_before_the_first_write(tmp_path: Path) -> None:
    kernel, state = made(tmp_path), tmp_path / "run"
    for name, driver, kind, says in (
        ("nobody", "uio_hv_generic", UnavailableError, "no VMBus device nobody: there are 4"),
        (NIC0, "vfio-pci", UsageError, "vfio-pci drives PCI devices; .* take --driver uio_hv_generic"),
        (NIC0, "uio_xyz", UnavailableError, "no VMBus driver uio_xyz loaded: modprobe uio_xyz"),
        (NIC0, "../pci", UsageError, "is no name of a driver"),
    ):
        with pytest.raises(kind, match=says):
            vmbus_binding.bind(name, driver, machine=kernel, state=state)
    with pytest.raises(UsageError, match="was not bound here"):
        vmbus_binding.unbind(NIC0, machine=kernel, state=state)

    def guard(device: vmbus.SysfsDevice) -> None:
        raise UnavailableError(f"{device.kind} carries the default route")

    with pytest.raises(UnavailableError, match="network carries the default route"):
        vmbus_binding.bind(NIC0, machine=kernel, state=state, guards=(guard,))
    assert kernel.written == []
    assert not state.exists()


def test_no_vmbus_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="this machine has no VMBus"):
        vmbus_binding.bind(NIC0, machine=VmbusKernel(sysfs=tmp_path), state=tmp_path)


def test_a_class_that_cannot_be_read_stops_an_old_kernel_only(tmp_path: Path) -> None:
    for override in (True, False):
        kernel = made(tmp_path / str(override), override)
        (kernel.sysfs / "bus/vmbus/devices" / NIC0 / "class_id").write_text("")
        if override:
            vmbus_binding.bind(NIC0, machine=kernel, state=tmp_path / "run")
        else:
            with pytest.raises(UnavailableError, match="class_id: empty; without it uio_hv_generic cannot be told"):
                vmbus_binding.bind(NIC0, machine=kernel, state=tmp_path / "run2")
            assert kernel.written == []


def test_a_driver_that_is_gone_is_said_before_anything_is_written(tmp_path: Path) -> None:
    kernel, state = made(tmp_path), tmp_path / "run"
    vmbus_binding.bind(NIC0, machine=kernel, state=state)
    written = len(kernel.written)
    folder = kernel.sysfs / "bus/vmbus/drivers/hv_netvsc"
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(UnavailableError, match="had driver hv_netvsc before, which is not loaded: modprobe hv_netvsc"):
        vmbus_binding.unbind(NIC0, machine=kernel, state=state)
    assert len(kernel.written) == written
    assert kernel.state()[NIC0][0] == "uio_hv_generic"


def test_who_binds_waits_for_who_is_binding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, state = made(tmp_path), tmp_path / "run"
    monkeypatch.setattr(handover, "_PATIENCE", 0)
    handle = os.open(kernel.sysfs / "bus/vmbus/drivers_probe", os.O_WRONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="another process is binding devices"):
            vmbus_binding.bind(NIC0, machine=kernel, state=state)
    finally:
        os.close(handle)
    assert kernel.written == []
    vmbus_binding.bind(NIC0, machine=kernel, state=state)


DRIVERS = st.sampled_from(["uio_hv_generic", "hv_netvsc"])


@settings(max_examples=50, deadline=None)
@given(
    before=st.sampled_from([None, "hv_netvsc", "uio_hv_generic"]),
    override=st.booleans(),
    through=st.lists(DRIVERS, min_size=1, max_size=4),
)
def test_whatever_it_was_bound_to_it_goes_back(
    tmp_path_factory: pytest.TempPathFactory, before: str | None, override: bool, through: list[str]
) -> None:
    root = tmp_path_factory.mktemp("kernel")
    kernel, state = VmbusKernel.make(root), root / "run"
    device = kernel.offer(NIC0, NETWORK, before, override=override)
    kernel.offer(NIC1, SCSI, "hv_storvsc", override=override)
    if before == "uio_hv_generic":
        uio_device(kernel, device)
        kernel.taught["uio_hv_generic"].add(NETWORK)
    was = kernel.state()
    for driver in through:
        vmbus_binding.bind(NIC0, driver, machine=kernel, state=state)
        assert kernel.state()[NIC0][0] == driver
    if state.is_dir() and any(state.iterdir()):
        vmbus_binding.unbind(NIC0, machine=kernel, state=state)
    assert kernel.state() == was
