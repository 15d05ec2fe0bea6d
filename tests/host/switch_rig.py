"""What the tests of the switch share: ports whose other end the test holds, and a switch that runs step by step."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable

from vfio_vmbus.host.frames import mac_value
from vfio_vmbus.host.switch.fdb import fdb_pin
from vfio_vmbus.host.switch.forwarding import switch_round
from vfio_vmbus.host.switch.port import Port
from vfio_vmbus.host.switch.switch import Switch

BROADCAST = b"\xff" * 6
DEADLINE = 20.0


def mac(number: int) -> bytes:
    """A locally administered unicast address."""
    return b"\x02\x00\x00\x00" + number.to_bytes(2, "big")


def frame(source: bytes, destination: bytes, size: int = 60, mark: int = 0) -> bytes:
    """An experimental frame (EtherType 0x88b5) of `size` bytes; `mark` tells it from others."""
    return (destination + source + b"\x88\xb5" + mark.to_bytes(4, "big") * (size // 4))[:size]


class Station:
    """The other end of a TAP port: a socket that keeps frames apart, as a TAP device does."""

    def __init__(self, switch: Switch, name: str | None = None, *, max_frame: int = 9216) -> None:
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.port: Port = switch.add_tap(other.fileno(), name, max_frame=max_frame)

    def send(self, *frames: bytes) -> None:
        self.socket.settimeout(DEADLINE)
        for data in frames:
            self.socket.send(data)

    def receive(self) -> bytes:
        """The next frame; waits for it."""
        self.socket.settimeout(DEADLINE)
        return self.socket.recv(65536)

    def received(self) -> list[bytes]:
        """All frames that are there."""
        self.socket.settimeout(0)
        frames = []
        while True:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return frames
            if not data:
                return frames
            frames.append(data)

    def close(self) -> None:
        self.socket.close()


def step(switch: Switch, now: int | None = None) -> int:
    """Rounds until there is no more to do, with the switch's clock at `now`; how many frames they forwarded."""
    if now is not None:
        switch.state["now"] = now
    work = 0
    while (done := switch_round(switch.state.address)) > 0:
        work += done
    return work


def bind(switch: Switch, port: Port, address: bytes) -> None:
    """What add_nic does to a port besides its data plane: an address of its own, the only one that it may send from."""
    record = switch._records.array[port.index]
    record["bound"] = mac_value(address)
    assert fdb_pin(switch.state.address, mac_value(address), port.index) == 1


def close_all(switch: Switch, stations: Iterable[Station]) -> None:
    switch.close()
    for station in stations:
        station.close()


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)
