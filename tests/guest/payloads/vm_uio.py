"""Our own drivers in a guest of our own virtual machine: uio_hv_generic gives them the card on the kernel's real VMBus.

`outside` runs in the machine that has /dev/kvm, `inside` in its guest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

Report = Callable[[Any], None]

OUTSIDE, INSIDE = "10.9.0.1", "10.9.0.2"
UNSAFE = "--enable-unsafe-noiommu-mode"
TAP = "vm0"
PULL, PLUG = "pull the card", "plug it in again"
COMPLAINTS = Path("/run/complaints")
"""What the last `net tap` complained of."""
PATIENCE = 300.0


def outside(report: Report, kernel: str, initrd: str, disk: str) -> dict[str, Any]:
    """Boot, have `inside` run there, pull its card and plug it in again, and look at it from the namespace and the host."""
    from guest.vm import MIB, Images, inner

    from vfio_vmbus.apps.lab import Lab, NamespaceSpec
    from vfio_vmbus.host.embedded import EmbeddedHost

    with ExitStack() as stack:
        lab = stack.enter_context(Lab(NamespaceSpec("outside", f"{OUTSIDE}/24")))
        host = stack.enter_context(EmbeddedHost(poll="interrupt"))
        host.switch.add_tap(lab.namespaces[0].tap.fd)
        nic = host.add_nic("nic0")
        guest = stack.enter_context(inner(Images.of(kernel, initrd, disk), host, nic, memory=640 * MIB))
        guest.shell.run("sysctl -w vm.nr_hugepages=64")
        report("booted")
        guest.shell.send(f"py {__file__} inside '{{}}'")
        guest.shell.hear(PULL, PATIENCE)
        guest.hyperv.rescind(nic)
        guest.shell.hear(PLUG, PATIENCE)
        guest.hyperv.offer(nic)
        status, said = guest.shell.answer(PATIENCE)
        messages = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        failed = [message["error"] for message in messages if "error" in message]
        if status or failed:
            raise RuntimeError("\n".join([f"status {status}", *failed, said]))
        found: dict[str, Any] = messages[-1]["result"]
        found["mac of the host"] = nic.mac.hex(":")
        found["interface"] = guest.interface(nic)
        connection = guest.hyperv.connection
        found["host"] = [connection.failed, list(map(str, connection.errors)), connection.domain.fault_count]
        return found


def inside(report: Report) -> dict[str, Any]:
    """There and back: the kernel's card, ours, driven, its driver killed and started again, the card pulled under it and plugged in
    again, the kernel's."""
    from vfio_vmbus.bus import vmbus
    from vfio_vmbus.wire.guids import CLASS_NETWORK

    def card() -> Any:
        (found,) = [device for device in vmbus.devices() if device.class_guid == str(CLASS_NETWORK)]
        return found

    name = card().name
    said: dict[str, Any] = {"name": name, "before": card().driver}
    said["list"] = row(command("list", "--json")["said"], name)
    said["bind"] = command("bind", name, "--json")["status"]
    said["bound"] = card().driver
    said["list bound"] = row(command("list", "--json")["said"], name)
    said["without the switch"] = command("net", "tap", TAP, "--device", f"vmbus:{name}", "--seconds", "1")
    report("bound")
    said["mac"] = drive(name)
    report("driven by hand")
    first = start_tap(name)
    said["first"] = reach()
    audit = command("audit", "--json")
    said["audit"] = [audit["status"], [device["isolation"] for device in audit["said"]["devices"]]]
    os.kill(first, signal.SIGKILL)
    said["killed"] = end_of(first)
    report("killed")
    second = start_tap(name)
    said["second"] = reach()
    report("driven again")
    say(PULL)
    said["pulled"] = [end_of(second), COMPLAINTS.read_text()]
    wait_until(lambda: all(device.name != name for device in vmbus.devices()), "the kernel has let go of it")
    say(PLUG)
    wait_until(lambda: [device.driver for device in vmbus.devices()] == ["hv_netvsc"], "the kernel drives it again")
    said["bound again"] = command("bind", name, "--json")["status"]
    third = start_tap(name)
    said["third"] = reach()
    os.kill(third, signal.SIGTERM)
    said["ended"] = end_of(third)
    said["unbind"] = command("unbind", name, "--json")["status"]
    said["back"] = card().driver
    return said


def command(*arguments: str) -> dict[str, Any]:
    """The command in this process, as a new one takes long in here: exit status, what it printed, what it complained of."""
    from vfio_vmbus.cli.main import main

    out, complaints = StringIO(), StringIO()
    before, sys.argv = sys.argv, ["vfio-vmbus", *arguments]
    status: Any = 0
    try:
        with redirect_stdout(out), redirect_stderr(complaints):
            main()
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


def row(rows: list[dict[str, Any]], name: str) -> list[Any]:
    (found,) = [each for each in rows if each["device"] == f"vmbus:{name}"]
    return [found["driver"], found["isolation"]]


def drive(name: str) -> str:
    """netvsc itself, over the channel that the kernel opens: its card's address."""
    from vfio_vmbus.bus import uio
    from vfio_vmbus.bus.uio_device import UioDevice
    from vfio_vmbus.drivers.netvsc.driver import Netvsc

    with UioDevice(uio.find(name, wait=PATIENCE), unsafe=True) as device, Netvsc(device) as nic:
        return nic.mac.hex(":")


def start_tap(name: str) -> int:
    """`net tap` in a process of its own; its TAP has an address when this returns."""
    pid = os.fork()
    if pid == 0:
        said = command("net", "tap", TAP, "--device", f"vmbus:{name}", "--poll", "interrupt", UNSAFE)
        COMPLAINTS.write_text(said["complained"])
        os._exit(said["status"])
    from pyroute2 import IPRoute

    def made() -> bool:
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, f"net tap ended: {COMPLAINTS.read_text()}"
        return there()

    wait_until(made, "net tap has made its TAP")
    with IPRoute() as route:
        index = route.link_lookup(ifname=TAP)[0]
        route.addr("add", index=index, address=INSIDE, prefixlen=24)
        route.link("set", index=index, state="up")
    return pid


def reach() -> bool:
    """Does the namespace outside answer?"""
    from vfio_vmbus.apps.lab.ping import ping

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(OSError):
            if ping(OUTSIDE, 3, 0.1, 5.0).received:
                return ping(OUTSIDE, 20, 0.02, 20.0).received == 20
    return False


def end_of(pid: int) -> int:
    """The exit status of a process, or its signal, negative; its TAP is gone then."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wait_until(lambda: not there(), "its TAP is gone")
    return status


def there() -> bool:
    return Path("/sys/class/net", TAP).exists()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def say(word: str) -> None:
    """To `outside`, while this runs."""
    Path("/dev/console").write_text(f"\x02{word}\n")
