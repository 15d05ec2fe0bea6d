"""A shell in a guest that has nothing but a serial console: the guest's end (an init of its initramfs) and ours (`Shell`).

A line to the guest is a number and a command; it answers STX, the number, a newline, what the command prints, ETX, the number, a
space, the exit status and a newline. Each command runs in a subshell, so that what it does to the shell ends with it.
"""

from __future__ import annotations

import re
import threading
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
    """Commands in the guest, one after the other; one thread uses it. `said` is all that came over the console.

    send: brings bytes to the console. gone: says why nothing more will come, or None.
    """

    def __init__(self, send: Callable[[bytes], object], gone: Callable[[], object | None] = lambda: None) -> None:
        self.said = bytearray()
        self._line = 0  # where the last one begins
        self._send = send
        self._gone = gone
        self._news = threading.Condition()
        self._number = 0
        self._at = 0

    def write(self, data: bytes) -> None:
        """The guest says this (`vm.console.Console`); from any thread."""
        with self._news:
            self.said += data
            if data.endswith(b"\n"):
                if b"\x02" in self.said[self._line :] or b"\x03" in self.said[self._line :]:
                    self._news.notify()  # only then: whoever waits would take time from the guest's CPUs
                self._line = len(self.said)

    def ready(self, timeout: float = 120.0) -> float:
        """Wait for the guest's user space; the seconds that its kernel had run by then."""
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
        self._send(f"{self._number} {command}\n".encode())

    def answer(self, timeout: float = 60.0) -> tuple[int, str]:
        """What the last command that was sent says, as `status`."""
        number = b"%d" % self._number
        pattern = re.compile(rb"\x02" + number + rb"\r?\n(.*?)\x03" + number + rb" (\d+)\r?\n", re.DOTALL)
        found = self._until(pattern, f"command {self._number} has ended", timeout)
        return int(found[2]), found[1].decode(errors="replace").replace("\r\n", "\n").removesuffix("\n")

    def hear(self, word: str, timeout: float = 60.0) -> None:
        """Wait until the command that runs says a word of its own choice, behind STX. Raises ShellError when it ends instead.

        All of it is still in the command's answer.
        """
        end = b"\x03%d " % self._number
        found = self._until(
            re.compile(b"(\x02" + re.escape(word.encode()) + rb"\r?\n)|" + end), f"it says {word}", timeout, keep=True
        )
        if not found[1]:
            raise ShellError(f"the command has ended before it said {word}\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        text = self.said.decode(errors="replace").replace("\r\n", "\n")
        return "--- the end of the guest's console:\n" + "\n".join(text.splitlines()[-lines:])

    def _until(self, pattern: re.Pattern[bytes], what: str, timeout: float, *, keep: bool = False) -> re.Match[bytes]:
        """What was found; looked for behind that from now on, unless it is to be kept."""
        end = time.monotonic() + timeout
        with self._news:
            while True:
                gone = self._gone()  # asked first: what it said before is here then
                if found := pattern.search(self.said, self._at):
                    self._at = self._at if keep else found.end()
                    return found
                if gone is not None:
                    raise ShellError(f"the guest is gone before {what}: {gone}\n{self.tail()}")
                if time.monotonic() > end:
                    raise ShellError(f"not within {timeout:.0f} s: {what}\n{self.tail()}")
                self._news.wait(0.2)
