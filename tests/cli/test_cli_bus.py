"""list, bind, unbind, audit and doctor as a user meets them; on a /sys, /dev and /run of files where root may have a mount namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bus.trees import BALLOON, NETWORK, NIC0, machine, pci_device, put, uio_device, vmbus_device
from tests.cli.commands import one_line, run

CARD = "0000:00:04.0"
BALLOON0 = "fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"


@pytest.mark.parametrize("command", ["list", "bind", "unbind", "audit", "doctor"])
def test_help_names_the_options_and_gives_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"Example: vfio-vmbus {command}" in done.stdout
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bind"], "Missing argument"),
        (["bind", "../eth0"], "is no device: take an instance GUID"),
        (["bind", "no-such-device"], "no device no-such-device"),
        (["bind", "ffff:1f:1f.7"], "no PCI device ffff:1f:1f.7"),
        (["unbind", "00000000-0000-0000-0000-000000000000"], "no device 00000000"),
        (["unbind", "a\nb"], "is no device"),
        (["doctor", "no-such-device"], "no device no-such-device"),
        (["list", "--seconds", "0"], "--seconds"),
        (["audit", "eth0"], "eth0"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in one_line(done)


def test_watching_prints_a_line_for_each_device_and_ends_in_time() -> None:
    done = run("list", "--watch", "--json", "--seconds", "0.01")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_ = [json.loads(line) for line in done.stdout.splitlines()]
    assert (first["event"], first["device"], first["isolation"]) == ("present", "embedded:nic0", "isolated")


def test_doctor_says_what_the_embedded_host_takes() -> None:
    done = run("doctor", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == (1 if said["missing"] else 0)
    assert {"kernel", "user namespaces"} <= {check["what"] for check in said["checks"]}


class Guest:
    """A machine of files that takes the place of this one's /sys, /dev/vfio ... for a command."""

    program = (
        "import ctypes, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None): sys.exit(77)\n"
        "root = sys.argv.pop(1).encode()\n"
        "for name in (b'sys', b'run'):\n"
        "    if libc.mount(root + b'/' + name, b'/' + name, None, 0x1000, None): sys.exit(77)\n"
        "sys.argv[0] = 'vfio-vmbus'\n"
        "from vfio_vmbus.cli.main import main\n"
        "main()\n"
    )

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = machine(root)
        for folder in ("sys/class/net", "run"):
            (root / folder).mkdir(parents=True)
        put(root / "sys/bus/vmbus/drivers_probe")
        put(root / "sys/bus/vmbus/drivers/uio_hv_generic/unbind")
        put(root / "sys/bus/vmbus/drivers/hv_balloon/unbind")

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", self.program, str(self.root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
        if done.returncode == 77:
            pytest.skip("mount namespaces are forbidden here")
        return done

    def relink(self) -> None:
        """Links that name the folder of the test have to name /sys, which it will be."""
        for path in self.root.rglob("*"):
            if path.is_symlink() and os.readlink(path).startswith(str(self.root)):
                target = os.readlink(path).removeprefix(str(self.root))
                path.unlink()
                path.symlink_to(target)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    if os.geteuid() != 0:
        pytest.skip("putting files over /sys takes a mount namespace of root's")
    made = Guest(tmp_path)
    device = vmbus_device(made.machine, NIC0, NETWORK, driver="uio_hv_generic")
    uio_device(made.machine, device)
    vmbus_device(made.machine, BALLOON0, BALLOON, driver="hv_balloon")
    put(device.parent / BALLOON0 / "state", "")
    pci_device(made.machine, CARD, driver="igb_uio")
    made.relink()
    return made


def test_list_shows_what_is_bound_to_what_and_how_safe_it_is(guest: Guest) -> None:
    done = guest.run("list")
    assert (done.returncode, done.stderr) == (0, "")
    row = next(line for line in done.stdout.splitlines() if NIC0 in line.split())
    assert row.split() == [NIC0, "network", "uio_hv_generic", "uio0", "1", "2048/2048", "no", "unsafe"]
    assert f"vmbus:{NIC0}: unsafe: VMBus has no IOMMU" in done.stdout
    assert f"vmbus:{BALLOON0}: state: empty" in done.stdout
    assert f"pci:{CARD}: unsafe: igb_uio" in done.stdout
    assert "No VMBus" not in done.stdout


def test_list_for_machines(guest: Guest) -> None:
    rows = {row["device"]: row for row in json.loads(guest.run("list", "--json").stdout)}
    nic = rows[f"vmbus:{NIC0}"]
    assert (nic["class"], nic["instance"], nic["driver"], nic["isolation"]) == ("network", NIC0, "uio_hv_generic", "unsafe")
    assert nic["channels"][0]["relid"] == 1
    assert rows[f"vmbus:{BALLOON0}"]["isolation"] == "kernel"
    assert rows[f"vmbus:{BALLOON0}"]["problems"] == {"state": "empty"}
    assert rows[f"pci:{CARD}"]["isolation"] == "unsafe"


def test_audit_finds_them_and_ends_with_1(guest: Guest) -> None:
    done = guest.run("audit", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    said = json.loads(done.stdout)
    assert {device["device"]: device["isolation"] for device in said["devices"]} == {
        f"vmbus:{NIC0}": "unsafe",
        f"pci:{CARD}": "unsafe",
    }
    assert len(said["unsafe"]) >= 2
    people = guest.run("audit")
    assert people.returncode == 1
    assert f"UNSAFE: vmbus:{NIC0}" in people.stdout
    assert "unsafe things found (docs/unsafe.md)" in people.stdout


def test_a_kernel_that_does_nothing_is_one_line_and_nothing_is_left(guest: Guest) -> None:
    done = guest.run("bind", BALLOON0)
    assert done.returncode == 2
    assert "uio_hv_generic does not take" in one_line(done)
    assert list((guest.root / "run/vfio-vmbus").iterdir()) == []


def test_a_container_whose_sys_is_read_only_is_told_so(guest: Guest) -> None:
    guest.program = guest.program.replace("sys.argv[0] =", "libc.mount(None, b'/sys', None, 0x1021, None)\nsys.argv[0] =")
    done = guest.run("bind", BALLOON0)
    assert done.returncode == 2
    assert (
        "driver_override cannot be written by uid 0: run as root, on a machine (or container) whose /sys is writable"
        in one_line(done)
    )
    assert not (guest.root / "run/vfio-vmbus").exists()


def test_unbind_of_what_was_not_bound_here(guest: Guest) -> None:
    done = guest.run("unbind", NIC0)
    assert done.returncode == 2
    assert f"{NIC0} was not bound here" in one_line(done)


def test_doctor_for_a_device_of_vmbus(guest: Guest) -> None:
    done = guest.run("doctor", BALLOON0)
    assert done.returncode == 1
    assert f"vfio-vmbus bind {BALLOON0}" in done.stdout
    assert "Missing: " in done.stdout
