"""QEMU's vfio-user-pci at our server, without a guest: configuration space, registers, interrupts, DMA, reset, coming and going."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vfio_vmbus.wire import vmbus

from .packages import Tools
from .process import PATIENCE, SOURCES, Program
from .qmp import QmpError
from .qtest import QtestMachine
from .run import user_device
from .server import Server

SLOT = 4
BAR0, BAR2 = 0xE0000000, 0xE0010000
STATUS, CONTROL, ERROR = 0x20, 0x24, 0x28
ADMIN_IOVA, UPSTREAM, DOWNSTREAM = 0x30, 0x38, 0x3C
RINGS, PAGES = 0x100000, 2
TARGET = vmbus.TargetInfo.of(sint=vmbus.MESSAGE_SINT)
MAILBOX = 0x200000
"""Where the interrupt's message is written: qtest has no CPU that would take it, and memory can be looked at."""

T = TypeVar("T")


@pytest.fixture(scope="module")
def server(programs: Tools) -> Iterator[Server]:
    """One for all: each test's QEMU finds the device free, whatever became of the one before."""
    with tempfile.TemporaryDirectory(prefix="rig-") as folder, Server(Path(folder)) as server:
        yield server
        assert server.program.running


@pytest.fixture
def machine(programs: Tools, short_folder: Path, server: Server) -> Iterator[QtestMachine]:
    with QtestMachine(programs, short_folder, *user_device(server.path)) as machine:
        server.event("attached")
        yield machine
    server.event("detached")


def wake(machine: QtestMachine) -> None:
    """Give the BARs addresses, switch memory and bus master on."""
    machine.set_config(SLOT, 0x10, BAR0)
    machine.set_config(SLOT, 0x18, BAR2)
    machine.set_config(SLOT, 0x04, 0x6)


def plug(server: Server) -> dict[str, Any]:
    """`device_add`'s arguments for the served device."""
    return {"driver": "vfio-user-pci", "id": "vu0", "addr": f"{SLOT}.0", "socket": {"path": str(server.path), "type": "unix"}}


def within(what: str, attempt: Callable[[], T]) -> T:
    deadline = time.monotonic() + PATIENCE
    while not (result := attempt()):
        assert time.monotonic() < deadline, f"not {what}"
        time.sleep(0.01)
    return result


def start_admin_ring(machine: QtestMachine) -> int:
    """Start the admin ring over cleared memory; STATUS then."""
    machine.write(RINGS, bytes(2 * PAGES * 4096))
    machine.write32(BAR0 + ADMIN_IOVA, RINGS)
    machine.write32(BAR0 + ADMIN_IOVA + 4, 0)
    machine.write32(BAR0 + UPSTREAM, PAGES)
    machine.write32(BAR0 + DOWNSTREAM, PAGES)
    machine.write32(BAR0 + CONTROL, 1)
    return machine.read32(BAR0 + STATUS)


def test_the_monitor_shows_a_network_card_of_microsofts(machine: QtestMachine) -> None:
    text = machine.qmp.human("info pci")
    assert "Ethernet controller: PCI device 1414:4256" in text
    assert "BAR0: 32 bit memory" in text
    assert "BAR2: 32 bit memory" in text


def test_the_configuration_space_passes_through(machine: QtestMachine) -> None:
    assert machine.config(SLOT, 0x00) == 0x42561414
    assert machine.config(SLOT, 0x08) == 0x02000001
    assert machine.config(SLOT, 0x2C) & 0xFFFF == 0x1414
    found = {}
    at = machine.config(SLOT, 0x34) & 0xFF
    while at:
        found[machine.config(SLOT, at) & 0xFF] = at
        at = machine.config(SLOT, at) >> 8 & 0xFF
    assert set(found) == {0x11, 0x09}
    assert machine.config(SLOT, found[0x09] + 4).to_bytes(4, "little") == b"VMBS"
    assert machine.config(SLOT, found[0x11] + 4) == 0x2
    assert machine.config(SLOT, found[0x11] + 8) == 0x802


def test_bars_are_sized_as_usual(machine: QtestMachine) -> None:
    for register, mask in {0x10: 0xFFFFE000, 0x14: 0, 0x18: 0xFFFFF000, 0x1C: 0, 0x20: 0, 0x24: 0}.items():
        machine.set_config(SLOT, register, 0xFFFFFFFF)
        assert machine.config(SLOT, register) == mask, hex(register)


def test_registers_are_read_and_posted_writes_arrive_in_order(machine: QtestMachine) -> None:
    wake(machine)
    assert machine.read32(BAR0).to_bytes(4, "little") == b"VMBS"
    assert machine.read32(BAR0 + 4) == 1
    for value in (0x1000, 0x12345000, 0):
        machine.write32(BAR0 + ADMIN_IOVA, value)
        assert machine.read32(BAR0 + ADMIN_IOVA) == value
    for _ in range(300):
        machine.write32(BAR0 + 0x1000 + 4 * 7, 1)  # a doorbell of a channel that is not open
    assert machine.read32(BAR0).to_bytes(4, "little") == b"VMBS"


def test_a_message_goes_there_and_back_with_an_interrupt(machine: QtestMachine) -> None:
    wake(machine)
    msix = 0x40
    machine.write32(BAR2, MAILBOX)
    machine.write32(BAR2 + 4, 0)
    machine.write32(BAR2 + 8, 0xCAFE)
    machine.write32(BAR2 + 12, 0)
    machine.set_config(SLOT, msix, machine.config(SLOT, msix) | 1 << 31)
    assert start_admin_ring(machine) == 1
    contact = vmbus.InitiateContact(version_requested=vmbus.VERSION_WIN10_V5_3, target_info=TARGET).pack()
    body = bytes([6, 0, 2, 0, (16 + len(contact) + 7) // 8, 0, 0, 0]) + bytes(8) + contact
    body += bytes(-len(body) % 8)
    packet = body + bytes(8)
    machine.write(RINGS + 4096, packet)
    machine.write32(RINGS, len(packet))
    machine.write32(BAR0 + 0x1000, 1)
    back = RINGS + PAGES * 4096
    within("answered", lambda: machine.read32(back) > 0)
    within("interrupted", lambda: machine.read32(MAILBOX) == 0xCAFE)
    answer = vmbus.VersionResponse.unpack(machine.read(back + 4096 + 16, vmbus.VersionResponse.SIZE))
    assert answer == vmbus.VersionResponse(version_supported=1, message_connection_id=answer.message_connection_id)


def test_memory_that_is_not_shared_is_refused_and_nothing_breaks(programs: Tools, short_folder: Path, server: Server) -> None:
    with QtestMachine(programs, short_folder, *user_device(server.path), shared=False) as machine:
        server.event("attached")
        wake(machine)
        assert start_admin_ring(machine) == 2
        assert machine.read32(BAR0 + ERROR) == 2
        assert not any(mapped for *_, mapped in server.status()["maps"])
    server.event("detached")


def test_a_dma_outside_of_the_maps_is_refused_and_counted(machine: QtestMachine, server: Server) -> None:
    wake(machine)
    machine.write32(BAR0 + ADMIN_IOVA + 4, 1)
    machine.write32(BAR0 + UPSTREAM, PAGES)
    machine.write32(BAR0 + DOWNSTREAM, PAGES)
    machine.write32(BAR0 + CONTROL, 1)
    assert machine.read32(BAR0 + STATUS) == 2
    assert machine.read32(BAR0 + ERROR) == 2
    status = server.status()
    assert status["fault_count"] == 1
    assert (status["faults"][0]["iova"], status["faults"][0]["reason"]) == (1 << 32, "not mapped")


def test_a_reset_of_the_machine_resets_the_function(machine: QtestMachine, server: Server) -> None:
    wake(machine)
    assert start_admin_ring(machine) == 1
    machine.qmp.command("system_reset")
    machine.qmp.event(lambda event: event["event"] == "RESET")
    wake(machine)
    assert machine.read32(BAR0 + STATUS) == 0
    assert machine.read32(BAR0 + ADMIN_IOVA) == 0
    assert start_admin_ring(machine) == 1


def test_a_device_has_one_client(machine: QtestMachine, server: Server) -> None:
    wake(machine)
    assert start_admin_ring(machine) == 1
    with pytest.raises(QmpError):
        machine.qmp.command("device_add", **{**plug(server), "id": "vu1", "addr": "5.0"})
    assert machine.read32(BAR0 + STATUS) == 1


def test_a_device_is_plugged_and_unplugged_and_free_for_the_next(programs: Tools, short_folder: Path, server: Server) -> None:
    """QEMU 11.1 itself aborts when a vfio-user device with MSI-X has been unplugged (vfio_user_pci_finalize takes a memory region
    apart that is gone): to the server it is a client that goes in either case."""
    for _ in range(2):
        with QtestMachine(programs, short_folder) as machine:
            machine.qmp.command("device_add", **plug(server))
            server.event("attached")
            wake(machine)
            assert start_admin_ring(machine) == 1
            machine.unplug("vu0", SLOT)
            server.event("detached")
            assert not server.status()["client"]


def test_a_killed_qemu_leaves_the_device_free_for_the_next(programs: Tools, short_folder: Path, server: Server) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        with QtestMachine(programs, short_folder, *user_device(server.path)) as machine:
            server.event("attached")
            wake(machine)
            assert start_admin_ring(machine) == 1
            machine.program.kill(number)
            machine.program.wait()
            server.event("detached")
            assert not server.status()["client"]


def test_the_command_line_serves_qemu(programs: Tools, short_folder: Path) -> None:
    path, log = short_folder / "nic0", short_folder / "serve.log"
    command = [sys.executable, "-m", "vfio_vmbus", "serve", "--listen", str(path), "--json"]
    serve = Program("vfio-vmbus serve", command, log, SOURCES)
    try:
        serve.until("listening", lambda: path.exists() or None)
        with QtestMachine(programs, short_folder, *user_device(path)) as machine:
            wake(machine)
            assert start_admin_ring(machine) == 1
            serve.until("attached", lambda: '"attached"' in log.read_text() or None)
        serve.until("detached", lambda: '"detached"' in log.read_text() or None)
        serve.kill(signal.SIGTERM)
        assert serve.wait() == 0
        assert not path.exists()
    finally:
        serve.end()
