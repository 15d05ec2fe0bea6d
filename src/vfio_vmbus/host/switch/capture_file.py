"""The file behind a capture port: a thread that takes the records from memory to a pcap file, without the GIL while it writes."""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import dpkt

from ...errors import UnavailableError, UsageError
from ...memory.block import Block
from ...memory.libc import EAGAIN
from ...memory.shared import SharedMemory
from .capture import TAPE, capture_drain
from .state import HEADER

BUFFER = 8 << 20
"""Bytes between worker and file: a hundredth of a second at 6 Gbit/s."""
BATCH_SECONDS = 0.01
"""How long the thread lets bytes gather once it was woken: it costs one signal in that time, whatever the rate."""
MAX_SNAPLEN = 262144
"""As libpcap has it."""
GRACE_SECONDS = 2.0
"""How long a reader that takes nothing may hold up the end."""
_TAIL = 16
"""The tail's place in 8-byte words, two cache lines behind the head."""


def _create(path: Path, snaplen: int, nanoseconds: bool) -> IO[bytes]:
    """A new file with the header of a pcap file."""
    try:
        with ExitStack() as resources:
            file = resources.enter_context(open(path, "wb", buffering=0))
            dpkt.pcap.Writer(file, snaplen=snaplen, linktype=dpkt.pcap.DLT_EN10MB, nano=nanoseconds)
            os.set_blocking(file.fileno(), False)
            resources.pop_all()
            return file
    except OSError as error:
        raise UsageError(f"capture to {path}: {error.strerror}") from error


class CaptureFile:
    """A pcap file that is written while frames come. `state.address` is for the port.

    snaplen: bytes kept of each frame. nanoseconds: resolution of the timestamps, else microseconds. buffer: bytes, a power of 2.
    Raises UsageError for a file that cannot be created and numbers out of range.
    """

    def __init__(self, path: str | Path, *, snaplen: int = MAX_SNAPLEN, nanoseconds: bool = True, buffer: int = BUFFER) -> None:
        if not HEADER <= snaplen <= MAX_SNAPLEN:
            raise UsageError(f"capture: snaplen of {snaplen} bytes: take {HEADER} to {MAX_SNAPLEN}")
        if buffer < 4096 or buffer & (buffer - 1):
            raise UsageError(f"capture: buffer of {buffer} bytes: take a power of two, 4096 at least")
        self.path = Path(path)
        with ExitStack() as resources:
            self._file = resources.enter_context(_create(self.path, snaplen, nanoseconds))
            with SharedMemory(buffer, "capture") as memory:
                self._memory = resources.enter_context(memory.map(wrap_from=0))
            self._signal = os.eventfd(0, os.EFD_CLOEXEC)
            resources.callback(os.close, self._signal)
            self._resources = resources.pop_all()
        self._words = Block("i8", 2 * _TAIL)
        self.state = Block(TAPE)
        self.state["memory"] = self._memory.address
        self.state["size"] = buffer
        self.state["head"] = self._words.address
        self.state["tail"] = self._words.address + 8 * _TAIL
        self.state["snaplen"] = snaplen
        self.state["unit"] = 1 if nanoseconds else 1000
        self.state["epoch"] = time.time_ns() - time.monotonic_ns()
        self.state["signal"] = self._signal
        self.error: OSError | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"capture {self.path.name}", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        while self.error is None and not self._ending.is_set():
            os.read(self._signal, 8)  # which goes on when a signal interrupts it, unlike eventfd_read
            self._ending.wait(BATCH_SECONDS)
            self._drain()

    def _drain(self) -> None:
        """Write until there is no more. A pipe whose reader is slow is waited for, but not for long once the end has come."""
        patience = GRACE_SECONDS
        while (result := capture_drain(self.state.address, self._file.fileno())) == -EAGAIN:
            if not select.select([], [self._file], [], BATCH_SECONDS)[1] and self._ending.is_set():
                patience -= BATCH_SECONDS
                if patience <= 0:
                    break
        if result < 0:
            self.error = OSError(-result, os.strerror(-result))

    def close(self) -> None:
        """Write what is left and close the file, once the port is out of the switch. UnavailableError if a write failed."""
        if self._file.closed:
            return
        self._ending.set()
        os.eventfd_write(self._signal, 1)
        self._thread.join()
        self._resources.close()
        if self.error is not None:
            raise UnavailableError(f"capture to {self.path}: {self.error.strerror}")
