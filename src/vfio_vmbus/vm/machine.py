"""`Machine`: a guest from its kernel's file to the reason why it ended.

with Machine(kernel=Path("vmlinuz"), cmdline="console=ttyS0", console=output) as machine:
    machine.start()
    print(machine.wait(timeout=60))
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..errors import LocalError, UnavailableError, UsageError
from . import acpi, boot, cpuid, pci, rtc, serial
from .console import Console, PanicWatch
from .cpu import Ended, Processor
from .host_cpu import emulated
from .kvm import PATH, Kvm, Vcpu
from .memory import MIB, GuestMemory, check_width, place_pmem
from .paravirt import Paravirt
from .ports import Ports
from .power import Power
from .serial import Serial

log = logging.getLogger("vfio_vmbus.vm")

MEMORY: Final = 512 * MIB
CMDLINE: Final = "console=ttyS0 panic=-1"
_SLICE = 0.5
"""Seconds after which whoever waits looks up: signals that the kernel gave to other threads are handled then."""


class Machine:
    """A virtual machine. A context manager, which closes it.

    kernel, initrd: files. memory: bytes. console: gets the serial port's output; its input goes to `feed`. pmem: files that are /dev/pmem0
    and so on, see `memory.Pmem`. paravirt: the Hyper-V side, which is closed with the machine.

    Raises UnavailableError where there is no KVM, or one that lacks something, and UsageError for what cannot be a machine: one line each.
    """

    def __init__(
        self,
        *,
        kernel: Path,
        initrd: Path | None = None,
        cmdline: str = CMDLINE,
        cpus: int = 1,
        memory: int = MEMORY,
        console: Console | None = None,
        pmem: Sequence[Path] = (),
        paravirt: Paravirt | None = None,
        device: str = PATH,
    ) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ended: Ended | None = None
        self._running = dict[int, Vcpu]()  # those whose thread has adopted them and lives
        self._threads: list[threading.Thread] = []
        self._watch = PanicWatch(console, lambda text: self._end(Ended("panic", text)))
        self._paravirt = paravirt
        with ExitStack() as stack:
            self._build(stack, device, cpus, memory, pmem)
            self._load(_content(kernel, "kernel"), _content(initrd, "initrd") if initrd else b"", cmdline)
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Let it run. Once only. Raises UnavailableError where this process may have no more threads."""
        if self._threads or self._ended:
            raise UsageError("a machine starts once")
        for vcpu in self._vcpus:
            thread = threading.Thread(target=self._life, args=(vcpu,), name=f"vcpu-{vcpu.index}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._end(Ended("failed", f"vCPU {vcpu.index}: {error}"))
                raise UnavailableError(f"no thread for vCPU {vcpu.index}: {error}") from error
            self._threads.append(thread)

    def feed(self, data: bytes) -> None:
        """Input for the serial console, from any thread."""
        self._serial.feed(data)

    @property
    def waiting(self) -> int:
        """Bytes of input that the guest has not read. It loses some beyond 64 KiB, and what comes before it listens."""
        return self._serial.waiting

    def wait(self, timeout: float | None = None) -> Ended:
        """Wait until it has ended. After `timeout` seconds it is stopped: the reason is "time-out" then, or the panic the guest died of."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self._over.wait(max(0.0, min(_SLICE, end - time.monotonic()))):
            if time.monotonic() >= end:
                self._end(Ended("time-out", f"still running after {timeout:g} s"))
        ended = self._ended
        assert ended is not None
        return ended

    @property
    def ended(self) -> Ended | None:
        """Why it has ended, once it has."""
        return self._ended

    def panic(self, text: str) -> None:
        """The guest says that it is lost; from any thread."""
        self._end(Ended("panic", text))

    def stop(self) -> None:
        """End it from outside: the reason is "stopped" if there was none before. Does not wait."""
        self._end(Ended("stopped"))

    def close(self) -> None:
        """Stop it, and give everything back. Again is harmless."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _build(self, stack: ExitStack, device: str, cpus: int, memory: int, pmem: Sequence[Path]) -> None:
        kvm = Kvm(device)
        stack.callback(kvm.close)
        most = min(kvm.max_vcpus, acpi.MOST_CPUS)
        if not 1 <= cpus <= most:
            raise UsageError(f"{cpus} CPUs: this machine's KVM has 1 to {most}")
        self.memory = GuestMemory(memory)
        stack.callback(self.memory.close)
        self._pmem = place_pmem(pmem, self.memory.top)
        for image in self._pmem:
            stack.callback(image.close)
        supported = kvm.supported_cpuid()
        check_width([self.memory.top, *(image.end for image in self._pmem)], cpuid.address_bits(supported))
        self.vm = kvm.create_vm()
        stack.callback(self.vm.close)
        self.vm.create_irqchip()
        for slot, one in enumerate(self.memory.ranges):
            self.vm.set_memory(slot, one.gpa, one.size, self.memory.address(one.gpa, one.size))
        for slot, image in enumerate(self._pmem, len(self.memory.ranges)):
            self.vm.set_memory(slot, image.gpa, image.size, image.address)
        if self._paravirt is not None:
            stack.callback(self._paravirt.close)
            self._paravirt.prepare(self.vm, self.memory, cpus, self.panic)
        self._vcpus: list[Vcpu] = []
        xsave = not emulated()
        for index in range(cpus):
            vcpu = self.vm.create_vcpu(index)
            stack.callback(vcpu.close)
            self._vcpus.append(vcpu)
            hypervisor = None
            if self._paravirt is not None:
                self._paravirt.prepare_vcpu(vcpu)
                hypervisor = self._paravirt.cpuid(vcpu.supported_hv_cpuid())
            vcpu.set_cpuid(cpuid.for_vcpu(supported, index, cpus, hypervisor, xsave=xsave))
        self._ports = self._devices()

    def _devices(self) -> Ports:
        ports = Ports()
        self._serial = Serial(self._watch.write, lambda level: self.vm.irq_line(serial.IRQ, level))
        ports.add_bytes(serial.PORT, serial.PORTS, self._serial.read, self._serial.write)
        clock = rtc.Rtc()
        ports.add_bytes(rtc.PORT, rtc.PORTS, clock.read, clock.write)
        bridge = pci.HostBridge()
        ports.add(pci.PORT, pci.ADDRESS_PORTS, bridge.read_address, bridge.write_address)
        ports.add(pci.DATA, pci.DATA_PORTS, bridge.read_data, bridge.write_data)
        Power(ports, lambda: self._end(Ended("power-off")), lambda: self._end(Ended("reset")))
        return ports

    def _load(self, kernel: bytes, initrd: bytes, cmdline: str) -> None:
        tables = acpi.tables(boot.FIRMWARE, len(self._vcpus))
        pmem = [(image.gpa, image.size) for image in self._pmem]
        start = boot.start(kernel, initrd, cmdline, self.memory.ranges, pmem, tables)
        for placement in start.placements:
            self.memory.write(placement.gpa, placement.data)
        first = self._vcpus[0]
        first.set_special_registers(boot.special_registers(first.special_registers()))
        first.set_registers(boot.registers(start.entry))

    def _life(self, vcpu: Vcpu) -> None:
        """A vCPU's thread. It is kicked only while it is in `_running`, where it gets once it is ready for that: if the machine has ended
        before, the processor sees so; if it ends later, the kick waits for its next entry into the guest."""
        processor = Processor(vcpu, self._ports, self._paravirt, self._over.is_set, self._end, lambda: self._crash_text(vcpu))
        try:
            vcpu.adopt()
            with self._lock:
                self._running[vcpu.index] = vcpu
        except LocalError as error:
            self._end(Ended("failed", str(error)))
        processor.run()
        with self._lock:
            self._running.pop(vcpu.index, None)
        try:
            if self._paravirt is not None:
                self._paravirt.stopped(vcpu)
        except LocalError as error:  # it is over already: nothing depends on it
            log.info("vCPU %d: %s", vcpu.index, error)

    def _crash_text(self, vcpu: Vcpu) -> str:
        return (self._paravirt.crashed(vcpu) if self._paravirt is not None else "") or self._watch.text

    def _end(self, ended: Ended) -> None:
        """The first reason counts. A guest that panicked, and then resets or does nothing any more, has panicked."""
        if ended.reason in ("reset", "time-out") and self._watch.text:
            ended = Ended("panic", self._watch.text)
        with self._lock:
            if self._ended is None:
                self._ended = ended
                self._over.set()
            for vcpu in self._running.values():
                vcpu.kick()


def _content(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnavailableError(f"the {what} {path} cannot be read: {error.strerror}") from error
