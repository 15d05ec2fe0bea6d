"""The applications over netvsc on the embedded host. A datagram socket is as good as a TAP: one frame a read or write."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import dpkt
import numba
import pytest

from vfio_vmbus.apps.capture import capture
from vfio_vmbus.apps.forward import Forwarder
from vfio_vmbus.apps.measure import measure_receiving, measure_sending
from vfio_vmbus.apps.replay import replay
from vfio_vmbus.apps.tap import TapBridge
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.demo.replayed import write_capture
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.access import load8, store8
from vfio_vmbus.wire.oid import PACKET_TYPE_PROMISCUOUS

PEER = bytes.fromhex("020000000001")
BROADCAST = b"\xff" * 6


@dataclass(frozen=True)
class Card:
    host: EmbeddedHost
    nic: Netvsc
    wire: socket.socket
    """The other end of a TAP port of the host's switch: a frame a datagram."""

    def say(self, payload: bytes, destination: bytes | None = None) -> bytes:
        """Send a frame to the card from outside; the frame."""
        frame = (destination or self.nic.mac) + PEER + b"\x88\xb5" + payload
        self.wire.send(frame)
        return frame

    def hear(self) -> bytes:
        return self.wire.recv(65536)


@contextmanager
def driven(mtu: int = 1500, allow_spoofing: bool = False) -> Iterator[Card]:
    with ExitStack() as stack:
        host = stack.enter_context(EmbeddedHost())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.enter_context(ours)
        stack.enter_context(theirs)
        ours.settimeout(10)
        host.switch.add_tap(theirs.fileno(), "outside")
        vsp = host.add_nic("nic0", allow_spoofing=allow_spoofing)
        device = stack.enter_context(open_device(host.attach(vsp)))
        yield Card(host, stack.enter_context(Netvsc(device, mtu=mtu, packet_filter=PACKET_TYPE_PROMISCUOUS)), ours)


def eventually(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@dataclass
class FakeTap:
    fd: int


@pytest.mark.parametrize("poll", ["busy", "adaptive", "interrupt"])
def test_a_tap_bridge_carries_frames_of_all_sizes_both_ways(poll: str) -> None:
    with driven(mtu=9000) as card, ExitStack() as stack:
        kernel, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.enter_context(kernel)
        stack.enter_context(tap)
        tap.setblocking(False)
        kernel.settimeout(10)
        bridge = stack.enter_context(TapBridge(card.nic, FakeTap(tap.fileno()), poll=poll))
        sizes = [14, 60, 61, 1514, 1515, 4096, 6096, 6097, 9014]
        for size in sizes:
            frame = card.say(bytes(index % 251 for index in range(size - 14)))
            assert kernel.recv(65536) == frame
            answer = PEER + card.nic.mac + b"\x88\xb6" + frame[14:]
            kernel.send(answer)
            assert card.hear() == answer
        eventually(lambda: bridge.counters().from_tap == len(sizes), "the last frame to be counted")
        counted = bridge.counters()
        assert (counted.to_tap, counted.to_tap_bytes, counted.from_tap_bytes) == (len(sizes), sum(sizes), sum(sizes))
        assert (counted.tap_full, counted.tap_errors) == (0, 0)


def test_a_tap_bridge_outlives_a_full_tap_and_tells() -> None:
    with driven() as card, ExitStack() as stack:
        kernel, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.enter_context(kernel)
        stack.enter_context(tap)
        tap.setblocking(False)
        kernel.settimeout(10)
        with TapBridge(card.nic, FakeTap(tap.fileno())) as bridge:
            sent = 0
            while bridge.counters().tap_full == 0:
                card.say(bytes(46))
                sent += 1
                assert sent < 100_000
            eventually(lambda: bridge.counters().to_tap + bridge.counters().tap_full == sent, "all frames to be counted")
            assert len(kernel.recv(65536)) == 60


def test_the_link_goes_down_and_up_while_a_bridge_runs() -> None:
    with driven() as card, ExitStack() as stack:
        kernel, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.enter_context(kernel)
        stack.enter_context(tap)
        tap.setblocking(False)
        kernel.settimeout(10)
        stack.enter_context(TapBridge(card.nic, FakeTap(tap.fileno())))
        for up in (False, True):
            card.host.set_link(card.host.nics["nic0"], up)
            eventually(lambda up=up: card.nic.link == up, "the driver to know")  # type: ignore[misc]
        frame = card.say(b"after all that")
        assert kernel.recv(65536) == frame


def test_a_forwarder_swaps_addresses() -> None:
    with driven() as card, Forwarder(card.nic) as forwarder:
        for size in (0, 46, 1500):
            frame = card.say(bytes(size))
            assert card.hear() == frame[6:12] + frame[:6] + frame[12:]
        eventually(lambda: forwarder.counters().sent == 3, "the last frame to be counted")
        assert forwarder.counters().received == 3
        assert forwarder.counters().dropped == 0


def test_a_forwarder_runs_a_function_of_the_users() -> None:
    @numba.njit  # type: ignore[untyped-decorator]
    def only_even(address: int, size: int) -> int:
        """Frames whose 15th byte is even go back, with that byte raised by one, as if the card had sent them to a group."""
        if load8(address + 14) & 1:
            return 0
        store8(address + 14, load8(address + 14) + 1)
        for at in range(6):
            store8(address + 6 + at, load8(address + at))
            store8(address + at, 255)
        return 1

    with driven() as card, Forwarder(card.nic, function=only_even) as forwarder:
        card.say(b"\x03odd")
        card.say(b"\x04even")
        assert card.hear() == BROADCAST + card.nic.mac + b"\x88\xb5" + b"\x05even"
        eventually(lambda: forwarder.counters().received == 2, "both frames to be counted")
        assert forwarder.counters().dropped == 1


def test_bytes_for_convenience() -> None:
    with driven() as card:
        sent = [card.say(bytes([number]) * 60) for number in range(5)]
        heard: list[bytes] = []
        eventually(lambda: bool(heard.extend(card.nic.queue.receive()) or len(heard) == 5), "five frames")
        assert heard == sent
        answers = [PEER + card.nic.mac + frame[12:] for frame in heard]
        assert card.nic.queue.send(answers) == 5
        assert [card.hear() for _ in answers] == answers
        assert card.nic.queue.send([]) == 0
        assert card.nic.queue.send([b"short", b""]) == 2
        assert card.nic.counters().tx_too_long == 2


def test_capture_writes_what_came(tmp_path: Path) -> None:
    with driven() as card:
        sent = [card.say(bytes([number]) * (50 + number)) for number in range(100)]
        done = capture(card.nic, tmp_path / "out.pcap", frames=100, seconds=10)
    with open(tmp_path / "out.pcap", "rb") as file:
        assert [data for _, data in dpkt.pcap.Reader(file)] == sent
    assert (done.frames, done.bytes) == (100, sum(map(len, sent)))


def test_capture_keeps_no_more_than_snaplen(tmp_path: Path) -> None:
    with driven() as card:
        card.say(bytes(1000))
        capture(card.nic, tmp_path / "out.pcap", frames=1, seconds=10, snaplen=64)
    with open(tmp_path / "out.pcap", "rb") as file:
        ((_, data),) = dpkt.pcap.Reader(file)
    assert len(data) == 64


@pytest.mark.parametrize("recorded_pace", [False, True])
def test_replay_sends_every_frame_in_order(tmp_path: Path, recorded_pace: bool) -> None:
    write_capture(tmp_path / "in.pcap", BROADCAST, 200)
    with open(tmp_path / "in.pcap", "rb") as file:
        expected = [data for _, data in dpkt.pcap.Reader(file)]
    with driven(allow_spoofing=True) as card:
        heard: list[bytes] = []
        sink = card.host.switch.add_capture(tmp_path / "seen.pcap")
        done = replay(card.nic, tmp_path / "in.pcap", loops=2, recorded_pace=recorded_pace)
        eventually(lambda: card.host.switch.ports[1].counters().rx_frames == 400, "all frames to reach the switch")
        card.host.switch.remove(sink)
        with open(tmp_path / "seen.pcap", "rb") as file:
            heard = [data for _, data in dpkt.pcap.Reader(file)]
    assert heard == expected * 2
    assert (done.frames, done.bytes) == (400, 2 * sum(map(len, expected)))


def test_replay_refuses_frames_beyond_the_mtu(tmp_path: Path) -> None:
    with open(tmp_path / "in.pcap", "wb") as file:
        dpkt.pcap.Writer(file).writepkt(bytes(4000), ts=0)
    with driven(mtu=1500) as card, pytest.raises(UsageError, match="4000 bytes"):
        replay(card.nic, tmp_path / "in.pcap")


def test_rates_count_what_passed() -> None:
    with driven() as card:
        sink = card.host.switch.add_sink()
        sent = measure_sending(card.nic, PEER + card.nic.mac + bytes(52), 0.1)
        eventually(lambda: sink.counters().tx_frames == card.nic.counters().tx_frames, "all frames to reach the sink")
        assert 0 < sent.frames <= sink.counters().tx_frames
        card.host.switch.add_generator(PEER, card.nic.mac, size=64)
        received = measure_receiving(card.nic, 64, 0.1)
        assert 0 < received.frames <= card.nic.counters().rx_frames
        assert received.gbit_per_s == pytest.approx(received.mpps * 64 * 8 / 1000)
