"""`Guest`: a Linux guest in QEMU, in software emulation, that runs Python payloads and returns their results."""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import agent
from .image import MODULES, SHARE, initramfs
from .kernels import CPU
from .packages import Tools
from .process import PATIENCE, Program, RigError, tail
from .qmp import Qmp

PROJECT = Path(__file__).resolve().parents[2]
BOOT_SECONDS = 300.0
PRELOAD = ("vfio_vmbus.cli.main", "vfio_vmbus.channel.opening", "vfio_vmbus.vfio.kernel", "vfio_vmbus.apps.tap")

EDU_ADDRESS = "0000:00:05.0"
NVME_ADDRESS = "0000:00:06.0"
NVME_VECTORS = 2048
NVME_SERIAL = "vfio-vmbus"
BRIDGED_ADDRESSES = ("0000:01:01.0", "0000:01:02.0", "0000:01:03.0")
USER_ADDRESS = "0000:00:04.0"
USER_EDU_ADDRESS = "0000:00:07.0"


def edu_device() -> list[str]:
    """QEMU's options for its educational PCI device, at EDU_ADDRESS."""
    return ["-device", "edu,addr=5.0"]


def nvme_device(folder: Path) -> list[str]:
    """QEMU's options for an NVMe controller with many interrupts, which the guest's kernel has a driver for, at NVME_ADDRESS."""
    disk = folder / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = f"file={disk},if=none,id=disk,format=raw"
    return ["-drive", drive, "-device", f"nvme,drive=disk,serial={NVME_SERIAL},addr=6.0,msix_qsize={NVME_VECTORS}"]


def bridged_devices() -> list[str]:
    """QEMU's options for devices behind one bridge, which the IOMMU does not keep apart: two edus, and a virtio device, which the
    guest's kernel has a driver for; at BRIDGED_ADDRESSES."""
    bridge = ["-device", "pcie-pci-bridge,id=bridge,addr=8.0", "-device", "virtio-rng-pci,bus=bridge,addr=3"]
    return [*bridge, "-device", "edu,bus=bridge,addr=1", "-device", "edu,bus=bridge,addr=2"]


def user_device(where: Path, name: str = "vu0", slot: int = 4) -> list[str]:
    """QEMU's options for a device that a vfio-user server at the socket `where` serves; at USER_ADDRESS by default."""
    device = {"driver": "vfio-user-pci", "id": name, "addr": f"{slot}.0", "socket": {"path": str(where), "type": "unix"}}
    return ["-device", json.dumps(device)]


class Payload:
    """A function that runs in the guest."""

    def __init__(self, guest: Guest, number: int, name: str) -> None:
        self._guest = guest
        self._number = number
        self._name = name
        self._said: list[dict[str, Any]] = []
        self.compiled = 0
        """Kernels that had to be compiled in the guest; known with the result."""

    def report(self, timeout: float = PATIENCE) -> Any:
        """The next value that it reports. Raises as `result`, also when it ends instead."""
        message = self._next(timeout)
        if "report" not in message:
            raise RigError(f"{self._name} ended instead of reporting: {message.get('error', message.get('result'))}")
        return message["report"]

    def result(self, timeout: float = PATIENCE) -> Any:
        """What it returns, once it has. Raises RigError with its traceback when it failed, and when it takes longer."""
        while True:
            message = self._next(timeout)
            if "error" in message:
                raise RigError(f"{self._name} failed in the guest:\n{message['error']}\n{self._guest.console(20)}")
            if "result" in message:
                self.compiled = message["compiled"]
                return message["result"]

    def stop(self) -> None:
        """SIGTERM: `SystemExit` in the payload."""
        self._guest.send({"id": self._number, "stop": True})

    def _next(self, timeout: float) -> dict[str, Any]:
        self._guest.receive(self._number, self._said, self._name, timeout)
        return self._said.pop(0)


class Guest:
    """One boot. A context manager; `folder` gets its logs and sockets (short paths: a socket's name ends at 107 bytes).

    devices: QEMU's options for what is to be driven; there is a virtual Intel IOMMU before all of them.
    """

    boot_seconds = BOOT_SECONDS
    """What a boot may take on a loaded machine."""
    preload: Sequence[str] = PRELOAD
    """Modules that are imported once, before the first payload."""
    settings: Mapping[str, str] = {}
    """More of the agent's environment."""
    modules: Sequence[str] = MODULES
    """The kernel's modules that the guest loads."""
    speed: Sequence[str] = ("-accel", "tcg,thread=multi")
    """QEMU's options for how it emulates."""
    processor = "max"
    """QEMU's name for its CPU."""
    board: Sequence[str] = ("-device", "intel-iommu,caching-mode=on")
    """QEMU's options for what comes before all other devices."""
    words = "intel_iommu=on"
    """More of the kernel's command line."""
    files_cached = "always"
    """How long what the guest knows of the machine's files holds (virtiofsd --cache): nobody writes them while tests run."""

    def __init__(
        self, tools: Tools, folder: Path, kernels: Path, devices: Sequence[str] = (), *, memory: str = "1G", cpus: int = 1
    ) -> None:
        self.qemu: Program
        self.qmp: Qmp
        self.hello = ""
        self.compiled_at_start = -1
        """Kernels of PRELOAD that had to be compiled in the guest."""
        self._tools = tools
        self._folder = folder
        self._kernels = kernels
        self._devices = list(devices)
        self._memory = memory
        self._cpus = cpus
        self._stack = ExitStack()
        self._said: dict[int, list[dict[str, Any]]] = {0: []}
        self._unfinished = b""
        self._number = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def run(self, file: Path, function: str = "main", timeout: float = PATIENCE, **arguments: Any) -> Any:
        """Run a function of a Python file in the guest and return its result (JSON). Raises RigError as `Payload.result`."""
        return self.start(file, function, timeout, **arguments).result(timeout + 10)

    def start(self, file: Path, function: str = "main", timeout: float = PATIENCE, **arguments: Any) -> Payload:
        """As `run`, without waiting for its end; it is killed after `timeout` seconds."""
        self._number += 1
        self._said[self._number] = []
        order = {"id": self._number, "file": str(file), "function": function, "arguments": arguments, "timeout": timeout}
        self.send(order)
        return Payload(self, self._number, f"{file.name}:{function}")

    def console(self, lines: int = 30) -> str:
        """The last lines of the guest's console."""
        return tail(self._folder / "console.log", lines)

    def send(self, order: dict[str, Any]) -> None:
        self._port.sendall(json.dumps(order).encode() + b"\n")

    def receive(self, number: int, into: list[dict[str, Any]], name: str, timeout: float) -> None:
        """Wait for messages of payload `number` and move them to `into`, if it is empty."""
        deadline = time.monotonic() + timeout
        while not into:
            if self._said[number]:
                into += self._said[number]
                self._said[number] = []
            elif select.select([self._port], [], [], max(0.0, min(1.0, deadline - time.monotonic())))[0]:
                self._take()
            elif not self.qemu.running:
                raise RigError(f"QEMU is gone while {name} ran\n{self.qemu.tail()}\n{self.console()}")
            elif time.monotonic() > deadline:
                raise RigError(f"{name} said nothing for {timeout:.0f} s\n{self.qemu.tail()}\n{self.console()}")

    def _take(self) -> None:
        data = self._port.recv(1 << 16)
        if not data:
            raise RigError(f"QEMU has closed the guest's port\n{self.qemu.tail()}\n{self.console()}")
        self._unfinished += data
        *lines, self._unfinished = self._unfinished.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._said[message["id"]].append(message)

    def _start(self, stack: ExitStack) -> None:
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}:{PROJECT / 'tests'}",
            "PYTHONUNBUFFERED": "1",
            "LANG": "C.UTF-8",
            "HOME": "/dev/shm",
            "TMPDIR": "/dev/shm",  # everything else is read-only
            "XDG_CACHE_HOME": "/dev/shm/cache",
            **CPU,
            **self.settings,
        }
        self._make_image([sys.executable, agent.__file__, str(self._kernels), *self.preload], environment)
        share = self._folder / "share"
        server = file_server(self._tools, share, self.files_cached)
        files = Program("virtiofsd", server, self._folder / "virtiofsd.log")
        stack.callback(files.end)
        files.until("its socket was there", lambda: share.exists() or None)
        self.qemu = Program("QEMU", self._command(), self._folder / "qemu.log", self._tools.qemu_environment)
        stack.callback(self.qemu.end)
        self.qmp = stack.enter_context(self.qemu.until("its control socket was there", lambda: connected(self._folder / "qmp")))
        self._port = socket.socket(socket.AF_UNIX)
        stack.callback(self._port.close)
        self._port.connect(str(self._folder / "port"))
        self._connect(stack)
        said: list[dict[str, Any]] = []
        self.receive(0, said, "the guest's boot", self.boot_seconds)
        self.hello = said[0]["report"]
        self.compiled_at_start = said[0]["compiled"]

    def _make_image(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """What boots and becomes `command`, the agent."""
        initramfs(self._tools, self._folder / "init.cpio", command, environment, self.modules)

    def _connect(self, stack: ExitStack) -> None:
        """Once QEMU runs, before the agent says anything."""

    def _command(self) -> list[str]:
        # no_timer_check: on a loaded machine, emulated, the timer can be too late for the kernel, which panics then.
        words = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"
        files = self._folder / "share"
        return [
            *self._tools.qemu,
            *(*self.speed, "-cpu", self.processor, "-smp", str(self._cpus), "-m", self._memory),
            *("-object", f"memory-backend-memfd,id=ram,size={self._memory},share=on", "-machine", "q35,memory-backend=ram"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{self._folder / 'console.log'}"),
            *("-kernel", str(self._tools.kernel), "-initrd", str(self._folder / "init.cpio"), "-append", f"{words} {self.words}"),
            *("-qmp", f"unix:{self._folder / 'qmp'},server=on,wait=off"),
            *self.board,
            *("-device", "virtio-serial-pci,addr=2.0", "-device", "virtserialport,chardev=port"),
            *("-chardev", f"socket,id=port,path={self._folder / 'port'},server=on,wait=off"),
            *("-chardev", f"socket,id=share,path={files}", "-device", f"vhost-user-fs-pci,addr=3.0,chardev=share,tag={SHARE}"),
            *self._devices,
        ]


def file_server(tools: Tools, socket: Path, cached: str = "always") -> list[str]:
    """The command that serves this machine's file system, read-only, to a QEMU at a socket."""
    served = [*tools.virtiofsd, "--shared-dir=/", f"--socket-path={socket}", "--readonly", f"--cache={cached}"]
    return [*served, "--sandbox=none", "--inode-file-handles=never", "--log-level=error"]


def connected(path: Path) -> Qmp | None:
    """QEMU's control socket, once QEMU listens there."""
    try:
        return Qmp(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
