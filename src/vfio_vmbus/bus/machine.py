"""Where this machine shows itself to user space, and reading it without trust: sysfs, procfs, device nodes.

What is missing, forbidden, empty, endless, binary or no file at all is an answer here, never an exception: one file that cannot be read
must not hide the others.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..vfio.kernel.nodes import Roots

ATTRIBUTE_LIMIT: Final = 4096
"""Bytes: sysfs gives an attribute one page."""
FILE_LIMIT: Final = 1 << 20
"""Bytes that are read of a file in /proc or of a device's folder that is longer than a page."""
MISSING: Final = "missing"
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)


@dataclass(frozen=True)
class Found:
    """What a file said, stripped of blanks, or why it said nothing: `problem` is then MISSING, "empty", "permission denied" ..."""

    text: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Machine(Roots):
    """A machine by its file systems; other roots than the real ones in tests. Writes go through `write` alone."""

    proc: Path = Path("/proc")
    run: Path = Path("/run")
    etc: Path = Path("/etc")
    modules: Path = Path("/lib/modules")

    def find(self, path: Path, limit: int = ATTRIBUTE_LIMIT) -> Found:
        """What an attribute says; one that is longer than `limit` bytes, or binary, says nothing."""
        try:
            content = _read(path, limit + 1)
        except OSError as error:
            return Found(None, MISSING if error.errno in _ABSENT else (error.strerror or "unreadable").lower())
        if len(content) > limit:
            return Found(None, f"longer than {limit} bytes")
        try:
            text = content.decode().strip()
        except UnicodeDecodeError:
            return Found(None, "binary")
        if not text.replace("\n", " ").replace("\t", " ").isprintable():
            return Found(None, "binary")
        return Found(text) if text else Found(None, "empty")

    def text(self, path: Path, limit: int = FILE_LIMIT) -> str:
        """The file's text, "" for one that cannot be read; cut off at `limit` bytes, undecodable bytes replaced."""
        return self.data(path, limit).decode(errors="replace")

    def data(self, path: Path, limit: int) -> bytes:
        """The file's first bytes; none of one that cannot be read."""
        try:
            return _read(path, limit)
        except OSError:
            return b""

    def number(self, path: Path, base: int = 10) -> int | None:
        """The number in an attribute, None for anything else."""
        return number(self.find(path).text, base)

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, sorted; nothing if it cannot be read. Names that are not printable are left out."""
        try:
            return sorted(name for name in os.listdir(folder) if name.isprintable())
        except OSError:
            return []

    def target(self, link: Path) -> str | None:
        """The last part of what a symbolic link points to."""
        try:
            name = Path(os.readlink(link)).name
        except OSError:
            return None
        return name if name.isprintable() and name else None

    def state_folder(self) -> Path:
        """Where it is kept what was done: /run/vfio-vmbus for root, XDG_RUNTIME_DIR/vfio-vmbus for others."""
        own = os.environ.get("XDG_RUNTIME_DIR")
        return self.run / "vfio-vmbus" if os.geteuid() == 0 or not own else Path(own) / "vfio-vmbus"

    def state_folders(self) -> list[Path]:
        """Everybody's of them, this process's first."""
        users = (self.run / "user" / name / "vfio-vmbus" for name in self.names(self.run / "user"))
        return list(dict.fromkeys([self.state_folder(), self.run / "vfio-vmbus", *users]))


def make_state_folder(folder: Path) -> None:
    """Others may read what was done here; in XDG_RUNTIME_DIR they cannot get that far. Raises OSError."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)


def number(text: str | None, base: int = 10) -> int | None:
    """ "17" is 17, "0x1414" with base 16 too, and anything else None: also what int() alone would take, as "1_0" or other
    scripts' digits."""
    if text is None or len(text) > 20 or not text.isascii() or "_" in text:
        return None
    try:
        return int(text, base)
    except ValueError:
        return None


def _read(path: Path, limit: int) -> bytes:
    """At most `limit` bytes of a regular file; a FIFO or a device would block, or do something."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "no regular file")
        parts: list[bytes] = []
        left = limit
        while left and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    finally:
        os.close(handle)
