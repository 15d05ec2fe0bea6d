"""The balloon as a device of the embedded host: dynamic memory's host end, which takes pages from a guest and gives them back.

The pages of an isolated client are IOVA pages of its own domain: what it gives away is given back to this machine (a hole is punched
into the client's memory file), and nothing else can be named. Order of messages as in Linux drivers/hv/hv_balloon.c.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from uuid import UUID, uuid4

from ..errors import LocalError, PeerError, ProtocolError, UsageError
from ..iommu.translation import WRITE
from ..memory.mapping import PAGE
from ..memory.shared import discard
from ..vfio import eventfd
from ..wire import dm
from ..wire.guids import CLASS_BALLOON
from ..wire.ring import PACKET_INBAND
from ..wire.table import Side
from ..wire.vmbus import ChannelOffer
from .vsp import ChannelContext

_BUDGET = 64
_RETRY_SECONDS = 0.001


class PageSet:
    """Page numbers as runs of neighbours: (start, count), sorted, that do not overlap."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.pages = 0

    def add(self, start: int, count: int) -> None:
        """Raises ProtocolError for an empty run, and for pages that are in here already."""
        at = bisect_right(self.runs, (start, 0))
        before = self.runs[at - 1] if at else (0, 0)
        after = self.runs[at][0] if at < len(self.runs) else start + count
        if count == 0 or sum(before) > start or after < start + count:
            raise ProtocolError(f"pages {start:#x} to {start + count:#x}: none, or some that were given already")
        self.runs.insert(at, (start, count))
        self.pages += count

    def take(self, most: int) -> list[dm.PageSpan]:
        """Up to `most` pages, which are no longer in here, in as many ranges as fit into a message."""
        taken: list[dm.PageSpan] = []
        while self.runs and most and len(taken) < dm.MAX_RANGES:
            start, count = self.runs.pop()
            part = min(count, most, dm.MAX_RANGE_PAGES)
            if part < count:
                self.runs.append((start, count - part))
            taken.append(dm.PageSpan.of(start_page=start + count - part, page_count=part))
            most -= part
            self.pages -= part
        return taken


class Balloon:
    """One balloon. All methods are called on the host's loop (`EmbeddedHost.run`).

    versions: of the protocol, newest first. The guest's last report is `status`; what it has given away is counted in `ballooned`.
    """

    def __init__(
        self,
        *,
        name: str = "balloon",
        versions: tuple[int, ...] = dm.SUPPORTED_VERSIONS,
        max_pages: int = 0,
        instance: UUID | None = None,
    ) -> None:
        self.name = name
        self.offer = ChannelOffer(class_guid=CLASS_BALLOON, instance_guid=instance or uuid4(), server_context_size=0)
        self._versions = versions
        self._max_pages = max_pages
        self._context: ChannelContext | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._handlers: dict[type[dm.DmMessage], Callable[..., None]] = {
            dm.VersionRequest: self._on_version,
            dm.CapabilitiesReport: self._on_capabilities,
            dm.StatusReport: self._on_status,
            dm.BalloonResponse: self._on_ballooned,
            dm.UnballoonResponse: self._on_unballooned,
            dm.HotAddResponse: self._on_hot_added,
        }
        self._forget()

    def _forget(self) -> None:
        self.version: int | None = None
        self.capabilities: dm.Capabilities | None = None
        self.status: dm.StatusReport | None = None
        self.reports = 0
        self.hot_added: tuple[int, int] | None = None
        """How the guest answered the last hot add: pages, result."""
        self._pages = PageSet()
        self._outbox: deque[bytes] = deque()
        self._wanted = 0
        self._awaited: type[dm.DmMessage] | None = None
        self._transaction = 0

    @property
    def ballooned(self) -> int:
        """Pages that the guest has given away."""
        return self._pages.pages

    @property
    def busy(self) -> bool:
        """Is a request unanswered?"""
        return self._awaited is not None

    def request(self, pages: int) -> None:
        """Ask the guest for pages; it may give fewer. Raises UsageError before it is ready, and while another request is open."""
        if not 0 < pages < 1 << 32:
            raise UsageError(f"{pages} pages: take 1 to {(1 << 32) - 1}")
        self._ask(dm.BalloonRequest(page_count=pages, transaction_id=self._next()), dm.BalloonResponse)
        self._wanted = pages

    def give_back(self, pages: int) -> None:
        """Give the guest up to so many of its pages back. Raises as `request`."""
        self._check_ready()
        if not 0 < pages <= self.ballooned:
            raise UsageError(f"{pages} pages: {self.ballooned} are there to be given back")
        transaction = self._next()
        while pages:
            spans = tuple(self._pages.take(pages))
            pages -= sum(span.page_count for span in spans)
            self._outbox.append(
                dm.encode_message(
                    dm.UnballoonRequest(
                        transaction_id=transaction,
                        flags=dm.MorePages.of(more_pages=int(pages > 0)),
                        range_count=len(spans),
                        ranges=spans,
                    )
                )
            )
        self._awaited = dm.UnballoonResponse
        self._flush()

    def hot_add(self, start: int, count: int) -> None:
        """Offer the guest pages that it does not have. Raises as `request`."""
        span = dm.PageSpan.of(start_page=start, page_count=count)
        self.hot_added = None
        self._ask(dm.HotAddRequest(span=span, transaction_id=self._next()), dm.HotAddResponse)

    def open(self, context: ChannelContext) -> None:
        """Begin to serve the guest."""
        self.close()
        self._context = context
        asyncio.get_running_loop().add_reader(context.doorbell, context.guarded(self._serve))
        asyncio.get_running_loop().call_soon(context.guarded(self._serve))

    def close(self) -> None:
        """The guest is gone, and what it gave away with it."""
        if self._context is not None:
            asyncio.get_running_loop().remove_reader(self._context.doorbell)
            self._context = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._forget()

    def gpadl_gone(self, handle: int) -> None:
        """A balloon has no shared buffers."""

    def _next(self) -> int:
        self._transaction += 1
        return self._transaction

    def _check_ready(self) -> None:
        if self.capabilities is None:
            raise UsageError(f"{self.name} has no guest that has told its capabilities")
        if self._awaited is not None:
            raise UsageError(f"{self.name}: another request awaits its {self._awaited.__name__}")

    def _ask(self, message: dm.DmMessage, answer: type[dm.DmMessage]) -> None:
        self._check_ready()
        self._awaited = answer
        self._post(message)

    def _post(self, message: dm.DmMessage, info: bytes = b"") -> None:
        self._outbox.append(dm.encode_message(message, info))
        self._flush()

    def _flush(self) -> bool:
        """Send what waits. False while the ring is full: then later."""
        context = self._context
        while self._outbox and context is not None:
            if not context.pair.outgoing.send(self._outbox[0]):
                if self._retry is None:
                    again = context.guarded(self._try_again)
                    self._retry = asyncio.get_running_loop().call_later(_RETRY_SECONDS, again)
                return False
            self._outbox.popleft()
        return True

    def _try_again(self) -> None:
        self._retry = None
        self._serve()

    def _serve(self) -> None:
        """Take what came. What goes wrong on account of the guest ends its use of the channel, and nothing else."""
        context = self._context
        if context is None:
            return
        eventfd.take(context.doorbell)
        try:
            again = self._take_some(context)
        except (PeerError, LocalError, OSError) as error:
            self.close()
            context.failed(error)
            return
        if again:
            asyncio.get_running_loop().call_soon(context.guarded(self._serve))

    def _take_some(self, context: ChannelContext) -> bool:
        """Up to a number of packets. True when there may be more. While an answer waits for room nothing is taken."""
        for _ in range(_BUDGET):
            if not self._flush():
                return False
            packet = context.pair.incoming.receive()
            if packet is None:
                if not context.pair.incoming.unmask():
                    return False
                continue
            if packet.packet_type != PACKET_INBAND:
                raise ProtocolError(f"balloon: packet type {packet.packet_type}, need {PACKET_INBAND} (in-band)")
            message = dm.parse_message(packet.payload, sender=Side.GUEST, version=self.version)
            self._handlers[type(message)](message)
        return True

    def _on_version(self, message: dm.VersionRequest) -> None:
        if self.version is not None:
            raise ProtocolError("balloon: VersionRequest after a version was agreed on")
        taken = message.version in self._versions
        self.version = message.version if taken else None
        accepted = dm.Accepted.of(is_accepted=int(taken))
        self._post(dm.VersionResponse(transaction_id=message.transaction_id, flags=accepted))

    def _on_capabilities(self, message: dm.CapabilitiesReport) -> None:
        if self.version is None or self.capabilities is not None:
            raise ProtocolError("balloon: CapabilitiesReport out of order")
        self.capabilities = message.capabilities
        accepted = dm.Accepted.of(is_accepted=1)
        self._post(dm.CapabilitiesResponse(transaction_id=message.transaction_id, flags=accepted))
        if self._max_pages and self.version >= dm.VERSION_1:
            info = dm.InfoHeader(data_size=8).pack() + self._max_pages.to_bytes(8, "little")
            self._post(dm.InfoMessage(info_size=len(info)), info)

    def _on_status(self, message: dm.StatusReport) -> None:
        if self.capabilities is None:
            raise ProtocolError("balloon: StatusReport before the capabilities")
        self.status = message
        self.reports += 1

    def _on_ballooned(self, message: dm.BalloonResponse) -> None:
        self._expect(message)
        context = self._context
        assert context is not None, "a handler runs while the channel is open"
        given = sum(span.page_count for span in message.ranges)
        if given > self._wanted:
            raise ProtocolError(f"balloon: {given} pages given, {self._wanted} more were asked for")
        for span in message.ranges:
            iova, size = span.start_page * PAGE, span.page_count * PAGE
            pieces = context.domain.pieces(iova, size, WRITE)
            self._pages.add(span.start_page, span.page_count)
            for piece in pieces:
                discard(piece)
        self._wanted -= given
        if not message.flags.more_pages:
            self._awaited = None
        elif not given:
            raise ProtocolError("balloon: a BalloonResponse without pages that is not the last")

    def _on_unballooned(self, message: dm.UnballoonResponse) -> None:
        self._expect(message)
        self._awaited = None

    def _on_hot_added(self, message: dm.HotAddResponse) -> None:
        self._expect(message)
        self._awaited = None
        self.hot_added = message.page_count, message.result

    def _expect(self, message: dm.DmMessage) -> None:
        if self._awaited is not type(message):
            raise ProtocolError(f"balloon: {type(message).__name__} answers nothing")
