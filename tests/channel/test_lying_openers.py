"""A server that shows an opened device and lies about it, or fails at any moment: an error of its own kind, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from bent_device import BentDevice

from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.channel.opened import MAX_BUFFER, OpenedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.errors import (
    ClosedError,
    DmaError,
    PeerError,
    ProtocolError,
    RefusedError,
    RescindedError,
    RingError,
    UnavailableError,
    UsageError,
    VfioVmbusError,
)
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.device import Device
from vfio_vmbus.vfio.inprocess import InProcessDevice
from vfio_vmbus.vfio.vmbus_function import OpenedMemory, Sizes, VmbusFunction
from vfio_vmbus.wire import opened as wire
from vfio_vmbus.wire.ring import RING_READ_INDEX, RING_WRITE_INDEX

RW = READ | WRITE
SIZES = Sizes(upstream=2 * PAGE, downstream=3 * PAGE, receive=4 * PAGE, send=2 * PAGE)


class Nowhere:
    """Opens channels that lead nowhere, whose rings begin as `spoil` leaves them."""

    def __init__(self) -> None:
        self.spoil: Callable[[OpenedMemory], None] = lambda memory: None

    def start(self, memory: OpenedMemory, interrupt: int) -> None:
        self.spoil(memory)

    def stop(self) -> None:
        pass


class Liar:
    """A function whose registers and regions a test may change."""

    def __init__(self, sizes: Sizes = SIZES) -> None:
        self.function = VmbusFunction("liar", sizes=sizes)
        self.backend = self.function.backend = Nowhere()

    def device(self) -> Device:
        return InProcessDevice(self.function, lambda call: call(), lambda: None)

    def register(self, offset: int, value: int) -> None:
        self.function._registers[offset : offset + 4] = value.to_bytes(4, "little")

    def region(self, index: int, **changes: Any) -> None:
        self.function.windows[index] = replace(self.function.windows[index], **changes)

    def no_region(self, index: int) -> None:
        del self.function.windows[index]


@contextmanager
def liar(sizes: Sizes = SIZES) -> Iterator[Liar]:
    with nothing_left(objects=False):
        made = Liar(sizes)
        yield made
        made.function.close()


def drive(device: Device) -> None:
    with open_device(device) as opened:
        channel = opened.open(2)
        shared = [opened.share(PAGE, access, "shared") for access in (RW, READ)]
        opened.dma_buffer(PAGE, RW, "pool")
        assert not opened.rescinded
        assert [buffer.size for buffer in shared] == [4 * PAGE, 2 * PAGE]
        assert shared[0].handle != shared[1].handle
        channel.close()
        shared[0].close()
        opened.open(2)


Lie = Callable[[Liar], None]
UPSTREAM, DOWNSTREAM = wire.CHANNELS_AT + 4, wire.CHANNELS_AT + 8

LIES: dict[str, tuple[type[VfioVmbusError], str, Lie]] = {
    "magic": (UnavailableError, "begins with 0x00000001", lambda it: it.register(0, 1)),
    "layout": (UnavailableError, "layout 2", lambda it: it.register(4, 2)),
    "no registers": (UnavailableError, "shows no opened VMBus device", lambda it: it.no_region(7)),
    "few registers": (UnavailableError, "too short", lambda it: it.region(7, size=0x1000)),
    "no channel": (ProtocolError, "no channel", lambda it: it.register(0x10, 0)),
    "rings nowhere": (ProtocolError, "channel 0 is not as", lambda it: it.register(wire.CHANNELS_AT, 1)),
    "rings beyond": (ProtocolError, "channel 0 is not as", lambda it: it.register(wire.CHANNELS_AT, 1 << 31)),
    "rings elsewhere": (ProtocolError, "rings of 8192 and 12288 bytes in 8192", lambda it: it.register(wire.CHANNELS_AT, 7)),
    "no ring": (ProtocolError, "a ring of 0 pages", lambda it: it.register(UPSTREAM, 0)),
    "no data": (ProtocolError, "a ring of 1 pages", lambda it: it.register(DOWNSTREAM, 1)),
    "a huge ring": (ProtocolError, "a ring of 4294967295 pages", lambda it: it.register(DOWNSTREAM, 0xFFFF_FFFF)),
    "a longer ring": (ProtocolError, "rings of 12288", lambda it: it.register(UPSTREAM, 3)),
    "shorter rings": (ProtocolError, "in 16384 bytes", lambda it: it.region(0, size=4 * PAGE)),
    "rings of half a page": (ProtocolError, "bytes in 20488", lambda it: it.region(0, size=5 * PAGE + 8)),
    "rings of no memory": (ProtocolError, "cannot be mapped", lambda it: it.region(0, memory=None)),
    "no receive buffer": (RefusedError, "no buffer for shared", lambda it: it.no_region(3)),
    "no send buffer": (RefusedError, "no buffer for shared", lambda it: it.no_region(4)),
    "no handle": (RefusedError, "no buffer for shared", lambda it: it.no_region(5)),
    "no handle to send": (RefusedError, "no buffer for shared", lambda it: it.no_region(6)),
    "handle 0": (ProtocolError, "handle is 0", lambda it: it.region(5, read=lambda offset, size: bytes(size))),
    "an odd buffer": (ProtocolError, "a buffer of 4100 bytes", lambda it: it.region(3, size=4100)),
    "a huge buffer": (ProtocolError, f"up to {MAX_BUFFER}", lambda it: it.region(4, size=1 << 40)),
    "a longer buffer": (ProtocolError, "a buffer is not as", lambda it: it.region(4, size=8 * PAGE)),
    "a buffer of no memory": (ProtocolError, "a buffer is not as", lambda it: it.region(3, memory=None)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_told_from_the_truth(name: str) -> None:
    error, text, lie = LIES[name]
    with liar() as it:
        lie(it)
        for _ in range(2):
            with nothing_left(objects=False), pytest.raises(error, match=text):
                drive(it.device())


def test_the_truth_is_believed() -> None:
    with liar() as it:
        for _ in range(2):
            drive(it.device())


@pytest.mark.parametrize(("ring", "index"), [(0, RING_WRITE_INDEX), (2 * PAGE, RING_READ_INDEX)])
@pytest.mark.parametrize("value", [4, PAGE * 4, 0xFFFF_FFF8])
def test_rings_whose_indices_cannot_be(ring: int, index: int, value: int) -> None:
    with liar() as it:
        it.backend.spoil = lambda memory: memory.part(0)[1].write(ring + index, value.to_bytes(4, "little"))
        with pytest.raises(RingError):
            drive(it.device())


def test_a_channel_that_is_not_open() -> None:
    def no(memory: OpenedMemory) -> None:
        raise RefusedError("no")

    with liar() as it:
        it.backend.spoil = no
        with pytest.raises(RefusedError, match="did not open the channel"):
            drive(it.device())
        it.backend.spoil = lambda memory: None
        with open_device(it.device()) as opened:
            channel = opened.open(2)
            it.function.fail()
            with pytest.raises(RefusedError, match="closed the channel"):
                assert opened.rescinded
            channel.close()
            opened.open(2)
            assert not opened.rescinded
            it.function.gone()
            assert opened.rescinded
        with pytest.raises(RescindedError):
            drive(it.device())


def test_a_device_that_cannot_be_reset_is_used_as_it_is() -> None:
    with liar() as it:
        device = it.device()
        device.info = replace(device.info, resettable=False)
        resets = BentDevice(device, lambda number, name: pytest.fail(name) if name == "reset" else None)
        drive(resets)


ERRORS: dict[str, Callable[[], Exception]] = {
    "closed": lambda: ClosedError("the device is closed"),
    "gone": lambda: PeerError("the server is gone"),
    "refused": lambda: DmaError("no"),
    "not there": lambda: UsageError("nothing there"),
    "pipe": lambda: BrokenPipeError(32, "Broken pipe"),
}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", ERRORS)
def test_any_use_may_fail(kind: str, lasting: bool) -> None:
    with liar() as it:
        for wrong in count(1):

            def bend(number: int, name: str, wrong: int = wrong) -> None:
                if number == wrong or (lasting and number > wrong):
                    raise ERRORS[kind]()

            device = BentDevice(it.device(), bend)
            with nothing_left(objects=False):
                try:
                    drive(device)
                except (VfioVmbusError, OSError) as error:
                    known = type(ERRORS[kind]()) | UsageError | DmaError | ProtocolError | UnavailableError | RefusedError
                    assert isinstance(error, known), f"use {wrong}: {error!r}"
            if device.uses < wrong:  # all went well
                break
        assert wrong > 30
        drive(it.device())


def test_what_nobody_expects_comes_through() -> None:
    class Broken(Exception):
        pass

    with liar() as it:
        for wrong in (1, 5, 9):

            def bend(number: int, name: str, wrong: int = wrong) -> None:
                if number == wrong:
                    raise Broken

            with nothing_left(objects=False), pytest.raises(Broken):
                drive(BentDevice(it.device(), bend))


def test_the_device_stays_its_callers() -> None:
    with liar() as it, it.device() as device:
        opened = OpenedDevice(device)
        opened.open(2)
        opened.close()
        assert device.region(7).read(0, 4) == b"VMBO"
