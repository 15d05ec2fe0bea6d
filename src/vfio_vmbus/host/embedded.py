"""`EmbeddedHost`: a VMBus host inside this process. One loop for all control planes, one switch with its worker for the data plane."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from ..errors import ClosedError, UsageError, WaitTimeout
from ..vfio.function import PciFunction
from ..vfio.inprocess import InProcessDevice
from .connection import Connection
from .netvsp.vsp import Netvsp
from .switch.switch import Switch
from .vsp import Vsp

T = TypeVar("T")

_CALL_SECONDS = 10.0


def random_mac() -> bytes:
    """A random unicast address of Hyper-V's range, 00:15:5d."""
    return bytes.fromhex("00155d") + secrets.token_bytes(3)


class EmbeddedHost:
    """Runs from the moment it is made until `close`; a with statement closes it. Methods may be called from any thread.

    poll: how its worker waits: "busy", "adaptive" or "interrupt".
    """

    def __init__(self, *, poll: str = "adaptive", name: str = "host") -> None:
        self.name = name
        self.switch = Switch(f"{name}-switch", poll=poll)
        self.nics: dict[str, Netvsp] = {}
        self._connections: dict[PciFunction, Connection] = {}
        self._used: set[Vsp] = set()
        self._number = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=f"{name}-control", daemon=True)
        self._closed = False
        self.switch.start()
        self._thread.start()

    def add_nic(self, name: str | None = None, mac: bytes | None = None, **options: Any) -> Netvsp:
        """Put a network card on the switch; options as of Netvsp. Raises UsageError for a name that is taken."""
        name = name or f"nic{len(self.nics)}"
        if name in self.nics:
            raise UsageError(f"{self.name} has a card {name} already")
        self.nics[name] = Netvsp(self.switch, mac or random_mac(), name=name, **options)
        return self.nics[name]

    def attach(self, *devices: Vsp, name: str | None = None) -> InProcessDevice:
        """A PCI function that offers these devices to one client, as a VFIO device. UsageError for a device that has a client."""
        return self.run(lambda: self._attach(devices, name))

    def connection(self, device: InProcessDevice) -> Connection:
        """The host's end of an attached device, to look at."""
        return self._connections[device.function]

    def rescind(self, device: Vsp) -> None:
        """Take a device away from the client that has it."""
        self.run(lambda: self._rescind(device))

    def set_link(self, nic: Netvsp, up: bool) -> None:
        """Plug a card's virtual cable in or out."""
        self.run(lambda: nic.set_link(up))

    def run(self, call: Callable[[], T]) -> T:
        """Call on the host's loop and bring back what it returns or raises. Raises WaitTimeout when the loop does not get to it."""
        if threading.current_thread() is self._thread:
            return call()
        if self._closed:
            raise ClosedError(f"{self.name} is closed")
        answer: Future[T] = Future()
        self._loop.call_soon_threadsafe(_answer, answer, call)
        try:
            return answer.result(_CALL_SECONDS)
        except FutureTimeout:
            if answer.done():
                raise
            raise WaitTimeout(f"{self.name}'s control plane", _CALL_SECONDS) from None

    def close(self) -> None:
        """Let go of all clients, stop worker and loop."""
        if self._closed:
            return
        self.run(self._release_all)
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        self._loop.close()
        self.switch.close()

    def __enter__(self) -> EmbeddedHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _attach(self, devices: tuple[Vsp, ...], name: str | None) -> InProcessDevice:
        for device in devices:
            if device in self._used:
                raise UsageError("this device has a client already: detach it there first")
        self._number += 1
        function = PciFunction(name or f"embedded:{self._number}")
        self._connections[function] = Connection(function, list(devices))
        function.domain.quiesce = self.switch.worker.paused
        self._used.update(devices)

        def released() -> None:
            connection = self._connections.pop(function, None)
            if connection is not None:
                connection.close()
                function.close()
            self._used.difference_update(devices)

        return InProcessDevice(function, self.run, released)

    def _rescind(self, device: Vsp) -> None:
        for connection in self._connections.values():
            with suppress(UsageError):
                connection.rescind(device)
                return
        raise UsageError("no client has this device")

    def _release_all(self) -> None:
        for function, connection in list(self._connections.items()):
            connection.close()
            function.close()
        self._connections.clear()
        for nic in self.nics.values():
            nic.close()


def _answer(future: Future[T], call: Callable[[], T]) -> None:
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
