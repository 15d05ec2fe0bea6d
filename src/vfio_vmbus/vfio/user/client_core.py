"""The vfio-user client's protocol core: a server's bytes and descriptors in; replies, answers and what is to be closed out. No I/O.

One command of ours is under way at a time. Meanwhile, and at any other time, the server may send commands of its own (DMA_READ,
DMA_WRITE), which are answered from the memory that is mapped for it. A reply that nobody asked for is counted and dropped. Where the
stream goes on is known by sizes alone, so a message that cannot be believed is the end.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ...errors import IsolationFault, ProtocolError, VfioVmbusError
from ...wire import vfio_user as wire
from ...wire.table import Side
from ...wire.vfio_user import Header
from .client_memory import ClientMemory

MAX_DATA: Final = 1 << 20
"""Bytes of data in one message, both ways."""
MAX_MESSAGE: Final = Header.SIZE + wire.RegionAccess.SIZE + MAX_DATA
_SIZE_AT: Final = Header.OFFSETS["message_size"]


@dataclass(frozen=True)
class Reply:
    """The reply to our command. error: an errno, or 0. fds: the caller's to close. lost: some descriptors did not arrive."""

    error: int
    payload: bytes
    fds: tuple[int, ...] = ()
    lost: bool = False


@dataclass(frozen=True)
class Answer:
    """Send this: the answer to a command of the server's."""

    data: bytes


@dataclass(frozen=True)
class Discard:
    """Close these descriptors: nobody asked for them."""

    fds: tuple[int, ...]


@dataclass(frozen=True)
class Broken:
    """The stream cannot be believed any more."""

    error: ProtocolError


Action = Reply | Answer | Discard | Broken


@dataclass(frozen=True)
class _Luggage:
    """Descriptors that came with a message, and whether some were lost."""

    fds: list[int] = field(default_factory=list)
    lost: bool = False

    def with_more(self, more: _Luggage) -> _Luggage:
        return _Luggage(self.fds + more.fds, self.lost or more.lost)


class ClientCore:
    """One connection. `ask` gives the bytes of a command, `receive` takes what one recvmsg returned.

    stray_replies, stray_fds, served: replies and descriptors that nobody asked for, commands of the server's answered.
    """

    def __init__(self, memory: ClientMemory) -> None:
        self.stray_replies = 0
        self.stray_fds = 0
        self.served = 0
        self.message_id = 0  # of the latest command: those go round, so that a late reply is not taken for another
        self._memory = memory
        self._awaited: tuple[int, int] | None = None
        self.partial = bytearray()  # of a message that is not complete
        self._luggage = _Luggage()

    def ask(self, number: int, payload: bytes = b"") -> bytes:
        """The bytes of a command, whose reply is awaited from now on."""
        self.message_id = (self.message_id + 1) & 0xFFFF
        self.await_reply(self.message_id, number)
        return wire.encode_request(self.message_id, number, payload)

    def await_reply(self, message_id: int, number: int) -> None:
        """A command was sent; its reply is awaited."""
        self._awaited = message_id, number

    def receive(self, data: bytes, fds: Sequence[int] = (), *, lost: bool = False) -> list[Action]:
        """Take bytes of the stream with the descriptors that came along. After a Broken there is nothing more.

        The kernel ends a recvmsg behind the bytes that descriptors were sent with: they belong to the last message that begins in `data`,
        or, if none does, to the one that goes on.
        """
        self.partial += data
        carried, fresh = self._luggage, _Luggage([*fds], lost)
        self._luggage = _Luggage()
        mine = _Luggage()
        actions: list[Action] = []
        try:
            while (message := self._next_message()) is not None:
                mine, carried = carried, _Luggage()
                if not self.partial:
                    mine, fresh = mine.with_more(fresh), _Luggage()
                actions += self._take(message, mine)
                mine = _Luggage()
        except ProtocolError as error:
            actions += [*self._discard(mine.fds + carried.fds + fresh.fds), Broken(error)]
        else:
            self._luggage = carried.with_more(fresh)
        return actions

    def end(self) -> list[Action]:
        """The connection has ended: what is to be closed."""
        self._awaited = None
        self.partial.clear()
        left, self._luggage = self._luggage, _Luggage()
        return self._discard(left.fds)

    def _next_message(self) -> bytes | None:
        """The next whole message of the stream. Raises ProtocolError for a header that cannot be."""
        if len(self.partial) < Header.SIZE:
            return None
        wire.parse_header(self.partial[: Header.SIZE], MAX_MESSAGE)
        size = int.from_bytes(self.partial[_SIZE_AT : _SIZE_AT + 4], "little")
        if len(self.partial) < size:
            return None
        message = bytes(self.partial[:size])
        del self.partial[:size]
        return message

    def _take(self, message: bytes, luggage: _Luggage) -> list[Action]:
        """One message. Raises ProtocolError for the reply that is awaited, to another command; its descriptors are then still there."""
        header = Header.unpack(message)
        if header.flags.kind == wire.KIND_COMMAND:
            return [*self._discard(luggage.fds), *self._serve(header, message[Header.SIZE :])]
        if self._awaited is None or header.message_id != self._awaited[0]:
            self.stray_replies += 1
            return self._discard(luggage.fds)
        if header.command != self._awaited[1]:
            raise ProtocolError(f"a reply to command {header.command}, need {self._awaited[1]}")
        self._awaited = None
        error = (header.error or errno.EIO) if header.flags.error else 0
        return [Reply(error, message[Header.SIZE :], tuple(luggage.fds), luggage.lost)]

    def _discard(self, fds: list[int]) -> list[Action]:
        self.stray_fds += len(fds)
        return [Discard(tuple(fds))] if fds else []

    def _serve(self, header: Header, payload: bytes) -> list[Action]:
        """Answer a command of the server's."""
        self.served += 1
        try:
            answer = wire.encode_reply(header, self._run(header.command, payload))
        except _Unknown:
            answer = wire.encode_error(header, errno.ENOSYS)
        except (IsolationFault, OSError):
            answer = wire.encode_error(header, errno.EFAULT)
        except VfioVmbusError:
            answer = wire.encode_error(header, errno.EINVAL)
        return [] if header.flags.no_reply else [Answer(answer)]

    def _run(self, number: int, payload: bytes) -> bytes:
        command = wire.COMMANDS.get(number)
        if command is None or command.sender is not Side.HOST:
            raise _Unknown(f"command {number} from a server")
        value, data = wire.parse_request(number, payload)
        if value.count > MAX_DATA:
            raise ProtocolError(f"{command.name}: {value.count} bytes, limit {MAX_DATA}")
        if number == wire.DMA_READ:
            return bytes(value.pack() + self._memory.read(value.iova, value.count))
        self._memory.write(value.iova, data)
        return bytes(value.pack())


class _Unknown(ProtocolError):
    """A command that no server sends."""
