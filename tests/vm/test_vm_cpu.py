"""The run loop over a vCPU that follows a script: every kind of exit, sane and mad."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.errors import UnavailableError
from vfio_vmbus.vm.cpu import Ended, Processor
from vfio_vmbus.vm.paravirt import Hypercall, Paravirt
from vfio_vmbus.vm.ports import Ports
from vfio_vmbus.wire import kvm as uapi

DATA_AT = 4096
Step = Callable[[mmap], int]
"""Fills in the shared page, and says why the guest stopped."""


class Script:
    """A vCPU whose guest does what it is told; when the script is over it powers off."""

    index = 3

    def __init__(self, *steps: Step) -> None:
        self.shared = mmap(-1, 8192)
        self._steps = list(steps)

    def run(self) -> int:
        return self._steps.pop(0)(self.shared) if self._steps else event(uapi.SYSTEM_EVENT_SHUTDOWN)(self.shared)

    def registers(self) -> uapi.Regs:
        return uapi.Regs(rip=0xABCD)


class Hypervisor:
    """A Hyper-V side that writes down what it is asked."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def hypercall(self, call: Hypercall) -> int:
        self.heard.append(call)
        return 0x1122334455667788

    def synic_changed(self, *what: int) -> None:
        self.heard.append(what)

    def msr(self, vp: int, number: int, value: int | None) -> int | None:
        self.heard.append((vp, number, value))
        return None if number == 0x66 else 0x77

    prepare = prepare_vcpu = cpuid = crashed = close = lambda *_: None


def run(script: Script, ports: Ports | None = None, paravirt: Paravirt | None = None) -> Ended:
    """Why it ended."""
    said: list[Ended] = []
    processor = Processor(script, ports or Ports(), paravirt, lambda: bool(said), said.append, lambda: "the last words")
    processor.run()
    assert len(said) == 1
    assert "\n" not in said[0].text
    return said[0]


def io(direction: int, size: int, port: int, data: bytes, count: int = 1) -> Step:
    def step(shared: mmap) -> int:
        uapi.RUN_IO.pack_into(shared, uapi.RUN_UNION_AT, direction, size, port, count, DATA_AT)
        shared[DATA_AT : DATA_AT + len(data)] = data
        return uapi.EXIT_IO

    return step


def mmio(is_write: int) -> Step:
    def step(shared: mmap) -> int:
        uapi.RUN_MMIO.pack_into(shared, uapi.RUN_UNION_AT, 0xE0001000, bytes(8), 8, is_write)
        return uapi.EXIT_MMIO

    return step


def event(kind: int) -> Step:
    def step(shared: mmap) -> int:
        uapi.RUN_SYSTEM_EVENT.pack_into(shared, uapi.RUN_UNION_AT, kind, *[0] * 17)
        return uapi.EXIT_SYSTEM_EVENT

    return step


def msr(reason: int, number: int, value: int = 0) -> Step:
    def step(shared: mmap) -> int:
        uapi.RUN_MSR.pack_into(shared, uapi.RUN_UNION_AT, 0xEE, uapi.MSR_EXIT_REASON_FILTER, number, value)
        return reason

    return step


def looks(check: Callable[[mmap], None]) -> Step:
    """The guest sees what its last exit was answered."""

    def step(shared: mmap) -> int:
        check(shared)
        return uapi.EXIT_INTR

    return step


def test_port_accesses_reach_the_device_with_their_size_and_count() -> None:
    said: list[tuple[int, int, int]] = []
    ports = Ports()
    ports.add(0x500, 8, lambda at, size: 0x11223344 % (1 << 8 * size), lambda *what: said.append(what))

    def sees(shared: mmap) -> None:
        assert shared[DATA_AT : DATA_AT + 6] == b"\x44\x33" * 3

    script = Script(
        io(1, 1, 0x500, b"\x05"),
        io(1, 2, 0x502, b"\x01\x02"),
        io(1, 4, 0x504, b"\x01\x02\x03\x04"),
        io(1, 1, 0x501, b"abc", 3),
        io(0, 2, 0x500, bytes(6), 3),
        looks(sees),
    )
    assert run(script, ports) == Ended("power-off")
    assert said == [(0, 1, 5), (2, 2, 0x201), (4, 4, 0x04030201), (1, 1, 97), (1, 1, 98), (1, 1, 99)]


def test_memory_that_is_none_reads_ones_and_forgets() -> None:
    def sees(shared: mmap) -> None:
        assert shared[uapi.RUN_MMIO_DATA_AT : uapi.RUN_MMIO_DATA_AT + 8] == b"\xff" * 8

    assert run(Script(mmio(1), mmio(0), looks(sees))) == Ended("power-off")


def test_hypercalls_and_the_synic_reach_the_hypervisor() -> None:
    def hypercall(shared: mmap) -> int:
        uapi.RUN_HYPERV_HCALL.pack_into(shared, uapi.RUN_UNION_AT, uapi.HYPERV_HCALL, 0x5C, 0, 0x1000, 0x2000)
        return uapi.EXIT_HYPERV

    def synic(shared: mmap) -> int:
        uapi.RUN_HYPERV_SYNIC.pack_into(shared, uapi.RUN_UNION_AT, uapi.HYPERV_SYNIC, 0x40000083, 1, 0x3001, 0x4001)
        return uapi.EXIT_HYPERV

    def sees(shared: mmap) -> None:
        assert uapi.RUN_U64.unpack_from(shared, uapi.RUN_HYPERV_RESULT_AT) == (0x1122334455667788,)

    def refused(shared: mmap) -> None:
        assert uapi.RUN_U64.unpack_from(shared, uapi.RUN_HYPERV_RESULT_AT) == (2,)

    hypervisor = Hypervisor()
    assert run(Script(hypercall, looks(sees), synic), paravirt=hypervisor) == Ended("power-off")
    assert hypervisor.heard == [Hypercall(3, 0x5C, 0x1000, 0x2000), (3, 1, 0x3001, 0x4001)]
    assert run(Script(synic, hypercall, looks(refused))) == Ended("power-off")


def test_msrs_reach_the_hypervisor_and_fault_where_there_is_none() -> None:
    def answers(error: int, value: int | None = None) -> Step:
        def check(shared: mmap) -> None:
            assert shared[uapi.RUN_MSR_ERROR_AT] == error
            if value is not None:
                assert uapi.RUN_U64.unpack_from(shared, uapi.RUN_MSR_DATA_AT) == (value,)

        return looks(check)

    read, write = uapi.EXIT_X86_RDMSR, uapi.EXIT_X86_WRMSR
    hypervisor = Hypervisor()
    steps = [
        *(msr(read, 0x55), answers(0, 0x77), msr(write, 0x55, 9), answers(0)),
        *(msr(read, 0x66), answers(1), msr(write, 0x66, 9), answers(1)),
    ]
    assert run(Script(*steps), paravirt=hypervisor) == Ended("power-off")
    assert hypervisor.heard == [(3, 0x55, None), (3, 0x55, 9), (3, 0x66, None), (3, 0x66, 9)]
    assert run(Script(msr(read, 0x55), answers(1), msr(write, 0x55), answers(1))) == Ended("power-off")


def simply(reason: int) -> Step:
    return lambda _: reason


def fail_entry(shared: mmap) -> int:
    uapi.RUN_FAIL_ENTRY.pack_into(shared, uapi.RUN_UNION_AT, 0x80000021, 1)
    return uapi.EXIT_FAIL_ENTRY


def internal_error(kind: int, count: int) -> Step:
    def step(shared: mmap) -> int:
        uapi.RUN_INTERNAL.pack_into(shared, uapi.RUN_UNION_AT, kind, count, *range(1, 17))
        return uapi.EXIT_INTERNAL_ERROR

    return step


def raises(error: Exception) -> Step:
    def step(_: mmap) -> int:
        raise error

    return step


@pytest.mark.parametrize(
    ("step", "ended"),
    [
        (event(uapi.SYSTEM_EVENT_SHUTDOWN), Ended("power-off")),
        (event(uapi.SYSTEM_EVENT_RESET), Ended("reset")),
        (event(uapi.SYSTEM_EVENT_CRASH), Ended("panic", "the last words")),
        (simply(uapi.EXIT_SHUTDOWN), Ended("reset", "vCPU 3: triple fault")),
        (fail_entry, Ended("failed", "vCPU 3: CPU 1 cannot enter the guest, hardware reason 0x80000021")),
        (internal_error(1, 2), Ended("failed", "vCPU 3: an instruction that KVM cannot emulate at 0xabcd (0x1 0x2)")),
        (internal_error(2, 99), None),
        (simply(5), Ended("failed", "vCPU 3: exit 5, which no guest can cause here")),
        (simply(12345), Ended("failed", "vCPU 3: exit 12345, which no guest can cause here")),
        (raises(UnavailableError("gone")), Ended("failed", "vCPU 3: gone")),
        (raises(ZeroDivisionError("a defect")), Ended("failed", "vCPU 3: ZeroDivisionError: a defect")),
    ],
)
def test_what_ends_a_machine(step: Step, ended: Ended | None) -> None:
    found = run(Script(step))
    assert found.reason == "failed" if ended is None else found == ended


@pytest.mark.parametrize("step", [simply(uapi.EXIT_INTR), simply(uapi.EXIT_IRQ_WINDOW_OPEN), event(4), event(99)])
def test_what_needs_no_answer(step: Step) -> None:
    assert run(Script(step, step)) == Ended("power-off")


def test_a_device_with_a_defect_ends_the_machine_alone() -> None:
    def breaks(*_: int) -> int:
        raise RuntimeError("broken")

    ports = Ports()
    ports.add(0x500, 1, breaks, lambda *_: None)
    assert run(Script(io(0, 1, 0x500, bytes(1))), ports) == Ended("failed", "vCPU 3: RuntimeError: broken")


@given(
    st.lists(
        st.tuples(st.sampled_from([uapi.EXIT_MMIO, uapi.EXIT_HYPERV, uapi.EXIT_X86_RDMSR]), st.binary(min_size=64, max_size=64))
    )
)
def test_whatever_the_guest_puts_there_the_loop_goes_on(exits: list[tuple[int, bytes]]) -> None:
    def step(reason: int, noise: bytes) -> Step:
        def fill(shared: mmap) -> int:
            shared[uapi.RUN_UNION_AT : uapi.RUN_UNION_AT + 64] = noise
            return reason

        return fill

    assert run(Script(*(step(*each) for each in exits))) == Ended("power-off")
