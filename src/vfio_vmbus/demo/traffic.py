"""The kernel's own TCP/IP stack on both sides of the card: ping, a download that is compared, a TCP measurement."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..apps.lab import Namespace

DOWNLOAD = 64 << 20
PINGS = 20
TCP_SECONDS = 2.0


@dataclass(frozen=True)
class Http:
    """Bytes that came, and whether they are those that were sent."""

    bytes: int
    sha256_match: bool


@dataclass(frozen=True)
class Ping:
    """Echoes sent and received, and the median of their round trips in milliseconds."""

    sent: int
    received: int
    rtt_ms_median: float | None


def ping(left: Namespace, right: Namespace, count: int = PINGS) -> Ping:
    """Ping through the card."""
    result = left.ping(right.address, count, 0.02, 1.0)
    return Ping(result.sent, result.received, result.rtt_ms_median)


def download(left: Namespace, right: Namespace, size: int, progress: Callable[[int, int], None]) -> Http:
    """Fetch `size` bytes over HTTP through the card, and compare their SHA-256 with the server's."""
    body = right.http_serve(size, seed=1)
    got = left.http_get(right.http_url(body), progress=progress)
    return Http(got.bytes, got.sha256 == body.sha256 and got.bytes == size)


def tcp(left: Namespace, right: Namespace, seconds: float) -> float:
    """Gbit/s of one TCP stream through the card."""
    return left.tcp_send(right.address, right.tcp_serve(), seconds).gbit_per_s


class Meanwhile:
    """Pings that go on in the background: the first driver's traffic while the second one attacks."""

    def __init__(self, left: Namespace, right: Namespace) -> None:
        self._left = left
        self._right = right
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="demo-pings", daemon=True)
        self.sent = 0
        self.received = 0

    def _main(self) -> None:
        try:
            while not self._stop.is_set() or self.sent == 0:
                result = self._left.ping(self._right.address, 10, 0.01, 1.0)
                self.sent += result.sent
                self.received += result.received
        except BaseException as error:  # raised again where the results are asked for
            self._error = error

    def __enter__(self) -> Meanwhile:
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop.set()
        self._thread.join(30)
        if self._error is not None and exc[0] is None:
            raise self._error
