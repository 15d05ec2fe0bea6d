"""Servers for tests of the vfio-user client: the embedded host behind a socket, in this process or in one of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.vsp import Vsp
from vfio_vmbus.vfio.user_client import UserDevice
from vfio_vmbus.vfio.user_connection import UserConnection
from vfio_vmbus.vfio.user_core import ServerCore
from vfio_vmbus.vfio.user_device import FunctionDevice

PATIENCE = 30.0


def attach(host: EmbeddedHost, *devices: Vsp) -> socket.socket:
    """The client's end of a connection to a function of the host's."""
    ours, theirs = socket.socketpair()
    serve(host, ours, *devices)
    return theirs


def serve(host: EmbeddedHost, sock: socket.socket, *devices: Vsp) -> None:
    """Serve a connected socket with a function that offers these devices, until the client goes."""
    device = host.attach(*devices)
    core = ServerCore(FunctionDevice(device.function))
    host.run(lambda: UserConnection(sock, core, lambda reason: device.close()))


@contextmanager
def connected(host: EmbeddedHost, *devices: Vsp) -> Iterator[UserDevice]:
    with UserDevice(attach(host, *devices), timeout=PATIENCE) as device:
        yield device


Serve = Callable[[socket.socket], None]
