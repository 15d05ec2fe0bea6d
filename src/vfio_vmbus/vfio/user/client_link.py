"""A vfio-user client's connection: commands out, replies in, one at a time, by any thread; and the server's own commands answered.

A command that gets no reply in time, or one that breaks the protocol, ends the connection: what the server then thinks of it is not
known. Everything after that raises ClosedError with the first reason.

The server may ask for memory while no command is under way. Once anything is mapped, a thread sleeps on the socket then (`attend`). It is
told to look away (one epoll_ctl) before a command is sent, so that replies wake up only who waits for them.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeVar, cast

from ...errors import ClosedError, ProtocolError, RefusedError, UnavailableError, UsageError, VfioVmbusError, WaitTimeout
from ...wire import vfio_user as wire
from ..rights import descriptors
from .client_attendant import Attendant
from .client_core import Action, Answer, Broken, ClientCore, Discard, Reply
from .client_socket import timeval

T = TypeVar("T")

_ACCESS: Final = struct.Struct("<HHIIIQII")
"""A header and a RegionAccess."""
_PREFIX: Final = _ACCESS.size
_IS_REPLY: Final = wire.KIND_REPLY
_PIECE: Final = 1 << 16
MAX_TIMEOUT: Final = 1e6
_MOST_FDS: Final = 253
"""SCM_MAX_FD: Linux passes no more in one message."""
_ROOM: Final = socket.CMSG_SPACE(4 * _MOST_FDS)
_SEND: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE: Final = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_MAX_UNSENT: Final = 16
"""Answers that wait for a server who does not read; from there on it is not read from either."""


class Link:
    """Owns `sock`. timeout: seconds that a reply may take, from the moment its command was sent."""

    def __init__(self, sock: socket.socket, name: str, core: ClientCore, timeout: float) -> None:
        self.name = name
        self.core = core
        self.lock = threading.RLock()
        self._socket = sock
        self._fd = sock.fileno()
        self._buffer = bytearray(_PIECE)
        self._view = memoryview(self._buffer)
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._reply: Reply | None = None
        self._failure: str | None = None
        self._attendant: Attendant | None = None
        sock.setblocking(True)
        self.timeout = timeout

    @property
    def timeout(self) -> float:
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        if not 0 < seconds <= MAX_TIMEOUT:
            raise UsageError(f"a timeout of {seconds} s: take more than 0, up to {MAX_TIMEOUT}")
        with self.lock:
            self._timeout = seconds
            if self._failure is None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))

    def ask(
        self,
        number: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        parse: Callable[[bytes, Sequence[int]], T],
        takes_fds: bool = False,
    ) -> T:
        """A command, and what `parse` makes of its reply and of the descriptors that came along, which are closed when it returns. A
        ProtocolError of it ends the connection as any other does.

        Raises RefusedError (its status is the errno), WaitTimeout, ProtocolError, ClosedError; UnavailableError when descriptors were lost.
        """
        with self.lock:
            self._begin()
            try:
                self._reply = None
                self._outbox.append((memoryview(self.core.ask(number, payload)), tuple(fds)))
                reply = self._wait(_name_of(number), takes_fds)
                try:
                    answer = None if reply.error or reply.lost else parse(reply.payload, reply.fds)
                finally:
                    self._close_fds(reply.fds)
            except BaseException as error:
                self._break(error)
                raise
            if self._attendant is not None:
                self._attendant.look(self._fd)
        if reply.error:
            raise _refusal(self.name, number, reply.error)
        if reply.lost:
            what = f"descriptors of the reply to {_name_of(number)} were lost"
            raise UnavailableError(f"{self.name}: {what}: has this process too many open?")
        return cast(T, answer)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ of up to the server's max_data_xfer_size. Errors as for `ask`."""
        return self._access(wire.REGION_READ, region, offset, count, b"", _PREFIX + count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """REGION_WRITE of up to the server's max_data_xfer_size. Errors as for `ask`."""
        self._access(wire.REGION_WRITE, region, offset, len(data), data, _PREFIX)

    def attend(self) -> None:
        """From now on the server's commands are answered at any time."""
        with self.lock:
            self._begin()
            if self._attendant is None:
                self._attendant = Attendant(self.serve, self._fd)
            self._attendant.look(self._fd)

    def check(self) -> None:
        """Raises ClosedError when the connection has ended."""
        if self._failure is not None:
            raise ClosedError(self._failure)

    def serve(self) -> bool:
        """Answer what the server asks for, without waiting for more. False when the connection has ended."""
        with self.lock:
            if self._failure is not None:
                return False
            try:
                if self._take(takes_fds=False):
                    self._pump("a server that does not take its answers", awaits=False, takes_fds=False)
            except (VfioVmbusError, OSError) as error:
                self._break(error)
                return False
            return True

    def close(self) -> None:
        """Say goodbye and wait, up to the timeout, until the server has let go of what it had. Harmless when closed already."""
        with self.lock:
            if self._fd < 0:
                return
            working = self._failure is None
            self._failure = self._failure or f"{self.name} is closed"
            attendant, self._attendant = self._attendant, None
            self._fd = -1
            if working:
                self._goodbye()
        if attendant is not None:
            attendant.stop()
        with self.lock:
            self._carry_out(self.core.end())
            self._socket.close()

    def _goodbye(self) -> None:
        deadline = time.monotonic() + self.timeout
        try:
            self._socket.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self._poll(select.POLLIN, left)
                if not self._socket.recv(_PIECE, socket.MSG_DONTWAIT):
                    return
        except OSError:
            return

    def _begin(self) -> None:
        self.check()
        if self._attendant is not None:
            self._attendant.look_away(self._fd)

    def _break(self, error: BaseException) -> None:
        """Nothing more is said to this server."""
        if self._failure is not None:
            return
        self._failure = str(error) or type(error).__name__
        self._outbox.clear()
        self._carry_out(self.core.end())
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _access(self, command: int, region: int, offset: int, count: int, data: bytes, size: int) -> bytes:
        """A region access and the data of its reply, which has `size` bytes.

        The reply to one that goes well is known but for its data. So if it comes whole and alone, as it does, it is compared and not taken
        apart; whatever else comes goes to the core.
        """
        with self.lock:
            if self._failure is not None:
                raise ClosedError(self._failure)
            attendant = self._attendant
            if attendant is not None:
                attendant.look_away(self._fd)
            core = self.core
            core.message_id = number = (core.message_id + 1) & 0xFFFF
            request = _ACCESS.pack(number, command, _PREFIX + len(data), 0, 0, offset, region, count) + data
            expected = _ACCESS.pack(number, command, size, _IS_REPLY, 0, offset, region, count)
            sent, got = 0, -1
            try:
                try:
                    if not core.partial and not self._outbox:
                        sent = self._socket.send(request, _SEND)
                        if sent == len(request):
                            got = self._socket.recv_into(self._buffer)
                            if got == size and self._buffer.startswith(expected):
                                if attendant is not None:
                                    attendant.look(self._fd)
                                return bytes(self._view[_PREFIX:size])
                except BlockingIOError:
                    if sent == len(request):
                        raise WaitTimeout(f"{self.name}: the reply to {_name_of(command)}", self.timeout) from None
                except OSError as error:
                    self._gone(error)
                core.await_reply(number, command)
                code, found = self._slow(command, request[sent:], got, expected, size)
            except BaseException as failure:
                self._break(failure)
                raise
            if attendant is not None:
                attendant.look(self._fd)
        if code:
            raise _refusal(self.name, command, code)
        return found

    def _slow(self, command: int, unsent: bytes, got: int, expected: bytes, size: int) -> tuple[int, bytes]:
        """The errno or the data of an access's reply, however it comes. got: bytes in the buffer, -1 if nothing was received."""
        self._reply = None
        if unsent:
            self._outbox.append((memoryview(unsent), ()))
        if got >= 0:
            self._take_bytes(bytes(self._view[:got]))
        reply = self._wait(_name_of(command), takes_fds=False)
        need = size - wire.Header.SIZE
        if reply.error:
            return reply.error, b""
        if len(reply.payload) != need:
            raise ProtocolError(f"{self.name}: reply to {_name_of(command)}: {len(reply.payload)} bytes, need {need}")
        if not reply.payload.startswith(expected[wire.Header.SIZE :]):
            said = wire.RegionAccess.unpack(reply.payload)
            raise ProtocolError(f"{self.name}: reply to {_name_of(command)}: {said} was not asked for")
        return 0, reply.payload[_PREFIX - wire.Header.SIZE :]

    def _wait(self, name: str, takes_fds: bool) -> Reply:
        """Send what is in the outbox and wait for the reply, which may be there already."""
        self._pump(f"the reply to {name}", awaits=True, takes_fds=takes_fds)
        reply, self._reply = self._reply, None
        assert reply is not None
        return reply

    def _pump(self, awaited: str, awaits: bool, takes_fds: bool) -> None:
        """Send and receive until nothing is left to be sent, and the reply is there if one is awaited."""
        deadline = time.monotonic() + self.timeout
        while True:
            self._flush()
            waits = awaits and self._reply is None
            if not self._outbox and not waits:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{self.name}: {awaited}", self.timeout)
            events = select.POLLOUT if self._outbox else 0
            if len(self._outbox) < _MAX_UNSENT:
                events |= select.POLLIN
            if self._poll(events, left) & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._take(takes_fds)

    def _poll(self, events: int, seconds: float) -> int:
        poller = select.poll()
        poller.register(self._socket, events)
        ready = poller.poll(max(seconds, 0.001) * 1000)
        return ready[0][1] if ready else 0

    def _flush(self) -> None:
        """Send what waits, as far as there is room."""
        try:
            while self._outbox:
                data, fds = self._outbox[0]
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._socket.sendmsg([data], control, _SEND)
                if sent < len(data):
                    self._outbox[0] = (data[sent:], ())
                else:
                    self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(error)

    def _take(self, takes_fds: bool) -> bool:
        """Take in what has come; False when nothing has. Without room for them, the kernel closes descriptors that come."""
        try:
            if not takes_fds:
                self._take_bytes(self._socket.recv(_PIECE, _RECEIVE))
                return True
            data, control, flags, _ = self._socket.recvmsg(_PIECE, _ROOM, _RECEIVE)
        except BlockingIOError:
            return False
        except OSError as error:
            self._gone(error)
        self._take_bytes(data, descriptors(control), bool(flags & socket.MSG_CTRUNC))
        return True

    def _take_bytes(self, data: bytes, fds: Sequence[int] = (), lost: bool = False) -> None:
        if not data:
            self._gone(None)
        self._carry_out(self.core.receive(data, fds, lost=lost))

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Reply():
                    self._reply = action
                case Answer(data=data):
                    self._outbox.append((memoryview(data), ()))
                case Discard(fds=fds):
                    self._close_fds(fds)
                case Broken(error=error):
                    raise error

    def _gone(self, error: OSError | None) -> NoReturn:
        raise ClosedError(
            f"{self.name}: the server has closed the connection{f' ({error.strerror})' if error else ''}"
        ) from error

    @staticmethod
    def _close_fds(fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)


def _name_of(number: int) -> str:
    return wire.COMMANDS[number].name


def _refusal(name: str, number: int, code: int) -> RefusedError:
    return RefusedError(f"{name}: {_name_of(number)} refused: {errno.errorcode.get(code, 'an errno of its own')}", code)
