"""What goes over a control socket: a JSON object a line, a request and its answer in turn.

Both sides may be hostile: a request is small and has exactly the fields that are named here; of an answer fields that are not known are
passed over, so that a newer process can be asked, and its size is limited.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

import msgspec

from ..bus.policy import Isolation, UnsafeUse
from ..errors import ProtocolError

LONGEST_REQUEST: Final = 4096
"""Bytes of a line."""
LONGEST_ANSWER: Final = 4 << 20


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag=str.lower):
    pass


class Status(_Request, frozen=True):
    """Answer: a Report."""


class Link(_Request, frozen=True):
    """Plug a card's virtual cable in or out."""

    nic: str
    up: bool


class Rescind(_Request, frozen=True):
    """Take a device away from its client. at_once: without a warning, as when it breaks; else a card's cable is pulled first."""

    device: str
    at_once: bool = False


class Offer(_Request, frozen=True):
    """Give a device back to the client that it was taken from, or to `client`; a name that is new is a new card's."""

    device: str
    client: str | None = None


class Mtu(_Request, frozen=True):
    """Take a card away and offer it again with another limit to its MTU."""

    nic: str
    size: int


Command: TypeAlias = Link | Rescind | Offer | Mtu
Request: TypeAlias = Status | Link | Rescind | Offer | Mtu


class Device(msgspec.Struct, frozen=True):
    """A device that the process has on offer, or drives. kind: as `list` says it. why: of its isolation. client: who has it.

    counters: since the process began, by name.
    """

    name: str
    kind: str
    isolation: Isolation
    why: str
    instance: str | None = None
    mac: str | None = None
    mtu: int | None = None
    link: bool | None = None
    client: str | None = None
    counters: dict[str, int] = {}


class Client(msgspec.Struct, frozen=True):
    """Who has devices of a host. devices: their names. maps: of its memory. faults: refused by the IOMMU. errors: its breaches of protocol.

    version: of VMBus, None while it has not connected. failed: it is cut off, until it begins anew.
    """

    name: str
    devices: tuple[str, ...]
    version: str | None
    failed: bool
    channels: int
    gpadls: int
    gpadl_bytes: int
    maps: int
    mapped_bytes: int
    faults: int
    errors: int
    last_error: str | None = None


class Port(msgspec.Struct, frozen=True):
    """A port of the host's switch. Of counters, "rx" is from the port into the switch."""

    name: str
    kind: str
    enabled: bool
    counters: dict[str, int]


class Report(msgspec.Struct, frozen=True):
    """A process of ours. kind: its command. since: seconds since 1970. clock: nanoseconds (CLOCK_MONOTONIC) at which this was true.

    unsafe: what it was allowed by `bus.policy`.
    """

    name: str
    kind: str
    pid: int
    since: float
    clock: int
    release: str
    unsafe: tuple[UnsafeUse, ...] = ()
    devices: tuple[Device, ...] = ()
    clients: tuple[Client, ...] = ()
    ports: tuple[Port, ...] = ()


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """report: to Status. done: to a command, what became of it, for people. refused: why not; wrong_use: by the mistake of who asked."""

    report: Report | None = None
    done: str | None = None
    refused: str | None = None
    wrong_use: bool = False


_T = TypeVar("_T")
_requests: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)
_answers: Final = msgspec.json.Decoder(Answer)


def parse_request(line: bytes) -> Request:
    """Raises ProtocolError for what is none."""
    return _parsed(_requests.decode, line, "request")


def parse_answer(line: bytes) -> Answer:
    """Raises ProtocolError for what is none."""
    return _parsed(_answers.decode, line, "answer")


def line_of(message: Request | Answer) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def _parsed(decode: Callable[[bytes], _T], line: bytes, what: str) -> _T:
    try:
        return decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"no {what} that is understood here: {error}") from None
