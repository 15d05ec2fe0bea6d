"""A device around another one, which fails or lies where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfio_vmbus.memory.mapping import Mapping
from vfio_vmbus.vfio.device import Device, Dma, Irq, Region


class BentDevice(Device):
    """Each use of `inner` asks `bend(number, name)` first: what that returns, if not None, is the answer; what it raises is raised."""

    def __init__(self, inner: Device, bend: Callable[[int, str], Any] = lambda number, name: None) -> None:
        self.inner = inner
        self.bend = bend
        self.uses = 0
        self.info = inner.info
        self.dma = _Dma(self, inner.dma)

    def use(self, name: str, call: Callable[[], Any]) -> Any:
        self.uses += 1
        bent = self.bend(self.uses, name)
        return call() if bent is None else bent

    def region(self, index: int) -> Region:
        return self.use("region", lambda: _Region(self, self.inner.region(index)))

    def irq(self, index: int) -> Irq:
        return self.use("irq", lambda: _Irq(self, self.inner.irq(index)))

    def reset(self) -> None:
        self.use("reset", self.inner.reset)

    def close(self) -> None:
        self.inner.close()


class _Region(Region):
    def __init__(self, device: BentDevice, inner: Region) -> None:
        self.device, self.inner = device, inner
        self.index, self.size, self.flags, self.areas = inner.index, inner.size, inner.flags, inner.areas

    def read(self, offset: int, size: int) -> bytes:
        return self.device.use(f"read {offset:#x}", lambda: self.inner.read(offset, size))

    def write(self, offset: int, data: bytes) -> None:
        self.device.use(f"write {offset:#x}", lambda: self.inner.write(offset, data))

    def doorbell(self, offset: int) -> int:
        return self.device.use("doorbell", lambda: self.inner.doorbell(offset))

    def map(self, offset: int, size: int, *, wrap_from: int | None = None) -> Mapping:
        return self.device.use("map region", lambda: self.inner.map(offset, size, wrap_from=wrap_from))


class _Irq(Irq):
    def __init__(self, device: BentDevice, inner: Irq) -> None:
        self.device, self.inner = device, inner
        self.index, self.count = inner.index, inner.count

    def enable(self, vector: int, eventfd: int) -> None:
        self.device.use("enable", lambda: self.inner.enable(vector, eventfd))

    def disable(self, vector: int) -> None:
        self.device.use("disable", lambda: self.inner.disable(vector))


class _Dma(Dma):
    def __init__(self, device: BentDevice, inner: Dma) -> None:
        self.device, self.inner = device, inner

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        self.device.use("map", lambda: self.inner.map(iova, fd, offset, size, access))

    def unmap(self, iova: int, size: int) -> None:
        self.device.use("unmap", lambda: self.inner.unmap(iova, size))
