"""The balloon driver: dynamic memory's guest end. Order of messages as in Linux drivers/hv/hv_balloon.c.

What the host asks for is given from memory that this process allocates for it, up to a limit that its user sets; the rest of the
system's memory is never given away, and hot-added memory is refused unless the user says what to do with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from ...channel.device import VmbusDevice
from ...errors import ProtocolError, RefusedError, RescindedError, UsageError, WaitTimeout
from ...wire import dm
from ...wire.guids import CLASS_BALLOON
from ...wire.ring import PACKET_COMPLETION, PACKET_INBAND
from ...wire.table import Side
from .memory import BalloonMemory
from .pressure import Pressure, floor, read_pressure

log = logging.getLogger("vfio_vmbus.balloon")

RING_PAGES = 6
"""Of each ring: what Linux asks for, control page included."""
REPORT_SECONDS = 1.0

AnswerT = TypeVar("AnswerT", bound=dm.DmMessage)

HotAdd = Callable[[int, int], int]
"""Called with the first page and the number of pages that the host offers; how many were taken."""


@dataclass(frozen=True)
class BalloonInfo:
    """version: of the protocol. pages: that the host has now; limit: that it may have. max_pages: what the host says it may ever give
    this guest, 0 if it does not. given, returned: pages in all; requests, reports, hot_adds: messages."""

    version: str
    pages: int
    limit: int
    max_pages: int
    reports_wanted: bool
    requests: int
    given: int
    returned: int
    reports: int
    hot_adds: int
    isolation: str


class Balloon:
    """A balloon that this process drives over `device` (which stays the caller's).

    limit: pages that the host may get, 0 for none. hot_add: takes memory that the host offers. report: seconds between reports.
    Call `serve` again and again. Raises UsageError for a device of another class, RefusedError when the host has no version in common
    or does not accept us, ProtocolError when it breaks the protocol, WaitTimeout when it says nothing.
    """

    def __init__(
        self,
        device: VmbusDevice,
        *,
        limit: int = 0,
        hot_add: HotAdd | None = None,
        versions: tuple[int, ...] = dm.SUPPORTED_VERSIONS,
        report: float = REPORT_SECONDS,
        pressure: Callable[[], Pressure] = read_pressure,
        timeout: float = 5.0,
    ) -> None:
        if device.class_guid != CLASS_BALLOON:
            raise UsageError(f"{device.name} is no balloon")
        if limit < 0:
            raise UsageError(f"a limit of {limit} pages: take 0 or more")
        self.device = device
        self._limit = limit
        self._hot_add = hot_add
        self._report = report
        self._pressure = pressure
        self._timeout = timeout
        self._version: int | None = None
        self._transaction = 0
        self._max_pages = 0
        self._counts = dict.fromkeys(("requests", "given", "returned", "reports", "hot_adds"), 0)
        self._handlers: dict[type[dm.DmMessage], Callable[..., None]] = {
            dm.BalloonRequest: self._on_request,
            dm.UnballoonRequest: self._on_give_back,
            dm.HotAddRequest: self._on_hot_add,
            dm.InfoMessage: lambda message: None,
        }
        self._memory = BalloonMemory(device)
        self._stack = ExitStack()
        self._channel = device.open(RING_PAGES)
        self._stack.callback(self._channel.close)
        try:
            self._agree(versions)
            self._reports_wanted = self._introduce()
        except BaseException:
            self.close()
            raise
        self._next_report = time.monotonic()

    @property
    def info(self) -> BalloonInfo:
        """The balloon as it is now."""
        return BalloonInfo(
            version=dm.version_text(self._version or 0),
            pages=self._memory.pages,
            limit=self._limit,
            max_pages=self._max_pages,
            reports_wanted=self._reports_wanted,
            isolation=self.device.isolation,
            **self._counts,
        )

    def serve(self, seconds: float) -> None:
        """Answer the host and report to it for so long. Raises ProtocolError, RescindedError when the device goes."""
        end = time.monotonic() + seconds
        while True:
            self.poll()
            now = time.monotonic()
            if now >= end:
                return
            self._sleep(min(end, self._next_report) - now if self._reports_wanted else end - now)

    def poll(self) -> None:
        """Take what came, without waiting, and report if that is due. Raises as `serve`."""
        while (message := self._receive()) is not None:
            self._handle(message)
        now = time.monotonic()
        if self._reports_wanted and now >= self._next_report:
            self._next_report = now + self._report
            self._send_report()
        if self.device.rescinded:
            raise RescindedError(f"{self.device.name} was taken away by its host")

    def close(self) -> None:
        """Leave the channel and free the memory. Pages that the host has are missing from then on where nothing isolates: ask it to
        give them back first."""
        if self._memory.pages and not self.device.isolation:
            log.warning("%s: closed while the host has %d pages of this machine", self.device.name, self._memory.pages)
        self._stack.close()
        self._memory.close()

    def __enter__(self) -> Balloon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _agree(self, versions: tuple[int, ...]) -> None:
        for version in versions:
            last = dm.LastAttempt.of(is_last_attempt=int(version == versions[-1]))
            answer = self._ask(dm.VersionRequest(version=version, flags=last), dm.VersionResponse)
            if answer.flags.is_accepted:
                self._version = version
                return
        raise RefusedError(f"the host speaks no dynamic memory protocol of {', '.join(map(dm.version_text, versions))}")

    def _introduce(self) -> bool:
        """Tell what we can do. Does the host want reports?"""
        able = dm.Capabilities.of(balloon=int(self._limit > 0), hot_add=int(self._hot_add is not None))
        answer = self._ask(
            dm.CapabilitiesReport(capabilities=able, max_page_number=(1 << 64) - 1),
            dm.CapabilitiesResponse,
        )
        if not answer.flags.is_accepted:
            raise RefusedError("the host does not accept this balloon")
        return not answer.flags.suppress_pressure_reports

    def _ask(self, message: dm.DmMessage, kind: type[AnswerT]) -> AnswerT:
        """The answer; what else comes meanwhile is out of order."""
        self._send(message)
        deadline = time.monotonic() + self._timeout
        while (answer := self._receive()) is None:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{self.device.name}: {kind.__name__}", self._timeout)
            self._sleep(deadline - time.monotonic())
        if not isinstance(answer, kind):
            raise ProtocolError(f"{self.device.name}: {type(answer).__name__} instead of {kind.__name__}")
        return answer

    def _receive(self) -> dm.DmMessage | None:
        while (packet := self._channel.incoming.receive()) is not None:
            if packet.packet_type == PACKET_COMPLETION:
                continue  # we ask for none, but some hosts complete
            if packet.packet_type != PACKET_INBAND:
                raise ProtocolError(f"{self.device.name}: packet type {packet.packet_type}, need {PACKET_INBAND} (in-band)")
            message = dm.parse_message(packet.payload, sender=Side.HOST, version=self._version)
            if isinstance(message, dm.InfoMessage):
                self._note(packet.payload)
            return message
        return None

    def _sleep(self, seconds: float) -> None:
        if seconds > 0 and not self._channel.incoming.unmask():
            self._channel.wait(seconds)

    def _send(self, message: dm.DmMessage) -> None:
        """Raises WaitTimeout when the host takes nothing any more."""
        self._transaction += 1
        data = dm.encode_message(replace(message, transaction_id=self._transaction))
        deadline = time.monotonic() + self._timeout
        while not self._channel.outgoing.send(data):
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{self.device.name}: room for {type(message).__name__}", self._timeout)
            time.sleep(0.001)

    def _handle(self, message: dm.DmMessage) -> None:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"{self.device.name}: {type(message).__name__} answers nothing")
        handler(message)

    def _on_request(self, message: dm.BalloonRequest) -> None:
        """Give what the limit and the machine allow, chunk by chunk; the last response says that it is the last."""
        self._counts["requests"] += 1
        pressure = self._pressure()
        spare = max(0, pressure.available - floor(pressure.total))
        wanted = min(message.page_count, self._limit - self._memory.pages, spare)
        waiting: list[dm.PageSpan] = []
        for pages in self._memory.give(wanted):
            self._counts["given"] += len(pages)
            waiting += dm.spans(pages)
            while len(waiting) > dm.MAX_RANGES:
                self._respond(waiting[: dm.MAX_RANGES], more=True)
                del waiting[: dm.MAX_RANGES]
        self._respond(waiting, more=False)
        log.info("%s: %d pages asked for, %d are out", self.device.name, message.page_count, self._memory.pages)

    def _respond(self, spans: list[dm.PageSpan], *, more: bool) -> None:
        flags = dm.RangesBefore.of(more_pages=int(more), range_count=len(spans))
        self._send(dm.BalloonResponse(flags=flags, ranges=tuple(spans)))

    def _on_give_back(self, message: dm.UnballoonRequest) -> None:
        for span in message.ranges:
            self._memory.take_back(span)
            self._counts["returned"] += span.page_count
        if not message.flags.more_pages:
            self._send(dm.UnballoonResponse())

    def _on_hot_add(self, message: dm.HotAddRequest) -> None:
        """Success with no pages tells the host not to ask again (hv_balloon.c, hot_add_req)."""
        self._counts["hot_adds"] += 1
        count = 0
        if self._hot_add is not None:
            count = self._hot_add(message.span.start_page, message.span.page_count)
        self._send(dm.HotAddResponse(page_count=count, result=int(count > 0 or self._hot_add is None)))

    def _note(self, data: bytes) -> None:
        header, value = dm.parse_info(data)
        if header.info_type == dm.INFO_TYPE_MAX_PAGE_CNT and len(value) == 8:
            self._max_pages = int.from_bytes(value, "little")

    def _send_report(self) -> None:
        """Committed counts what was ballooned (this process allocated it) and the floor, so that the host does not ask below it."""
        pressure = self._pressure()
        self._send(
            dm.StatusReport(
                available=pressure.available,
                committed=pressure.committed + floor(pressure.total),
                page_file_size=pressure.swap,
            )
        )
        self._counts["reports"] += 1
