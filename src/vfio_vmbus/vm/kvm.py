"""KVM's descriptors: `Kvm` (/dev/kvm), `Vm`, `Vcpu`, with their ioctls as methods.

A method of `Vm` may be called from any thread at any time. One of `Vcpu` waits while that vCPU runs: only its own thread calls
them, save `kick`.

Refusals raise UnavailableError where the machine lacks or forbids something, else LocalError; the text names the ioctl.
Source: Documentation/virt/kvm/api.rst of Linux 6.12.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Final, TypeVar

from ..errors import ClosedError, LocalError, UnavailableError, UsageError
from ..wire import kvm as uapi
from ..wire.layout import Struct

PATH: Final = "/dev/kvm"

_NEEDED: Final = {
    "IRQCHIP": uapi.CAP_IRQCHIP,
    "USER_MEMORY": uapi.CAP_USER_MEMORY,
    "SET_TSS_ADDR": uapi.CAP_SET_TSS_ADDR,
    "EXT_CPUID": uapi.CAP_EXT_CPUID,
    "MP_STATE": uapi.CAP_MP_STATE,
    "IRQ_ROUTING": uapi.CAP_IRQ_ROUTING,
    "IRQFD": uapi.CAP_IRQFD,
    "PIT2": uapi.CAP_PIT2,
    "SET_IDENTITY_MAP_ADDR": uapi.CAP_SET_IDENTITY_MAP_ADDR,
    "ENABLE_CAP_VM": uapi.CAP_ENABLE_CAP_VM,
}
"""What no machine goes without; what its Hyper-V side needs, that side asks for (`Hyperv.prepare`)."""

_UNAVAILABLE: Final = frozenset(
    (
        errno.EPERM,
        errno.EACCES,
        errno.ENOTTY,
        errno.EOPNOTSUPP,
        errno.ENODEV,
        errno.EBUSY,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
    )
)

_KICK: Final = signal.SIGRTMIN
"""Sent to a vCPU's thread, where it is blocked except while the guest runs: so it ends KVM_RUN, and never reaches any handler."""

_TSS_ADDRESS: Final = 0xFFFBD000
_IDENTITY_MAP_ADDRESS: Final = 0xFFFBC000
"""Four pages below 4 GiB that Intel's processors need for real mode; no memory is there."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int

StructT = TypeVar("StructT", bound=Struct)


def _refusal(name: str, code: int, what: str) -> LocalError:
    text = f"KVM_{name}{f' for {what}' if what else ''}: {os.strerror(code)} ({errno.errorcode.get(code, code)})"
    if code == errno.EBADF:
        return ClosedError(text)
    return UnavailableError(text) if code in _UNAVAILABLE else LocalError(text)


class _Descriptor:
    """A descriptor of KVM's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def _call(self, name: str, argument: int | Struct = 0, *, what: str = "") -> int:
        """An ioctl that the kernel reads `argument` of, by its name in `wire/kvm.py`; its result."""
        if isinstance(argument, int):
            return self._ioctl(name, argument, what)
        data = argument.pack()
        buffer = ctypes.create_string_buffer(data, len(data))
        return self._ioctl(name, ctypes.addressof(buffer), what)

    def _fetch(self, name: str, argument: StructT, room: int = 0) -> tuple[int, StructT]:
        """An ioctl that the kernel writes `argument` of, which has `room` bytes more for it; the result, and what it holds then."""
        data = argument.pack()
        buffer = ctypes.create_string_buffer(data, len(data) + room)
        result = self._ioctl(name, ctypes.addressof(buffer), "")
        return result, type(argument).unpack(buffer.raw)

    def _ioctl(self, name: str, argument: int, what: str) -> int:
        while True:
            result: int = _libc.ioctl(self.fd, getattr(uapi, name), argument)
            if result >= 0:
                return result
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise _refusal(name, code, what)

    def has(self, capability: int) -> int:
        """CHECK_EXTENSION: 0 where there is none, else 1 or a number that depends on the capability."""
        return self._ioctl("CHECK_EXTENSION", capability, "")

    def enable(self, capability: int, *arguments: int) -> None:
        """ENABLE_CAP."""
        args = (*arguments, 0, 0, 0, 0)[:4]
        self._call("ENABLE_CAP", uapi.EnableCap(cap=capability, args=args), what=f"capability {capability}")

    def _cpuid(self, name: str) -> list[uapi.CpuidEntry]:
        entries = (uapi.CpuidEntry(),) * uapi.MAX_CPUID_ENTRIES
        _, got = self._fetch(name, uapi.Cpuid(count=len(entries), entries=entries))
        return list(got.entries)

    def close(self) -> None:
        """Close it; again is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Kvm(_Descriptor):
    """/dev/kvm, open. Raises UnavailableError, in one line that says what to do, where this machine cannot."""

    def __init__(self, path: str = PATH) -> None:
        super().__init__(-1)
        if os.uname().machine != "x86_64":
            raise UnavailableError(f"virtual machines are for x86-64, this is {os.uname().machine}")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UnavailableError(_why_not(path, error)) from error
        with ExitStack() as stack:
            stack.callback(self.close)
            version = self._ioctl("GET_API_VERSION", 0, "")
            if version != uapi.API_VERSION:
                raise UnavailableError(f"{path} speaks version {version} of KVM's interface, need {uapi.API_VERSION}")
            self._require(**_NEEDED)
            self.run_size = self._ioctl("GET_VCPU_MMAP_SIZE", 0, "")
            if self.run_size < uapi.RUN_MIN_SIZE:
                raise UnavailableError(f"this KVM is too old: it shares {self.run_size} bytes a vCPU, need {uapi.RUN_MIN_SIZE}")
            stack.pop_all()

    def _require(self, **capabilities: int) -> None:
        """Raise UnavailableError, with their names, unless this KVM has all of these capabilities."""
        missing = [f"KVM_CAP_{name}" for name, number in capabilities.items() if not self.has(number)]
        if missing:
            raise UnavailableError(f"this machine's KVM lacks {', '.join(missing)} (Linux {os.uname().release})")

    @property
    def max_vcpus(self) -> int:
        return self.has(uapi.CAP_MAX_VCPUS) or self.has(uapi.CAP_NR_VCPUS) or 4

    def supported_cpuid(self) -> list[uapi.CpuidEntry]:
        """What a guest's CPUID can say here; KVM's own leaves from 0x40000000 on are among it."""
        return self._cpuid("GET_SUPPORTED_CPUID")

    def create_vm(self) -> Vm:
        """A virtual machine without anything."""
        return Vm(self._ioctl("CREATE_VM", 0, ""), self.run_size)


class Vm(_Descriptor):
    """A virtual machine: memory slots, interrupt controllers, eventfds. All may be called while its vCPUs run."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size
        self._lock = threading.Lock()
        self._routes = dict[int, list[uapi.IrqRoute]]()
        self._next_gsi = uapi.IOAPIC_PINS

    def create_irqchip(self) -> None:
        """PICs, I/O APIC, timer, and a local APIC for each vCPU made afterwards."""
        self._ioctl("SET_TSS_ADDR", _TSS_ADDRESS, "")
        where = ctypes.c_uint64(_IDENTITY_MAP_ADDRESS)
        self._ioctl("SET_IDENTITY_MAP_ADDR", ctypes.addressof(where), "")
        self._ioctl("CREATE_IRQCHIP", 0, "")
        self._call("CREATE_PIT2", uapi.PitConfig(flags=uapi.PIT_SPEAKER_DUMMY))
        for pin in range(uapi.IOAPIC_PINS):
            self._routes[pin] = list(_legacy_routes(pin))

    def set_memory(self, slot: int, gpa: int, size: int, address: int) -> None:
        """`size` bytes of this process at `address` are the guest's at `gpa`."""
        region = uapi.UserMemoryRegion(
            slot=slot,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=address,
        )
        self._call("SET_USER_MEMORY_REGION", region, what=f"{size} bytes at {gpa:#x}")

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt line of the PICs and the I/O APIC."""
        self._call("IRQ_LINE", uapi.IrqLevel(irq=gsi, level=int(level)))

    def add_route(self, kind: int, where: Struct) -> int:
        """A new interrupt number for irqfds: `where` is what that kind of route has, a SintRoute for ROUTING_HV_SINT."""
        with self._lock:
            gsi = self._next_gsi
            self._next_gsi += 1
            self._routes[gsi] = [uapi.IrqRoute(gsi=gsi, type=kind, where=where.pack())]
            self._set_routes()
        return gsi

    def _set_routes(self) -> None:
        routes = tuple(route for some in self._routes.values() for route in some)
        self._call("SET_GSI_ROUTING", uapi.IrqRouting(count=len(routes), routes=routes))

    def irqfd(self, fd: int, gsi: int, *, resample: int = -1) -> None:
        """Signalling eventfd `fd` raises interrupt `gsi`; the eventfd `resample`, if any, is signalled at its acknowledgement."""
        with_resample = resample >= 0
        self._call(
            "IRQFD",
            uapi.Irqfd(
                fd=fd,
                gsi=gsi,
                flags=uapi.IRQFD_RESAMPLE if with_resample else 0,
                resamplefd=resample if with_resample else 0,
            ),
            what=f"interrupt {gsi}",
        )

    def hyperv_eventfd(self, connection_id: int, fd: int) -> None:
        """The guest's HvSignalEvent for this connection id signals eventfd `fd`."""
        self._call("HYPERV_EVENTFD", uapi.HypervEventFd(conn_id=connection_id, fd=fd), what=f"connection {connection_id:#x}")

    def remove_hyperv_eventfd(self, connection_id: int) -> None:
        """No more of it."""
        self._call(
            "HYPERV_EVENTFD",
            uapi.HypervEventFd(conn_id=connection_id, flags=uapi.HYPERV_EVENTFD_DEASSIGN),
            what=f"connection {connection_id:#x}",
        )

    def filter_msrs(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Accesses to `count` MSRs from `first` on, for each (first, count), come to user space (EXIT_X86_RDMSR, _WRMSR).

        At most 16 ranges. Needs CAP_X86_USER_SPACE_MSR enabled with MSR_EXIT_REASON_FILTER.
        """
        bitmap = ctypes.create_string_buffer(uapi.MSR_FILTER_MAX_BITMAP)  # all zero: denied
        flags = uapi.MSR_FILTER_READ | uapi.MSR_FILTER_WRITE
        wanted = [
            uapi.MsrFilterRange(flags=flags, base=first, count=count, bitmap=ctypes.addressof(bitmap)) for first, count in ranges
        ]
        if len(wanted) > uapi.MSR_FILTER_MAX_RANGES or any(one.count > 8 * len(bitmap) for one in wanted):
            raise UsageError(f"a filter has {uapi.MSR_FILTER_MAX_RANGES} ranges of {8 * len(bitmap)} MSRs at most")
        rest = [uapi.MsrFilterRange()] * (uapi.MSR_FILTER_MAX_RANGES - len(wanted))
        self._call("X86_SET_MSR_FILTER", uapi.MsrFilter(ranges=tuple(wanted + rest)))

    def create_vcpu(self, index: int) -> Vcpu:
        """A vCPU; `index` is its APIC id and VP index. Number 0 runs, the others wait for INIT and start-up interrupts."""
        return Vcpu(self._ioctl("CREATE_VCPU", index, f"vCPU {index}"), index, self._run_size)


class Vcpu(_Descriptor):
    """A vCPU and the page that it shares with the kernel. `run` and all else but `kick` are its own thread's."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        super().__init__(fd)
        self.index = index
        try:
            self.shared = mmap.mmap(fd, run_size)
        except OSError as error:
            os.close(fd)
            raise UnavailableError(f"vCPU {index}: its {run_size} shared bytes cannot be mapped: {error}") from error
        self._thread = 0

    def adopt(self) -> None:
        """Make the calling thread this vCPU's: from now on no signal reaches it, and `kick` ends `run`."""
        everything = signal.valid_signals()
        signal.pthread_sigmask(signal.SIG_BLOCK, everything)
        blocked = sum(1 << (number - 1) for number in everything if number != _KICK)
        self._call("SET_SIGNAL_MASK", uapi.SignalMask(signals_low=blocked & 0xFFFFFFFF, signals_high=blocked >> 32))
        self._thread = threading.get_ident()

    def kick(self) -> None:
        """End the current `run`, or the next one if there is none; from any thread. The vCPU's thread lives, and has adopted it."""
        signal.pthread_kill(self._thread, _KICK)

    def run(self) -> int:
        """KVM_RUN: enter the guest until something wants user space. The exit's reason; EXIT_INTR when it was kicked."""
        if _libc.ioctl(self.fd, uapi.RUN, 0) >= 0:
            reason: int = uapi.RUN_U32.unpack_from(self.shared, uapi.RUN_EXIT_REASON_AT)[0]
            return reason
        code = ctypes.get_errno()
        if code in (errno.EINTR, errno.EAGAIN):  # EAGAIN: it has just had its INIT
            return uapi.EXIT_INTR
        raise _refusal("RUN", code, f"vCPU {self.index}")

    def supported_hv_cpuid(self) -> list[uapi.CpuidEntry]:
        """The leaves of Hyper-V that this KVM stands behind; some need CAP_HYPERV_SYNIC2, enabled before. Needs CAP_HYPERV_CPUID."""
        return self._cpuid("GET_SUPPORTED_HV_CPUID")

    def set_cpuid(self, entries: Sequence[uapi.CpuidEntry]) -> None:
        self._call("SET_CPUID2", uapi.Cpuid(count=len(entries), entries=tuple(entries)), what=f"vCPU {self.index}")

    def registers(self) -> uapi.Regs:
        return self._fetch("GET_REGS", uapi.Regs())[1]

    def set_registers(self, registers: uapi.Regs) -> None:
        self._call("SET_REGS", registers)

    def special_registers(self) -> uapi.Sregs:
        return self._fetch("GET_SREGS", uapi.Sregs())[1]

    def set_special_registers(self, registers: uapi.Sregs) -> None:
        self._call("SET_SREGS", registers)

    def msr(self, index: int) -> int:
        """A model-specific register, as the host sees it. Raises UsageError for one that this KVM does not know."""
        count, got = self._fetch("GET_MSRS", uapi.Msrs(count=1, entries=(uapi.MsrEntry(index=index),)))
        if count != 1:
            raise UsageError(f"KVM cannot read MSR {index:#x}")
        return got.entries[0].data

    def close(self) -> None:
        """Unmap and close. The VM's resources stay while any vCPU is open."""
        if self.fd >= 0:
            self.shared.close()
        super().close()


def _legacy_routes(pin: int) -> Iterable[uapi.IrqRoute]:
    """Interrupt lines 0 to 15 lead to a PIC and the I/O APIC, 16 to 23 to the latter alone, as KVM has them at first."""
    places = [uapi.IrqchipRoute(irqchip=uapi.IRQCHIP_IOAPIC, pin=pin)]
    if pin < 16:
        chip = uapi.IRQCHIP_PIC_MASTER if pin < 8 else uapi.IRQCHIP_PIC_SLAVE
        places.append(uapi.IrqchipRoute(irqchip=chip, pin=pin % 8))
    for place in places:
        yield uapi.IrqRoute(gsi=pin, type=uapi.ROUTING_IRQCHIP, where=place.pack())


def _why_not(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"no {path}: load kvm_intel or kvm_amd; in a virtual machine, allow nesting in the machine around it"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission for {path}: be in its group (usually kvm), or run as root"
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"{path} is there, but no KVM behind it: load kvm_intel or kvm_amd; the CPU's virtualization may be off in the firmware"
    return f"{path} cannot be opened: {error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
