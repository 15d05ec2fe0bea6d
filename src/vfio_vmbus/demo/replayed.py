"""Where namespaces are forbidden: a capture is replayed into the switch, and what the driver receives is compared with it."""

from __future__ import annotations

import ctypes
import hashlib
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import dpkt

from ..channel.device import VmbusDevice
from ..drivers.netvsc.driver import Netvsc
from ..errors import WaitTimeout
from .hostprocess import HostProcess, host_process

FRAMES = 20_000
PACE = 50_000.0
"""Frames a second: less than a driver in plain Python takes."""
SECONDS = 20.0


@dataclass(frozen=True)
class Replayed:
    """Frames replayed and received, and whether each came as it was sent, in order."""

    sent: int
    received: int
    sha256_match: bool


def write_capture(path: Path, destination: bytes, count: int) -> str:
    """A pcap file of `count` frames of all sizes and random content. The SHA-256 of all their bytes."""
    dice = random.Random(1)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        writer = dpkt.pcap.Writer(file)
        for number in range(count):
            payload = dice.randbytes(dice.randint(46, 1500))
            frame = destination + bytes.fromhex("020000000001") + b"\x88\xb5" + payload
            digest.update(frame)
            writer.writepkt(frame, ts=number / 1e6)
    return digest.hexdigest()


@dataclass(frozen=True)
class ReplayStage:
    """A host in a process of its own, and a card that this process drives."""

    host: HostProcess
    device: VmbusDevice
    nic: Netvsc


@contextmanager
def replay_stage() -> Iterator[ReplayStage]:
    """Set it up."""
    with ExitStack() as stack:
        host = stack.enter_context(host_process())
        device = stack.enter_context(host.attach())
        yield ReplayStage(host, device, stack.enter_context(Netvsc(device)))


def replayed(on: ReplayStage) -> Replayed:
    """Send such a file through the card and compare. Raises WaitTimeout when it does not all come."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.pcap"
        expected = write_capture(path, on.nic.mac, FRAMES)
        on.host.replay(str(path), PACE)
        digest = hashlib.sha256()
        received = _receive(on.nic, FRAMES, digest)
        on.host.stop_replay()
    return Replayed(FRAMES, received, digest.hexdigest() == expected)


def _receive(nic: Netvsc, count: int, digest: hashlib._Hash) -> int:
    received = 0
    deadline = time.monotonic() + SECONDS
    while received < count:
        for address, size, _, _ in nic.queue.rx_burst().tolist():
            digest.update(ctypes.string_at(address, size))
            received += 1
        if received < count and not nic.queue.wait(0.1) and time.monotonic() > deadline:
            raise WaitTimeout(f"the last {count - received} of {count} frames", SECONDS)
    return received
