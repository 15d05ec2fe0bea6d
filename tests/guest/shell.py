"""A shell in a guest that has nothing but a serial console: the guest's end (an init of its initramfs) and ours (`Shell`).

A line to the guest is a number and a command; it answers STX, the number, a newline, what the command prints, ETX, the number, a
space, the exit status and a newline. Each command runs in a subshell, so that what it does to the shell ends with it.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .image import pack
from .packages import Tools

MODULES = ("hv_vmbus", "hv_netvsc")

_INIT = """\
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp /dev/shm
dmesg -n 1
stty raw -echo </dev/console
ip link set lo up
for module in {modules}; do insmod /modules/$module || echo "init: no module $module"; done
{more}
printf '\\002ready %s\\n' "$(cut -d' ' -f1 /proc/uptime)"
while IFS= read -r line; do
  number=${{line%% *}}
  printf '\\002%s\\n' "$number"
  (eval "${{line#* }}") </dev/null 2>&1
  printf '\\003%s %s\\n' "$number" $?
done </dev/console
poweroff -f
"""

_READY = re.compile(rb"\x02ready ([0-9.]+)\r?\n")


class ShellError(Exception):
    """The guest did not answer, or the command failed; the message has the end of its console."""


def shell_image(
    tools: Tools,
    where: Path,
    modules: Sequence[str] = MODULES,
    more: str = "",
    folders: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write the initramfs of a guest that `Shell` talks to. more: what its init does before it is ready."""
    pack(tools, where, _INIT, modules, {"more": more}, folders)


class Shell:
    """Commands in the guest, one after the other. `said` is all that came over the console.

    read, write: file descriptors of the console's two directions. gone: says why nothing more will come, or None.
    """

    def __init__(self, read: int, write: int, gone: Callable[[], str | None] = lambda: None) -> None:
        self.said = b""
        self._read = read
        self._write = write
        self._gone = gone
        self._number = 0
        self._at = 0

    def ready(self, timeout: float = 120.0) -> float:
        """Wait for the guest's user space; the seconds that its kernel had taken for it."""
        return float(self._until(_READY, "its user space is ready", timeout)[1])

    def run(self, command: str, timeout: float = 60.0) -> str:
        """What a command prints. Raises ShellError when it fails."""
        status, said = self.status(command, timeout)
        if status:
            raise ShellError(f"{command}: status {status}: {said}")
        return said

    def status(self, command: str, timeout: float = 60.0) -> tuple[int, str]:
        """The exit status of a command, and what it printed, both kinds."""
        self.send(command)
        return self.answer(timeout)

    def send(self, command: str) -> None:
        """A command whose `answer` is asked for later, or never."""
        self._number += 1
        line = f"{self._number} {command}\n".encode()
        while line:
            line = line[os.write(self._write, line) :]

    def answer(self, timeout: float = 60.0) -> tuple[int, str]:
        """What the last command that was sent says, as `status`."""
        number = b"%d" % self._number
        pattern = re.compile(rb"\x02" + number + rb"\r?\n(.*?)\x03" + number + rb" (\d+)\r?\n", re.DOTALL)
        found = self._until(pattern, f"command {self._number} has ended", timeout)
        return int(found[2]), found[1].decode(errors="replace").replace("\r\n", "\n").removesuffix("\n")

    def collect(self, timeout: float) -> bool:
        """Take what comes next; False when nothing came in time, or nothing will."""
        if not select.select([self._read], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._read, 1 << 16)
        except OSError:  # a terminal whose other end is closed
            data = b""
        self.said += data
        return bool(data)

    def tail(self, lines: int = 20) -> str:
        text = self.said.decode(errors="replace").replace("\r\n", "\n")
        return "--- the end of the guest's console:\n" + "\n".join(text.splitlines()[-lines:])

    def _until(self, pattern: re.Pattern[bytes], what: str, timeout: float) -> re.Match[bytes]:
        end = time.monotonic() + timeout
        while True:
            if found := pattern.search(self.said, self._at):
                self._at = found.end()
                return found
            if not self.collect(0.2) and (why := self._gone()):
                while self.collect(0.0):
                    pass
                if not pattern.search(self.said, self._at):
                    raise ShellError(f"the guest is gone before {what}: {why}\n{self.tail()}")
            elif time.monotonic() > end:
                raise ShellError(f"not within {timeout:.0f} s: {what}\n{self.tail()}")
