"""bind and unbind, on a bus that is a tree of files: what was there is there again, whatever was in between. A real kernel: tests/guest."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bus.sysfs_tree import SysfsTree
from vfio_vmbus.bus import binding, pci
from vfio_vmbus.errors import UnavailableError, UsageError

ADDRESS = "0000:00:04.0"
OTHER = "0000:00:05.0"
IDS = (0x1234, 0x11E8)


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    tree = SysfsTree.make(tmp_path)
    tree.add_driver("vfio-pci")
    tree.add_driver("e1000e", IDS)
    tree.add_driver("uio_pci_generic")
    return tree


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "run/vfio-vmbus"


def test_bound_and_given_back(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, driver="e1000e")
    tree.add_device(OTHER, driver="e1000e")
    before = pci.devices(tree)
    made = binding.bind("00:04.0", roots=tree, state=state)
    assert made == binding.Binding(ADDRESS, "vfio-pci", "e1000e", None)
    assert pci.look(ADDRESS, tree).driver == "vfio-pci"
    assert pci.look(OTHER, tree) == before[1]
    (file,) = state.iterdir()
    assert file.name == f"bound-{ADDRESS}.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o755  # others may see what was bound, and what is unsafe
    assert binding.unbind(ADDRESS, roots=tree, state=state) == made
    assert pci.devices(tree) == before
    assert list(state.iterdir()) == []
    with pytest.raises(UsageError, match=f"{ADDRESS} was not bound here: .*; it has e1000e"):
        binding.unbind(ADDRESS, roots=tree, state=state)


def test_what_had_no_driver_has_none_afterwards_though_one_would_take_it(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS)
    binding.bind(ADDRESS, roots=tree, state=state)
    binding.unbind(ADDRESS, roots=tree, state=state)
    assert pci.look(ADDRESS, tree).driver is None
    assert pci.look(ADDRESS, tree).override is None


def test_what_vfio_has_already_is_left_alone(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, driver="vfio-pci")
    assert binding.bind(ADDRESS, roots=tree, state=state).driver_before == "vfio-pci"
    assert tree.written == []
    with pytest.raises(UsageError, match="was not bound here"):
        binding.unbind(ADDRESS, roots=tree, state=state)


def test_what_was_unplugged_says_nothing_of_what_is_there_now(tree: SysfsTree, state: Path) -> None:
    """The first one was never given back; the second has another driver of its own."""
    first = tree.add_device(ADDRESS, driver="e1000e")
    binding.bind(ADDRESS, roots=tree, state=state)
    shutil.rmtree(first)
    (tree.sysfs / "kernel/iommu_groups/1/devices" / ADDRESS).unlink()
    tree.add_device(ADDRESS, driver="uio_pci_generic")
    assert binding.bind(ADDRESS, roots=tree, state=state).driver_before == "uio_pci_generic"
    binding.unbind(ADDRESS, roots=tree, state=state)
    assert pci.look(ADDRESS, tree).driver == "uio_pci_generic"


DRIVERS = st.sampled_from(["vfio-pci", "uio_pci_generic", "e1000e"])


@settings(max_examples=60, deadline=None)
@given(
    before=st.sampled_from([None, "e1000e", "uio_pci_generic", "vfio-pci"]),
    override=st.sampled_from(["(null)", "e1000e", "vfio-pci", "uio_pci_generic"]),
    through=st.lists(DRIVERS, min_size=1, max_size=4),
)
def test_whatever_it_was_bound_to_it_goes_back(
    tmp_path_factory: pytest.TempPathFactory, before: str | None, override: str, through: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("bus")
    tree, state = SysfsTree.make(folder), folder / "run"
    for name, claims in (("vfio-pci", ()), ("e1000e", (IDS,)), ("uio_pci_generic", ())):
        tree.add_driver(name, *claims)
    path = tree.add_device(ADDRESS, driver=before)
    (path / "driver_override").write_text(override + "\n")
    was = pci.look(ADDRESS, tree)
    for driver in through:
        binding.bind(ADDRESS, driver, roots=tree, state=state)
        assert pci.look(ADDRESS, tree).driver == driver
    if state.is_dir() and any(state.iterdir()):
        binding.unbind(ADDRESS, roots=tree, state=state)
    assert pci.look(ADDRESS, tree) == was


def test_a_driver_that_does_not_take_it_leaves_everything_as_it_was(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, driver="e1000e")
    was = pci.look(ADDRESS, tree)
    tree.refuses.add(("vfio-pci", ADDRESS))
    with pytest.raises(UnavailableError, match=r"vfio-pci does not take 0000:00:04.0 \(1234:11e8\): it has no driver now"):
        binding.bind(ADDRESS, roots=tree, state=state)
    assert pci.look(ADDRESS, tree) == was
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("name", ["bus/pci/drivers_probe", f"bus/pci/devices/{ADDRESS}/driver/unbind"])
def test_a_write_that_the_kernel_refuses_leaves_everything_as_it_was(tree: SysfsTree, state: Path, name: str) -> None:
    tree.add_device(ADDRESS, driver="e1000e")
    was = pci.look(ADDRESS, tree)
    tree.deaf[name] = 0
    with pytest.raises(UnavailableError, match="does not take"):
        binding.bind(ADDRESS, roots=tree, state=state)
    assert pci.look(ADDRESS, tree) == was
    assert list(state.iterdir()) == []


def test_a_driver_that_is_gone_is_told(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, driver="e1000e")
    binding.bind(ADDRESS, roots=tree, state=state)
    del tree.claims["e1000e"]
    with pytest.raises(UnavailableError, match=r"had driver e1000e before, and has none now: is it loaded \(modprobe e1000e\)"):
        binding.unbind(ADDRESS, roots=tree, state=state)


def test_what_cannot_be_bound_says_why(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, group=None)
    tree.add_device(OTHER, group=7)
    with pytest.raises(UnavailableError, match=r"0000:00:04.0 is in no IOMMU group: turn the IOMMU on \(intel_iommu=on"):
        binding.bind(ADDRESS, roots=tree, state=state)
    (tree.dev / "vfio/noiommu-7").touch()
    with pytest.raises(UnavailableError, match=r"unsafe switch enable_unsafe_noiommu_mode \(/dev/vfio/noiommu-7\)"):
        binding.bind(OTHER, roots=tree, state=state)
    with pytest.raises(UnavailableError, match="no PCI driver vfio-xyz loaded: modprobe vfio-xyz"):
        binding.bind(OTHER, "vfio-xyz", roots=tree, state=state)
    for name in ("", "..", "a/b"):
        with pytest.raises(UsageError, match="is no name of a driver"):
            binding.bind(OTHER, name, roots=tree, state=state)
    assert tree.written == []
    binding.bind(ADDRESS, "uio_pci_generic", roots=tree, state=state)  # which needs no IOMMU


def test_a_guard_is_asked_before_anything_is_touched(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, driver="e1000e")

    def guard(device: pci.PciDevice) -> None:
        raise UnavailableError(f"{device.address} has the root file system")

    with pytest.raises(UnavailableError, match="has the root file system"):
        binding.bind(ADDRESS, roots=tree, state=state, guards=(guard,))
    assert tree.written == []
    assert not state.exists()


def test_a_state_that_makes_no_sense_is_not_guessed_at(tree: SysfsTree, state: Path) -> None:
    tree.add_device(ADDRESS, driver="e1000e")
    state.mkdir(parents=True)
    for text in ("", "{", "[]", '{"address": 5}'):
        (state / f"bound-{ADDRESS}.json").write_text(text)
        with pytest.raises(UnavailableError, match="cannot be understood"):
            binding.unbind(ADDRESS, roots=tree, state=state)
        with pytest.raises(UnavailableError, match="cannot be understood"):
            binding.bind(ADDRESS, roots=tree, state=state)
    assert tree.written == []


def test_where_the_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert binding.state_folder() == Path("/run/user/1000/vfio-vmbus")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert binding.state_folder() == Path("/run/vfio-vmbus")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    assert binding.state_folder() == Path("/run/vfio-vmbus")
