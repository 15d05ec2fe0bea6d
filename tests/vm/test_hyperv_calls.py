"""What a guest finds of the hypervisor: CPUID, hypercalls and their statuses, crash MSRs; and what KVM is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host.raw_client import eventually
from tests.vm.synic_guest import INPUT, NotedVm, SynicGuest
from vfio_vmbus.errors import LocalError, UnavailableError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vm import vmbus
from vfio_vmbus.vm.hyperv import Hyperv
from vfio_vmbus.vm.memory import MIB, GuestMemory
from vfio_vmbus.vm.paravirt import Hypercall
from vfio_vmbus.wire import hyperv
from vfio_vmbus.wire import kvm as uapi
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.hyperv import PostMessage, SignalEvent

TOP = 64 * MIB
POST, SIGNAL = hyperv.CALL_POST_MESSAGE, hyperv.CALL_SIGNAL_EVENT


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("nic")
        yield host


@pytest.fixture
def guest(host: EmbeddedHost) -> Iterator[SynicGuest]:
    with nothing_left(objects=False), SynicGuest(host, host.nics["nic"], cpus=2) as guest:
        yield guest


# What KVM is asked for.


def test_kvm_gets_routes_irqfds_and_the_filter(guest: SynicGuest) -> None:
    vm = guest.vm
    assert vm.enabled == [(uapi.CAP_X86_USER_SPACE_MSR, uapi.MSR_EXIT_REASON_FILTER)]
    assert vm.filtered == [(0x40000100, 6)]
    assert [vcpu.enabled for vcpu in guest.vcpus] == [[uapi.CAP_HYPERV_SYNIC2]] * 2
    assert vm.routes == [(uapi.ROUTING_HV_SINT, uapi.SintRoute(vcpu=vp, sint=2)) for vp in (0, 1)]
    fds = [fd for pair in vm.irqfds.values() for fd in pair]
    assert len(set(fds)) == 4
    assert min(fds) >= 0


@pytest.mark.parametrize("capability", [uapi.CAP_HYPERV_SYNIC2, uapi.CAP_HYPERV_EVENTFD, uapi.CAP_X86_MSR_FILTER])
def test_a_kvm_that_lacks_something_is_named(host: EmbeddedHost, capability: int) -> None:
    side = Hyperv(host, host.nics["nic"])
    memory = GuestMemory(TOP)
    with pytest.raises(UnavailableError, match="cannot be Hyper-V: it lacks KVM_CAP_"):
        side.prepare(NotedVm([capability]), memory, 1, print)  # type: ignore[arg-type]
    with pytest.raises(LocalError, match="no machine yet"):
        _ = side.connection
    side.close()
    memory.close()


def test_a_device_that_somebody_has_is_refused_and_costs_nothing(host: EmbeddedHost, guest: SynicGuest) -> None:
    with nothing_left(objects=False):
        for _ in range(2):
            side = Hyperv(host, host.nics["nic"])
            with GuestMemoryOf() as memory, pytest.raises(UsageError, match="has a client already"):
                side.prepare(NotedVm(), memory, 1, print)  # type: ignore[arg-type]
            side.close()


class GuestMemoryOf:
    """Memory as a context."""

    def __enter__(self) -> GuestMemory:
        self.memory = GuestMemory(TOP)
        return self.memory

    def __exit__(self, *exc: object) -> None:
        self.memory.close()


# CPUID.

KVM_SAYS = [
    uapi.CpuidEntry(function=0x40000000, eax=0x40000082, ebx=0x7263694D, ecx=0x666F736F, edx=0x76482074),
    uapi.CpuidEntry(function=0x40000001, eax=0x31237648),
    uapi.CpuidEntry(function=0x40000002, eax=0x3839, ebx=0xA0000),
    uapi.CpuidEntry(function=0x40000003, eax=0xFFFF, ebx=0xFFFFFFFF, ecx=0xFFFFFFFF, edx=0xFFFFFFFF),
    uapi.CpuidEntry(function=0x40000004, eax=0xFFFFFFFF, ebx=0xFFF),
    uapi.CpuidEntry(function=0x40000005, eax=1024, ebx=64),
    uapi.CpuidEntry(function=0x4000000A, eax=1),
    uapi.CpuidEntry(function=0x40000080, eax=0x40000082),
]


def test_cpuid_says_what_there_is_and_nothing_else(guest: SynicGuest) -> None:
    said = {entry.function: entry for entry in guest.hyperv.cpuid(KVM_SAYS)}
    assert list(said) == list(range(0x40000000, 0x40000006))
    vendor = said[0x40000000]
    assert b"".join(part.to_bytes(4, "little") for part in (vendor.ebx, vendor.ecx, vendor.edx)) == b"Microsoft Hv"
    assert vendor.eax == 0x40000005
    assert said[0x40000001].eax.to_bytes(4, "little") == b"Hv#1"
    # Reference counter, SynIC, hypercalls, VP index, reference TSC, frequencies: no timers, no VP assist page, no APIC registers.
    assert said[0x40000003].eax == 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11
    assert said[0x40000003].ebx == 1 << 4 | 1 << 5
    assert said[0x40000003].edx == 1 << 8 | 1 << 10
    assert said[0x40000004].eax == 1 << 9  # only: do not ask for AutoEOI
    assert said[0x40000004].ebx == 0xFFFFFFFF
    assert (said[0x40000005].eax, said[0x40000005].ebx) == (1024, 64)


def test_cpuid_offers_no_more_than_kvm(guest: SynicGuest) -> None:
    features = uapi.CpuidEntry(function=0x40000003, eax=1 << 2 | 1 << 5 | 1 << 6, edx=0)
    said = {entry.function: entry for entry in guest.hyperv.cpuid([features])}
    assert (said[0x40000003].eax, said[0x40000003].edx) == (1 << 2 | 1 << 5 | 1 << 6, 0)
    for lacking in (2, 5, 6):
        with pytest.raises(UnavailableError, match="VMBus needs"):
            guest.hyperv.cpuid([uapi.CpuidEntry(function=0x40000003, eax=0xFFFFFFFF & ~(1 << lacking))])


# Hypercalls.

GOOD = wire.InitiateContact(version_requested=1).pack()


def posted(**fields: object) -> bytes:
    values = {"connection_id": 4, "message_type": 1, "payload_size": len(GOOD), "payload": GOOD.ljust(240, b"\0")}
    return PostMessage(**(values | fields)).pack()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpa", "fields", "status"),
    [
        (INPUT, {}, hyperv.STATUS_SUCCESS),
        (INPUT + 4096 - 256, {}, hyperv.STATUS_SUCCESS),
        (TOP - 256, {}, hyperv.STATUS_SUCCESS),
        (INPUT, {"connection_id": 1}, hyperv.STATUS_SUCCESS),
        (INPUT, {"connection_id": 0xFF000004}, hyperv.STATUS_SUCCESS),  # 24 bits count
        (INPUT, {"payload_size": 240}, hyperv.STATUS_SUCCESS),
        (INPUT, {"payload_size": 0}, hyperv.STATUS_SUCCESS),  # which VMBus, not the hypervisor, takes for nonsense
        (INPUT, {"payload_size": 241}, hyperv.STATUS_INVALID_PARAMETER),
        (INPUT, {"payload_size": 0xFFFFFFFF}, hyperv.STATUS_INVALID_PARAMETER),
        (INPUT, {"message_type": 0}, hyperv.STATUS_INVALID_PARAMETER),
        (INPUT, {"message_type": 0x80000001}, hyperv.STATUS_INVALID_PARAMETER),
        (INPUT, {"connection_id": 0}, hyperv.STATUS_INVALID_CONNECTION_ID),
        (INPUT, {"connection_id": 2}, hyperv.STATUS_INVALID_CONNECTION_ID),
        (INPUT, {"connection_id": 0x800074}, hyperv.STATUS_INVALID_CONNECTION_ID),
    ],
)
def test_what_posting_a_message_gives(guest: SynicGuest, gpa: int, fields: dict[str, int], status: int) -> None:
    assert guest.call(POST, posted(**fields), gpa=gpa) == status


@pytest.mark.parametrize("code", [POST, SIGNAL])
@pytest.mark.parametrize(
    ("gpa", "status"),
    [
        (INPUT + 4, hyperv.STATUS_INVALID_ALIGNMENT),
        (INPUT + 1, hyperv.STATUS_INVALID_ALIGNMENT),
        (TOP, hyperv.STATUS_INVALID_PARAMETER),
        (0xC0000000, hyperv.STATUS_INVALID_PARAMETER),
        (0xFEE00000, hyperv.STATUS_INVALID_PARAMETER),
        (1 << 32, hyperv.STATUS_INVALID_PARAMETER),
        ((1 << 64) - 4096, hyperv.STATUS_INVALID_PARAMETER),
        ((1 << 64) - 8, None),
    ],
)
def test_inputs_that_are_nowhere(guest: SynicGuest, code: int, gpa: int, status: int | None) -> None:
    if status is None:  # the smaller input ends with the address space, the larger one crosses a page
        status = hyperv.STATUS_INVALID_PARAMETER if code == SIGNAL else hyperv.STATUS_INVALID_HYPERCALL_INPUT
    assert guest.call(code, gpa=gpa) == status


def test_inputs_lie_within_a_page(guest: SynicGuest) -> None:
    for gpa in (INPUT + 4096 - 248, INPUT + 4096 - 8, TOP - 248):
        assert guest.call(POST, gpa=gpa) == hyperv.STATUS_INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("code", [0, 1, 2, 0x5B, 0x5E, 0x8001, 0xFFFF])
def test_calls_that_are_not_there(guest: SynicGuest, code: int) -> None:
    assert guest.call(code) == hyperv.STATUS_INVALID_HYPERCALL_CODE


@pytest.mark.parametrize("extra", [1 << 17, 1 << 26, 1 << 32, 1 << 43, 1 << 48])
def test_neither_call_repeats_or_has_a_variable_header(guest: SynicGuest, extra: int) -> None:
    for code in (POST, SIGNAL):
        assert guest.call(code, posted(), control=extra) == hyperv.STATUS_INVALID_HYPERCALL_INPUT


def test_a_message_does_not_fit_into_registers(guest: SynicGuest) -> None:
    assert guest.call(POST, posted(), control=hyperv.CALL_FAST) == hyperv.STATUS_INVALID_HYPERCALL_INPUT


def test_signals_that_kvm_leaves_to_us(guest: SynicGuest) -> None:
    guest.connect()
    with guest.memory(8) as rings:
        assert guest.open(guest.share(rings.pfns).gpadl, 4) == 0
        doorbell = guest.vm.eventfds[1]
        assert guest.signal(1) == hyperv.STATUS_SUCCESS
        assert guest.call(SIGNAL, SignalEvent(connection_id=1).pack()) == hyperv.STATUS_SUCCESS
        assert guest.signal(1, flag=1) == hyperv.STATUS_INVALID_PARAMETER
        for unknown in (0, 2, 4, 2048, 0xFFFFFF):
            assert guest.signal(unknown) == hyperv.STATUS_INVALID_CONNECTION_ID
        assert doorbell >= 0


def test_a_guest_that_posts_faster_than_the_loop_takes_hears_that_there_is_no_buffer(
    host: EmbeddedHost, guest: SynicGuest
) -> None:
    statuses: list[int] = []

    def flood() -> None:
        """On the loop, which takes nothing meanwhile."""
        statuses.extend(guest.call(POST, posted(payload_size=8)) for _ in range(vmbus.MAX_INBOX + 5))

    host.run(flood)
    assert statuses == [hyperv.STATUS_SUCCESS] * vmbus.MAX_INBOX + [hyperv.STATUS_INSUFFICIENT_BUFFERS] * 5
    eventually(lambda: guest.call(POST, posted(payload_size=8)) == hyperv.STATUS_SUCCESS, "there are buffers again")


# The crash MSRs.


def test_a_crash_with_a_message_is_its_text(guest: SynicGuest) -> None:
    side = guest.hyperv
    assert side.msr(0, hyperv.MSR_CRASH_CTL, None) == hyperv.CRASH_NOTIFY | hyperv.CRASH_MESSAGE
    guest.ram.write(INPUT, b"Kernel panic - not syncing: sysrq triggered crash\n\xff\0\0")
    for index, value in enumerate((0, 0, 0, INPUT, 53)):
        assert side.msr(1, hyperv.MSR_CRASH_P0 + index, value) == value
        assert side.msr(0, hyperv.MSR_CRASH_P0 + index, None) == value
    assert guest.panics == []
    side.msr(0, hyperv.MSR_CRASH_CTL, 0)
    assert guest.panics == []
    side.msr(0, hyperv.MSR_CRASH_CTL, hyperv.CRASH_NOTIFY | hyperv.CRASH_MESSAGE)
    assert guest.panics == ["Kernel panic - not syncing: sysrq triggered crash\n\N{REPLACEMENT CHARACTER}"]


def test_a_crash_without_a_message_is_its_parameters(guest: SynicGuest) -> None:
    for index in range(5):
        guest.hyperv.msr(0, hyperv.MSR_CRASH_P0 + index, 0x10 + index)
    guest.hyperv.msr(0, hyperv.MSR_CRASH_CTL, hyperv.CRASH_NOTIFY)
    assert guest.panics == ["the guest reports a crash: 0x10 0x11 0x12 0x13 0x14"]


@pytest.mark.parametrize(("gpa", "size"), [(TOP, 10), (TOP - 10, 4096), ((1 << 64) - 1, 1), (1 << 63, (1 << 64) - 1)])
def test_a_crash_whose_message_is_nowhere(guest: SynicGuest, gpa: int, size: int) -> None:
    guest.hyperv.msr(0, hyperv.MSR_CRASH_P0 + 3, gpa)
    guest.hyperv.msr(0, hyperv.MSR_CRASH_P0 + 4, size)
    guest.hyperv.msr(0, hyperv.MSR_CRASH_CTL, hyperv.CRASH_NOTIFY | hyperv.CRASH_MESSAGE)
    assert len(guest.panics) == 1
    assert "where it has no memory" in guest.panics[0]


def test_a_message_has_a_page_at_most(guest: SynicGuest) -> None:
    guest.ram.write(INPUT, b"a" * 10000)
    guest.hyperv.msr(0, hyperv.MSR_CRASH_P0 + 3, INPUT)
    guest.hyperv.msr(0, hyperv.MSR_CRASH_P0 + 4, (1 << 64) - 1)
    guest.hyperv.msr(0, hyperv.MSR_CRASH_CTL, hyperv.CRASH_NOTIFY | hyperv.CRASH_MESSAGE)
    assert guest.panics == ["a" * 4096]


@pytest.mark.parametrize("number", [hyperv.MSR_CRASH_P0 - 1, hyperv.MSR_CRASH_CTL + 1, 0x40000000, 0, 0xFFFFFFFF])
def test_other_msrs_are_none(guest: SynicGuest, number: int) -> None:
    assert guest.hyperv.msr(0, number, None) is None
    assert guest.hyperv.msr(0, number, 1) is None


def test_the_call_record_is_what_the_processor_brings() -> None:
    call = Hypercall(vp=1, control=0x1005C, input=2, output=3)
    assert (call.vp, call.control & 0xFFFF, call.input, call.output) == (1, 0x5C, 2, 3)
