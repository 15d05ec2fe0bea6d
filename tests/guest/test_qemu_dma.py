"""QEMU's messages for memory that has no file: our edu reads and writes a machine's memory by asking QEMU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_vmbus.testing import edu

from .packages import Tools
from .process import PATIENCE
from .qtest import QtestMachine
from .run import user_device
from .server import Server

SLOT = 4
BAR0 = 0xE0100000
MAILBOX = 0x200000
OUT, BACK = 0x300000, 0x301000
COUNT = 4096
NOWHERE = 0x70000000


@pytest.fixture(params=["by message", "by file"])
def machine(request: pytest.FixtureRequest, programs: Tools, short_folder: Path) -> Iterator[tuple[QtestMachine, Server]]:
    shared = request.param == "by file"
    with (
        Server(short_folder) as server,
        QtestMachine(programs, short_folder, *user_device(server.edu_path), shared=shared) as machine,
    ):
        machine.set_config(SLOT, 0x10, BAR0)
        machine.set_config(SLOT, 0x04, 0x6)
        machine.set_config(SLOT, edu.MSI_AT + 4, MAILBOX)
        machine.set_config(SLOT, edu.MSI_AT + 12, 0xBEEF)
        machine.set_config(SLOT, edu.MSI_AT, machine.config(SLOT, edu.MSI_AT) | 1 << 16)
        yield machine, server


def copy(machine: QtestMachine, source: int, target: int, command: int) -> None:
    """Let the device copy, and wait for its interrupt."""
    machine.write32(MAILBOX, 0)
    for register, value in ((edu.REG_DMA_SOURCE, source), (edu.REG_DMA_TARGET, target), (edu.REG_DMA_COUNT, COUNT)):
        machine.write32(BAR0 + register, value)
    machine.write32(BAR0 + edu.REG_DMA_COMMAND, command | edu.DMA_START | edu.DMA_IRQ)
    deadline = time.monotonic() + PATIENCE
    while machine.read32(MAILBOX) != 0xBEEF:
        assert time.monotonic() < deadline, "no interrupt"
    assert machine.read32(BAR0 + edu.REG_IRQ_STATUS) == edu.IRQ_DMA
    machine.write32(BAR0 + edu.REG_IRQ_ACK, edu.IRQ_DMA)


def test_memory_is_copied_both_ways_and_what_is_no_memory_is_refused(machine: tuple[QtestMachine, Server]) -> None:
    qemu, server = machine
    assert qemu.read32(BAR0 + edu.REG_ID) == edu.ID
    pattern = bytes(range(256)) * (COUNT // 256)
    qemu.write(OUT, pattern)
    qemu.write(BACK, bytes(COUNT))
    copy(qemu, OUT, edu.BUFFER_AT, 0)
    copy(qemu, edu.BUFFER_AT, BACK, edu.DMA_FROM_DEVICE)
    assert qemu.read(BACK, COUNT) == pattern
    assert server.status()["edu_faults"] == 0
    copy(qemu, NOWHERE, edu.BUFFER_AT, 0)
    copy(qemu, edu.BUFFER_AT, NOWHERE, edu.DMA_FROM_DEVICE)
    assert server.status()["edu_faults"] == 2
    copy(qemu, edu.BUFFER_AT, OUT, edu.DMA_FROM_DEVICE)
    assert qemu.read(OUT, COUNT) == pattern
