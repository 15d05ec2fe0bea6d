"""KVM's interface: our declarations against what a C compiler makes of the kernel's headers (tests/fixtures/kvm; tools/uapi_extract.py)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.wire.strategies import all_structs
from vfio_vmbus.wire import kvm
from vfio_vmbus.wire.layout import Struct

KERNEL: dict[str, Any] = json.loads((Path(__file__).parent.parent / "fixtures/kvm/linux-6.12.json").read_text())
RUN: dict[str, int] = KERNEL["structs"]["kvm_run"]["members"]
HYPERV: dict[str, int] = KERNEL["structs"]["kvm_hyperv_exit"]["members"]

# Ours -> the kernel's structure, and where our names are not the kernel's ("-": a hole, or what is told as one).
STRUCTS: dict[type[Struct], tuple[str, str]] = {
    kvm.UserMemoryRegion: ("kvm_userspace_memory_region", ""),
    kvm.IrqLevel: ("kvm_irq_level", ""),
    kvm.PitConfig: ("kvm_pit_config", ""),
    kvm.Irqfd: ("kvm_irqfd", ""),
    kvm.IrqchipRoute: ("kvm_irq_routing_irqchip", ""),
    kvm.SintRoute: ("kvm_irq_routing_hv_sint", ""),
    kvm.IrqRoute: ("kvm_irq_routing_entry", "where=u"),
    kvm.IrqRouting: ("kvm_irq_routing", "count=nr routes=-"),
    kvm.EnableCap: ("kvm_enable_cap", ""),
    kvm.CpuidEntry: ("kvm_cpuid_entry2", ""),
    kvm.Cpuid: ("kvm_cpuid2", "count=nent entries=-"),
    kvm.Regs: ("kvm_regs", ""),
    kvm.Segment: ("kvm_segment", ""),
    kvm.DescriptorTable: ("kvm_dtable", ""),
    kvm.Sregs: ("kvm_sregs", ""),
    kvm.MsrEntry: ("kvm_msr_entry", ""),
    kvm.Msrs: ("kvm_msrs", "count=nmsrs entries=-"),
    kvm.SignalMask: ("kvm_signal_mask", "length=len signals_low=sigset signals_high=-"),
    kvm.HypervEventFd: ("kvm_hyperv_eventfd", ""),
    kvm.MsrFilterRange: ("kvm_msr_filter_range", "count=nmsrs pad=-"),
    kvm.MsrFilter: ("kvm_msr_filter", "pad=-"),
}
WITHOUT_A_SIZE = (kvm.SignalMask,)
"""The kernel's structure ends before what goes with it."""

# The kernel's names where they are not KVM_ and ours.
NUMBERS = {
    "IRQFD_RESAMPLE": "KVM_IRQFD_FLAG_RESAMPLE",
    "IO_OUT": "KVM_EXIT_IO_OUT",
    "HYPERV_SYNIC": "KVM_EXIT_HYPERV_SYNIC",
    "HYPERV_HCALL": "KVM_EXIT_HYPERV_HCALL",
    "MSR_FILTER_MAX_BITMAP": "KVM_MSR_FILTER_MAX_BITMAP_SIZE",
    "CPUID_SIGNIFICANT_INDEX": "KVM_CPUID_FLAG_SIGNIFCANT_INDEX",
    "ROUTING_IRQCHIP": "KVM_IRQ_ROUTING_IRQCHIP",
    "ROUTING_HV_SINT": "KVM_IRQ_ROUTING_HV_SINT",
    "IOAPIC_PINS": "KVM_IOAPIC_NUM_PINS",
}

# What of kvm_run is read: our struct, where it begins, and the offset of each of its values.
IN_RUN = {
    "io": (kvm.RUN_IO, ["io.direction", "io.size", "io.port", "io.count", "io.data_offset"]),
    "mmio": (kvm.RUN_MMIO, ["mmio.phys_addr", "mmio.data", "mmio.len", "mmio.is_write"]),
    "msr": (kvm.RUN_MSR, ["msr.error", "msr.reason", "msr.index", "msr.data"]),
    "fail_entry": (kvm.RUN_FAIL_ENTRY, ["fail_entry.hardware_entry_failure_reason", "fail_entry.cpu"]),
    "internal": (kvm.RUN_INTERNAL, ["internal.suberror", "internal.ndata", "internal.data"]),
    "system_event": (kvm.RUN_SYSTEM_EVENT, ["system_event.type", "system_event.ndata", "system_event.data"]),
}
IN_HYPERV = {
    "synic": (kvm.RUN_HYPERV_SYNIC, ["type", "u.synic.msr", "u.synic.control", "u.synic.evt_page", "u.synic.msg_page"]),
    "hcall": (kvm.RUN_HYPERV_HCALL, ["type", "u.hcall.input", "u.hcall.result", "u.hcall.params"]),
}


def offsets(form: struct.Struct) -> list[int]:
    """Where each value of a struct.Struct lies: the byte that a one in it is found at."""
    zeros = form.unpack(bytes(form.size))
    found = []
    for index, zero in enumerate(zeros):
        one = b"\1" if isinstance(zero, bytes) else 1
        found.append(form.pack(*(one if each == index else value for each, value in enumerate(zeros))).index(1))
    return found


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_sizes_and_offsets_are_the_kernels(kind: type[Struct]) -> None:
    name, table = STRUCTS[kind]
    theirs = KERNEL["structs"][name]
    renamed = dict(row.split("=") for row in table.split())
    if kind not in WITHOUT_A_SIZE:
        assert theirs["size"] == kind.SIZE
    ours = {renamed.get(field.name, field.name): field.offset for field in kind.FIELDS}
    ours.pop("-", None)
    assert ours == theirs["members"]


def test_numbers_are_the_kernels() -> None:
    ours = {
        NUMBERS.get(name, f"KVM_{name}"): value
        for name, value in vars(kvm).items()
        if name.isupper() and isinstance(value, int) and not name.startswith(("MAX_", "RUN_"))
    }
    ours["KVM_RUN"] = kvm.RUN
    theirs = {name: value % (1 << 32) for name, value in KERNEL["numbers"].items()}
    assert ours == theirs
    assert len(ours) > 60


@pytest.mark.parametrize("name", [*IN_RUN, *IN_HYPERV])
def test_what_an_exit_says_is_read_where_the_kernel_puts_it(name: str) -> None:
    form, members = IN_RUN.get(name) or IN_HYPERV[name]
    begin = kvm.RUN_UNION_AT if name in IN_RUN else 0
    where = RUN if name in IN_RUN else HYPERV
    assert [begin + at for at in offsets(form)][: len(members)] == [where[member] for member in members]


def test_places_in_the_shared_page() -> None:
    assert RUN["exit_reason"] == kvm.RUN_EXIT_REASON_AT
    assert RUN["mmio.data"] == kvm.RUN_MMIO_DATA_AT
    assert RUN["msr.error"] == kvm.RUN_MSR_ERROR_AT
    assert RUN["msr.data"] == kvm.RUN_MSR_DATA_AT
    assert RUN["hyperv"] + HYPERV["u.hcall.result"] == kvm.RUN_HYPERV_RESULT_AT
    assert kvm.RUN_UNION_AT == RUN["hyperv"] == RUN["io.direction"]
    assert KERNEL["structs"]["kvm_run"]["size"] == kvm.RUN_MIN_SIZE


def test_nothing_is_left_out() -> None:
    assert {kind for kind in all_structs() if kind.__module__ == kvm.__name__} == STRUCTS.keys()
