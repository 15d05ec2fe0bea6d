"""One vfio-user client on a Unix stream socket, served on the running asyncio loop: carries out what `core` decides.

It takes a little at a time, so that no client keeps the others waiting: a few messages a turn, no more requests a second than it may
send, and none while it does not read its replies.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from ...errors import VfioVmbusError, WaitTimeout
from ..rights import descriptors
from .core import MAX_MSG_FDS, Action, Answer, Close, Release, Send, ServerCore
from .device import ServedDevice

_PIECE: Final = 4096
"""Bytes taken from a client before others get their turn; it bounds the messages, too, which have 16 bytes at least."""
_LARGE_PIECE: Final = 1 << 16
"""Of a message that is larger."""
_MESSAGES: Final = 32
"""Messages carried out before others get their turn."""
_LINGER_NS: Final = 30_000 if len(os.sched_getaffinity(0)) > 1 else 0
"""How long the next request is awaited; on one CPU its sender could not even run meanwhile."""
_HURRIED: Final = 32
"""Requests after which that is not done, where it was in vain."""
_RECEIVE: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TRUNCATED: Final = int(socket.MSG_CTRUNC)
_LOOK_SECONDS: Final = 0.25
"""How often a client that is not read from is looked at: is it still there?"""
_RETRY_SECONDS: Final = 0.005
"""How often it is looked whether a client has taken what it was sent, before descriptors are."""


_Received: TypeAlias = tuple[bytes, list[tuple[int, int, bytes]], int]
"""Bytes, ancillary data, flags."""


@dataclass(frozen=True)
class ServerLimits:
    """What one client may do.

    max_data: bytes of data in a message, at most 64 MiB. max_fds: descriptors in a message. max_requests: a second, and at once after a
    pause; who sends more is read from later. max_unsent: bytes of replies that wait for a client which does not read; it is not read
    from either then. answer_seconds: how long its answers may take when the server asks it for memory.
    """

    max_data: int = 1 << 20
    max_fds: int = MAX_MSG_FDS
    max_requests: float = 100_000
    max_unsent: int = 1 << 20
    answer_seconds: float = 5.0


class Client(Protocol):
    """What a served device may want of its client."""

    name: str

    @property
    def max_data(self) -> int:
        """Bytes of data that it takes in a message."""

    async def ask(self, number: int, payload: bytes) -> bytes:
        """Send a command, DMA_READ or DMA_WRITE: its reply's payload. Raises RefusedError with the client's errno, ProtocolError,
        WaitTimeout, ClosedError."""


Claim = Callable[[Client], ServedDevice]
"""Gives a client a device for as long as it stays, or raises RefusedError with the errno that it is turned away with."""


class UserConnection:
    """Serves a connected socket, which is its own from then on, until the client goes, breaks the protocol, or `close`.

    ended: called once, with the reason, when descriptors and socket are closed and the device is released.
    """

    def __init__(
        self,
        sock: socket.socket,
        claim: Claim,
        ended: Callable[[str], None],
        *,
        limits: ServerLimits | None = None,
        name: str = "client",
    ) -> None:
        self.name = name
        self.limits = limits or ServerLimits()
        self.core = ServerCore(lambda: claim(self), max_data=self.limits.max_data, max_msg_fds=self.limits.max_fds)
        self._socket = sock
        self._room = socket.CMSG_SPACE(
            4 * (self.limits.max_fds + 1)
        )  # what does not fit is closed by the kernel, and refused here
        self._buffer = memoryview(bytearray(_PIECE))
        self._buffers = [self._buffer]
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._bucket = _Bucket(self.limits.max_requests, self._loop.time)
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._unsent_bytes = 0
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._later: asyncio.Handle | None = None
        self._retry: asyncio.Handle | None = None
        self._hurried = 0
        self._reading = False
        self._writing = False
        self._open = True
        sock.setblocking(False)
        self._read_on()

    @property
    def unsent(self) -> int:
        """Bytes of replies that the client has not made room for."""
        return self._unsent_bytes

    @property
    def max_data(self) -> int:
        return self.core.peer.max_data_xfer_size

    async def ask(self, number: int, payload: bytes) -> bytes:
        message_id, request = self.core.ask(number, payload)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._answers[message_id] = answer
        try:
            self._send(request.data, ())
            return await asyncio.wait_for(answer, self.limits.answer_seconds)
        except TimeoutError:
            raise WaitTimeout(f"{self.name} to answer command {number}", self.limits.answer_seconds) from None
        finally:
            self._answers.pop(message_id, None)
            self.core.give_up(message_id)

    def close(self, reason: str = "closed by the server") -> None:
        """End the connection. Harmless when it has ended."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        for handle in (self._later, self._retry):
            if handle is not None:
                handle.cancel()
        try:
            self._carry_out(self.core.end())
            if self.core.device is not None:
                self.core.device.release()
        finally:
            self._socket.close()  # not before: a client that reads the end of the stream knows that its memory is not used any more
            self._ended(reason)

    def _readable(self) -> None:
        """Take what has come. When that was a request which is answered at once, the next one is awaited for a moment: a client that asks
        again and again need not wait for the loop each time. Others have their turn after some messages."""
        got = self._receive()
        for left in range(_MESSAGES - 1, -1, -1):
            if got is None or not self._answered(*got) or not left:
                return
            got = self._linger()

    def _receive(self) -> _Received | None:
        """What one recvmsg gives, if there is anything."""
        try:
            if self.core.missing > _PIECE:
                data, control, flags, _ = self._socket.recvmsg(min(self.core.missing, _LARGE_PIECE), self._room, _RECEIVE)
            else:
                count, control, flags, _ = self._socket.recvmsg_into(self._buffers, self._room, _RECEIVE)
                data = self._buffer[:count].tobytes()
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self.close(f"the client is gone: {error}")
            return None
        return data, control, flags

    def _linger(self) -> _Received | None:
        """What comes within a moment. Where that was in vain, the client may need this CPU to send it: then not for the next requests."""
        if self._hurried:
            self._hurried -= 1
            return None
        end = time.monotonic_ns() + _LINGER_NS
        while self._open:
            got = self._receive()
            if got is not None:
                return got
            if time.monotonic_ns() > end:
                self._hurried = _HURRIED
                break
        return None

    def _answered(self, data: bytes, control: list[tuple[int, int, bytes]], flags: int) -> bool:
        """Was it a request that could be answered at once? If not, it is carried out in its turn."""
        lost = flags & _TRUNCATED != 0
        if not control and not lost and not self._unsent and self._bucket.tokens >= 1:
            reply = self.core.quick(data)
            if reply is not None:
                self._bucket.tokens -= 1
                if reply:
                    self._send(reply, ())
                return True
        self._carry_out(self.core.feed(data, descriptors(control) if control else (), lost=lost))
        if data:
            self._work()
        else:
            self.close("the client has closed the connection")
        return False

    def _work(self) -> None:
        """Carry out what the client has sent, as much as it may have in one turn."""
        for _ in range(_MESSAGES):
            if not self.core.ready or self._unsent_bytes >= self.limits.max_unsent or not self._bucket.take():
                break
            self._carry_out(self.core.step())
        self._read_on()

    def _read_on(self) -> None:
        """What comes next: the rest of what was read, now or later; more of it; or nothing before the client takes its replies."""
        if not self._open:
            return
        if self._later is not None:
            self._later.cancel()
            self._later = None
        full = self._unsent_bytes >= self.limits.max_unsent
        if self.core.ready and not full:
            wait = self._bucket.wait()
            if wait:
                self._later = self._loop.call_later(min(wait, _LOOK_SECONDS), self._look)
            else:
                self._later = self._loop.call_soon(self._work)
        wanted = not full and not self.core.ready
        if wanted and not self._reading:
            self._loop.add_reader(self._socket, self._readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._socket)
        self._reading = wanted

    def _look(self) -> None:
        """Go on with a client that has sent too much, unless it has gone meanwhile: then what it sent does not matter any more."""
        self._later = None
        poll = select.poll()
        poll.register(self._socket, 0)
        if poll.poll(0):  # nothing but POLLHUP and POLLERR can be
            self.close("the client has closed the connection")
        else:
            self._work()

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(data=data, fds=fds):
                    self._send(data, fds)
                case Release(fds=fds):
                    for fd in fds:
                        os.close(fd)
                case Answer(message_id=message_id, result=result):
                    self._answer(message_id, result)
                case Close(reason=reason):
                    self.close(reason)

    def _answer(self, message_id: int, result: bytes | VfioVmbusError) -> None:
        waiting = self._answers.get(message_id)
        if waiting is None or waiting.done():
            return
        if isinstance(result, bytes):
            waiting.set_result(result)
        else:
            waiting.set_exception(result)

    def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        """What finds no room waits, in order; else all of a reply goes in one piece, as QEMU takes no header in two."""
        if not self._open:
            return
        if not fds and not self._unsent:
            try:
                sent = self._socket.send(data, _SEND)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self.close(f"the client is gone: {error}")
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._unsent.append((data, fds))
        self._unsent_bytes += len(data)
        if not self._writing:
            self._flush()
        if self._unsent_bytes >= self.limits.max_unsent:
            self._read_on()

    def _flush(self) -> None:
        """Send what waits, as far as there is room."""
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                if fds and self._unread():
                    self._wait_for_room()
                    return
                sent = self._sendmsg(data, fds)
                self._unsent_bytes -= sent
                if sent < len(data):
                    self._unsent[0] = (data[sent:], ())
                else:
                    self._unsent.popleft()
        except (BlockingIOError, InterruptedError):
            self._writing = True
            self._loop.add_writer(self._socket, self._written)
        except OSError as error:
            self.close(f"the client is gone: {error}")

    def _unread(self) -> bool:
        """Is there anything on its way to the client that it has not taken?"""
        return struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0] > 0

    def _wait_for_room(self) -> None:
        """Descriptors wait until the client has taken everything: the kernel limits how many a user, and with it all clients of this
        server, has on the way."""
        self._loop.remove_writer(self._socket)
        self._writing = True
        self._retry = self._loop.call_later(_RETRY_SECONDS, self._written)

    def _written(self) -> None:
        """There is room again."""
        self._flush()
        if self._open and not self._unsent:
            self._writing = False
            self._loop.remove_writer(self._socket)
        self._read_on()

    def _sendmsg(self, data: bytes, fds: tuple[int, ...]) -> int:
        if not fds:
            return self._socket.send(data, _SEND)
        return self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], _SEND)


class _Bucket:
    """Lets `rate` requests a second through, and as many at once after a pause."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._most = max(rate, 1.0)
        self.tokens = self._most
        self._since = clock()

    def take(self) -> bool:
        """One request; False when it is too early for it. Looks at the clock only when the bucket is empty."""
        if self.tokens < 1:
            now = self._clock()
            self.tokens = min(self._most, self.tokens + (now - self._since) * self._rate)
            self._since = now
            if self.tokens < 1:
                return False
        self.tokens -= 1
        return True

    def wait(self) -> float:
        """Seconds until `take` may let one through."""
        if self.tokens >= 1:
            return 0.0
        return max(0.0, (1 - self.tokens) / self._rate - (self._clock() - self._since))
