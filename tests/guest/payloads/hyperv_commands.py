"""The command line on a real VMBus: what `list`, `bind`, `unbind`, `doctor` and `audit` say, and what the kernel has afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from vfio_vmbus.bus import handover, vmbus
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.policy import allow_unsafe, unsafe_uses
from vfio_vmbus.cli.main import main
from vfio_vmbus.errors import UnsafeError
from vfio_vmbus.wire.guids import CLASS_BALLOON

Report = Callable[[Any], None]


def command(*arguments: str) -> dict[str, Any]:
    """The command in this process, as a new one takes long in here: exit status, what it printed, what it complained of."""
    out, complaints = StringIO(), StringIO()
    before, sys.argv = sys.argv, ["vfio-vmbus", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(complaints):
            main()
        status: Any = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    text = out.getvalue()
    return {
        "status": status,
        "said": json.loads(text) if "--json" in arguments and text else text,
        "complained": complaints.getvalue(),
    }


def balloon() -> vmbus.SysfsDevice:
    (found,) = [device for device in vmbus.devices() if device.class_guid == str(CLASS_BALLOON)]
    return found


def commands(report: Report) -> dict[str, Any]:
    """There and back, by the command line; the balloon's GUID is its name."""
    name = balloon().name
    said: dict[str, Any] = {"name": name, "override": balloon().can_override}
    said["list"] = command("list", "--json")
    said["doctor before"] = command("doctor", name, "--json")
    said["audit before"] = command("audit", "--json")
    said["bind"] = command("bind", name.upper(), "--json")
    said["bound"] = balloon().driver
    said["list bound"] = command("list", "--json")
    said["table"] = command("list")
    said["doctor bound"] = command("doctor", name, "--json")
    node = os.open("/dev/uio0", os.O_RDWR)
    said["audit open"] = command("audit", "--json")
    said["unbind open"] = command("unbind", name)
    os.close(node)
    said["refused"] = command("bind", name, "--driver", "vfio-pci")
    said["unbind"] = command("unbind", name, "--json")
    said["back"] = balloon().driver
    said["override after"] = balloon().override
    said["audit after"] = command("audit", "--json")
    said["state"] = sorted(path.name for path in Path("/run/vfio-vmbus").iterdir())
    return said


def by_class(report: Report) -> dict[str, Any]:
    """As on a kernel without driver_override: new_id, and forgotten again. What the kernel has is asked of the real files."""
    name = balloon().name

    class OldSeat(handover.Seat):
        @property
        def can_override(self) -> bool:
            return False

    seat = OldSeat("vmbus", name, Machine(), name, str(CLASS_BALLOON))
    made = handover.hand_over(seat, vmbus.UIO_DRIVER, None)
    bound = balloon().driver
    handover.give_back(seat, None)
    back = balloon().driver
    forget = Path(f"/sys/bus/vmbus/drivers/{vmbus.UIO_DRIVER}/remove_id")
    try:
        forget.write_text(str(CLASS_BALLOON))
        known = True
    except OSError:
        known = False
    return {"before": made.driver_before, "bound": bound, "back": back, "driver knows the class": known}


def policy(report: Report) -> dict[str, Any]:
    """The door to unsafe ways on a real kernel: who passes, what the kernel says of it."""
    before = int(Path("/proc/sys/kernel/tainted").read_text())
    try:
        allow_unsafe("the balloon", enabled=False)
        refused = ""
    except UnsafeError as error:
        refused = str(error)
    between = int(Path("/proc/sys/kernel/tainted").read_text())
    use = allow_unsafe("the balloon", enabled=True)
    after = int(Path("/proc/sys/kernel/tainted").read_text())
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return {
        "refused": refused,
        "taint": [before, between, after],
        "use": [use.logged, use.tainted],
        "uses": [use.what for use in unsafe_uses()],
        "log": [line for line in log.splitlines() if "vfio-vmbus" in line],
        "audit": command("audit", "--json"),
        "list": command("list", "--json"),
    }


def unprivileged(report: Report) -> dict[str, Any]:
    """As another user: what is readable is shown, what is not is said, nothing is changed."""
    for arguments in (["list", "--json"], ["audit", "--json"], ["bind", "nobody"]):
        command(*arguments)  # everything is imported while the files of Python's may be read
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    os.environ.pop("XDG_RUNTIME_DIR", None)
    name = balloon().name
    try:
        allow_unsafe("the balloon", enabled=True)
        refused = ""
    except UnsafeError as error:
        refused = str(error)
    return {
        "list": command("list", "--json"),
        "bind": command("bind", name),
        "audit": command("audit", "--json"),
        "refused": refused,
        "driver": balloon().driver,
    }
