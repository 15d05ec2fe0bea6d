"""`UserServer`: devices for other processes, by vfio-user on Unix sockets. Many places to connect, one device a place, one client a device.

It runs on the running asyncio loop, and all its methods are called there. What a place serves is the business of a `Claim`: called when a
client has said VERSION, it gives it a device, which is released when the client goes, however it goes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Literal

from ...errors import RefusedError
from .connection import Claim, Client, ServerLimits, UserConnection
from .device import ServedDevice
from .listener import Admission, PathListener, Peer, inherited_socket

log = logging.getLogger("vfio_vmbus.vfio")

GREETING_SECONDS: Final = 10.0
"""How long a connection may take to say VERSION."""
MAX_WAITING: Final = 16
"""Connections to one place that have not said VERSION; further ones are closed."""
_PAUSE_SECONDS: Final = 0.5
"""How long nobody is let in when this process has no descriptor for a client."""
_KNOWN_STRANGERS: Final = 1024


@dataclass(frozen=True)
class ServerEvent:
    """What happened at `place`: it is listened there; a client has the device; it has gone, or was turned away, and why.

    faults: accesses to memory that were refused while a client had the device, once it has gone.
    """

    kind: Literal["listening", "attached", "detached", "refused"]
    place: str
    peer: Peer | None = None
    reason: str = ""
    faults: int = 0


class _Place:
    """One socket where clients of one device come from."""

    def __init__(self, name: str, claim: Claim) -> None:
        self.name = name
        self.claim = claim
        self.taken = False
        self.connections: set[UserConnection] = set()
        self.waiting = 0


class UserServer:
    """Serves until `close`. limits: of each client. allow_uids: users besides this process's own and root. events: is told what happens.

    turned_away: connections of users that may not come.
    """

    def __init__(
        self,
        *,
        limits: ServerLimits | None = None,
        allow_uids: Collection[int] = (),
        events: Callable[[ServerEvent], None] = lambda event: None,
    ) -> None:
        self.limits = limits or ServerLimits()
        self.admission = Admission(frozenset(allow_uids))
        self.turned_away = 0
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._strangers: set[int] = set()
        self._listeners: dict[socket.socket, Callable[[], None]] = {}
        self._places: list[_Place] = []
        self._pauses: set[asyncio.Handle] = set()

    @property
    def clients(self) -> int:
        """How many there are now, those who have not got their device yet among them."""
        return sum(len(place.connections) for place in self._places)

    @property
    def idle(self) -> bool:
        """Is there no client, and none can come?"""
        return not self._listeners and not self.clients

    def listen(self, path: str | os.PathLike[str], claim: Claim, *, mode: int = 0o600) -> None:
        """Let clients connect at `path`, a socket that is made with this mode. Raises UsageError where that cannot be."""
        listener = PathListener(path, mode)
        self._listen(listener.socket, listener.close, self._place(os.fspath(path), claim))

    def adopt(self, fd: int, claim: Claim) -> None:
        """Serve an inherited socket, which is the server's from then on: a listening one, or one that leads to a client, who then needs
        no admission. Raises UsageError for a descriptor that is neither."""
        sock, listens = inherited_socket(fd)
        place = self._place(f"descriptor {fd}", claim)
        if listens:
            self._listen(sock, sock.close, place)
        else:
            self._serve(sock, place, Peer.of(sock))

    def close(self) -> None:
        """End all connections, stop listening. Harmless when that is done."""
        for pause in self._pauses:
            pause.cancel()
        self._pauses.clear()
        for sock, close in self._listeners.items():
            self._loop.remove_reader(sock)
            close()
        self._listeners.clear()
        for place in self._places:
            for connection in list(place.connections):
                connection.close("the server ends")

    def _place(self, name: str, claim: Claim) -> _Place:
        place = _Place(name, claim)
        self._places.append(place)
        return place

    def _listen(self, sock: socket.socket, close: Callable[[], None], place: _Place) -> None:
        self._listeners[sock] = close
        self._loop.add_reader(sock, self._accept, sock, place)
        self._events(ServerEvent("listening", place.name))

    def _accept(self, sock: socket.socket, place: _Place) -> None:
        try:
            connected, _ = sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors, no memory: it would be tried again and again at once
            log.warning("%s: nobody is let in for %g s: %s", place.name, _PAUSE_SECONDS, error)
            self._pause(sock, place)
            return
        peer = Peer.of(connected)
        if not self.admission.admits(peer):
            self._turn_away(place, peer)
            connected.close()
        elif place.waiting >= MAX_WAITING:
            self._events(ServerEvent("refused", place.name, peer, f"{place.waiting} connections have not said VERSION yet"))
            connected.close()
        else:
            self._serve(connected, place, peer)

    def _pause(self, sock: socket.socket, place: _Place) -> None:
        self._loop.remove_reader(sock)

        def go_on() -> None:
            self._pauses.discard(handle)
            self._loop.add_reader(sock, self._accept, sock, place)

        handle = self._loop.call_later(_PAUSE_SECONDS, go_on)
        self._pauses.add(handle)

    def _turn_away(self, place: _Place, peer: Peer) -> None:
        self.turned_away += 1
        if peer.uid not in self._strangers and len(self._strangers) < _KNOWN_STRANGERS:
            self._strangers.add(peer.uid)
            log.warning("%s: user %d may not come (process %d)", place.name, peer.uid, peer.pid)
            self._events(ServerEvent("refused", place.name, peer, f"user {peer.uid} may not come"))

    def _serve(self, sock: socket.socket, place: _Place, peer: Peer) -> None:
        _Session(self._loop, sock, place, peer, self.limits, self._events)


class _Session:
    """One connection to a place, from its beginning to its end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        place: _Place,
        peer: Peer,
        limits: ServerLimits,
        events: Callable[[ServerEvent], None],
    ) -> None:
        self._place = place
        self._peer = peer
        self._events = events
        self._attached = False
        self._device: ServedDevice | None = None
        self._faults_before = 0
        name = f"{place.name}, process {peer.pid}"
        place.waiting += 1
        self._greeting = loop.call_later(GREETING_SECONDS, self._silent)
        self._connection = UserConnection(sock, self._claim, self._ended, limits=limits, name=name)
        place.connections.add(self._connection)

    def _claim(self, client: Client) -> ServedDevice:
        """It has said VERSION."""
        if self._place.taken:
            raise RefusedError(f"{self._place.name}: the device has a client already", errno.EBUSY)
        device = self._place.claim(client)
        self._place.taken = self._attached = True
        self._device, self._faults_before = device, device.fault_count
        self._place.waiting -= 1
        self._greeting.cancel()
        self._events(ServerEvent("attached", self._place.name, self._peer))
        return device

    def _silent(self) -> None:
        self._connection.close(f"no VERSION within {GREETING_SECONDS:g} s")

    def _ended(self, reason: str) -> None:
        self._greeting.cancel()
        self._place.connections.discard(self._connection)
        if self._attached:
            self._place.taken = False
        else:
            self._place.waiting -= 1
        kind: Literal["detached", "refused"] = "detached" if self._attached else "refused"
        faults = self._device.fault_count - self._faults_before if self._device is not None else 0
        self._events(ServerEvent(kind, self._place.name, self._peer, reason, faults))
