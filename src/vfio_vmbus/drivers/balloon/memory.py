"""The memory that a balloon gives to the host: DMA buffers of its own, whose page numbers the host gets."""

from __future__ import annotations

from collections.abc import Iterator

from ...channel.device import READ, WRITE, DmaBuffer, VmbusDevice
from ...errors import DmaError, ProtocolError
from ...memory.mapping import PAGE
from ...wire.dm import PageSpan

CHUNK_PAGES = 512
"""2 MiB: what is allocated, and let go of, at a time."""


class _Chunk:
    def __init__(self, buffer: DmaBuffer) -> None:
        self.buffer = buffer
        self.out = set(buffer.pfns)


class BalloonMemory:
    """Pages of `device`'s DMA buffers that the host has. Nothing here touches them while it does."""

    def __init__(self, device: VmbusDevice) -> None:
        self._device = device
        self._chunks: dict[int, _Chunk] = {}  # by page number

    @property
    def pages(self) -> int:
        """How many the host has."""
        return len(self._chunks)

    def give(self, pages: int) -> Iterator[tuple[int, ...]]:
        """Page numbers of fresh memory, in chunks; it ends early when the machine has no more to give."""
        while pages > 0:
            size = min(pages, CHUNK_PAGES)
            try:
                buffer = self._device.dma_buffer(size * PAGE, READ | WRITE, "balloon")
            except (DmaError, OSError):
                return
            chunk = _Chunk(buffer)
            self._chunks.update(dict.fromkeys(chunk.out, chunk))
            pages -= size
            yield tuple(sorted(chunk.out))

    def take_back(self, span: PageSpan) -> None:
        """The host gives pages back. Memory all of whose pages are back is freed. Raises ProtocolError for pages that it does not have."""
        for page in range(span.start_page, span.start_page + span.page_count):
            chunk = self._chunks.pop(page, None)
            if chunk is None:
                raise ProtocolError(f"the host gives page {page:#x} back, which it does not have")
            chunk.out.discard(page)
            if not chunk.out:
                chunk.buffer.close()

    def close(self) -> None:
        """Free everything, whether the host has it or not."""
        for chunk in set(self._chunks.values()):
            chunk.buffer.close()
        self._chunks.clear()
