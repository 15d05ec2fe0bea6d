"""Whatever a client of an opened card writes, rings, maps and resets: its host serves on, and a reset makes the card as new."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_client import eventually

from vfio_vmbus.channel.opened import OpenedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import DmaError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE, Mapping
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.device import Device
from vfio_vmbus.vfio.inprocess import InProcessDevice
from vfio_vmbus.vfio.vmbus_function import RECEIVE_HANDLE, SEND_HANDLE, Sizes
from vfio_vmbus.wire import nvsp
from vfio_vmbus.wire import opened as wire
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, RING_READ_INDEX, RING_WRITE_INDEX, Packet

SIZES = Sizes(upstream=4 * PAGE, downstream=4 * PAGE, receive=32 * PAGE, send=16 * PAGE)
IOVA = 1 << 32
REGIONS = {wire.REGION_RINGS: 8 * PAGE, wire.REGION_RECEIVE: 32 * PAGE, wire.REGION_SEND: 16 * PAGE}


@dataclass
class Stage:
    host: EmbeddedHost
    device: InProcessDevice
    memory: SharedMemory
    bystander: Netvsc


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, SharedMemory(4 * PAGE) as memory:
        function = host.attach(host.add_nic("wild"), personality="vmbus", sizes=SIZES)
        with function, open_device(host.attach(host.add_nic("tame"))) as tame, Netvsc(tame) as bystander:
            yield Stage(host, function, memory, bystander)


WORDS = st.one_of(
    st.sampled_from([0, 1, 4, 8, 12, PAGE, 3 * PAGE - 8, 3 * PAGE, 0x7FFFFFFF, 0xFFFFFFF8, 0xFFFFFFFF]), st.integers(0, 2**32 - 1)
)
MESSAGES = st.sampled_from(
    [
        nvsp.Init(min_version=nvsp.VERSION_6_1, max_version=nvsp.VERSION_6_1),
        nvsp.SendNdisVersion(major=6, minor=30),
        nvsp.SendNdisConfig(mtu=1514),
        nvsp.SendReceiveBuffer(gpadl=RECEIVE_HANDLE, buffer_id=nvsp.RECEIVE_BUFFER_ID),
        nvsp.SendReceiveBuffer(gpadl=SEND_HANDLE, buffer_id=nvsp.RECEIVE_BUFFER_ID),
        nvsp.SendSendBuffer(gpadl=SEND_HANDLE),
        nvsp.SendSendBuffer(gpadl=RECEIVE_HANDLE),
        nvsp.RevokeReceiveBuffer(buffer_id=nvsp.RECEIVE_BUFFER_ID),
        nvsp.RevokeSendBuffer(buffer_id=nvsp.SEND_BUFFER_ID),
        nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_DATA, section_index=0, section_size=512),
        nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_CONTROL, section_index=1, section_size=64),
    ]
)
STEPS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(sorted(REGIONS)), st.integers(0, 2**16), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("index"), st.sampled_from([RING_WRITE_INDEX, RING_READ_INDEX]), st.booleans(), WORDS),
    st.tuples(st.just("say"), MESSAGES, st.sampled_from([PACKET_INBAND, PACKET_COMPLETION, PACKET_GPA_DIRECT, 3])),
    st.tuples(st.just("ring")),
    st.tuples(st.just("map"), st.integers(0, 3)),
    st.tuples(st.just("unmap"), st.integers(0, 3)),
    st.tuples(st.just("reset")),
)


class Client:
    """A client that writes packets where the ring's index says, right or wrong."""

    def __init__(self, device: Device, memory: SharedMemory) -> None:
        self.device = device
        self.memory = memory
        self.maps = {index: device.region(index).map(0, size) for index, size in REGIONS.items()}
        self.bell = device.region(wire.REGION_REGISTERS).doorbell(wire.DOORBELLS_AT)

    @property
    def rings(self) -> Mapping:
        return self.maps[wire.REGION_RINGS]

    def do(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.maps[region].write(offset % (REGIONS[region] - 64), data)

    def index(self, offset: int, upstream: bool, value: int) -> None:
        self.rings.write((0 if upstream else 4 * PAGE) + offset, value.to_bytes(4, "little"))

    def say(self, message: nvsp.NvspMessage, kind: int) -> None:
        packet = Packet(
            packet_type=PACKET_INBAND, transaction_id=5, completion_requested=True, payload=nvsp.encode_message(message)
        )
        data = kind.to_bytes(2, "little") + packet.pack()[2:] + bytes(8)
        at = int.from_bytes(self.rings.read(RING_WRITE_INDEX, 4), "little")
        if at % 8 == 0 and at + len(data) < 3 * PAGE:
            self.rings.write(PAGE + at, data)
            self.index(RING_WRITE_INDEX, True, at + len(data))
        self.ring()

    def ring(self) -> None:
        os.eventfd_write(self.bell, 1)

    def map(self, number: int) -> None:
        try:
            self.device.dma.map(IOVA + number * PAGE, self.memory.fd, number * PAGE, PAGE, 3)
        except DmaError:
            assert self.maps  # it is there already

    def unmap(self, number: int) -> None:
        self.device.dma.unmap(IOVA + number * PAGE, PAGE)

    def reset(self) -> None:
        self.device.reset()

    def close(self) -> None:
        self.device.dma.unmap(IOVA, 4 * PAGE)
        for mapping in self.maps.values():
            mapping.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=40))
def test_a_card_is_as_new_after_a_reset(stage: Stage, caplog: pytest.LogCaptureFixture, steps: list[tuple[Any, ...]]) -> None:
    caplog.set_level(logging.ERROR)
    client = Client(stage.device, stage.memory)
    try:
        for step in steps:
            client.do(*step)
        client.ring()
        status = stage.device.region(wire.REGION_REGISTERS).read32(wire.STATUS_AT)
        assert status in (wire.STATUS_OPEN, wire.STATUS_FAILED)
    finally:
        client.close()
    with OpenedDevice(stage.device) as device, Netvsc(device) as nic:
        frame = nic.mac + stage.bystander.mac + b"\x88\xb5" + bytes(range(64))
        assert stage.bystander.queue.send([frame]) == 1
        got: list[bytes] = []
        eventually(lambda: got.extend(nic.queue.receive()) or frame in got, "a frame")
        stage.bystander.queue.rx_burst()
    assert [record.message for record in caplog.records if "defect" in record.message] == []
