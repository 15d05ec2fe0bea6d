"""Where the guest's serial console leads, and what is learnt from what goes by: the text of a kernel's panic.

Until hv_vmbus has loaded, and in a machine without Hyper-V, a guest has no other way to say that it is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

_LONGEST: Final = 1024
"""Bytes of a line that are looked at."""
_PANIC: Final = b"Kernel panic - not syncing: "
_END: Final = b"---[ end "


class Console(Protocol):
    """What a machine needs of it. Input goes to `Machine.feed`."""

    def write(self, data: bytes, /) -> object:
        """The guest's output, from a vCPU's thread, a byte or some. It ought not to wait: the guest waits with it."""


class PanicWatch:
    """Hands output on, and looks for the panic's line. stuck: called when Linux says that it ends there and does nothing any more."""

    def __init__(self, console: Console | None, stuck: Callable[[str], None]) -> None:
        self._console = console
        self._stuck = stuck
        self._line = bytearray()
        self.text = ""
        """The panic's text, once there was one."""

    def write(self, data: bytes) -> None:
        """Output of the guest."""
        if self._console is not None:
            self._console.write(data)
        for byte in data:
            if byte == 0x0A:
                self._look(bytes(self._line))
                self._line.clear()
            elif len(self._line) < _LONGEST:
                self._line.append(byte)

    def _look(self, line: bytes) -> None:
        _, found, text = line.partition(_PANIC)
        if not found:
            return
        if _END in line:
            self._stuck(self.text)
        else:
            self.text = text.decode(errors="replace").strip()
