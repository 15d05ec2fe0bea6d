"""`EmbeddedHost`: a VMBus host inside this process. One loop for all control planes, one switch with its worker for the data plane."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from itertools import count
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar

from ..errors import ClosedError, UsageError, WaitTimeout
from ..iommu.domain import Domain
from ..vfio.config import Identity
from ..vfio.function import Function, PciFunction
from ..vfio.inprocess import InProcessDevice
from ..vfio.vmbus_function import VmbusFunction
from ..wire.vmbus import ChannelOffer
from .admin_ring import AdminRing
from .balloon import Balloon
from .carrier import Carrier
from .connection import Connection
from .faults.fate import Desk, FaultCount
from .faults.plan import FaultPlan
from .netvsp.vsp import Netvsp
from .opened import Opener
from .switch.switch import Switch
from .vsp import Vsp

log = logging.getLogger("vfio_vmbus.host")

T = TypeVar("T")

_CALL_SECONDS = 10.0


def random_mac() -> bytes:
    """A random unicast address of Hyper-V's range, 00:15:5d."""
    return bytes.fromhex("00155d") + secrets.token_bytes(3)


HostEnd: TypeAlias = Connection | Opener
"""What the host has of a client."""
Made: TypeAlias = tuple[Function, HostEnd]


class Place(Protocol):
    """Where a client is: a `Function`, or a carrier that is no function's. Called on the host's loop."""

    domain: Domain

    def gone(self) -> None:
        """The host ends: let go of the client's memory, and tell the client if there is a way."""

    def close(self) -> None:
        """It goes away itself."""


class PlacedCarrier(Carrier, Place, Protocol):
    """A carrier that is a place by itself."""


def _as_pci(name: str, devices: tuple[Vsp, ...], faults: Desk | None, options: dict[str, Any]) -> Made:
    """A PCI function, behind which the client opens what it likes."""
    first = devices[0].offer if devices else ChannelOffer()
    function = PciFunction(name, identity=Identity(first.class_guid, first.instance_guid), **options)
    try:
        return function, Connection(AdminRing(function), devices, faults=faults)
    except BaseException:
        function.close()
        raise


def _as_vmbus(name: str, devices: tuple[Vsp, ...], faults: Desk | None, options: dict[str, Any]) -> Made:
    """One device whose channel is open."""
    offer = devices[0].offer
    function = VmbusFunction(name, identity=Identity(offer.class_guid, offer.instance_guid), **options)
    return function, Opener(function, devices[0], faults)


PERSONALITIES: Mapping[str, Callable[[str, tuple[Vsp, ...], Desk | None, dict[str, Any]], Made]] = {
    "pci": _as_pci,
    "vmbus": _as_vmbus,
}
"""How a device may look to its client."""


def check_personality(personality: str, devices: tuple[Vsp, ...]) -> None:
    """Raise UsageError unless these devices can look like that."""
    if personality not in PERSONALITIES:
        raise UsageError(f"personality {personality!r}: take {' or '.join(PERSONALITIES)}")
    if personality == "vmbus" and len(devices) != 1:
        raise UsageError(f"{len(devices)} devices with the personality vmbus: take one")


class EmbeddedHost:
    """Runs from the moment it is made until `close`; a with statement closes it. Methods may be called from any thread.

    poll: how its worker waits: "busy", "adaptive" or "interrupt". faults: what is to go wrong on its devices.
    """

    def __init__(self, *, poll: str = "adaptive", name: str = "host", faults: FaultPlan | None = None) -> None:
        self.name = name
        self._faults = Desk(faults) if faults else None
        self.switch = Switch(f"{name}-switch", poll=poll)
        self.nics: dict[str, Netvsp] = {}
        self.balloons: dict[str, Balloon] = {}
        self._ends: dict[Place, HostEnd] = {}
        self._used: dict[Place, set[Vsp]] = {}
        """The devices that each client has, or had: nobody else gets them while it is there."""
        self._at_close: list[Callable[[], None]] = []
        self._number = 0
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._defect)
        self._thread = threading.Thread(target=self._main, name=f"{name}-control", daemon=True)
        self._gate = threading.Lock()  # who passes it before `close` does is still served
        self._closed = False
        self.switch.start()
        self._thread.start()

    def add_nic(self, name: str | None = None, mac: bytes | None = None, **options: Any) -> Netvsp:
        """Put a network card on the switch; options as of Netvsp. Raises UsageError for a name that is taken."""
        return self.run(lambda: self._add_nic(name, mac, options))

    def add_balloon(self, name: str = "balloon0", **options: Any) -> Balloon:
        """A balloon, to take memory from a guest and give it back; options as of Balloon. Raises UsageError for a name that is taken."""
        if name in self.balloons:
            raise UsageError(f"{self.name} has a balloon {name} already")
        self.balloons[name] = Balloon(name=name, **options)
        return self.balloons[name]

    def attach(self, *devices: Vsp, name: str | None = None, personality: str = "pci", **options: Any) -> InProcessDevice:
        """These devices for one client, as a VFIO device. personality: "pci", a PCI function that offers them, or "vmbus", which shows
        one device that is opened already. options: as of PciFunction or VmbusFunction (max_maps, max_bytes; sizes).

        Raises UsageError for a device that has a client, and for a card that is on another host's switch.
        """

        def attach() -> InProcessDevice:
            function, released = self.make_function(*devices, name=name, personality=personality, **options)
            return InProcessDevice(function, self.run, released)

        return self.run(attach)

    def make_function(
        self, *devices: Vsp, name: str | None = None, personality: str = "pci", **options: Any
    ) -> tuple[Function, Callable[[], None]]:
        """What `attach` wraps, for who serves it on this host's loop, and on it only: the function, and what is to be called, once, when
        its client has gone. Arguments and errors as of `attach`."""
        check_personality(personality, devices)
        self._check(devices)
        self._number += 1
        function, end = PERSONALITIES[personality](name or f"embedded:{self._number}", devices, self._faults, options)
        self._place(function, end, devices)
        return function, lambda: self._release(function)

    def connect(self, make: Callable[[], PlacedCarrier], *devices: Vsp, **options: Any) -> Connection:
        """These devices for the client that a carrier leads to, which `make` makes on the host's loop. options: as of Connection.

        Raises as `attach`, and what `make` raises. `disconnect` ends it.
        """

        def connect() -> Connection:
            self._check(devices)
            carrier = make()
            try:
                end = Connection(carrier, devices, faults=self._faults, **options)
            except BaseException:
                carrier.close()
                raise
            self._place(carrier, end, devices)
            return end

        return self.run(connect)

    def disconnect(self, connection: Connection) -> None:
        """The client of `connect` is gone: let go of its memory, and have its devices for others. Harmless twice, and after `close`."""

        def disconnect() -> None:
            for place in [place for place, end in self._ends.items() if end is connection]:
                self._release(place)

        with suppress(ClosedError):
            self.run(disconnect)

    def offer(self, connection: Connection, device: Vsp) -> None:
        """Give a client one more device while it runs, also one that was rescinded before. Raises UsageError as `attach`."""

        def offer() -> None:
            place = next((place for place, end in self._ends.items() if end is connection), None)
            if place is None:
                raise UsageError(f"{connection.name} is no client of {self.name}")
            if device not in self._used[place]:
                self._check((device,))
            connection.offer(device)
            self._used[place].add(device)

        self.run(offer)

    def fault_counts(self) -> list[FaultCount]:
        """What the ordered faults have done so far, for each device, flow and order; none for a device that was not opened yet."""
        desk = self._faults
        return self.run(desk.counts) if desk else []

    def fault_counters(self, device: str) -> dict[str, int]:
        """The same as counters of a device, with names like "fault_drop_packets_to_guest"; none where no faults are ordered."""
        counters: dict[str, int] = {}
        for done in self.fault_counts():
            if device in done.device.split("+"):  # messages are a client's, which may have several devices
                name = f"fault_{done.kind}_{done.flow}".replace("-", "_")
                counters[name] = counters.get(name, 0) + done.hits
        return counters

    def at_close(self, callback: Callable[[], None]) -> None:
        """Call this on the host's loop when the host closes, before its clients are let go."""
        self._at_close.append(callback)

    def connection(self, device: InProcessDevice) -> HostEnd:
        """The host's end of an attached device, to look at. Raises UsageError when it is not attached here (any more)."""
        connection = self._ends.get(device.function)
        if connection is None:
            raise UsageError(f"{device.info.name} is not attached to {self.name}")
        return connection

    def clients(self) -> list[HostEnd]:
        """The host's ends of all its clients, to look at on its loop."""
        return self.run(lambda: list(self._ends.values()))

    def connection_of(self, device: Vsp) -> HostEnd:
        """The host's end for the client that has this device, to look at. Raises UsageError when nobody has it."""
        found = self.run(lambda: next((each for each in self._ends.values() if each.has(device)), None))
        if found is None:
            raise UsageError(f"no client of {self.name} has this device")
        return found

    def rescind(self, device: Vsp) -> None:
        """Take a device away from the client that has it, for good: it can be attached again when that client has closed."""
        self.run(lambda: self._rescind(device))

    def set_link(self, nic: Netvsp, up: bool) -> None:
        """Plug a card's virtual cable in or out. Raises UsageError for another host's card."""
        if nic not in self.nics.values():
            raise UsageError(f"{nic.name} is no card of {self.name}")
        self.run(lambda: nic.set_link(up))

    def run(self, call: Callable[[], T]) -> T:
        """Call on the host's loop and bring back what it returns or raises.

        Raises WaitTimeout when the loop does not get to it (then it is not called any more), ClosedError after `close`.
        """
        if threading.current_thread() is self._thread:
            return call()
        answer: Future[T] = Future()
        with self._gate:
            if self._closed:
                raise ClosedError(f"{self.name} is closed")
            self._loop.call_soon_threadsafe(_answer, answer, call)
        try:
            return answer.result(_CALL_SECONDS)
        except FutureTimeout:
            if answer.done() and not answer.cancelled():
                raise
            answer.cancel()
            raise WaitTimeout(f"{self.name}'s control plane", _CALL_SECONDS) from None

    def close(self) -> None:
        """Let go of all clients, stop worker and loop. Raises UsageError on the host's own loop."""
        if threading.current_thread() is self._thread:
            raise UsageError(f"{self.name} cannot be closed from its own loop")
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._release_all)
        with ExitStack() as stack:
            stack.callback(self.switch.close)
            self._thread.join(_CALL_SECONDS)
            if self._thread.is_alive():
                raise WaitTimeout(f"the end of {self.name}'s control plane", _CALL_SECONDS)
            self._loop.close()

    def __enter__(self) -> EmbeddedHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback raised that is no client's doing (those are guarded, see `Connection`): say so, and serve on."""
        log.error("%s: defect of the host: %s", self.name, context["message"], exc_info=context.get("exception"))

    def _add_nic(self, name: str | None, mac: bytes | None, options: dict[str, Any]) -> Netvsp:
        name = name or next(free for free in (f"nic{number}" for number in count()) if free not in self.nics)
        if name in self.nics:
            raise UsageError(f"{self.name} has a card {name} already")
        self.nics[name] = Netvsp(self.switch, mac or random_mac(), name=name, **options)
        return self.nics[name]

    def _check(self, devices: tuple[Vsp, ...]) -> None:
        if len(set(devices)) < len(devices):
            raise UsageError("a device is attached to a function once")
        for device in devices:
            if any(device in used for used in self._used.values()):
                raise UsageError("this device has a client already: detach it there first")
            if isinstance(device, Netvsp) and device not in self.nics.values():
                raise UsageError(f"{device.name} is no card of {self.name}: its worker is another host's")

    def _rescind(self, device: Vsp) -> None:
        for connection in self._ends.values():
            if connection.has(device):
                connection.rescind(device)
                return
        raise UsageError(f"no client of {self.name} has this device")

    def _place(self, place: Place, end: HostEnd, devices: tuple[Vsp, ...]) -> None:
        place.domain.quiesce = self.switch.worker.paused
        self._ends[place] = end
        self._used[place] = set(devices)

    def _release(self, place: Place) -> None:
        """A client is gone. Nothing happens when the host has ended before."""
        self._used.pop(place, None)
        if place in self._ends:
            with ExitStack() as stack:
                stack.callback(place.close)
                stack.callback(self._ends.pop(place).close)

    def _release_all(self) -> None:
        """The end. What one client's memory cannot be freed for is logged, and holds up nobody else."""
        with ExitStack() as stack:
            stack.callback(self._loop.stop)
            for nic in self.nics.values():
                stack.callback(nic.close)
            for place in self._ends:
                stack.callback(self._end, place)
            for callback in self._at_close:
                stack.callback(callback)

    def _end(self, place: Place) -> None:
        if place not in self._ends:
            return
        with ExitStack() as stack:
            stack.callback(self._release, place)
            place.gone()


def _answer(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
