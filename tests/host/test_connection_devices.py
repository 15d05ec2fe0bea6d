"""Devices behind a connection that fail: their client learns of it, and nobody else suffers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from raw_client import RW, RawClient, eventually

from vfio_vmbus.errors import ProtocolError, RingError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.vsp import ChannelContext
from vfio_vmbus.iommu.translation import READ
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.guids import CLASS_GUIDS
from vfio_vmbus.wire.ring import PACKET_COMPLETION
from vfio_vmbus.wire.vmbus import ChannelOffer


class Defect(Exception):
    """What nobody expects a device to raise."""


class Echo:
    """A device that sends every packet back, and fails where it is told to."""

    def __init__(self) -> None:
        self.offer = ChannelOffer(class_guid=CLASS_GUIDS["heartbeat"], instance_guid=uuid4())
        self.context: ChannelContext | None = None
        self.calls: list[str] = []
        self.broken: dict[str, Exception] = {}

    def _note(self, what: str) -> None:
        self.calls.append(what)
        if what in self.broken:
            raise self.broken[what]

    def open(self, context: ChannelContext) -> None:
        self.context = context
        asyncio.get_running_loop().add_reader(context.doorbell, context.guarded(self._echo))
        self._note("open")

    def _echo(self) -> None:
        assert self.context is not None
        asyncio.get_running_loop().remove_reader(self.context.doorbell)  # once is enough
        self._note("echo")
        packet = self.context.pair.incoming.receive()
        if packet is not None:
            self.context.pair.outgoing.send(packet.payload, packet_type=PACKET_COMPLETION)

    def close(self) -> None:
        if self.context is not None:
            asyncio.get_running_loop().remove_reader(self.context.doorbell)
            self.context = None
        self._note("close")

    def gpadl_gone(self, handle: int) -> None:
        self._note("gpadl_gone")


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("witness")
        yield host


@pytest.fixture(scope="module")
def witness(host: EmbeddedHost) -> Iterator[RawClient]:
    with RawClient(host.attach(host.nics["witness"])) as witness:
        yield witness.connect()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(host: EmbeddedHost, witness: RawClient, echo: Echo) -> Iterator[RawClient]:
    with nothing_left(objects=False), RawClient(host.attach(echo)) as client:
        yield client.connect()
        echo.broken.clear()
    witness.ping()
    assert echo.context is None


def opened(client: RawClient) -> tuple[RingPair, int]:
    """An open channel: our end of its rings, and their GPADL."""
    rings = client.memory(8)
    gpadl = client.share(rings.pfns).gpadl
    pair = RingPair.fresh(rings.memory, 0, 4 * PAGE, 8 * PAGE, client.bar.doorbell(reg.REG_DOORBELLS + 4), "ours")
    assert client.open(gpadl, 4) == wire.STATUS_SUCCESS
    return pair, gpadl


def test_a_device_gets_its_channel_and_its_buffers_and_loses_them_in_order(
    host: EmbeddedHost, client: RawClient, echo: Echo
) -> None:
    pair, gpadl = opened(client)
    context = echo.context
    assert context is not None
    with pair, client.memory(2) as shared:
        shared.mapping.write(PAGE, b"behind the first page")
        handle = client.share(shared.pfns).gpadl
        buffer = host.run(lambda: context.gpadl(handle))
        assert buffer.mapping.read(PAGE, 21) == b"behind the first page"
        assert host.run(lambda: context.gpadl(handle)) == buffer
        for wrong in (handle + 1, 0):
            with pytest.raises(ProtocolError, match="none of channel 1"):
                host.run(lambda wrong=wrong: context.gpadl(wrong))
        pair.outgoing.send(b"hello...")
        eventually(lambda: pair.incoming.unmask(), "an echo")
        packet = pair.incoming.receive()
        assert packet is not None
        assert packet.payload == b"hello..."
        client.unshare(handle)
        assert echo.calls == ["open", "echo", "gpadl_gone"]
        assert buffer.mapping.closed
        client.say(wire.CloseChannel(child_relid=1))
        client.unshare(gpadl)
    assert echo.calls[3:] == ["close"]


def test_a_buffer_that_is_only_read_is_mapped_like_that(host: EmbeddedHost, client: RawClient, echo: Echo) -> None:
    pair, _ = opened(client)
    with pair, client.memory(1, READ) as shared:
        handle = client.share(shared.pfns).gpadl
        context = echo.context
        assert context is not None
        buffer = host.run(lambda: context.gpadl(handle))
        assert buffer.access == READ
        with open("/proc/self/maps") as maps:
            assert any(line.startswith(f"{buffer.mapping.address:x}-") and " r--s " in line for line in maps)
        client.unshare(handle)


@pytest.mark.parametrize("error", [Defect(), UsageError("no port left"), RingError("broken")], ids=repr)
def test_a_device_that_does_not_open_says_so(
    host: EmbeddedHost, client: RawClient, echo: Echo, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with client.memory(8) as rings:
        gpadl = client.share(rings.pfns).gpadl
        echo.broken["open"] = error
        assert client.open(gpadl, 4) == wire.STATUS_UNSUCCESSFUL
        assert echo.calls == ["open", "close"]
        assert host.connection(client.device).open_channels == 0  # type: ignore[arg-type]
        assert "did not open" in caplog.text
        echo.broken.clear()
        assert client.open(gpadl, 4) == wire.STATUS_SUCCESS
        client.say(wire.CloseChannel(child_relid=1))
        client.unshare(gpadl)


def test_what_a_callback_raises_ends_that_client_alone(
    host: EmbeddedHost, client: RawClient, witness: RawClient, echo: Echo, caplog: pytest.LogCaptureFixture
) -> None:
    pair, _ = opened(client)
    with pair:
        echo.broken["echo"] = Defect("oh no")
        pair.outgoing.send(b"hello...")
        client.failed()
        witness.ping()
    assert "defect of the host" in caplog.text
    assert "oh no" in caplog.text
    assert echo.calls == ["open", "echo", "close"]
    assert isinstance(host.connection(client.device).errors[-1], Defect)  # type: ignore[arg-type]
    client.restart()
    client.connect().ping()


def test_memory_that_a_device_does_not_leave_stays_mapped(
    host: EmbeddedHost, witness: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel may still be at it: better lost than pulled away. The client's connection ends in order all the same."""
    echo = Echo()
    with RawClient(host.attach(echo)) as client:
        client.connect()
        pair, gpadl = opened(client)
        context = echo.context
        assert context is not None
        with pair, client.memory(1) as shared:
            handle = client.share(shared.pfns).gpadl
            buffer = host.run(lambda: context.gpadl(handle))
            echo.broken = {"gpadl_gone": Defect("still there"), "close": Defect("still open")}
            client.unshare(handle)
            client.say(wire.CloseChannel(child_relid=1))
            client.unshare(gpadl)
            assert not buffer.mapping.closed
            assert not context.pair.incoming.mapping.closed
        client.say(wire.Unload())
        client.hear(wire.UnloadResponse)
        assert caplog.text.count("memory stays mapped") == 2
        host.run(context.pair.close)
        host.run(buffer.mapping.close)
    witness.ping()


def test_rescinding_closes_the_channel_and_frees_its_memory(host: EmbeddedHost, client: RawClient, echo: Echo) -> None:
    pair, gpadl = opened(client)
    with pair:
        host.rescind(echo)
        assert client.hear(wire.RescindChannelOffer).child_relid == 1
        assert echo.calls == ["open", "close"]
        client.say(wire.CloseChannel(child_relid=1))  # which crossed the rescind
        client.unshare(gpadl)
        client.say(wire.RelidReleased(child_relid=1))
        eventually(lambda: not host.connection(client.device).has(echo), "the device is released")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no client"):
            host.rescind(echo)
        assert client.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)


def test_a_device_is_taken_away_once(host: EmbeddedHost, client: RawClient, echo: Echo) -> None:
    with client.memory(1) as page:
        client.share(page.pfns)
        host.rescind(echo)
        with pytest.raises(UsageError, match="already"):
            host.rescind(echo)
        client.hear(wire.RescindChannelOffer)
    assert client.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)  # the host had left that memory with the device


def test_channels_interrupt_where_their_client_says(host: EmbeddedHost, client: RawClient, echo: Echo) -> None:
    pair, _ = opened(client)
    context = echo.context
    assert context is not None
    fds = host.connection(client.device).carrier.function.vectors.fds  # type: ignore[arg-type]
    with pair:
        assert context.pair.outgoing._state["doorbell"] == fds[1]
        client.say(wire.ModifyChannel(child_relid=1, target_vp=7))
        assert client.hear(wire.ModifyChannelResponse).status == 0
        assert context.pair.outgoing._state["doorbell"] == fds[7]
        client.say(wire.ModifyChannel(child_relid=1, target_vp=reg.VECTORS))
        assert client.hear(wire.ModifyChannelResponse).status != 0
        assert context.pair.incoming._state["doorbell"] == fds[7]


def test_a_channel_without_interrupts(client: RawClient, echo: Echo) -> None:
    with client.memory(8, RW) as rings:
        gpadl = client.share(rings.pfns).gpadl
        assert client.open(gpadl, 4, vector=wire.VP_INDEX_DISABLE_INTERRUPT) == 0
        assert echo.context is not None
        assert echo.context.pair.outgoing._state["doorbell"] == -1
        client.say(wire.CloseChannel(child_relid=1))
        client.unshare(gpadl)
