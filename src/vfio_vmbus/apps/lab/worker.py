"""The process that lives in a lab's namespace: a fresh Python that calls `main`, see `Namespace`.

Standard input is its socket. The main thread does nothing but take requests, so it sees the end of its
parent's socket, whatever else runs; then the process exits, and the namespace and the interface go with it.
"""

import array
import os
import signal
import socket
import threading
import traceback

from vfio_vmbus.apps.lab import messages
from vfio_vmbus.apps.lab.download import download, serve_body
from vfio_vmbus.apps.lab.messages import Failure, Progress, Ready, Reply, Request, Setup
from vfio_vmbus.apps.lab.namespace import enter_namespaces, exit_with, furnish
from vfio_vmbus.apps.lab.ping import ping
from vfio_vmbus.apps.lab.tcp import send_tcp, serve_tcp
from vfio_vmbus.errors import LocalError, PeerError, RefusedError, VfioVmbusError


def perform(request: Request, reply: socket.socket) -> messages.Result:
    """Does what was asked. Raises VfioVmbusError or OSError."""
    match request:
        case messages.Ping(dest, count, interval, timeout):
            return ping(dest, count, interval, timeout)
        case messages.HttpServe(size, seed):
            return serve_body(size, seed)
        case messages.HttpGet(url, timeout):
            return download(url, timeout, lambda done, total: _send(reply, Progress(done, total)))
        case messages.TcpServe():
            return serve_tcp()
        case messages.TcpSend(dest, port, seconds, timeout):
            return send_tcp(dest, port, seconds, timeout)
        case Setup():
            raise LocalError("this worker has its namespace already")


def set_up(request: Setup, reply: socket.socket) -> None:
    """Enters the namespaces, which needs a process with one thread, and hands the TAP over."""
    try:
        enter_namespaces()
        with furnish(request) as tap:
            _send(reply, Ready(), tap.fd)
    except VfioVmbusError as error:
        _send(reply, Failure.of(error))


def answer(request: Request, reply: socket.socket) -> None:
    """Runs in a thread of its own: a request and its result or failure."""
    with reply:
        try:
            _send(reply, _outcome(request, reply))
        except (BrokenPipeError, ConnectionResetError):
            return  # the caller no longer waits


def _outcome(request: Request, reply: socket.socket) -> Reply:
    try:
        return perform(request, reply)
    except VfioVmbusError as error:
        return Failure.of(error)
    except (BrokenPipeError, ConnectionResetError) as error:
        return Failure.of(PeerError(f"{request}: the other end closed the connection: {error.strerror}"))
    except ConnectionRefusedError as error:
        return Failure.of(RefusedError(f"{request}: {error.strerror}: nobody listens there"))
    except OSError as error:
        return Failure.of(PeerError(f"{request}: {error.strerror or error}"))
    except Exception as error:
        traceback.print_exc()
        return Failure.of(LocalError(f"{request} failed in the lab's worker: {error!r}"))


def _send(reply: socket.socket, message: Reply, *fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    reply.sendmsg([messages.encode(message)], rights)


def receive(control: socket.socket) -> tuple[Request, socket.socket] | None:
    """The next request and the socket for its replies, or None when the parent is gone."""
    data, fds, _, _ = socket.recv_fds(control, messages.PACKET_LIMIT, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    return messages.decode_request(data), socket.socket(fileno=fds[0])


def main(parent: int) -> None:
    """Serves until `parent`, the process that started this one, is gone or closes its socket."""
    exit_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the socket
    control = socket.socket(fileno=0)
    while (received := receive(control)) is not None:
        request, reply = received
        if isinstance(request, Setup):
            with reply:
                set_up(request, reply)
        else:
            threading.Thread(target=answer, args=(request, reply), daemon=True).start()
    os._exit(0)  # without waiting for what still runs
