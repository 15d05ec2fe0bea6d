"""What a lab and the worker of one of its namespaces say to each other.

JSON, one message a packet of a SOCK_SEQPACKET socket. A request brings a socket of its own (SCM_RIGHTS)
for its replies: any number of `Progress`, then one result or `Failure`. So calls from several threads need no
numbers and no reader, and a worker that dies in the middle is an end of file for whoever waits.
"""

from typing import Self

import msgspec

from vfio_vmbus.errors import (
    LocalError,
    PeerError,
    RefusedError,
    UnavailableError,
    UsageError,
    VfioVmbusError,
    WaitTimeout,
)

PACKET_LIMIT = 65536  # bytes of one message; below the least send buffer of a socket


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first request: enter namespaces of one's own and make the TAP, whose fd comes with the reply."""

    tap: str
    mac: bytes
    mtu: int
    address: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    dest: str
    count: int
    interval: float
    timeout: float


class HttpServe(msgspec.Struct, frozen=True, tag=True):
    size: int
    seed: int


class HttpGet(msgspec.Struct, frozen=True, tag=True):
    url: str
    timeout: float


class TcpServe(msgspec.Struct, frozen=True, tag=True):
    pass


class TcpSend(msgspec.Struct, frozen=True, tag=True):
    dest: str
    port: int
    seconds: float
    timeout: float


Request = Setup | Ping | HttpServe | HttpGet | TcpServe | TcpSend


class Ready(msgspec.Struct, frozen=True, tag=True):
    pass


class PingResult(msgspec.Struct, frozen=True, tag=True):
    """Echo requests sent, replies that came in time (each once), and their median round trip in ms."""

    sent: int
    received: int
    rtt_ms_median: float | None


class HttpBody(msgspec.Struct, frozen=True, tag=True):
    """A body that is being served: the port, its length in bytes and its SHA-256 in hex."""

    port: int
    bytes: int
    sha256: str


class Download(msgspec.Struct, frozen=True, tag=True):
    """What a download brought: bytes, their SHA-256 in hex, seconds from the request to the last byte."""

    bytes: int
    sha256: str
    seconds: float


class TcpPort(msgspec.Struct, frozen=True, tag=True):
    port: int


class TcpResult(msgspec.Struct, frozen=True, tag=True):
    """Bytes of TCP payload that arrived, and seconds from the first to the last, by the receiver's clock."""

    bytes: int
    seconds: float
    gbit_per_s: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the body so far, and in all."""

    done: int
    total: int


class Failure(msgspec.Struct, frozen=True, tag=True):
    """Why a request failed: the exception's class by name, its message, and seconds for a `WaitTimeout`."""

    error: str
    message: str
    seconds: float = 0.0

    @classmethod
    def of(cls, error: VfioVmbusError) -> Self:
        if isinstance(error, WaitTimeout):
            return cls("WaitTimeout", error.awaited, error.seconds)
        return cls(type(error).__name__, str(error))

    def exception(self) -> VfioVmbusError:
        """The exception that the caller gets; `LocalError` for a class that is not expected of a worker."""
        if self.error == "WaitTimeout":
            return WaitTimeout(self.message, self.seconds)
        return _RAISED.get(self.error, LocalError)(self.message)


_RAISED: dict[str, type[VfioVmbusError]] = {
    cls.__name__: cls for cls in (UnavailableError, UsageError, LocalError, PeerError, RefusedError)
}

Result = Ready | PingResult | HttpBody | Download | TcpPort | TcpResult
Reply = Result | Progress | Failure

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
