"""KVM: numbers of its ioctls, capabilities and exits, and the structures that go through them. x86-64 only.

Structures are those of @struct; what lies in the page that a vCPU shares with the kernel (`struct kvm_run`) is read at every exit, and
has plain `struct.Struct`s at fixed offsets instead. Sources: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h of Linux 6.12,
Documentation/virt/kvm/api.rst.
"""

import struct as _struct
from typing import Annotated, Final

from vfio_vmbus.wire.layout import S32, U8, U16, U32, U64, Array, Raw, Struct, Tail, struct

API_VERSION: Final = 12

# ---- ioctl numbers: direction (2 bits), size (14), letter 0xae (8), number (8); asm-generic/ioctl.h


def _io(number: int) -> int:
    return 0xAE00 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | 0xAE00 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | 0xAE00 | number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0xAE00 | number


# of /dev/kvm
GET_API_VERSION: Final = _io(0x00)
CREATE_VM: Final = _io(0x01)
CHECK_EXTENSION: Final = _io(0x03)
GET_VCPU_MMAP_SIZE: Final = _io(0x04)
GET_SUPPORTED_CPUID: Final = _iowr(0x05, 8)

# of a virtual machine
CREATE_VCPU: Final = _io(0x41)
SET_USER_MEMORY_REGION: Final = _iow(0x46, 32)
SET_TSS_ADDR: Final = _io(0x47)
SET_IDENTITY_MAP_ADDR: Final = _iow(0x48, 8)
CREATE_IRQCHIP: Final = _io(0x60)
IRQ_LINE: Final = _iow(0x61, 8)
SET_GSI_ROUTING: Final = _iow(0x6A, 8)
IRQFD: Final = _iow(0x76, 32)
CREATE_PIT2: Final = _iow(0x77, 64)
HYPERV_EVENTFD: Final = _iow(0xBD, 24)
X86_SET_MSR_FILTER: Final = _iow(0xC6, 392)

# of a virtual machine, and of a vCPU
ENABLE_CAP: Final = _iow(0xA3, 104)

# of a vCPU
RUN: Final = _io(0x80)
GET_REGS: Final = _ior(0x81, 144)
SET_REGS: Final = _iow(0x82, 144)
GET_SREGS: Final = _ior(0x83, 312)
SET_SREGS: Final = _iow(0x84, 312)
GET_MSRS: Final = _iowr(0x88, 8)
SET_SIGNAL_MASK: Final = _iow(0x8B, 4)
SET_CPUID2: Final = _iow(0x90, 8)
GET_SUPPORTED_HV_CPUID: Final = _iowr(0xC1, 8)

# ---- capabilities, for CHECK_EXTENSION and ENABLE_CAP
CAP_IRQCHIP: Final = 0
CAP_USER_MEMORY: Final = 3
CAP_SET_TSS_ADDR: Final = 4
CAP_EXT_CPUID: Final = 7
CAP_NR_VCPUS: Final = 9
CAP_MP_STATE: Final = 14
CAP_IRQ_ROUTING: Final = 25
CAP_IRQFD: Final = 32
CAP_PIT2: Final = 33
CAP_SET_IDENTITY_MAP_ADDR: Final = 37
CAP_MAX_VCPUS: Final = 66
CAP_IRQFD_RESAMPLE: Final = 82
CAP_ENABLE_CAP_VM: Final = 98
CAP_HYPERV_SYNIC2: Final = 148
CAP_HYPERV_VP_INDEX: Final = 149
CAP_HYPERV_EVENTFD: Final = 154
CAP_HYPERV_CPUID: Final = 167
CAP_X86_USER_SPACE_MSR: Final = 188
CAP_X86_MSR_FILTER: Final = 189

# ---- exits
EXIT_IO: Final = 2
EXIT_MMIO: Final = 6
EXIT_IRQ_WINDOW_OPEN: Final = 7
EXIT_SHUTDOWN: Final = 8
EXIT_FAIL_ENTRY: Final = 9
EXIT_INTR: Final = 10
EXIT_SET_TPR: Final = 11
EXIT_INTERNAL_ERROR: Final = 17
EXIT_SYSTEM_EVENT: Final = 24
EXIT_IOAPIC_EOI: Final = 26
EXIT_HYPERV: Final = 27
EXIT_X86_RDMSR: Final = 29
EXIT_X86_WRMSR: Final = 30

IO_OUT: Final = 1

INTERNAL_ERROR_EMULATION: Final = 1

SYSTEM_EVENT_SHUTDOWN: Final = 1
SYSTEM_EVENT_RESET: Final = 2
SYSTEM_EVENT_CRASH: Final = 3

HYPERV_SYNIC: Final = 1
HYPERV_HCALL: Final = 2

MSR_EXIT_REASON_FILTER: Final = 1 << 2

# ---- struct kvm_run, which a vCPU's descriptor maps
RUN_EXIT_REASON_AT: Final = 8
RUN_UNION_AT: Final = 32
"""What an exit says; the structs below begin here."""
RUN_MIN_SIZE: Final = 2352

RUN_IO: Final = _struct.Struct("<BBHIQ")
"""direction, size of one access in bytes, port, how many accesses, where in kvm_run their data lie."""
RUN_MMIO: Final = _struct.Struct("<Q8sIB")
"""address, data, bytes, is it a write?"""
RUN_MMIO_DATA_AT: Final = RUN_UNION_AT + 8
RUN_MSR: Final = _struct.Struct("<B7xIIQ")
"""error (to the kernel: not zero makes a fault), reason of the exit, index, data."""
RUN_MSR_ERROR_AT: Final = RUN_UNION_AT
RUN_MSR_DATA_AT: Final = RUN_UNION_AT + 16
RUN_FAIL_ENTRY: Final = _struct.Struct("<QI")
"""the hardware's reason, the CPU it happened on."""
RUN_INTERNAL: Final = _struct.Struct("<II16Q")
"""suberror, how many of the numbers that follow mean something."""
RUN_SYSTEM_EVENT: Final = _struct.Struct("<II16Q")
"""type, how many of the numbers that follow mean something."""
RUN_HYPERV_TYPE: Final = _struct.Struct("<I")
RUN_HYPERV_SYNIC: Final = _struct.Struct("<I4xI4xQQQ")
"""type, the MSR that was written, then what now holds: SCONTROL, SIEFP, SIMP."""
RUN_HYPERV_HCALL: Final = _struct.Struct("<I4xQQQQ")
"""type, the hypercall's control word, its result (to the kernel), and two parameters (addresses or, fast, values)."""
RUN_HYPERV_RESULT_AT: Final = RUN_UNION_AT + 16
RUN_U64: Final = _struct.Struct("<Q")
RUN_U32: Final = _struct.Struct("<I")

# ---- flags
IRQFD_RESAMPLE: Final = 1 << 1

HYPERV_EVENTFD_DEASSIGN: Final = 1 << 0

PIT_SPEAKER_DUMMY: Final = 1 << 0
"""The kernel plays port 0x61, too, without which no clock can be calibrated by the timer."""

CPUID_SIGNIFICANT_INDEX: Final = 1 << 0

MSR_FILTER_READ: Final = 1 << 0
MSR_FILTER_WRITE: Final = 1 << 1
MSR_FILTER_MAX_RANGES: Final = 16
MSR_FILTER_MAX_BITMAP: Final = 0x600


ROUTING_IRQCHIP: Final = 1
ROUTING_HV_SINT: Final = 4

IRQCHIP_PIC_MASTER: Final = 0
IRQCHIP_PIC_SLAVE: Final = 1
IRQCHIP_IOAPIC: Final = 2
IOAPIC_PINS: Final = 24

MAX_CPUID_ENTRIES: Final = 256
MAX_MSRS: Final = 256
MAX_IRQ_ROUTES: Final = 4096


@struct(size=32)
class UserMemoryRegion(Struct):
    """Memory of this process as the guest's. memory_size 0 takes the slot away."""

    slot: U32 = 0
    flags: U32 = 0
    guest_phys_addr: U64 = 0
    memory_size: U64 = 0
    userspace_addr: U64 = 0


@struct(size=8)
class IrqLevel(Struct):
    """The level of a line of the interrupt controllers."""

    irq: U32 = 0
    level: U32 = 0


@struct(size=64)
class PitConfig(Struct):
    """Makes the timer 8254."""

    flags: U32 = 0
    pad: Annotated[bytes, Raw(60)] = bytes(60)


@struct(size=32)
class Irqfd(Struct):
    """Raises `gsi` when `fd` is signalled. With IRQFD_RESAMPLE `resamplefd` is signalled when the guest has acknowledged it."""

    fd: U32 = 0
    gsi: U32 = 0
    flags: U32 = 0
    resamplefd: U32 = 0
    pad: Annotated[bytes, Raw(16)] = bytes(16)


@struct(size=8)
class IrqchipRoute(Struct):
    """IrqRoute.where of ROUTING_IRQCHIP."""

    irqchip: U32 = 0
    pin: U32 = 0


@struct(size=8)
class SintRoute(Struct):
    """IrqRoute.where of ROUTING_HV_SINT. vcpu: the VP index."""

    vcpu: U32 = 0
    sint: U32 = 0


@struct(size=48)
class IrqRoute(Struct):
    """What the interrupt number `gsi` is. where: one of the routes above, packed."""

    gsi: U32 = 0
    type: U32 = 0
    flags: U32 = 0
    pad: U32 = 0
    where: Annotated[bytes, Raw(32)] = bytes(32)


@struct(size=8)
class IrqRouting(Struct):
    """All interrupt numbers of a machine; it replaces what was before."""

    count: U32 = 0
    flags: U32 = 0
    routes: Annotated[tuple[IrqRoute, ...], Tail(IrqRoute, count="count", limit=MAX_IRQ_ROUTES)] = ()


@struct(size=104)
class EnableCap(Struct):
    """Switches a capability on."""

    cap: U32 = 0
    flags: U32 = 0
    args: Annotated[tuple[int, ...], Array(U64, 4)] = (0, 0, 0, 0)
    pad: Annotated[bytes, Raw(64)] = bytes(64)


@struct(size=40)
class CpuidEntry(Struct):
    """What the guest's CPUID says for EAX = function and, with CPUID_SIGNIFICANT_INDEX, ECX = index."""

    function: U32 = 0
    index: U32 = 0
    flags: U32 = 0
    eax: U32 = 0
    ebx: U32 = 0
    ecx: U32 = 0
    edx: U32 = 0
    padding: Annotated[bytes, Raw(12)] = bytes(12)


@struct(size=8)
class Cpuid(Struct):
    """All of it."""

    count: U32 = 0
    padding: U32 = 0
    entries: Annotated[tuple[CpuidEntry, ...], Tail(CpuidEntry, count="count", limit=MAX_CPUID_ENTRIES)] = ()


@struct(size=144)
class Regs(Struct):
    """General registers."""

    rax: U64 = 0
    rbx: U64 = 0
    rcx: U64 = 0
    rdx: U64 = 0
    rsi: U64 = 0
    rdi: U64 = 0
    rsp: U64 = 0
    rbp: U64 = 0
    r8: U64 = 0
    r9: U64 = 0
    r10: U64 = 0
    r11: U64 = 0
    r12: U64 = 0
    r13: U64 = 0
    r14: U64 = 0
    r15: U64 = 0
    rip: U64 = 0
    rflags: U64 = 0


@struct(size=24)
class Segment(Struct):
    """A segment register with what its descriptor says."""

    base: U64 = 0
    limit: U32 = 0
    selector: U16 = 0
    type: U8 = 0
    present: U8 = 0
    dpl: U8 = 0
    db: U8 = 0
    s: U8 = 0
    l: U8 = 0  # noqa: E741  (the bit's name in every manual)
    g: U8 = 0
    avl: U8 = 0
    unusable: U8 = 0
    padding: U8 = 0


@struct(size=16)
class DescriptorTable(Struct):
    """GDTR or IDTR."""

    base: U64 = 0
    limit: U16 = 0
    padding: Annotated[bytes, Raw(6)] = bytes(6)


@struct(size=312)
class Sregs(Struct):
    """Segment and control registers."""

    cs: Segment = Segment()
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    tr: Segment = Segment()
    ldt: Segment = Segment()
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: U64 = 0
    cr2: U64 = 0
    cr3: U64 = 0
    cr4: U64 = 0
    cr8: U64 = 0
    efer: U64 = 0
    apic_base: U64 = 0
    interrupt_bitmap: Annotated[tuple[int, ...], Array(U64, 4)] = (0, 0, 0, 0)


@struct(size=16)
class MsrEntry(Struct):
    """A model-specific register and its value."""

    index: U32 = 0
    reserved: U32 = 0
    data: U64 = 0


@struct(size=8)
class Msrs(Struct):
    """Some of them. The ioctl's result is how many were read or written before the first that could not be."""

    count: U32 = 0
    pad: U32 = 0
    entries: Annotated[tuple[MsrEntry, ...], Tail(MsrEntry, count="count", limit=MAX_MSRS)] = ()


@struct(size=12)
class SignalMask(Struct):
    """The signals that are blocked while the guest runs (the kernel's sigset: bit n - 1 is signal n)."""

    length: U32 = 8
    signals_low: U32 = 0
    signals_high: U32 = 0


@struct(size=24)
class HypervEventFd(Struct):
    """Signals `fd` when the guest makes the hypercall HvSignalEvent for this connection id, instead of an exit."""

    conn_id: U32 = 0
    fd: S32 = -1
    flags: U32 = 0
    padding: Annotated[bytes, Raw(12)] = bytes(12)


@struct(size=24)
class MsrFilterRange(Struct):
    """`count` MSRs from `base` on. bitmap: address in this process of a bit for each; 0 brings what `flags` says to user space."""

    flags: U32 = 0
    count: U32 = 0
    base: U32 = 0
    pad: U32 = 0
    bitmap: U64 = 0


@struct(size=392)
class MsrFilter(Struct):
    """Which accesses to MSRs are let through to KVM. flags 0: all that no range speaks of."""

    flags: U32 = 0
    pad: U32 = 0
    ranges: Annotated[tuple[MsrFilterRange, ...], Array(MsrFilterRange, MSR_FILTER_MAX_RANGES)] = (
        MsrFilterRange(),
    ) * MSR_FILTER_MAX_RANGES
