"""Where namespaces are forbidden: a capture is replayed into the switch, and what the driver receives is compared with it."""

from __future__ import annotations

import ctypes
import hashlib
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import dpkt

from ..channel.offered import open_device
from ..drivers.netvsc.driver import Netvsc, NicInfo
from ..errors import WaitTimeout
from ..host.embedded import EmbeddedHost

FRAMES = 20_000
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


def replayed(host: EmbeddedHost) -> tuple[Replayed, NicInfo]:
    """Send such a file through a card and compare; and what the card was. Raises WaitTimeout when it does not all come."""
    vsp = host.add_nic("nic0")
    with tempfile.TemporaryDirectory() as folder, open_device(host.attach(vsp, name="embedded:nic0")) as device:
        path = Path(folder) / "frames.pcap"
        expected = write_capture(path, vsp.mac, FRAMES)
        with Netvsc(device) as nic:
            port = host.switch.add_replay(path, pace=100_000.0)
            digest = hashlib.sha256()
            received = _receive(nic, FRAMES, digest)
            host.switch.remove(port)
            return Replayed(FRAMES, received, digest.hexdigest() == expected), nic.info


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
