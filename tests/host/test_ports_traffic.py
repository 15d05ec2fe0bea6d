"""Generator and sink: the frames that were asked for, and no memory but the templates'."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dpkt
import pytest
from switch_rig import BROADCAST, Station, close_all, eventually, frame, mac, step

from vfio_vmbus.dataplane.pcapfile import read_frames
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.frames import BURST
from vfio_vmbus.host.switch.switch import Switch

A, B = mac(1), mac(2)


@pytest.fixture
def switch() -> Iterator[Switch]:
    switch = Switch()
    yield switch
    switch.close()


def checksum_is_good(data: bytes) -> bool:
    """RFC 1071: all words, the checksum included, add up to 0xffff."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@pytest.mark.parametrize("size", [42, 43, 60, 64, 1514, 9014])
def test_a_generator_sends_valid_udp_in_flows_that_take_turns(switch: Switch, size: int) -> None:
    station = Station(switch)
    generator = switch.add_generator(A, B, size=size, count=11, flows=3)
    assert not generator.done
    assert step(switch) == 11
    assert generator.done
    frames = station.received()
    assert {len(data) for data in frames} == {size}
    parsed = [dpkt.ethernet.Ethernet(data) for data in frames]
    assert {(eth.src, eth.dst, eth.data.len, eth.data.data.ulen) for eth in parsed} == {(A, B, size - 14, size - 34)}
    assert [eth.data.data.sport - parsed[0].data.data.sport for eth in parsed] == [number % 3 for number in range(11)]
    for data in frames[:3]:
        assert checksum_is_good(data[14:34])
        udp = data[34:]
        pseudo = data[26:34] + struct.pack("!HH", 17, len(udp))
        assert checksum_is_good(pseudo + udp + b"\0" * (len(udp) % 2))
    close_all(switch, [station])


def test_generator_and_sink_count_alike(switch: Switch) -> None:
    sink = switch.add_sink(touch=1500)
    generator = switch.add_generator(A, B, size=1000, count=1000)
    assert step(switch) == 1000
    assert step(switch) == 0
    taken, given = sink.counters(), generator.counters()
    assert (taken.tx_frames, taken.tx_bytes, taken.dropped) == (1000, 1_000_000, 0)
    assert (given.rx_frames, given.rx_bytes, given.dropped) == (1000, 1_000_000, 0)


def test_a_generator_takes_what_comes_back_and_counts_it(switch: Switch) -> None:
    station = Station(switch)
    generator = switch.add_generator(A, BROADCAST, count=1)
    step(switch)
    station.send(frame(B, A, 100))
    step(switch)
    assert (generator.counters().tx_frames, generator.counters().tx_bytes) == (1, 100)
    close_all(switch, [station])


def test_an_endless_generator_starts_when_it_is_enabled_and_ends_when_it_is_removed() -> None:
    with Switch() as switch:
        sink = switch.add_sink()
        generator = switch.add_generator(A, B, enabled=False)
        eventually(lambda: switch.worker.control["sleeps"] > 0, "sleep")
        assert generator.counters().rx_frames == 0
        generator.enabled = True
        eventually(lambda: sink.counters().tx_frames > 1000, "frames")
        switch.remove(generator)
        total = generator.counters().rx_frames
        assert sink.counters().tx_frames == total
        assert not generator.done


def test_flows_are_equally_served_in_bursts_that_do_not_divide(switch: Switch, tmp_path: Path) -> None:
    capture = switch.add_capture(tmp_path / "flows.pcap")
    switch.add_generator(A, B, count=2 * BURST + 2, flows=7)
    step(switch)
    switch.remove(capture)
    ports = Counter(dpkt.ethernet.Ethernet(data).data.data.sport for _, data in read_frames(tmp_path / "flows.pcap", 60))
    assert sorted(ports.values()) == [73] * 4 + [74] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 41}, "frames of 41 bytes: take 42 to 9216"),
        ({"size": 9217}, "frames of 9217 bytes"),
        ({"flows": 0}, "0 flows: take 1 to 1024"),
        ({"count": -1}, "-1 frames"),
        ({"source": BROADCAST}, "generator's source address ff:ff"),
        ({"destination": b"\x02"}, "generator's destination address 02: 1 bytes"),
    ],
)
def test_what_a_generator_cannot_do(switch: Switch, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        switch.add_generator(**({"source": A, "destination": B} | options))
    assert switch.ports == []
