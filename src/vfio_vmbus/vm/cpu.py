"""A vCPU's thread: runs the guest, and does what each exit asks for.

Whatever the guest does, it gets what hardware would give (ones from where nothing is, a fault for an MSR that is none), or the machine
ends with a reason. Source: Documentation/virt/kvm/api.rst, section 5 (kvm_run).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Final, Literal, Protocol

from ..errors import VfioVmbusError
from ..wire import kvm as uapi
from .paravirt import Hypercall, Paravirt
from .ports import Ports

log = logging.getLogger("vfio_vmbus.vm")

Reason = Literal["power-off", "reset", "panic", "time-out", "stopped", "failed"]


@dataclass(frozen=True)
class Ended:
    """Why a machine has ended, and what there is to say about it: the panic's text, or what failed."""

    reason: Reason
    text: str = ""


class Runnable(Protocol):
    """What is needed of a `kvm.Vcpu`, whose thread has adopted it."""

    index: int

    @property
    def shared(self) -> mmap: ...

    def run(self) -> int: ...
    def registers(self) -> uapi.Regs: ...


_HYPERCALL_REFUSED: Final = 2
"""HV_STATUS_INVALID_HYPERCALL_CODE"""


class Processor:
    """Runs a vCPU until `ended` says that the machine has ended. end: says so, with the reason; the first one counts."""

    def __init__(
        self,
        vcpu: Runnable,
        ports: Ports,
        paravirt: Paravirt | None,
        ended: Callable[[], bool],
        end: Callable[[Ended], None],
        crash_text: Callable[[], str],
    ) -> None:
        self._vcpu = vcpu
        self._shared = vcpu.shared
        self._ports = ports
        self._paravirt = paravirt
        self._ended = ended
        self._end = end
        self._crash_text = crash_text
        self._exits: dict[int, Callable[[], None]] = {
            uapi.EXIT_IO: self._io,
            uapi.EXIT_MMIO: self._mmio,
            uapi.EXIT_HYPERV: self._hyperv,
            uapi.EXIT_X86_RDMSR: self._read_msr,
            uapi.EXIT_X86_WRMSR: self._write_msr,
            uapi.EXIT_SHUTDOWN: self._shutdown,
            uapi.EXIT_SYSTEM_EVENT: self._system_event,
            uapi.EXIT_FAIL_ENTRY: self._fail_entry,
            uapi.EXIT_INTERNAL_ERROR: self._internal_error,
            uapi.EXIT_INTR: _nothing,
            uapi.EXIT_IRQ_WINDOW_OPEN: _nothing,
            uapi.EXIT_IOAPIC_EOI: _nothing,
            uapi.EXIT_SET_TPR: _nothing,
        }

    def run(self) -> None:
        """The thread's life."""
        try:
            while not self._ended():
                self.step()
        except VfioVmbusError as error:
            self._end(Ended("failed", f"vCPU {self._vcpu.index}: {error}"))
        except Exception as error:  # whatever a device does wrong ends its machine, not the program
            log.exception("vCPU %d", self._vcpu.index)
            self._end(Ended("failed", f"vCPU {self._vcpu.index}: {type(error).__name__}: {error}"))

    def step(self) -> None:
        """Enter the guest once, and do what its exit asks for."""
        reason = self._vcpu.run()
        handle = self._exits.get(reason)
        if handle is None:
            self._end(Ended("failed", f"vCPU {self._vcpu.index}: exit {reason}, which no guest can cause here"))
        else:
            handle()

    def _io(self) -> None:
        direction, size, port, count, at = uapi.RUN_IO.unpack_from(self._shared, uapi.RUN_UNION_AT)
        for start in range(at, at + count * size, size):
            if direction == uapi.IO_OUT:
                self._ports.write(port, size, int.from_bytes(self._shared[start : start + size], "little"))
            else:
                self._shared[start : start + size] = self._ports.read(port, size).to_bytes(size, "little")

    def _mmio(self) -> None:
        _, _, _, is_write = uapi.RUN_MMIO.unpack_from(self._shared, uapi.RUN_UNION_AT)
        if not is_write:
            self._shared[uapi.RUN_MMIO_DATA_AT : uapi.RUN_MMIO_DATA_AT + 8] = b"\xff" * 8

    def _hyperv(self) -> None:
        kind, *_ = uapi.RUN_HYPERV_TYPE.unpack_from(self._shared, uapi.RUN_UNION_AT)
        vp = self._vcpu.index
        if kind == uapi.HYPERV_HCALL:
            _, control, _, first, second = uapi.RUN_HYPERV_HCALL.unpack_from(self._shared, uapi.RUN_UNION_AT)
            result = _HYPERCALL_REFUSED
            if self._paravirt is not None:
                result = self._paravirt.hypercall(Hypercall(vp, control, first, second))
            uapi.RUN_U64.pack_into(self._shared, uapi.RUN_HYPERV_RESULT_AT, result)
        elif kind == uapi.HYPERV_SYNIC and self._paravirt is not None:
            _, _, control, events, messages = uapi.RUN_HYPERV_SYNIC.unpack_from(self._shared, uapi.RUN_UNION_AT)
            self._paravirt.synic_changed(vp, control, events, messages)

    def _read_msr(self) -> None:
        _, _, number, _ = uapi.RUN_MSR.unpack_from(self._shared, uapi.RUN_UNION_AT)
        value = self._paravirt.msr(self._vcpu.index, number, None) if self._paravirt is not None else None
        self._shared[uapi.RUN_MSR_ERROR_AT : uapi.RUN_MSR_ERROR_AT + 1] = b"\1" if value is None else b"\0"
        if value is not None:
            uapi.RUN_U64.pack_into(self._shared, uapi.RUN_MSR_DATA_AT, value)

    def _write_msr(self) -> None:
        _, _, number, value = uapi.RUN_MSR.unpack_from(self._shared, uapi.RUN_UNION_AT)
        done = self._paravirt.msr(self._vcpu.index, number, value) if self._paravirt is not None else None
        self._shared[uapi.RUN_MSR_ERROR_AT : uapi.RUN_MSR_ERROR_AT + 1] = b"\1" if done is None else b"\0"

    def _shutdown(self) -> None:
        self._end(Ended("reset", f"vCPU {self._vcpu.index}: triple fault"))

    def _system_event(self) -> None:
        kind, *_ = uapi.RUN_SYSTEM_EVENT.unpack_from(self._shared, uapi.RUN_UNION_AT)
        if kind == uapi.SYSTEM_EVENT_CRASH:
            self._end(Ended("panic", self._crash_text()))
        elif kind == uapi.SYSTEM_EVENT_SHUTDOWN:
            self._end(Ended("power-off"))
        elif kind == uapi.SYSTEM_EVENT_RESET:
            self._end(Ended("reset"))

    def _fail_entry(self) -> None:
        reason, cpu = uapi.RUN_FAIL_ENTRY.unpack_from(self._shared, uapi.RUN_UNION_AT)
        self._end(Ended("failed", f"vCPU {self._vcpu.index}: CPU {cpu} cannot enter the guest, hardware reason {reason:#x}"))

    def _internal_error(self) -> None:
        kind, count, *data = uapi.RUN_INTERNAL.unpack_from(self._shared, uapi.RUN_UNION_AT)
        where = f"at {self._vcpu.registers().rip:#x}"
        what = (
            "an instruction that KVM cannot emulate" if kind == uapi.INTERNAL_ERROR_EMULATION else f"KVM's internal error {kind}"
        )
        numbers = " ".join(f"{number:#x}" for number in data[: min(count, len(data))])
        self._end(Ended("failed", f"vCPU {self._vcpu.index}: {what} {where} ({numbers})"))


def _nothing() -> None:
    """An exit that needs no answer."""
