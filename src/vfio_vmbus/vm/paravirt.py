"""What a machine asks of its Hyper-V side: `Paravirt`, which `hyperv.Hyperv` is. A machine without one is a bare KVM guest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..wire.kvm import CpuidEntry
from .kvm import Vcpu, Vm
from .memory import GuestMemory


class Hypercall(NamedTuple):
    """A hypercall that KVM leaves to us. control: its first word (TLFS, "Hypercall Inputs"). input, output: guest-physical addresses, or
    the two parameters themselves if it is a fast one."""

    vp: int
    control: int
    input: int
    output: int


class Paravirt(Protocol):
    """In the order of the calls. From `hypercall` on they come from the vCPU's own thread, several at once; none may wait for long."""

    def prepare(self, vm: Vm, memory: GuestMemory, cpus: int, panic: Callable[[str], None]) -> None:
        """The machine has its memory and interrupt controllers, and none of its `cpus` vCPUs yet. panic(text): the guest says that it is
        lost; to be called from any thread."""

    def prepare_vcpu(self, vcpu: Vcpu) -> None:
        """A new vCPU, before it has its CPUID; it does not run yet, so its ioctls can be called."""

    def cpuid(self, supported: Sequence[CpuidEntry]) -> list[CpuidEntry]:
        """The leaves 0x40000000 to 0x400000ff, of those that this KVM supports for a prepared vCPU."""

    def hypercall(self, call: Hypercall) -> int:
        """A hypercall's result value."""

    def synic_changed(self, vp: int, control: int, event_page: int, message_page: int) -> None:
        """The guest has written SCONTROL, SIEFP or SIMP of its SynIC; these are all three now."""

    def msr(self, vp: int, number: int, value: int | None) -> int | None:
        """The guest reads an MSR of ours (value None), or writes it. What it reads, anything for a write, or None: a fault (#GP)."""

    def crashed(self, vcpu: Vcpu) -> str:
        """KVM saw the guest ask for a crash report (HV_X64_MSR_CRASH_CTL): its text. The vCPU's ioctls can be called."""

    def stopped(self, vcpu: Vcpu) -> None:
        """The machine has ended, and this vCPU runs no more. Its ioctls can be called."""

    def close(self) -> None:
        """No vCPU runs any more; the VM is closed afterwards. Again is harmless, and so is it before `prepare`."""
