"""What payloads share that run virtual machines of ours: a machine with cards on a switch and its shell, and steps that are told apart."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.vm.hyperv import Hyperv
from vfio_vmbus.vm.machine import Machine

from .shell import Shell

WORDS = "console=ttyS0 quiet panic=-1 mitigations=off"
MIB = 1 << 20


@dataclass(frozen=True)
class Images:
    """Files that the machine boots from."""

    kernel: Path
    initrd: Path
    pmem: tuple[Path, ...] = ()

    @classmethod
    def of(cls, kernel: str, initrd: str, *pmem: str) -> Images:
        return cls(Path(kernel), Path(initrd), tuple(map(Path, pmem)))


@dataclass(frozen=True)
class Inner:
    """A guest that runs."""

    machine: Machine
    hyperv: Hyperv
    shell: Shell

    def interface(self, nic: Netvsp, timeout: float = 60.0) -> str:
        """The guest's name for the interface of a card, once there is one."""
        mac = nic.mac.hex(":")
        look = f"until grep -l {mac} /sys/class/net/*/address; do usleep 50000; done 2>/dev/null"
        return Path(self.shell.run(look, timeout)).parent.name

    def gone(self, nic: Netvsp, timeout: float = 60.0) -> None:
        """Wait until there is no interface of a card."""
        self.shell.run(f"while grep -q {nic.mac.hex(':')} /sys/class/net/*/address; do usleep 50000; done", timeout)

    def configure(self, nic: Netvsp, address: str) -> str:
        """Give a card's interface an address, with prefix length; its name."""
        name = self.interface(nic)
        self.shell.run(f"ip addr add {address} dev {name} && ip link set {name} up")
        return name


@contextmanager
def inner(
    images: Images, host: EmbeddedHost, *nics: Netvsp, name: str = "guest", cpus: int = 1, memory: int = 256 * MIB, **options: Any
) -> Iterator[Inner]:
    """A guest with these cards, whose shell is ready. options: as of Hyperv."""
    hyperv = Hyperv(host, *nics, name=name, **options)
    shell = Shell(lambda data: machine.feed(data), lambda: machine.ended)
    made = {"kernel": images.kernel, "initrd": images.initrd, "pmem": images.pmem, "cmdline": WORDS}
    with Machine(**made, cpus=cpus, memory=memory, console=shell, paravirt=hyperv) as machine:
        machine.start()
        shell.ready()
        yield Inner(machine, hyperv, shell)


Step = tuple[str, Callable[[], Any]]


def take(report: Callable[[Any], None], steps: Sequence[Step], console: Callable[[], str]) -> None:
    """Take the steps in their order and report of each its name, what it returned, why it failed (or ""), and its seconds."""
    for name, step in steps:
        begun = time.monotonic()
        result, why = None, ""
        try:
            result = step()
        except Exception:  # the next ones may do all the same
            why = f"{traceback.format_exc()}\n{console()}"
        report([name, result, why, round(time.monotonic() - begun, 2)])


def held() -> int:
    """File descriptors of this process. (Its mappings are as many as the guest's pages are scattered.)"""
    return len(os.listdir("/proc/self/fd"))
