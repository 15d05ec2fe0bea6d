"""The vfio-user server's protocol core: a client's bytes and descriptors in, what is to be sent, released and closed out. No I/O.

The stream stays in step whatever is in a message, as long as its size can be believed; when that cannot be, or the client does not begin
with a VERSION that suits, the answer is EINVAL and the end of the connection. A shell carries the actions out, in order.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import (
    ClosedError,
    DmaError,
    IsolationFault,
    ProtocolError,
    RefusedError,
    UnavailableError,
    UsageError,
    VfioVmbusError,
    WaitTimeout,
)
from ..wire import vfio_user as wire
from ..wire.vfio_user import Header
from ..wire.vfio_user_version import MAX_SERVER_PAYLOAD, Capabilities, decode_version, encode_version
from .user_commands import Commands
from .user_device import ServedDevice

log = logging.getLogger("vfio_vmbus.vfio")

MAX_MSG_FDS: Final = 16
"""QEMU takes no server that announces more."""
KEPT_REFUSALS: Final = 64
_LEAST_ROOM: Final = 8192
"""Bytes of a message that is always taken: SPDK sends 4 KiB to ask for a region, WRITE_MULTI has up to 6 KiB."""

_ERRNOS: tuple[tuple[type[Exception], int], ...] = (
    (IsolationFault, errno.EFAULT),
    (ProtocolError, errno.EINVAL),
    (UsageError, errno.EINVAL),
    (DmaError, errno.EINVAL),
    (UnavailableError, errno.EOPNOTSUPP),
    (ClosedError, errno.ENODEV),
    (WaitTimeout, errno.ETIMEDOUT),
)


@dataclass(frozen=True)
class Send:
    """Send `data`, with descriptors, which stay the device's, beside its first byte. All in one sendmsg."""

    data: bytes
    fds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Release:
    """Close the client's descriptors: nobody needs them any more."""

    fds: tuple[int, ...]


@dataclass(frozen=True)
class Close:
    """End the connection; nothing more is taken from the client."""

    reason: str


Action = Send | Release | Close


@dataclass
class _Incoming:
    """A message that is not yet complete: what there is of it, its descriptors, and whether some were lost on the way."""

    data: bytearray
    fds: list[int]
    lost: bool = False


class ServerCore:
    """One client of `device`. max_data: bytes of data in a message, at most 64 MiB. `refusals`: the latest errors, newest last.

    `receive` takes what one recvmsg returned. Every descriptor given to it comes back in a Release once, at the latest by `end`.
    """

    def __init__(self, device: ServedDevice, *, max_data: int = 1 << 20, max_msg_fds: int = MAX_MSG_FDS) -> None:
        self.own = Capabilities(
            max_msg_fds=max_msg_fds, max_data_xfer_size=max_data, max_dma_maps=device.max_maps, write_multiple=True
        )
        self.max_size = max(_LEAST_ROOM, Header.SIZE + wire.RegionAccess.SIZE + max_data)
        self.refusals: deque[Exception] = deque(maxlen=KEPT_REFUSALS)
        self.refusal_count = 0
        self.unasked_replies = 0
        self._commands = Commands(device, self.own)
        self._negotiated = False
        self._closed = False
        self._incoming = _Incoming(bytearray(), [])

    @property
    def peer(self) -> Capabilities:
        """What the client can do, once it has said so."""
        return self._commands.peer

    @property
    def closed(self) -> bool:
        """Has the connection ended?"""
        return self._closed

    def receive(self, data: bytes, fds: Sequence[int] = (), *, lost: bool = False) -> list[Action]:
        """Take bytes of the stream, with the descriptors that came along; no bytes: the client has gone. lost: some descriptors were
        cut off (MSG_CTRUNC).

        The kernel ends a recvmsg behind the bytes that descriptors were sent with, so they belong to the last message that begins in
        `data`, or, if none does, to the one that goes on.
        """
        if self._closed or not data:
            return [*self.end(), *_release(fds)]
        actions: list[Action] = []
        pieces = self._split(data)
        for place, piece in enumerate(pieces, 1):
            last = place == len(pieces)
            self._incoming.data += piece
            if last:
                self._incoming.fds += fds
                self._incoming.lost |= lost
            if self._complete(self._incoming.data):
                message, self._incoming = self._incoming, _Incoming(bytearray(), [])
                actions += self._take(bytes(message.data), message.fds, message.lost)
            if self._closed:
                return [*actions, *_release(() if last else fds)]
        return actions

    def end(self) -> list[Action]:
        """The client has gone: what is to be released."""
        self._closed = True
        message, self._incoming = self._incoming, _Incoming(bytearray(), [])
        return _release(message.fds)

    def _split(self, data: bytes) -> list[bytes]:
        """Cut `data` where messages end, as far as their sizes can be believed."""
        pieces = []
        held, head = len(self._incoming.data), bytes(self._incoming.data[: Header.SIZE])
        at = 0
        while at < len(data):
            start = head + data[at : at + Header.SIZE]
            end = len(data)
            if len(start) >= Header.SIZE and self._plausible(size := _size_of(start)):
                end = min(end, at + size - held)
            pieces.append(data[at:end])
            at, held, head = end, 0, b""
        return pieces

    def _plausible(self, size: int) -> bool:
        return Header.SIZE <= size <= self.max_size

    def _complete(self, data: bytearray) -> bool:
        """Is it a whole message, or one whose size cannot be believed?"""
        if len(data) < Header.SIZE:
            return False
        size = _size_of(data)
        return len(data) >= size or not self._plausible(size)

    def _take(self, message: bytes, fds: Sequence[int], lost: bool) -> list[Action]:
        """Answer one message."""
        header = Header.unpack(message)
        if header.flags.kind == wire.KIND_REPLY and self._plausible(header.message_size):
            self.unasked_replies += 1
            return _release(fds)
        answer: list[Action] = []
        try:
            wire.parse_header(message, self.max_size)
            if lost:
                raise ProtocolError(f"command {header.command}: descriptors were lost, limit {self.own.max_msg_fds}")
            if len(fds) > self.own.max_msg_fds:
                raise ProtocolError(f"command {header.command}: {len(fds)} descriptors, limit {self.own.max_msg_fds}")
            payload, given = self._run(header.command, message[Header.SIZE :], fds)
            answer.append(Send(wire.encode_reply(header, payload), given))
        except Exception as error:
            if not isinstance(error, VfioVmbusError | OSError):
                log.exception("command %d: defect of the device", header.command)
            self._note(error)
            answer.append(Send(wire.encode_error(header, errno_of(error))))
            if not self._negotiated or not self._plausible(header.message_size):
                self._closed = True
        if header.flags.no_reply or header.flags.kind == wire.KIND_REPLY:
            answer.clear()
        return [*answer, *_release(fds), *([Close(str(self.refusals[-1]))] if self._closed else [])]

    def _run(self, number: int, payload: bytes, fds: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        if self._negotiated:
            return self._commands.run(number, payload, fds)
        if number != wire.VERSION:
            raise ProtocolError(f"the first command is {number}, need {wire.VERSION} (VERSION)")
        if fds:
            raise ProtocolError(f"VERSION: {len(fds)} descriptors, limit 0")
        version, capabilities = decode_version(payload)
        if version.major != wire.MAJOR_VERSION:
            raise ProtocolError(f"vfio-user version {version.major}.{version.minor}, need {wire.MAJOR_VERSION}")
        agreed = wire.Version(minor=min(version.minor, wire.MINOR_VERSION))
        reply = encode_version(agreed, self.own, limit=MAX_SERVER_PAYLOAD)
        self._commands.peer = capabilities
        self._negotiated = True
        return reply, ()

    def _note(self, error: Exception) -> None:
        """Without its traceback, which would keep everything alive that was in use there."""
        self.refusals.append(error.with_traceback(None))
        self.refusal_count += 1


def errno_of(error: Exception) -> int:
    """What an error reply says of it."""
    code: int | None = None
    if isinstance(error, RefusedError):
        code = error.status
    elif isinstance(error, VfioVmbusError):  # before OSError: WaitTimeout is one, without an errno
        code = next((number for kind, number in _ERRNOS if isinstance(error, kind)), None)
    elif isinstance(error, OSError):
        code = error.errno
    return code if code is not None and 0 < code <= wire.MAX_ERRNO else errno.EIO


def _size_of(data: bytes | bytearray) -> int:
    at = Header.OFFSETS["message_size"]
    return int.from_bytes(data[at : at + 4], "little")


def _release(fds: Sequence[int]) -> list[Action]:
    return [Release(tuple(fds))] if fds else []
