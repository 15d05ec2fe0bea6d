"""QEMU without a guest: its qtest accelerator, by which a test reads and writes as the guest's CPU would.

The protocol: docs/devel/testing/qtest.rst of QEMU.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from .packages import Tools
from .process import PATIENCE, Program, RigError
from .qmp import Qmp
from .run import connected

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC  # PCI configuration by ports, mechanism 1
EJECT = 0xAE08  # i440fx: the slot that a guest's firmware lets go (docs/specs/acpi_pci_hotplug.rst of QEMU)


class QtestMachine:
    """A machine that stands still; its devices work. A context manager.

    devices: QEMU's options. shared: its memory is a memfd that vfio-user servers may map, else it is QEMU's alone.
    """

    def __init__(self, tools: Tools, folder: Path, *devices: str, shared: bool = True) -> None:
        self.program: Program
        self.qmp: Qmp
        self._tools = tools
        self._folder = folder
        self._devices = devices
        self._shared = shared
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            path = self._folder / "qtest"
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen()
            (self._folder / "qmp").unlink(missing_ok=True)
            self.program = Program("QEMU", self._command(path), self._folder / "qemu.log", self._tools.qemu_environment)
            stack.callback(self.program.end)
            self.qmp = stack.enter_context(
                self.program.until("its control socket was there", lambda: connected(self._folder / "qmp"))
            )
            listener.settimeout(PATIENCE)
            self._socket, _ = listener.accept()
            stack.callback(self._socket.close)
            self._socket.settimeout(PATIENCE)
            self._lines = stack.enter_context(self._socket.makefile("rb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _command(self, path: Path) -> list[str]:
        memory = ["-m", "64M"]
        if self._shared:
            memory += ["-object", "memory-backend-memfd,id=ram,size=64M,share=on"]
        return [
            *self._tools.qemu,
            *("-accel", "qtest", "-qtest", f"unix:{path}", "-display", "none", "-nodefaults", *memory),
            *("-machine", "pc,memory-backend=ram" if self._shared else "pc"),
            *("-qmp", f"unix:{self._folder / 'qmp'},server=on,wait=off", *self._devices),
        ]

    def command(self, line: str) -> str:
        """What QEMU answers to a line of the protocol."""
        self._socket.sendall(line.encode() + b"\n")
        while True:
            answer = self._lines.readline().decode().split()
            if not answer:
                raise RigError(f"QEMU is gone at {line!r}\n{self.program.tail()}")
            if answer[0] == "OK":
                return " ".join(answer[1:])
            if answer[0] != "IRQ":  # an interrupt line that changes is told at any time
                raise RigError(f"QEMU answered {' '.join(answer)!r} to {line!r}")

    def read(self, address: int, size: int) -> bytes:
        """Physical memory."""
        return bytes.fromhex(self.command(f"read {address:#x} {size:#x}")[2:])

    def write(self, address: int, data: bytes) -> None:
        self.command(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def read32(self, address: int) -> int:
        """One access of 32 bits."""
        return int(self.command(f"readl {address:#x}"), 16)

    def write32(self, address: int, value: int) -> None:
        self.command(f"writel {address:#x} {value:#x}")

    def config(self, slot: int, offset: int) -> int:
        """32 bits of the configuration space of the function in a slot of bus 0."""
        self.command(f"outl {CONFIG_ADDRESS:#x} {1 << 31 | slot << 11 | offset & ~3:#x}")
        return int(self.command(f"inl {CONFIG_DATA:#x}"), 16)

    def set_config(self, slot: int, offset: int, value: int) -> None:
        self.command(f"outl {CONFIG_ADDRESS:#x} {1 << 31 | slot << 11 | offset & ~3:#x}")
        self.command(f"outl {CONFIG_DATA:#x} {value:#x}")

    def unplug(self, name: str, slot: int) -> None:
        """`device_del`, and what the firmware does when a guest agrees."""
        self.qmp.command("device_del", id=name)
        self.command(f"outl {EJECT:#x} {1 << slot:#x}")
