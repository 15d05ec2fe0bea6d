"""Whatever use of the VFIO device fails, once or from then on: the error comes through, and nothing of the driver's is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from bent_device import BentDevice

from vfio_vmbus.channel.connection import VmbusConnection
from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.errors import ClosedError, DmaError, PeerError, UsageError, VfioVmbusError
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.testing.scripted_function import ScriptedFunction
from vfio_vmbus.vfio.device import Device

RW = READ | WRITE


class Broken(Exception):
    """What a device might raise that nobody expects."""


ERRORS: dict[str, Callable[[], Exception]] = {
    "closed": lambda: ClosedError("the device is closed"),
    "gone": lambda: PeerError("the server is gone"),
    "refused": lambda: DmaError("no"),
    "pipe": lambda: BrokenPipeError(32, "Broken pipe"),
}


@pytest.fixture(scope="module")
def host() -> Iterator[ScriptedFunction]:
    with nothing_left(objects=False), ScriptedFunction() as host:
        for number in range(4):
            host.function.doorbell(number)
        yield host


def drive(device: Device) -> None:
    with open_device(device) as opened:
        channel = opened.open(2)
        shared = opened.share(PAGE, RW, "shared")
        opened.dma_buffer(PAGE, RW, "pool")
        assert not opened.rescinded
        channel.close()
        shared.close()
        opened.open(2)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", ERRORS)
def test_any_use_may_fail(host: ScriptedFunction, kind: str, lasting: bool) -> None:
    for wrong in count(1):

        def bend(number: int, name: str, wrong: int = wrong) -> None:
            if number == wrong or (lasting and number > wrong):
                raise ERRORS[kind]()

        device = BentDevice(host.next_device(), bend)
        with nothing_left(objects=False):
            try:
                drive(device)
            except (VfioVmbusError, OSError) as error:
                assert isinstance(error, type(ERRORS[kind]()) | UsageError | DmaError), f"use {wrong}: {error!r}"
        if device.uses < wrong:  # all went well
            break
    assert wrong > 30
    drive(host.next_device())


def test_what_nobody_expects_comes_through(host: ScriptedFunction) -> None:
    for wrong in (1, 5, 9):

        def bend(number: int, name: str, wrong: int = wrong) -> None:
            if number == wrong:
                raise Broken

        with nothing_left(objects=False), pytest.raises(Broken):
            VmbusConnection(BentDevice(host.next_device(), bend))
    drive(host.next_device())
