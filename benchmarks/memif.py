"""The yardstick of the NIC: Debian's dpdk-testpmd at both ends of a memif, two processes on two cores.

memif is a pair of rings in shared memory, as ours is, driven by C; no hugepages. testpmd
sends from buffers that stay warm and writes headers alone: an upper bound for real payloads.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.debian import unpacked
from benchmarks.machine import CACHE, two_cores
from vfio_vmbus.errors import UnavailableError

SLICE = 0.5  # seconds that one sample looks at
_SETTLE = 0.1  # seconds from the start of traffic to the slice
_PATIENCE = 20.0  # seconds for testpmd to come up, to answer or to go
_PROMPT = b"testpmd> "
_PACKAGES = ("dpdk-dev", r"librte-net-memif[0-9.]+", r"librte-mempool-ring[0-9.]+", r"librte-bus-vdev[0-9.]+")
_DRIVERS = ("librte_bus_vdev", "librte_mempool_ring", "librte_net_memif")


class Memif:
    """Two testpmd processes that sleep except while `mpps` measures. A context manager; raises `UnavailableError`.

    The receiver runs on the second core, the sender on the first; as there is one of each, the figure is
    yardstick for sending and for receiving alike.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        root = unpacked(_PACKAGES, CACHE / "dpdk")
        first, second = two_cores()
        if first == second:
            raise UnavailableError("two testpmd processes need two cores, and there is one")
        with ExitStack() as stack:
            # A folder of its own, with a short name: a unix socket's path ends at 107 bytes.
            socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memif-"))) / "s"
            self._receiver = stack.enter_context(_Testpmd(root, second, "server", socket))
            self._sender = stack.enter_context(_Testpmd(root, first, "client", socket))
            self._receiver.wait_for_link()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def version(self) -> str:
        """The package that testpmd is of, with its version."""
        packages = (CACHE / "dpdk/root/packages.txt").read_text().split()
        return next(package for package in packages if package.startswith("dpdk-dev_"))

    def mpps(self, size: int, seconds: float = SLICE) -> float:
        """Million frames of `size` bytes a second at the receiver, over `seconds`."""
        self._sender.command(f"set txpkts {size}")
        self._receiver.command("start")
        self._sender.command("start")
        try:
            time.sleep(_SETTLE)
            frames, octets, begin = self._receiver.received()
            time.sleep(seconds)
            more_frames, more_octets, end = self._receiver.received()
        finally:
            self._sender.command("stop")
            self._receiver.command("stop")
        frames, octets = more_frames - frames, more_octets - octets
        if frames == 0 or abs(octets / frames - size) > 1:
            raise UnavailableError(f"memif carried {frames} frames, {octets} bytes, where frames of {size} were sent")
        return frames / (end - begin) / 1e6


class _Testpmd:
    """One dpdk-testpmd at its prompt, pinned to a core."""

    def __init__(self, root: Path, core: int, role: str, socket: Path) -> None:
        libraries = _library_folder(root)
        # The prefix names a folder in DPDK's run-time folder; ours alone, so that two runs do not meet there.
        self._prefix = f"vfio-vmbus-bench-{os.getpid()}-{role}"
        command = ["stdbuf", "-oL", str(root / "usr/bin/dpdk-testpmd")]
        for driver in _DRIVERS:
            command += ["-d", _library(libraries, driver)]
        command += ["--no-pci", "--no-telemetry", f"--lcores=0@{core},1@{core}", "--no-huge", "-m", "512"]
        command += [f"--file-prefix={self._prefix}"]
        command += ["--vdev", f"net_memif0,role={role},id=0,socket={socket},socket-abstract=no"]
        command += ["--", "-i", "--no-mlockall", "--no-numa", "--total-num-mbufs=16384"]
        command += [f"--forward-mode={'rxonly' if role == 'server' else 'txonly'}"]
        self._command = command
        # Packages put libraries under /usr/lib or /lib, which are one folder on a system, but not unpacked.
        search = (libraries, root / "lib" / libraries.name)
        self._environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, search))}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            bufsize=0,
            start_new_session=True,  # an interrupt at the terminal is the bench's to handle
        )
        try:
            self._answer("its start")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def command(self, line: str) -> str:
        """testpmd's answer to one command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError as error:
            raise UnavailableError(f"dpdk-testpmd is gone at {line!r}") from error
        return self._answer(repr(line))

    def received(self) -> tuple[int, int, float]:
        """Frames and bytes that the port received so far, and the time (s) at which it said so."""
        begin = time.perf_counter()
        text = self.command("show port stats 0")
        end = time.perf_counter()
        counts = re.search(r"RX-packets:\s+(\d+).*?RX-bytes:\s+(\d+)", text, re.DOTALL)
        if counts is None:
            raise UnavailableError(f"dpdk-testpmd's port counters read {text[-200:]!r}")
        return int(counts[1]), int(counts[2]), (begin + end) / 2

    def wait_for_link(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while "Link status: up" not in self.command("show port info 0"):
            if time.monotonic() > deadline:
                raise UnavailableError(f"memif had no link after {_PATIENCE:.0f} s")
            time.sleep(0.05)

    def _answer(self, to: str) -> str:
        """What testpmd prints until its next prompt."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + _PATIENCE
        text = b""
        while not text.endswith(_PROMPT):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise UnavailableError(f"dpdk-testpmd gave no prompt within {_PATIENCE:.0f} s of {to}")
            chunk = os.read(pipe, 65536)
            if not chunk:
                words = text.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                raise UnavailableError(f"dpdk-testpmd ended at {to} and said: {words[0]}")
            text += chunk
        return text.decode(errors="replace")

    def _end(self) -> None:
        """End the process, by its own ways or not, and remove what it leaves behind."""
        try:
            self._process.communicate(b"quit\n", timeout=_PATIENCE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.communicate()
        for folder in ("/var/run/dpdk", os.environ.get("XDG_RUNTIME_DIR", "/tmp") + "/dpdk"):
            shutil.rmtree(f"{folder}/{self._prefix}", ignore_errors=True)


def _library_folder(root: Path) -> Path:
    """The one folder of the unpacked tree that holds the libraries (its name has the architecture in it)."""
    found = sorted(root.glob("usr/lib/*/librte_eal.so.*"))
    if not found:
        raise UnavailableError(f"{root} holds no DPDK library: remove the folder and try again")
    return found[0].parent


def _library(folder: Path, stem: str) -> str:
    """The name of a library with its release suffix; `-d` refuses paths that others could write to."""
    names = sorted((path.name for path in folder.glob(f"{stem}.so.*")), key=len)
    if not names:
        raise UnavailableError(f"{folder} holds no {stem}")
    return names[0]
