"""The small devices, each through its ports: clock, PCI's configuration, power; and the ports themselves."""

from __future__ import annotations

import calendar
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.vm import acpi, pci, rtc
from vfio_vmbus.vm.pci import HostBridge
from vfio_vmbus.vm.ports import Ports
from vfio_vmbus.vm.power import Power
from vfio_vmbus.vm.rtc import Rtc

SIZES = st.sampled_from([1, 2, 4])


class Wanted:
    """Ports with a `Power`, and what the guest wanted of it."""

    def __init__(self) -> None:
        self.ports = Ports()
        self.said: list[str] = []
        Power(self.ports, lambda: self.said.append("off"), lambda: self.said.append("reset"))


def clock_reads(clock: Rtc) -> int:
    """The time as mc146818_get_time of Linux reads it: seconds since 1970."""

    def at(index: int) -> int:
        clock.write(0, index)
        return clock.read(1)

    assert not at(rtc.REGISTER_A) & 0x80, "no update in progress"
    assert at(rtc.REGISTER_D) & 0x80, "the battery is good"
    assert at(rtc.REGISTER_B) & 0x06 == 0x02, "BCD, 24 hours"
    fields = (rtc.CENTURY, rtc.YEAR, rtc.MONTH, rtc.DAY, rtc.HOURS, rtc.MINUTES, rtc.SECONDS)
    century, year, *rest = (at(index) // 16 * 10 + at(index) % 16 for index in fields)
    return calendar.timegm((century * 100 + year, *rest, 0, 0, 0))


@given(st.integers(0, 4102444800))
def test_linux_reads_the_time(now: int) -> None:
    clock = Rtc(lambda: float(now))
    assert clock_reads(clock) == now
    clock.write(0, rtc.WEEKDAY)
    assert clock.read(1) == (time.gmtime(now).tm_wday + 1) % 7 + 1


def test_the_clock_keeps_what_is_stored_beside_the_time() -> None:
    clock = Rtc(lambda: 0.0)
    clock.write(0, 0x80 | 0x40)  # with NMIs masked
    clock.write(1, 0x77)
    assert clock.read(1) == 0x77
    for index in (rtc.HOURS, rtc.REGISTER_B, rtc.CENTURY):
        clock.write(0, index)
        before = clock.read(1)
        clock.write(1, 0x55)
        assert clock.read(1) == before, "the time is the machine's"
    assert clock.read(0) == 0xFF


@given(st.integers(0, 255), st.integers(0, 255))
def test_any_index_answers(index: int, value: int) -> None:
    clock = Rtc(lambda: 0.0)
    clock.write(0, index)
    clock.write(1, value)
    assert 0 <= clock.read(1) <= 255


def pci_ports() -> Ports:
    ports = Ports()
    bridge = HostBridge()
    ports.add(pci.PORT, pci.ADDRESS_PORTS, bridge.read_address, bridge.write_address)
    ports.add(pci.DATA, pci.DATA_PORTS, bridge.read_data, bridge.write_data)
    return ports


def test_linux_finds_configuration_type_1() -> None:
    """pci_check_type1 and pci_sanity_check of arch/x86/pci/direct.c."""
    ports = pci_ports()
    ports.write(0xCFB, 1, 0x01)
    before = ports.read(0xCF8, 4)
    ports.write(0xCF8, 4, 0x80000000)
    assert ports.read(0xCF8, 4) == 0x80000000
    ports.write(0xCF8, 4, 0x80000000 | 0x08)
    assert ports.read(0xCFC + 2, 2) == 0x0600, "a host bridge"
    ports.write(0xCF8, 4, before)


def test_there_is_one_function_on_the_bus() -> None:
    ports = pci_ports()
    found = []
    for place in range(1 << 16):
        ports.write(0xCF8, 4, 0x80000000 | place << 8)
        if ports.read(0xCFC, 4) != 0xFFFFFFFF:
            found.append(place)
    assert found == [0]
    ports.write(0xCF8, 4, 0)
    assert ports.read(0xCFC, 4) == 0xFFFFFFFF, "not enabled"


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 3), SIZES, st.integers(0, (1 << 32) - 1))
def test_any_configuration_access_answers(address: int, offset: int, size: int, value: int) -> None:
    ports = pci_ports()
    ports.write(0xCF8, 4, address)
    before = ports.read(0xCFC + offset, size)
    assert 0 <= before < 1 << 8 * size
    ports.write(0xCFC + offset, size, value % (1 << 8 * size))
    assert ports.read(0xCFC + offset, size) == before


def test_linux_powers_off() -> None:
    """acpi_hw_legacy_sleep: the type first, then with the enable bit."""
    wanted = Wanted()
    control = wanted.ports.read(acpi.PM1_CONTROL, 2)
    assert control & 1, "ACPI is on"
    wanted.ports.write(acpi.PM1_CONTROL, 2, control | acpi.S5_TYPE << 10)
    assert wanted.said == []
    wanted.ports.write(acpi.PM1_CONTROL, 2, control | acpi.S5_TYPE << 10 | 1 << 13)
    assert wanted.said == ["off"]


def test_a_byte_of_the_control_register_powers_off_too() -> None:
    wanted = Wanted()
    wanted.ports.write(acpi.PM1_CONTROL + 1, 1, (acpi.S5_TYPE << 10 | 1 << 13) >> 8)
    assert wanted.said == ["off"]


@pytest.mark.parametrize(
    ("port", "value"), [(acpi.RESET_PORT, acpi.RESET_VALUE), (0x64, 0xFE), (0x92, 0x01)], ids=["acpi", "keyboard", "fast"]
)
def test_the_ways_to_a_reset(port: int, value: int) -> None:
    wanted = Wanted()
    wanted.ports.write(port, 1, 0x02 if port != 0x64 else 0xD1)
    assert wanted.said == []
    wanted.ports.write(port, 1, value)
    assert wanted.said == ["reset"]


def test_other_sleep_types_do_nothing() -> None:
    wanted = Wanted()
    for kind in range(8):
        if kind != acpi.S5_TYPE:
            wanted.ports.write(acpi.PM1_CONTROL, 2, kind << 10 | 1 << 13)
    assert wanted.said == []


def test_the_events_that_may_interrupt_are_kept() -> None:
    wanted = Wanted()
    wanted.ports.write(acpi.PM1_EVENT + 2, 2, 0x0120)
    assert wanted.ports.read(acpi.PM1_EVENT + 2, 2) == 0x0120
    assert wanted.ports.read(acpi.PM1_EVENT, 4) == 0x01200000
    assert wanted.ports.read(acpi.PM1_EVENT, 2) == 0


def test_who_waits_for_the_keyboard_controller_does_not_wait_long() -> None:
    assert Wanted().ports.read(0x64, 1) & 0x02 == 0


def test_a_port_that_nobody_has_reads_ones() -> None:
    ports = Ports()
    assert [ports.read(0x1234, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    ports.write(0x1234, 4, 5)


def test_a_wide_access_to_a_narrow_device_is_one_to_each_port() -> None:
    ports = Ports()
    cells = bytearray(4)
    ports.add_bytes(0x100, 4, lambda at: cells[at], cells.__setitem__)
    ports.write(0x100, 4, 0x44332211)
    assert cells == b"\x11\x22\x33\x44"
    assert ports.read(0x101, 2) == 0x3322
    assert ports.read(0x102, 4) == 0xFFFF4433, "nothing behind it"
    ports.write(0x103, 4, 0xAABBCCDD)
    assert cells[3] == 0xDD


@given(st.integers(0, 0xFFFF), SIZES, st.integers(0, (1 << 32) - 1))
def test_any_access_answers_what_fits(port: int, size: int, value: int) -> None:
    wanted = Wanted()
    wanted.ports.write(port, size, value % (1 << 8 * size))
    assert 0 <= wanted.ports.read(port, size) < 1 << 8 * size
