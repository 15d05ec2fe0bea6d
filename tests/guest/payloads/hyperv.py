"""What a process does with a real VMBus device: sees it, takes it from the kernel's driver, drives it, dies over it, gives it back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vfio_vmbus.bus import uio, vmbus
from vfio_vmbus.bus.uio_device import UioDevice
from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.drivers.balloon.driver import Balloon
from vfio_vmbus.errors import VfioVmbusError
from vfio_vmbus.memory.pinned import _frames
from vfio_vmbus.wire import dm
from vfio_vmbus.wire.guids import CLASS_BALLOON

DRIVERS = Path("/sys/bus/vmbus/drivers")
PATIENCE = 60.0

Report = Callable[[Any], None]


def balloon_name() -> str:
    """What the bus calls it."""
    (name,) = [device.name for device in vmbus.devices() if device.class_guid == str(CLASS_BALLOON)]
    return name


def look(report: Report) -> dict[str, Any]:
    """All that sysfs shows."""
    return {
        "present": vmbus.present(vmbus.Machine()),
        "devices": [asdict(device) | {"isolation": device.isolation} for device in vmbus.devices()],
        "taint": int(Path("/proc/sys/kernel/tainted").read_text()),
    }


def kernel_log(report: Report) -> str:
    """What the guest's kernel said so far."""
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def rebind(report: Report, old: str, new: str) -> str | None:
    """Take the balloon from one driver of the kernel's and give it to another, by hand."""
    name = balloon_name()
    if new == "uio_hv_generic":
        with suppress(FileExistsError):
            (DRIVERS / new / "new_id").write_text(str(CLASS_BALLOON))
    if (DRIVERS / old / name).exists():
        (DRIVERS / old / "unbind").write_text(name)
    if not (DRIVERS / new / name).exists():
        (DRIVERS / new / "bind").write_text(name)
    return vmbus.look(name).driver


def describe(report: Report) -> dict[str, Any]:
    """The node that the kernel made."""
    node = uio.find(balloon_name(), wait=PATIENCE)
    return {
        "name": node.name,
        "maps": {name: [each.index, each.size, each.handle] for name, each in node.maps.items()},
        "ring": node.ring_file(node.device.relid or 0).exists(),
        "monitor": node.device.monitor,
    }


def opened(unsafe: bool = True) -> UioDevice:
    return UioDevice(uio.find(balloon_name(), wait=PATIENCE), unsafe=unsafe)


def refused(report: Report) -> list[str]:
    """Every way in that is closed."""
    said = []
    for attempt in (lambda: opened(unsafe=False), lambda: uio.find("uio7"), lambda: uio.find("../uio0")):
        try:
            attempt()
        except VfioVmbusError as error:
            said.append(f"{type(error).__name__}: {error}")
    with opened() as first, opened() as second:
        first.open(6)
        try:
            second.open(6)
        except VfioVmbusError as error:
            said.append(f"{type(error).__name__}: {error}")
        try:
            first.open(6)
        except VfioVmbusError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def shake_hands(report: Report, times: int = 1, without_ring_file: bool = False) -> list[dict[str, Any]]:
    """Open, agree with the host, close, again and again: each time begins with empty rings."""
    if without_ring_file:
        uio.UioNode.ring_file = lambda self, relid: Path("/nothing")  # type: ignore[method-assign]
    found = []
    for _ in range(times):
        with opened() as device, Balloon(device, timeout=PATIENCE) as driver:
            channel = driver._channel
            found.append(asdict(driver.info) | {"ring": channel.outgoing.size, "signals": channel.outgoing.statistics().signals})
    return found


def buffers(report: Report) -> dict[str, Any]:
    """The kernel's shared buffers, if it makes them for this device, and memory of ours whose frames are known."""
    found: dict[str, Any] = {}
    with opened() as device:
        device.open(6)
        for name, access in (("receive", WRITE), ("send", READ)):
            try:
                with_it = device.share(1, access, name)
                found[name] = [with_it.handle, with_it.size]
                with_it.close()
            except VfioVmbusError as error:
                found[name] = f"{type(error).__name__}: {error}"
        Path("/proc/sys/vm/nr_hugepages").write_text("2")
        huge = device.dma_buffer(2 << 20, READ | WRITE, "huge")
        small = device.dma_buffer(3 * 4096, READ | WRITE, "small")
        before = small.pfns
        small.mapping.write(0, b"x" * 4096)
        found["huge"] = [huge.iova % (2 << 20), len(huge.pfns), huge.pfns[-1] - huge.pfns[0], huge.pinned]
        found["small"] = [len(before), small.pinned, min(before) > 0]
        Path("/proc/sys/vm/compact_memory").write_text("1")
        found["stay"] = _frames(small.mapping) == before
    Path("/proc/sys/vm/nr_hugepages").write_text("0")
    return found


def drive(report: Report, limit: int, seconds: float) -> dict[str, Any]:
    """The balloon driver, for so long or until it is stopped; tells whatever changes. woken: how often the host's interrupt ended its
    sleep."""
    with opened() as device, Balloon(device, limit=limit, timeout=PATIENCE, report=2.0) as driver:
        channel = driver._channel
        end = time.monotonic() + seconds
        before, woken = -1, 0
        with suppress(SystemExit):
            while time.monotonic() < end:
                driver.poll()
                if driver.info.pages != before:
                    before = driver.info.pages
                    report(asdict(driver.info) | {"woken": woken})
                if not channel.incoming.unmask():
                    woken += channel.wait(2.0)
        return asdict(driver.info) | {"woken": woken}


def die(report: Report, limit: int) -> int:
    """A driver in the midst of its work that is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with opened() as device, Balloon(device, limit=limit, timeout=PATIENCE, report=0.0) as driver:
            os.write(writing, b"!")
            while True:
                driver.poll()
    assert os.read(reading, 1) == b"!"
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def console(report: Report) -> list[dict[str, Any]]:
    """`vfio-vmbus console` with a version request typed in; the first two packets."""
    request = dm.encode_message(dm.VersionRequest(version=dm.VERSION_2)).hex()
    command = [sys.executable, "-m", "vfio_vmbus", "console", "uio0", "--json", "--enable-unsafe-noiommu-mode"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            running.stdin.write(f"{request}\n")
            return [json.loads(running.stdout.readline()) for _ in range(2)]
        finally:
            running.send_signal(signal.SIGINT)
