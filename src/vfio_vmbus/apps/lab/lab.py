"""The lab as its user sees it: namespaces for the time of a `with` block, and what can be asked of them."""

import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from vfio_vmbus.apps.lab import messages
from vfio_vmbus.apps.lab.messages import Download, HttpBody, PingResult, Progress, Ready, TcpPort, TcpResult
from vfio_vmbus.apps.lab.reasons import TUN_PATH, tun_refused
from vfio_vmbus.apps.lab.tap import Tap, check_mac, check_mtu, check_name
from vfio_vmbus.errors import ClosedError, LocalError, UnavailableError, UsageError, WaitTimeout

START_SECONDS = 30.0  # for a worker to start, also on a busy machine
GRACE_SECONDS = 10.0  # that a worker may overrun the time-out of a command before it is taken for stuck
EXIT_SECONDS = 5.0  # for a worker to end after its socket was closed, before it is killed

R = TypeVar("R")


@dataclass(frozen=True)
class NamespaceSpec:
    """A namespace to make: its name in messages, its TAP's IPv4 address with prefix length, MTU in bytes.

    mac: 6 bytes; 02:00 and the address by default. Raises UsageError.
    """

    name: str
    address: str
    mtu: int = 1500
    mac: bytes = b""
    tap: str = "tap0"

    def __post_init__(self) -> None:
        try:
            interface = ipaddress.IPv4Interface(self.address)
        except ValueError:
            raise UsageError(f"address {self.address!r}: IPv4 with a prefix length, for example 10.77.0.1/24") from None
        if not self.mac:
            object.__setattr__(self, "mac", b"\x02\x00" + interface.ip.packed)
        check_mac(self.mac)
        check_mtu(self.mtu)
        check_name(self.tap)


class Lab:
    """Network namespaces, each with a TAP whose fd is here, for the time of a `with` block; needs no root.

        with Lab(NamespaceSpec("left", "10.77.0.1/24"), NamespaceSpec("right", "10.77.0.2/24")) as lab:
            left, right = lab.namespaces
            ... move frames between left.tap.fd and right.tap.fd ...
            left.ping(right.address)

    Entering raises UnavailableError where the machine forbids it; see `probe`. At the end the processes that
    hold the namespaces are gone and the TAPs' fds closed: end the threads that use these first.
    """

    def __init__(self, *specs: NamespaceSpec) -> None:
        self._specs = specs
        self._stack = ExitStack()
        self.namespaces: tuple[Namespace, ...] = ()

    @classmethod
    def pair(cls, mtu: int = 1500) -> Self:
        """Two namespaces, "left" and "right", 10.77.0.1 and .2 of one subnet; MTU in bytes."""
        return cls(NamespaceSpec("left", "10.77.0.1/24", mtu), NamespaceSpec("right", "10.77.0.2/24", mtu))

    def __enter__(self) -> Self:
        if self.namespaces:
            raise UsageError("this lab is open already")
        try:
            os.close(os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC))  # a worker may not do more than we may
        except OSError as error:
            raise UnavailableError(tun_refused(error)) from None
        with ExitStack() as stack:
            namespaces = tuple([stack.enter_context(Namespace(spec)) for spec in self._specs])
            for namespace in namespaces:  # all processes start at the same time, then each is waited for
                namespace.set_up()
            self.namespaces = namespaces
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Ends the workers and closes the TAPs; may be called again."""
        self.namespaces = ()
        self._stack.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def probe() -> str | None:
    """Says in one line why there can be no lab on this machine, or None: by making one (some 0.3 s)."""
    try:
        with Lab(NamespaceSpec("probe", "192.0.2.1/24")):
            return None
    except UnavailableError as error:
        return str(error)


class Namespace:
    """A network namespace with a TAP, and the process that lives in it. Made by `Lab`; any thread may call.

    Every call ends: with its result, with WaitTimeout, with RefusedError or PeerError if the network says no,
    with LocalError if the worker died, with ClosedError after the lab's end.
    """

    def __init__(self, spec: NamespaceSpec) -> None:
        self.name = spec.name
        self.address = str(ipaddress.IPv4Interface(spec.address).ip)
        self._spec = spec
        self._tap: Tap | None = None
        with ExitStack() as stack:
            self._said: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(self._control)
            with theirs:
                self._process = _start_worker(theirs, self._said)
            stack.callback(self._end_process)
            self._stack = stack.pop_all()

    @property
    def tap(self) -> Tap:
        """The TAP of this namespace; its fd works here, outside of the namespace."""
        if self._tap is None:
            raise ClosedError(f"namespace {self.name} has no TAP: it is not set up, or closed")
        return self._tap

    @property
    def pid(self) -> int:
        """The process that holds the namespaces (`nsenter --target PID --user --net` looks inside)."""
        return self._process.pid

    def set_up(self) -> None:
        """Waits for the namespace and takes its TAP over; `Lab` calls it. Raises UnavailableError."""
        spec = self._spec
        fds: list[int] = []
        setup = messages.Setup(spec.tap, spec.mac, spec.mtu, spec.address)
        try:
            self._call(setup, Ready, START_SECONDS, fds=fds)
        except UnavailableError:
            raise
        except (LocalError, WaitTimeout) as error:  # as where unshare(2) is answered by SIGSYS
            raise UnavailableError(f"a lab's worker cannot do its work here: {error}") from None
        self._tap = Tap(fds[0], spec.tap, spec.mac, spec.mtu)
        self._stack.callback(self._tap.close)

    def ping(self, dest: str, count: int = 10, interval: float = 0.05, timeout: float = 1.0) -> PingResult:
        """Pings `count` times, once each `interval` seconds; a reply later than `timeout` seconds is lost."""
        check_address(dest)
        _check("count", count, 1, 65536)
        _check("interval", interval, 0, 3600)
        _check("timeout", timeout, 0.001, 3600)
        request = messages.Ping(dest, count, interval, timeout)
        return self._call(request, PingResult, count * interval + timeout)

    def http_serve(self, size: int, seed: int = 0) -> HttpBody:
        """Serves `size` pseudo-random bytes that follow from the seed, until the lab ends; see `http_url`."""
        _check("size", size, 0, 1 << 32)
        return self._call(messages.HttpServe(size, seed), HttpBody, START_SECONDS + size / 1e7)

    def http_url(self, body: HttpBody) -> str:
        """Where another namespace finds what this one serves."""
        return f"http://{self.address}:{body.port}/"

    def http_get(self, url: str, *, timeout: float = 60.0, progress: Callable[[int, int], None] | None = None) -> Download:
        """Downloads; progress(bytes so far, bytes in all) is called in this thread."""
        _check("timeout", timeout, 0.001, 3600)
        return self._call(messages.HttpGet(url, timeout), Download, timeout, progress=progress)

    def tcp_serve(self) -> int:
        """Receives TCP for `tcp_send` until the lab ends; returns the port."""
        return self._call(messages.TcpServe(), TcpPort, GRACE_SECONDS).port

    def tcp_send(self, dest: str, port: int, seconds: float, *, timeout: float = 10.0) -> TcpResult:
        """Sends for that many seconds to another namespace's `tcp_serve`; measured where the bytes arrive.

        timeout: seconds beyond these for connecting and for the last bytes.
        """
        check_address(dest)
        _check("port", port, 1, 65535)
        _check("seconds", seconds, 0, 3600)
        _check("timeout", timeout, 0.001, 3600)
        return self._call(messages.TcpSend(dest, port, seconds, timeout), TcpResult, seconds + timeout)

    def _call(
        self,
        request: messages.Request,
        expected: type[R],
        seconds: float,
        *,
        progress: Callable[[int, int], None] | None = None,
        fds: list[int] | None = None,
    ) -> R:
        """One request and its result; `fds` takes the file descriptors that come with it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                self._send(request, theirs)
            until = time.monotonic() + seconds + GRACE_SECONDS
            while True:
                reply = self._receive(request, ours, until, seconds + GRACE_SECONDS, fds)
                if isinstance(reply, Progress):
                    if progress is not None:
                        progress(reply.done, reply.total)
                elif isinstance(reply, messages.Failure):
                    raise reply.exception()
                elif isinstance(reply, expected):
                    return reply
                else:
                    raise LocalError(f"namespace {self.name}: {reply!r} is no answer to {request!r}")

    def _send(self, request: messages.Request, replies: socket.socket) -> None:
        if self._control.fileno() < 0:
            raise self._closed()
        try:
            socket.send_fds(self._control, [messages.encode(request)], [replies.fileno()])
        except OSError:
            raise self._died() from None

    def _receive(
        self,
        request: messages.Request,
        replies: socket.socket,
        until: float,
        seconds: float,
        fds: list[int] | None,
    ) -> messages.Reply:
        replies.settimeout(max(until - time.monotonic(), 0.001))
        try:
            data, got, _, _ = socket.recv_fds(replies, messages.PACKET_LIMIT, 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise WaitTimeout(f"{type(request).__name__} in namespace {self.name}", seconds) from None
        except ConnectionResetError:
            data, got = b"", []
        if fds is not None:
            fds.extend(got)
        if not data:
            raise self._died()
        reply: messages.Reply = messages.decode_reply(data)
        return reply

    def _died(self) -> LocalError:
        if self._control.fileno() < 0:
            return self._closed()
        try:
            status: Any = self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = "none yet"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return LocalError(f"namespace {self.name}: its worker ended (status {status}): {said[-1] if said else 'no word'}")

    def _closed(self) -> ClosedError:
        return ClosedError(f"namespace {self.name}: the lab is closed")

    def _end_process(self) -> None:
        self._tap = None
        self._control.close()
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()


_WORKER = """
import sys
sys.path[:] = sys.argv[2:]
from vfio_vmbus.apps.lab.worker import main
main(int(sys.argv[1]))
"""


def _start_worker(control: socket.socket, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """A fresh Python that finds the same package; in a session of its own, because Ctrl-C is for us."""
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER, str(os.getpid()), *sys.path],
            stdin=control.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(
            f"a lab's worker cannot be started: {sys.executable or 'no path to Python'}: {error.strerror}"
        ) from None


def check_address(dest: str) -> None:
    """Raises UsageError unless dest is an IPv4 address."""
    try:
        ipaddress.IPv4Address(dest)
    except ValueError:
        raise UsageError(f"address {dest!r}: IPv4 without prefix length, for example 10.77.0.2") from None


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} {value}: {least} to {most}")
