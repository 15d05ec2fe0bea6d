"""bind and unbind as a user means them: any name of the device, nobody's login cut off, and what lasts beyond a reboot."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.bus.sysfs_tree import SysfsTree
from tests.bus.trees import NETWORK, NIC0, link, put, uio_device
from tests.bus.vmbus_kernel import VmbusKernel
from vfio_vmbus.bus import persist
from vfio_vmbus.bus.assign import assign, give_back
from vfio_vmbus.bus.names import Target
from vfio_vmbus.bus.persist import Persistence
from vfio_vmbus.errors import UnavailableError, UnsafeError, UsageError

CARD = "0000:00:04.0"
ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n{}\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\n"
DRIVERCTL = """#!/bin/sh
# Does with its files what driverctl 0.111 does; the device itself is the test's.
echo "$@" >> {log}
[ -e {broken} ] && {{ echo 'driverctl: no such module: x' >&2; exit 1; }}
case "$*" in
*unset-override*) rm -f {etc}/driverctl.d/$2-* ;;
*set-override*) mkdir -p {etc}/driverctl.d; echo "$5" > {etc}/driverctl.d/$2-$4 ;;
esac
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VmbusKernel:
    """A guest with eth0 of hv_netvsc, and no driverctl."""
    made = VmbusKernel.make(tmp_path)
    device = made.offer(NIC0, NETWORK, "hv_netvsc")
    put(device / "net/eth0/address", "")
    link(made.sysfs / "class/net/eth0", device / "net/eth0")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    return made


def with_driverctl(root: Path) -> Path:
    log = root / "driverctl.log"
    program = put(root / "bin/driverctl", DRIVERCTL.format(log=log, broken=root / "broken", etc=root / "etc"))
    program.chmod(0o755)
    return log


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.parametrize("name", ["eth0", NIC0, f"{{{NIC0.upper()}}}", f"vmbus:{NIC0}"])
def test_by_any_name_there_and_back(kernel: VmbusKernel, state: Path, name: str) -> None:
    before = kernel.state()
    done = assign(name, machine=kernel, state=state)
    assert (done.target.name, done.binding.driver, done.binding.driver_before) == (NIC0, "uio_hv_generic", "hv_netvsc")
    assert (done.isolation, done.persistence) == ("unsafe", None)
    back = give_back(NIC0, machine=kernel, state=state)
    assert (back.isolation, back.nodes) == ("kernel", ())
    assert kernel.state() == before


def test_what_carries_the_default_route_stays_unless_forced(kernel: VmbusKernel, state: Path) -> None:
    put(kernel.proc / "net/route", ROUTES.format("eth0"))
    with pytest.raises(
        UnavailableError, match=r"eth0 is in use: eth0 carries the default route \(--force takes it all the same\)"
    ):
        assign("eth0", machine=kernel, state=state)
    assert kernel.written == []
    assert assign("eth0", force=True, machine=kernel, state=state).binding.driver == "uio_hv_generic"


def test_what_carries_the_login_stays(kernel: VmbusKernel, state: Path) -> None:
    put(
        kernel.proc / "net/route",
        ROUTES.format("eth0").replace("\t00000000\t0100000A", "\t0000000A\t00000000").replace("\t00000000\n", "\t000000FF\n"),
    )
    with pytest.raises(UnavailableError, match=r"eth0 carries the remote login from 10\.0\.0\.7"):
        assign("eth0", machine=kernel, state=state, environment={"SSH_CONNECTION": "10.0.0.7 5 10.0.0.7 22"})
    assert kernel.written == []


def test_what_somebody_has_open_is_not_taken_away(kernel: VmbusKernel, state: Path) -> None:
    assign("eth0", machine=kernel, state=state)
    device = (kernel.sysfs / "bus/vmbus/devices" / NIC0).resolve()
    uio_device(kernel, device)
    link(kernel.proc / "77/fd/5", kernel.dev / "uio0")
    written = len(kernel.written)
    with pytest.raises(UnavailableError, match=r"uio0 is held open by process 77"):
        give_back(NIC0, machine=kernel, state=state)
    assert len(kernel.written) == written
    give_back(NIC0, force=True, machine=kernel, state=state)


def test_what_was_not_bound_here_is_told_so_before_anything_else(kernel: VmbusKernel, state: Path) -> None:
    """Nobody is led to --force by a default route."""
    put(kernel.proc / "net/route", ROUTES.format("eth0"))
    with pytest.raises(UsageError, match=rf"eth0 was not bound here .*: vfio-vmbus bind {NIC0} --driver NAME gives it"):
        give_back("eth0", machine=kernel, state=state)
    assert kernel.written == []


def test_a_rule_for_udev_is_written_and_removed(kernel: VmbusKernel, state: Path, tmp_path: Path) -> None:
    """Also where driverctl is installed: the dashes of a GUID are lost on the way to its service."""
    log, before = with_driverctl(tmp_path), kernel.state()
    done = assign("eth0", lasting=True, machine=kernel, state=state)
    assert done.persistence == Persistence("udev", kernel.etc / f"udev/rules.d/60-vfio-vmbus-{NIC0}.rules")
    comment, rule = done.persistence.file.read_text().splitlines()
    assert comment.startswith("# vfio-vmbus: vmbus device")
    assert f'SUBSYSTEM=="vmbus", KERNEL=="{NIC0}", ATTR{{driver_override}}="uio_hv_generic"' in rule
    assert give_back(NIC0, machine=kernel, state=state).persistence == done.persistence
    assert kernel.state() == before
    assert (list(done.persistence.file.parent.iterdir()), log.exists()) == ([], False)


@pytest.mark.parametrize(("driver", "written"), [("hv_netvsc", [NIC0, NIC0]), (None, ["", NIC0]), ("uio_hv_generic", ["", ""])])
def test_what_the_rule_runs(tmp_path: Path, driver: str | None, written: list[str]) -> None:
    """It is taken from another driver, and left alone where it is as it shall be: somebody may have it open."""
    made = VmbusKernel.make(tmp_path)
    made.offer(NIC0, NETWORK, "hv_netvsc")
    device = made.sysfs / "devices/vmbus" / NIC0
    (device / "driver").unlink()
    if driver:
        link(device / "driver", made.sysfs / "bus/vmbus/drivers" / driver)
        link(made.sysfs / "bus/vmbus/drivers" / driver / NIC0, device)
    rule = persist.save(Target("vmbus", NIC0), "uio_hv_generic", made).file.read_text()
    found = re.search(r"""RUN\+="/bin/sh -c '([^']*)'\"$""", rule, re.MULTILINE)
    assert found is not None
    line = found[1].replace("%p", f"/devices/vmbus/{NIC0}").replace("%k", NIC0).replace("/sys/", f"{made.sysfs}/")
    assert subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=False).stderr == b""
    files = (made.sysfs / "bus/vmbus/drivers/hv_netvsc/unbind", made.sysfs / "bus/vmbus/drivers_probe")
    assert [file.read_text().strip() for file in files] == written


def test_bound_by_the_rule_at_the_last_start_it_gets_its_default_driver(kernel: VmbusKernel, state: Path) -> None:
    assign("eth0", lasting=True, machine=kernel, state=state)
    (state / f"bound-{NIC0}.json").unlink()  # as /run is empty after a reboot
    back = give_back(NIC0, machine=kernel, state=state)
    assert (back.binding.driver, back.binding.driver_before) == ("uio_hv_generic", "hv_netvsc")
    assert kernel.state() == {NIC0: ("hv_netvsc", "(null)")}
    with pytest.raises(UsageError, match="was not bound here"):
        give_back(NIC0, machine=kernel, state=state)


def test_what_driverctl_saved_is_forgotten_too(kernel: VmbusKernel, state: Path, tmp_path: Path) -> None:
    log = with_driverctl(tmp_path)
    put(kernel.etc / f"driverctl.d/vmbus-{NIC0}", "uio_hv_generic\n")
    assert give_back(NIC0, machine=kernel, state=state).binding.driver_before == "hv_netvsc"
    assert log.read_text().splitlines() == [f"--bus vmbus --noprobe unset-override {NIC0}"]
    with pytest.raises(UsageError, match="was not bound here"):
        give_back(NIC0, machine=kernel, state=state)


def test_a_rule_that_cannot_be_written_leaves_everything_as_it_was(kernel: VmbusKernel, state: Path) -> None:
    put(kernel.etc / "udev", "no folder")
    before = kernel.state()
    with pytest.raises(UnavailableError, match=r"\.rules cannot be written \(.*\): run as root, or bind without --persist"):
        assign("eth0", lasting=True, machine=kernel, state=state)
    assert kernel.state() == before
    assert list(state.iterdir()) == []


@pytest.fixture
def pci(tmp_path: Path) -> SysfsTree:
    tree = SysfsTree.make(tmp_path)
    tree.add_driver("vfio-pci")
    tree.add_driver("e1000", (0x8086, 0x100E))
    tree.add_device(CARD, (0x8086, 0x100E), driver="e1000")
    return tree


def test_driverctl_saves_and_forgets(pci: SysfsTree, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    log = with_driverctl(tmp_path)
    done = assign(CARD, lasting=True, machine=pci, state=state)
    assert done.persistence is not None
    assert (done.persistence.by, done.persistence.file.read_text()) == ("driverctl", "vfio-pci\n")
    give_back(CARD, machine=pci, state=state)
    assert log.read_text().splitlines() == [
        f"--bus pci set-override {CARD} vfio-pci",
        f"--bus pci --noprobe unset-override {CARD}",
    ]
    assert pci.driver(CARD) == "e1000"


def test_a_driverctl_that_fails_leaves_everything_as_it_was(
    pci: SysfsTree, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with_driverctl(tmp_path)
    put(tmp_path / "broken")
    with pytest.raises(UnavailableError, match=r"driverctl --bus pci set-override .*: driverctl: no such module: x"):
        assign(CARD, lasting=True, machine=pci, state=state)
    assert pci.driver(CARD) == "e1000"
    assert list(state.iterdir()) == []


def test_an_old_kernel_cannot_make_it_last_and_says_so_first(kernel: VmbusKernel, state: Path) -> None:
    (kernel.sysfs / "bus/vmbus/devices" / NIC0 / "driver_override").unlink()
    with pytest.raises(UnavailableError, match=r"no driver_override, which --persist needs: this takes Linux 4\.18"):
        assign("eth0", lasting=True, machine=kernel, state=state)
    assert kernel.written == []


def test_pci_without_an_iommu_takes_the_switch_and_the_kernels(tmp_path: Path) -> None:
    address = CARD
    tree = SysfsTree.make(tmp_path)
    tree.add_driver("vfio-pci")
    tree.add_device(address, group=None)
    state = tmp_path / "state"
    with pytest.raises(UnavailableError, match="is in no IOMMU group"):
        assign(address, machine=tree, state=state)
    with pytest.raises(
        UnsafeError, match=r"the kernel does not allow it without: .*enable_unsafe_noiommu_mode is not there, or not Y"
    ):
        assign(address, unsafe=True, machine=tree, state=state)
    assert tree.written == []
    put(tree.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
    assert assign(address, unsafe=True, machine=tree, state=state).binding.driver == "vfio-pci"
    give_back(address, machine=tree, state=state)
