"""The vfio-user server's protocol core: a client's bytes and descriptors in, what is to be sent, released and closed out. No I/O.

The stream stays in step whatever is in a message, as long as its size can be believed; when that cannot be, or the client does not begin
with a VERSION that suits, the answer is EINVAL and the end of the connection. A shell carries the actions out, in order.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...errors import (
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
from ...wire import vfio_user as wire
from ...wire.vfio_user import Header
from ...wire.vfio_user_version import MAX_SERVER_PAYLOAD, Capabilities, decode_version, encode_version
from .commands import Commands
from .device import ServedDevice

log = logging.getLogger("vfio_vmbus.vfio")

MAX_MSG_FDS: Final = 16
"""QEMU takes no server that announces more."""
MAX_DMA_MAPS: Final = 65535
"""QEMU takes no server that announces more."""
KEPT_REFUSALS: Final = 64
MAX_ASKED: Final = 64
"""Requests of the server that a client may leave unanswered."""
_LEAST_ROOM: Final = 8192
"""Bytes of a message that is always taken: SPDK sends 4 KiB to ask for a region, WRITE_MULTI has up to 6 KiB."""

_SIZE_AT: Final = Header.OFFSETS["message_size"]
_ACCESS: Final = struct.Struct("<HHIIIQII")
"""A Header with a RegionAccess behind it, which come and go most often."""
_NO_REPLY: Final = wire.HeaderFlags.no_reply.mask
_REPLY: Final = wire.KIND_REPLY
_REGION_READ: Final = wire.REGION_READ
_REGION_WRITE: Final = wire.REGION_WRITE

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


@dataclass(frozen=True)
class Answer:
    """The client's answer to request `message_id` of this server: its reply's payload, or why there is none."""

    message_id: int
    result: bytes | VfioVmbusError


Action = Send | Release | Close | Answer


@dataclass
class _Incoming:
    """A message that is not yet complete: what there is of it, its descriptors, and whether some were lost on the way."""

    data: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    lost: bool = False


class ServerCore:
    """One client. claim: called for its VERSION, gives it a device, or raises RefusedError with the errno that it is turned away with.

    max_data: bytes of data in a message, at most 64 MiB. max_msg_fds: descriptors in one. `refusals`: the latest errors, newest last.
    `feed` takes what one recvmsg returned, `step` then carries out one message. Every descriptor given to it comes back in a Release
    once, at the latest by `end`.
    """

    def __init__(self, claim: Callable[[], ServedDevice], *, max_data: int = 1 << 20, max_msg_fds: int = MAX_MSG_FDS) -> None:
        self.max_msg_fds = max_msg_fds
        self.max_size = max(_LEAST_ROOM, Header.SIZE + wire.RegionAccess.SIZE + max_data)
        self.refusals: deque[Exception] = deque(maxlen=KEPT_REFUSALS)
        self.refusal_count = 0
        self.unasked_replies = 0
        self.missing = 0
        """Bytes that the message under way still needs; 0 while that is not known."""
        self._claim = claim
        self._max_data = max_data
        self._commands: Commands | None = None
        self._closed = False
        self._incoming = _Incoming()
        self._messages: deque[tuple[bytes, Sequence[int], bool]] = deque()
        """Those that are complete: their bytes, their descriptors, and whether some were lost."""
        self._asked: dict[int, int] = {}
        """Requests of this server that are not answered: message number -> command."""
        self._last_id = 0

    @property
    def device(self) -> ServedDevice | None:
        """What the client has, from its VERSION on."""
        return self._commands.device if self._commands else None

    @property
    def own(self) -> Capabilities:
        """What this server has announced. Raises UsageError before VERSION."""
        return self._negotiated().own

    @property
    def peer(self) -> Capabilities:
        """What the client can do, once it has said so. Raises UsageError before VERSION."""
        return self._negotiated().peer

    @property
    def closed(self) -> bool:
        """Has the connection ended?"""
        return self._closed

    @property
    def ready(self) -> bool:
        """Is there a message to be carried out?"""
        return bool(self._messages)

    def feed(self, data: bytes, fds: Sequence[int] = (), *, lost: bool = False) -> list[Action]:
        """Take bytes of the stream, with the descriptors that came along; no bytes: the client has gone. lost: some descriptors were
        cut off (MSG_CTRUNC). Returns what is to be released.

        The kernel ends a recvmsg behind the bytes that descriptors were sent with, so they belong to the last message that begins in
        `data`, or, if none does, to the one that goes on.
        """
        if self._closed or not data:
            return [*self.end(), *_release(fds)]
        if not self._incoming.data and not self._incoming.fds and _size_of(data) == len(data) >= Header.SIZE:
            self._messages.append((data, fds, lost))  # one message, as most clients send them
            return []
        pieces = self._split(data)
        for place, piece in enumerate(pieces, 1):
            self._incoming.data += piece
            if place == len(pieces):
                self._incoming.fds += fds
                self._incoming.lost |= lost
            if self._complete(self._incoming.data):
                self._messages.append((bytes(self._incoming.data), self._incoming.fds, self._incoming.lost))
                self._incoming = _Incoming()
        begun = self._incoming.data
        self.missing = _size_of(begun) - len(begun) if len(begun) >= Header.SIZE else 0
        return []

    def step(self) -> list[Action]:
        """Carry out one message, if there is one."""
        if self._closed or not self._messages:
            return []
        actions = self._take(*self._messages.popleft())
        return [*actions, *self.end()] if self._closed else actions

    def quick(self, data: bytes) -> bytes | None:
        """The reply (b"": none) to REGION_READ or REGION_WRITE, which most messages are, if `data` is that, whole and alone, and came
        without descriptors. None for anything else, which `feed` and `step` take; they do the same with these."""
        commands = self._commands
        if commands is None or self._closed or self._messages or self._incoming.data or len(data) < _ACCESS.size:
            return None
        message_id, command, size, flags, _, offset, region, count = _ACCESS.unpack_from(data)
        if flags & ~_NO_REPLY or size != len(data):
            return None
        try:
            if command == _REGION_READ and size == _ACCESS.size:
                value = commands.read(region, offset, count)
            elif command == _REGION_WRITE and size == _ACCESS.size + count:
                commands.write(region, offset, data[_ACCESS.size :])
                value = b""
            else:
                return None
        except Exception as error:
            return self._refusal(Header.unpack(data), error)
        if flags:
            return b""
        return _ACCESS.pack(message_id, command, _ACCESS.size + len(value), _REPLY, 0, offset, region, count) + value

    def receive(self, data: bytes, fds: Sequence[int] = (), *, lost: bool = False) -> list[Action]:
        """`feed`, and carry out all that is complete."""
        actions = self.feed(data, fds, lost=lost)
        while self._messages:
            actions += self.step()
        return actions

    def end(self) -> list[Action]:
        """The client has gone: what is to be released."""
        self._closed = True
        left = [*self._incoming.fds, *(fd for _, fds, _ in self._messages for fd in fds)]
        self._messages.clear()
        self._incoming = _Incoming()
        gone: list[Action] = [Answer(number, ClosedError("the client has gone")) for number in self._asked]
        self._asked.clear()
        return [*_release(left), *gone]

    def ask(self, number: int, payload: bytes) -> tuple[int, Send]:
        """A command for the client: its message number, by which an Answer will come, and what to send. Raises UsageError when there
        are too many that it has not answered, ClosedError when it has gone."""
        if self._closed:
            raise ClosedError("the client has gone")
        if len(self._asked) >= MAX_ASKED:
            raise UsageError(f"{len(self._asked)} requests to the client are not answered, limit {MAX_ASKED}")
        self._last_id = next(
            n & 0xFFFF for n in range(self._last_id + 1, self._last_id + 0x10000) if n & 0xFFFF not in self._asked
        )
        self._asked[self._last_id] = number
        return self._last_id, Send(wire.encode_request(self._last_id, number, payload))

    def give_up(self, message_id: int) -> None:
        """Nobody waits for this answer any more; if it comes it is one that nobody asked for."""
        self._asked.pop(message_id, None)

    def _negotiated(self) -> Commands:
        if self._commands is None:
            raise UsageError("the client has not said VERSION yet")
        return self._commands

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
            return [*self._answered(header, message[Header.SIZE :]), *_release(fds)]
        answer: list[Action] = []
        try:
            wire.check_header(header, self.max_size)
            if lost:
                raise ProtocolError(f"command {header.command}: descriptors were lost, limit {self.max_msg_fds}")
            if len(fds) > self.max_msg_fds:
                raise ProtocolError(f"command {header.command}: {len(fds)} descriptors, limit {self.max_msg_fds}")
            payload, given = self._run(header.command, message[Header.SIZE :], fds)
            if not header.flags.no_reply:
                answer.append(Send(wire.encode_reply(header, payload), given))
        except Exception as error:
            refusal = self._refusal(header, error)
            answer = [Send(refusal)] if refusal else []
            if self._commands is None or not self._plausible(header.message_size):
                self._closed = True
        return [*answer, *_release(fds), *([Close(str(self.refusals[-1]))] if self._closed else [])]

    def _refusal(self, header: Header, error: Exception) -> bytes:
        """Keep an error, and answer a command with it; nothing for one that wants no answer."""
        if not isinstance(error, VfioVmbusError | OSError):
            log.exception("command %d: defect of the device", header.command)
        self._note(error)
        if header.flags.no_reply or header.flags.kind == wire.KIND_REPLY:
            return b""
        return wire.encode_error(header, errno_of(error))

    def _answered(self, header: Header, payload: bytes) -> list[Action]:
        """A reply: is it one that was asked for?"""
        command = self._asked.pop(header.message_id, None)
        if command is None:
            self.unasked_replies += 1
            return []
        if header.command != command:
            wrong = ProtocolError(f"the reply to command {command} says that it is of {header.command}")
            return [Answer(header.message_id, wrong)]
        if header.flags.error:
            refusal = RefusedError(f"{wire.COMMANDS[command].name} was refused by the client", header.error)
            return [Answer(header.message_id, refusal)]
        return [Answer(header.message_id, payload)]

    def _run(self, number: int, payload: bytes, fds: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        if self._commands is not None:
            return self._commands.run(number, payload, fds)
        if number != wire.VERSION:
            raise ProtocolError(f"the first command is {number}, need {wire.VERSION} (VERSION)")
        if fds:
            raise ProtocolError(f"VERSION: {len(fds)} descriptors, limit 0")
        version, capabilities = decode_version(payload)
        if version.major != wire.MAJOR_VERSION:
            raise ProtocolError(f"vfio-user version {version.major}.{version.minor}, need {wire.MAJOR_VERSION}")
        agreed = wire.Version(minor=min(version.minor, wire.MINOR_VERSION))
        device = self._claim()
        own = Capabilities(
            max_msg_fds=self.max_msg_fds,
            max_data_xfer_size=self._max_data,
            max_dma_maps=min(device.max_maps, MAX_DMA_MAPS),
            write_multiple=True,
        )
        self._commands = Commands(device, own, capabilities)
        return encode_version(agreed, own, limit=MAX_SERVER_PAYLOAD), ()

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
    return int.from_bytes(data[_SIZE_AT : _SIZE_AT + 4], "little")


def _release(fds: Sequence[int]) -> list[Action]:
    return [Release(tuple(fds))] if fds else []
