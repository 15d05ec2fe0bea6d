"""TCP throughput: one connection, the bytes that go in a given time, counted and timed where they arrive."""

import socket
import struct
import threading
import time
from collections.abc import Callable

from vfio_vmbus.apps.lab.messages import TcpPort, TcpResult
from vfio_vmbus.errors import PeerError, WaitTimeout

CHUNK = 256 << 10
REPORT = struct.Struct("!Qd")  # what the receiver answers after the last byte: bytes, seconds
IDLE_SECONDS = 30  # without a byte, after which the receiver gives up a connection


def serve_tcp() -> TcpPort:
    """Receives on a port of its own, on all addresses, until this process ends; answers with reports."""
    listener = socket.create_server(("", 0))

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_receive, args=(connection,), name="tcp-receive", daemon=True).start()

    threading.Thread(target=accept, name="tcp-accept", daemon=True).start()
    return TcpPort(listener.getsockname()[1])


def _receive(connection: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    with connection:
        connection.settimeout(IDLE_SECONDS)
        try:
            total = connection.recv_into(buffer)
            begun = last = time.perf_counter()
            while size := connection.recv_into(buffer):
                total += size
                last = time.perf_counter()
            connection.sendall(REPORT.pack(total, last - begun))
        except OSError:
            return  # the sender is gone or stuck, and reports that itself


def send_tcp(dest: str, port: int, seconds: float, timeout: float) -> TcpResult:
    """Sends for that many seconds to a port of `serve_tcp`, and returns what arrived there.

    timeout: seconds beyond that for connecting, for what is in flight, and for the report. Raises WaitTimeout
    if they do not suffice, PeerError if bytes were lost, OSError if there is no connection.
    """
    until = time.perf_counter() + seconds + timeout

    def left() -> float:
        return max(until - time.perf_counter(), 0.001)

    try:
        with socket.create_connection((dest, port), timeout) as sock:
            sent = _send(sock, seconds, left)
            sock.shutdown(socket.SHUT_WR)
            report = _report(sock, left)
    except TimeoutError:
        raise WaitTimeout(f"TCP to {dest}:{port} to take {seconds:g} s of bytes", seconds + timeout) from None
    arrived, took = REPORT.unpack(report)
    if arrived != sent:
        raise PeerError(f"TCP to {dest}:{port}: {arrived} of {sent} bytes arrived")
    return TcpResult(arrived, took, round(arrived * 8 / took / 1e9, 4) if took > 0 else 0.0)


def _send(sock: socket.socket, seconds: float, left: Callable[[], float]) -> int:
    chunk = memoryview(bytes(CHUNK))
    stop, sent = time.perf_counter() + seconds, 0
    while sent == 0 or time.perf_counter() < stop:
        sock.settimeout(left())
        sent += sock.send(chunk)
    return sent


def _report(sock: socket.socket, left: Callable[[], float]) -> bytes:
    report = b""
    while len(report) < REPORT.size:
        sock.settimeout(left())
        piece = sock.recv(REPORT.size - len(report))
        if not piece:
            raise PeerError("TCP: the receiver ended without its report")
        report += piece
    return report
