"""ICMP echo (RFC 792) over a raw socket, as ping(8) does it."""

import errno
import os
import socket
import statistics
import struct
import time
from dataclasses import dataclass, field

from vfio_vmbus.apps.lab.messages import PingResult
from vfio_vmbus.errors import PeerError

ECHO_REQUEST, ECHO_REPLY = 8, 0
HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number
COOKIE = 16  # random bytes that tell our replies from those of another process with the same identifier
PAYLOAD = 56  # bytes, ping's default


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(int.from_bytes(data[i : i + 2]) for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass
class Exchange:
    """One run of pings: when each was sent (perf_counter), and round trips in ms, by sequence number."""

    dest: str
    timeout: float
    identifier: int = field(default_factory=lambda: int.from_bytes(os.urandom(2)))
    cookie: bytes = field(default_factory=lambda: os.urandom(COOKIE))
    sent_at: dict[int, float] = field(default_factory=dict)
    rtt_ms: dict[int, float] = field(default_factory=dict)

    def request(self, sequence: int) -> bytes:
        body = self.cookie.ljust(PAYLOAD, b"\0")
        blank = HEADER.pack(ECHO_REQUEST, 0, 0, self.identifier, sequence)
        return HEADER.pack(ECHO_REQUEST, 0, checksum(blank + body), self.identifier, sequence) + body

    def take(self, packet: bytes, now: float) -> None:
        """Notes an IPv4 packet if it is the first reply, in time and unharmed, to one of our requests."""
        start = (packet[0] & 0xF) * 4 if packet else 0
        if start < 20 or len(packet) != start + HEADER.size + PAYLOAD or checksum(packet[start:]) != 0:
            return
        kind, code, _, identifier, sequence = HEADER.unpack_from(packet, start)
        if (kind, code, identifier) != (ECHO_REPLY, 0, self.identifier):
            return
        if packet[start + HEADER.size :][:COOKIE] != self.cookie or packet[12:16] != socket.inet_aton(self.dest):
            return
        if sequence not in self.sent_at or sequence in self.rtt_ms:
            return
        rtt = now - self.sent_at[sequence]
        if rtt <= self.timeout:
            self.rtt_ms[sequence] = rtt * 1000

    def result(self) -> PingResult:
        median = round(statistics.median(self.rtt_ms.values()), 4) if self.rtt_ms else None
        return PingResult(len(self.sent_at), len(self.rtt_ms), median)


def ping(dest: str, count: int, interval: float, timeout: float) -> PingResult:
    """Sends `count` echo requests, one each `interval` seconds, and waits `timeout` seconds for each reply.

    Needs CAP_NET_RAW in this network namespace. Lost packets are a result; PeerError is raised if there is no
    way to send to `dest` at all.
    """
    run = Exchange(dest, timeout)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        begun = time.perf_counter()
        for sequence in range(count):
            _collect(sock, run, begun + sequence * interval, count)
            run.sent_at[sequence] = time.perf_counter()
            _send(sock, run, sequence)
        _collect(sock, run, time.perf_counter() + timeout, count)
    return run.result()


def _send(sock: socket.socket, run: Exchange, sequence: int) -> None:
    try:
        sock.sendto(run.request(sequence), socket.MSG_DONTWAIT, (run.dest, 0))
    except OSError as error:
        if error.errno in (errno.ENOBUFS, errno.EAGAIN):
            return  # a full queue has dropped it: a lost packet
        raise PeerError(f"no way to send a ping to {run.dest}: {error.strerror}") from None


def _collect(sock: socket.socket, run: Exchange, until: float, count: int) -> None:
    """Takes packets until that time, or until all replies are there."""
    while len(run.rtt_ms) < count:
        left = until - time.perf_counter()
        if left <= 0:
            return
        sock.settimeout(left)
        try:
            packet = sock.recv(65536)
        except TimeoutError:
            return
        run.take(packet, time.perf_counter())
