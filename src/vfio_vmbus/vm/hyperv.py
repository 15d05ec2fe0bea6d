"""What makes a virtual machine a guest of Hyper-V: CPUID, SynIC, hypercalls, crash report, and the embedded host behind them.

KVM does what it can: the MSRs (hypercall page, VP index, SynIC, clocks), SINT interrupts by irqfd, signals of channels by eventfd. Here
arrive messages that the guest posts, signals that KVM knows no eventfd for, moves of a SynIC's pages, and the MSRs of a crash.
Nothing is offered that is not there: no timers of the hypervisor's, no paravirtual TLB flush, no enlightened interrupts.

The host may come when the guest runs already (`attach`), so that a kernel boots while Numba and the data plane still load: nothing of
them is imported here before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Final

from ..errors import ClosedError, IsolationFault, LocalError, UnavailableError, UsageError
from ..vfio import eventfd
from ..wire import hyperv
from ..wire import kvm as uapi
from ..wire import vmbus as wire
from ..wire.hyperv import PostMessage, SignalEvent
from ..wire.kvm import CpuidEntry
from .kvm import Vcpu, Vm
from .memory import GuestMemory
from .paravirt import Hypercall

if TYPE_CHECKING:
    from ..host.connection import Connection
    from ..host.embedded import EmbeddedHost
    from ..host.vsp import Vsp
    from .synic import Synic
    from .vmbus import SynicCarrier

log = logging.getLogger("vfio_vmbus.vm")

_NEEDED: Final = {
    "HYPERV_SYNIC2": uapi.CAP_HYPERV_SYNIC2,
    "HYPERV_VP_INDEX": uapi.CAP_HYPERV_VP_INDEX,
    "HYPERV_EVENTFD": uapi.CAP_HYPERV_EVENTFD,
    "HYPERV_CPUID": uapi.CAP_HYPERV_CPUID,
    "X86_USER_SPACE_MSR": uapi.CAP_X86_USER_SPACE_MSR,
    "X86_MSR_FILTER": uapi.CAP_X86_MSR_FILTER,
    "IRQFD_RESAMPLE": uapi.CAP_IRQFD_RESAMPLE,
}
_MSRS: Final = (
    hyperv.REFERENCE_COUNTER
    | hyperv.SYNIC
    | hyperv.HYPERCALL_MSRS
    | hyperv.VP_INDEX
    | hyperv.REFERENCE_TSC
    | hyperv.FREQUENCY_MSRS
)
_CALLS: Final = hyperv.POST_MESSAGES | hyperv.SIGNAL_EVENTS
_BESIDES: Final = hyperv.FREQUENCIES_AVAILABLE | hyperv.CRASH_MSRS
_CONNECTIONS: Final = (wire.MESSAGE_CONNECTION_ID, wire.MESSAGE_CONNECTION_ID_4)
"""Where messages for VMBus go: of versions before 5.0, and since."""
_PAGE: Final = 4096
_MOST_TEXT: Final = 4096
MAX_PIECES: Final = 49152
"""Pieces of memory that a guest's rings and buffers may be mapped from: a driver's buffers are scattered pages, 12,000 of DPDK's."""


class Hyperv:
    """The Hyper-V side of one machine: a `Paravirt`. `devices` of `host` are on its VMBus; without a host, those of `attach`.

    max_version, min_version: of VMBus, major << 16 | minor. monitored: offers say that the guest may signal in its monitor page, as
    Hyper-V's do; drivers in user space need that.
    """

    def __init__(
        self,
        host: EmbeddedHost | None = None,
        *devices: Vsp,
        name: str = "guest",
        max_version: int = wire.SUPPORTED_VERSIONS[0],
        min_version: int = wire.SUPPORTED_VERSIONS[-1],
        monitored: bool = True,
    ) -> None:
        self.name = name
        self._host = host
        self._devices = devices
        self._options = {"max_version": max_version, "min_version": min_version, "monitored": monitored}
        self._eventfds: list[tuple[int, int]] = []
        """Of each processor: its interrupt, and that it was taken."""
        self._synics: list[Synic] = []
        self._pages: dict[int, tuple[int, int, int]] = {}
        """Of each processor's SynIC: control, event flags, messages."""
        self._lock = Lock()
        """For `_pages`, and what the carrier knows of them."""
        self._crash = [0] * hyperv.CRASH_PARAMETERS
        self._stack = ExitStack()
        self._connection: Connection | None = None
        self._carrier: SynicCarrier | None = None
        self._spoken = False
        self._os_id = 0

    @property
    def silence(self) -> str | None:
        """Why the guest has never spoken to VMBus, as far as can be told once its machine is closed; None if it has."""
        if self._spoken:
            return None
        if not self._os_id:
            return "the guest has not noticed Hyper-V: its kernel has no CONFIG_HYPERV, or did not get as far"
        return "the guest has not asked for its VMBus devices: its kernel has no hv_vmbus, or did not load that module"

    @property
    def noticed(self) -> bool:
        """Has the guest said what it is, as all that know Hyper-V do first? Once its machine is closed."""
        return self._spoken or bool(self._os_id)

    @property
    def connection(self) -> Connection:
        """The host's end of the guest's VMBus, to look at. Raises LocalError before the machine is made."""
        if self._connection is None:
            raise LocalError(f"{self.name} has no machine yet")
        return self._connection

    def attach(self, host: EmbeddedHost, *devices: Vsp) -> None:
        """Put the guest's VMBus on a host, with these devices, once the machine is made; once. Until then the guest, if it asks, hears to
        try again, as Linux does for more than two minutes (vmbus_post_msg in drivers/hv/connection.c).

        Raises UsageError for devices that cannot be had.
        """
        from .synic import Synic  # this loads the data plane

        if self._connection is not None:
            raise UsageError(f"{self.name} has a host already")
        if not self._eventfds:
            raise UsageError(f"{self.name} has no machine yet")
        with self._lock:
            self._host = host
            self._synics = [Synic(interrupt, taken) for interrupt, taken in self._eventfds]
            try:
                self._connection = host.connect(self._carry, *devices, max_pieces=MAX_PIECES, **self._options)
            except LocalError:
                self._host = self._carrier = None
                raise
            self._stack.callback(host.disconnect, self._connection)
            for vp in self._pages:
                self._place(vp)

    def offer(self, device: Vsp) -> None:
        """Plug a device in while the guest runs. Raises UsageError for one that somebody has."""
        self._attached().offer(self.connection, device)

    def rescind(self, device: Vsp) -> None:
        """Pull a device out while the guest runs. Raises UsageError when it has none such."""
        self._attached().rescind(device)

    def _attached(self) -> EmbeddedHost:
        if self._host is None:
            raise UsageError(f"{self.name} has no host yet")
        return self._host

    # While the machine is made.

    def prepare(self, vm: Vm, memory: GuestMemory, cpus: int, panic: Callable[[str], None]) -> None:
        """Raises UnavailableError where KVM lacks something, UsageError for devices that cannot be had."""
        missing = [f"KVM_CAP_{name}" for name, number in _NEEDED.items() if not vm.has(number)]
        if missing:
            raise UnavailableError(f"this machine's KVM cannot be Hyper-V: it lacks {', '.join(missing)}")
        self._vm, self._memory, self._panic = vm, memory, panic
        vm.enable(uapi.CAP_X86_USER_SPACE_MSR, uapi.MSR_EXIT_REASON_FILTER)
        vm.filter_msrs([(hyperv.MSR_CRASH_P0, hyperv.MSR_CRASH_CTL + 1 - hyperv.MSR_CRASH_P0)])
        self._eventfds = [(self._eventfd(), self._eventfd()) for _ in range(cpus)]
        if self._host is not None:
            self.attach(self._host, *self._devices)

    def _eventfd(self) -> int:
        fd = eventfd.make()
        self._stack.callback(os.close, fd)
        return fd

    def _carry(self) -> SynicCarrier:
        from .vmbus import SynicCarrier

        self._carrier = SynicCarrier(self.name, self._vm, self._memory, self._synics, self._attached().switch.worker.paused)
        return self._carrier

    def prepare_vcpu(self, vcpu: Vcpu) -> None:
        vcpu.enable(uapi.CAP_HYPERV_SYNIC2)
        route = uapi.SintRoute(vcpu=vcpu.index, sint=wire.MESSAGE_SINT)
        gsi = self._vm.add_route(
            uapi.ROUTING_HV_SINT, route
        )  # behind the SynIC: KVM takes no note of routes to one that is not there
        interrupt, taken = self._eventfds[vcpu.index]
        self._vm.irqfd(interrupt, gsi, resample=taken)

    def cpuid(self, supported: Sequence[CpuidEntry]) -> list[CpuidEntry]:
        """What is offered, of what KVM stands behind. Raises UnavailableError where that is too little for VMBus."""
        known = {entry.function: entry for entry in supported}
        features = known.get(hyperv.LEAF_FEATURES, CpuidEntry())
        needed = hyperv.SYNIC | hyperv.HYPERCALL_MSRS | hyperv.VP_INDEX
        if features.eax & needed != needed:
            raise UnavailableError(f"this machine's KVM offers Hyper-V guests {features.eax:#x}, VMBus needs {needed:#x} of it")
        vendor = [int.from_bytes(hyperv.VENDOR[at : at + 4], "little") for at in (0, 4, 8)]
        interface = int.from_bytes(hyperv.INTERFACE, "little")
        limits = known.get(hyperv.LEAF_LIMITS, CpuidEntry())
        return [
            CpuidEntry(function=hyperv.LEAF_VENDOR, eax=hyperv.LEAF_LIMITS, ebx=vendor[0], ecx=vendor[1], edx=vendor[2]),
            CpuidEntry(function=hyperv.LEAF_INTERFACE, eax=interface),
            replace(known.get(hyperv.LEAF_VERSION, CpuidEntry()), function=hyperv.LEAF_VERSION),
            CpuidEntry(function=hyperv.LEAF_FEATURES, eax=features.eax & _MSRS, ebx=_CALLS, edx=features.edx & _BESIDES),
            CpuidEntry(function=hyperv.LEAF_RECOMMENDATIONS, eax=hyperv.NO_AUTO_EOI, ebx=hyperv.NEVER_NOTIFY_SPINNING),
            replace(limits, function=hyperv.LEAF_LIMITS),
        ]

    # While the guest runs, on its processors' threads.

    def hypercall(self, call: Hypercall) -> int:
        """Its status. What the guest names is checked, and read once."""
        code = call.control & hyperv.CALL_CODE_MASK
        if code not in (hyperv.CALL_POST_MESSAGE, hyperv.CALL_SIGNAL_EVENT):
            return hyperv.STATUS_INVALID_HYPERCALL_CODE
        if call.control & hyperv.CALL_EXTRA_MASK:
            return hyperv.STATUS_INVALID_HYPERCALL_INPUT
        return self._post(call) if code == hyperv.CALL_POST_MESSAGE else self._signal(call)

    def _post(self, call: Hypercall) -> int:
        if call.control & hyperv.CALL_FAST:
            return hyperv.STATUS_INVALID_HYPERCALL_INPUT
        data = self._input(call.input, PostMessage.SIZE)
        if isinstance(data, int):
            return data
        message = PostMessage.unpack(data)
        if message.connection_id & hyperv.CONNECTION_ID_MASK not in _CONNECTIONS:
            return hyperv.STATUS_INVALID_CONNECTION_ID
        if message.message_type != hyperv.MESSAGE_VMBUS or message.payload_size > hyperv.MAX_PAYLOAD:
            return hyperv.STATUS_INVALID_PARAMETER
        self._spoken = True
        if self._carrier is None:
            return hyperv.STATUS_INSUFFICIENT_BUFFERS
        return self._carrier.deliver(message.payload[: message.payload_size])

    def _signal(self, call: Hypercall) -> int:
        data = call.input.to_bytes(8, "little") if call.control & hyperv.CALL_FAST else self._input(call.input, SignalEvent.SIZE)
        if isinstance(data, int):
            return data
        event = SignalEvent.unpack(data)
        if event.flag:
            return hyperv.STATUS_INVALID_PARAMETER
        if self._carrier is None:
            return hyperv.STATUS_INVALID_CONNECTION_ID
        return self._carrier.signal(event.connection_id & hyperv.CONNECTION_ID_MASK)

    def _input(self, gpa: int, size: int) -> bytes | int:
        """A copy of a hypercall's input, or the status that refuses it."""
        if gpa % 8:
            return hyperv.STATUS_INVALID_ALIGNMENT
        if gpa % _PAGE + size > _PAGE:
            return hyperv.STATUS_INVALID_HYPERCALL_INPUT
        try:
            return self._memory.read(gpa, size)
        except IsolationFault:
            return hyperv.STATUS_INVALID_PARAMETER

    def synic_changed(self, vp: int, control: int, event_page: int, message_page: int) -> None:
        """Returns when nobody uses the pages that were there before."""
        with self._lock:
            self._pages[vp] = control, event_page, message_page
            if self._carrier is not None:
                self._place(vp)

    def _place(self, vp: int) -> None:
        carrier = self._carrier
        assert carrier is not None
        try:
            self._attached().run(lambda: carrier.synic_changed(vp, *self._pages[vp]))
        except ClosedError:
            log.info("%s: its host has closed", self.name)

    def msr(self, vp: int, number: int, value: int | None) -> int | None:
        """The crash MSRs, which are one set for all processors."""
        if number == hyperv.MSR_CRASH_CTL:
            if value is not None and value & hyperv.CRASH_NOTIFY:
                self._panic(self._crash_text(with_message=bool(value & hyperv.CRASH_MESSAGE)))
            return hyperv.CRASH_NOTIFY | hyperv.CRASH_MESSAGE
        index = number - hyperv.MSR_CRASH_P0
        if not 0 <= index < len(self._crash):
            return None
        if value is not None:
            self._crash[index] = value
        return self._crash[index]

    def _crash_text(self, *, with_message: bool) -> str:
        """What the guest left: a part of its kernel's log, or else the five parameters."""
        numbers = " ".join(f"{number:#x}" for number in self._crash)
        if not with_message:
            return f"the guest reports a crash: {numbers}"
        *_, gpa, size = self._crash
        try:
            text = self._memory.read(gpa, min(size, _MOST_TEXT))
        except IsolationFault:
            return f"the guest reports a crash, and a message where it has no memory: {numbers}"
        return text.decode(errors="replace").rstrip("\0\n")

    def crashed(self, vcpu: Vcpu) -> str:
        """Never: the filter brings the crash MSRs to `msr`, before KVM."""
        return self._crash_text(with_message=False)

    def stopped(self, vcpu: Vcpu) -> None:
        """KVM has the guest's word of what it is."""
        if vcpu.index == 0:
            self._os_id = vcpu.msr(hyperv.MSR_GUEST_OS_ID)

    def close(self) -> None:
        """Take the devices from the guest. No processor runs any more; the VM is closed afterwards."""
        self._stack.close()
