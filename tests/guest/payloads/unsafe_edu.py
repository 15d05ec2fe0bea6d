"""What payloads share that drive edu where nothing keeps it in bounds: bindings, traces, DMA by physical addresses, suites."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfio_vmbus.bus import binding, pci
from vfio_vmbus.bus.policy import CAP_SYS_RAWIO, unsafe_uses
from vfio_vmbus.errors import VfioVmbusError
from vfio_vmbus.iommu.physical import PhysicalBuffer
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory import signal  # noqa: F401  (which sets up what it keeps once a process, and does not survive a fork)
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.conformance import DeviceConformance
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples"))
import edu

STATE = Path("/dev/shm/vfio-vmbus")
TEXT = b"all of memory"
Report = Callable[[Any], None]
_WARNINGS = ("unsafe, nothing confines its DMA", "kernel taint for vfio-noiommu", "vfio-noiommu device opened by user")
"""What this package says in the kernel's log, and what the kernel says itself (drivers/vfio/group.c, vfio_main.c)."""


@contextmanager
def bound(address: str, driver: str, *, unsafe: bool = False) -> Iterator[None]:
    """The device is `driver`'s, and then whose it was."""
    before = pci.look(address)
    binding.bind(address, driver, state=STATE, unsafe=unsafe)
    try:
        yield
    finally:
        binding.unbind(address, state=STATE)
        after = pci.look(address)
        assert (after.driver, after.override) == (before.driver, before.override)


def said(what: Callable[[], object]) -> str:
    """The error, by name."""
    try:
        what()
    except VfioVmbusError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@dataclass(frozen=True)
class Traces:
    """What tells of unsafe ways: the taint, lines of the kernel's log, marks."""

    tainted: bool
    lines: tuple[str, ...]
    marks: tuple[str, ...]


def traces() -> Traces:
    """What there is by now."""
    found = [line for line in kernel_log() if any(words in line for words in _WARNINGS)]
    marks = tuple(use.what for use in unsafe_uses())
    return Traces(bool(int(Path("/proc/sys/kernel/tainted").read_text()) >> 6 & 1), tuple(found), marks)


def kernel_log() -> list[str]:
    """What is in it by now."""
    lines = []
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            lines.append(os.read(log, 8192).decode(errors="replace").partition(";")[2].splitlines()[0])
    except BlockingIOError:
        return lines
    finally:
        os.close(log)


def command(device: Device) -> int:
    """The command register."""
    return int.from_bytes(device.region(CONFIG_REGION).read(4, 2), "little")


def both_ways(device: Device, driver: edu.Edu) -> str:
    """What the device has copied from one page to another, by their physical addresses."""
    with PhysicalBuffer(4096, READ | WRITE, "one") as one, PhysicalBuffer(4096, READ | WRITE, "two") as two:
        for each in (one, two):
            device.dma.map(each.iova, each.memory.fd, 0, each.size, READ | WRITE)
        one.mapping.write(0, TEXT)
        copy(device, driver, one.iova, edu.BUFFER, 0)
        copy(device, driver, edu.BUFFER, two.iova, edu.DMA_FROM_DEVICE)
        for each in (one, two):
            device.dma.unmap(each.iova, each.size)
        return two.mapping.read(0, len(TEXT)).decode(errors="replace")


def copy(device: Device, driver: edu.Edu, source: int, destination: int, direction: int) -> None:
    """As Edu's, with addresses of 64 bits."""
    bar = device.region(BAR0_REGION)
    bar.write64(edu.DMA_SOURCE, source)
    bar.write64(edu.DMA_DESTINATION, destination)
    bar.write32(edu.DMA_COUNT, len(TEXT))
    bar.write32(edu.DMA_COMMAND, edu.DMA_START | direction | edu.DMA_INTERRUPT)
    driver.wait(edu.INTERRUPT_DMA)


def without_rawio(*questions: Callable[[], object]) -> list[str]:
    """What a process says that is root but for CAP_SYS_RAWIO."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _give_up(CAP_SYS_RAWIO)
        os.write(theirs, "\0".join(said(question) for question in questions).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return text.split("\0")


def _give_up(capability: int) -> None:
    """Of the effective capabilities (capset(2), version 3 of its structures)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) == 0:
        data[0] &= ~(1 << capability)
        if libc.capset(header, data) == 0:
            return
    raise OSError(ctypes.get_errno(), "capabilities")


def results(suite: DeviceConformance, names: list[str]) -> dict[str, str]:
    """What went wrong, by the name of the test; "" where nothing did."""
    found = {}
    for name in names:
        try:
            getattr(suite, name)()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


def physical_maps(opened: Callable[[], Device]) -> dict[str, str]:
    """What the suite asks of maps, with memory that may be mapped at one place only: pages at their own frames."""
    found = {}
    with PhysicalBuffer(2 * PAGE, READ | WRITE, "pages") as memory, opened() as device:
        first, second = (frame * PAGE for frame in memory.pfns)

        def map_(iova: int, page: int) -> None:
            device.dma.map(iova, memory.memory.fd, page * PAGE, PAGE, READ | WRITE)

        for _ in range(3):
            map_(first, 0)
            map_(second, 1)
            device.dma.unmap(first, PAGE)
            device.dma.unmap(second, PAGE)
        device.dma.unmap(first, PAGE)
        map_(first, 0)
        found["twice"] = said(lambda: map_(first, 0))
        found["another's frame"] = said(lambda: map_(second, 0))
        found["elsewhere"] = said(lambda: map_(1 << 32, 0))
        found["half of it"] = said(lambda: device.dma.unmap(first, PAGE // 2))
    return {name: text.replace(f"{first:#x}", "FIRST").replace(f"{second:#x}", "SECOND") for name, text in found.items()}
