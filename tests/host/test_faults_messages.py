"""Control messages through a carrier with faults: what the client sees, and that the host lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from faults_rig import Talker, chosen, connection, talk
from raw_client import RawClient, eventually

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.faults.plan import FaultPlan, Flow
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import vmbus as wire

CONTACT = wire.InitiateContact(
    version_requested=wire.SUPPORTED_VERSIONS[0], target_info=wire.TargetInfo.of(sint=wire.MESSAGE_SINT)
)


@contextmanager
def raw(*texts: str, seed: int = 0) -> Iterator[tuple[EmbeddedHost, RawClient]]:
    """A client that has said nothing yet."""
    with EmbeddedHost(poll="interrupt", faults=FaultPlan.parse(texts, seed)) as host, RawClient(host.attach(Talker())) as client:
        yield host, client


def counts(host: EmbeddedHost) -> dict[str, tuple[int, int]]:
    return {count.flow: (count.seen, count.hits) for count in host.fault_counts()}


def test_a_lost_answer() -> None:
    with raw("drop:messages-to-guest:1:times=1") as (host, client):
        client.say(CONTACT)
        eventually(lambda: counts(host)["messages-to-guest"] == (1, 1), "the answer is lost")
        client.say(CONTACT)  # begins anew
        assert client.hear(wire.VersionResponse).version_supported == 1


def test_a_lost_question() -> None:
    with raw("drop:messages-to-host:1:times=1") as (host, client):
        client.say(CONTACT)
        client.connect()
        assert counts(host)["messages-to-host"] == (3, 1)


def test_answers_twice() -> None:
    with raw("duplicate:messages-to-guest:1:times=2") as (_, client):
        client.say(CONTACT)
        for _ in range(2):
            assert client.hear(wire.VersionResponse).version_supported == 1
        client.version = CONTACT.version_requested
        client.say(wire.RequestOffers())
        for _ in range(2):
            client.hear(wire.OfferChannel)
        client.hear(wire.AllOffersDelivered)


def test_questions_twice_are_the_clients_mistake() -> None:
    with raw("duplicate:messages-to-host:1:after=1:times=1") as (_, client):
        client.say(CONTACT)
        client.hear(wire.VersionResponse)
        client.say(wire.RequestOffers())
        client.failed()
        client.restart()
        client.connect()
        client.ping()


def test_late_messages_keep_their_order() -> None:
    order = "delay:messages:0.5:2ms"
    with raw(order) as (host, client):
        client.connect()
        for _ in range(10):
            client.ping()
        seen, hits = counts(host)["messages-to-guest"]
        assert hits == len(chosen(order, Flow.MESSAGES_TO_GUEST, seen)) > 5
        seen, hits = counts(host)["messages-to-host"]
        assert hits == len(chosen(order, Flow.MESSAGES_TO_HOST, seen)) > 5


def test_a_corrupted_answer_differs_by_a_bit() -> None:
    with raw("corrupt:messages-to-guest:1:times=1") as (_, client):
        client.say(CONTACT)
        eventually(lambda: client.pair.incoming.unmask(), "an answer")
        packet = client.pair.incoming.receive()
        assert packet is not None
        right = wire.VersionResponse(version_supported=1, message_connection_id=wire.MESSAGE_CONNECTION_ID_4).pack()
        bits = int.from_bytes(packet.payload, "little") ^ int.from_bytes(right.ljust(len(packet.payload), b"\0"), "little")
        assert bits.bit_count() == 1


@pytest.mark.parametrize("seed", range(6))
def test_corrupted_questions_are_a_clients_mistake_at_worst(seed: int) -> None:
    with raw("corrupt:messages-to-host:1:after=2", seed=seed) as (host, client):
        client.connect()
        for _ in range(3):
            client.say(wire.GpadlTeardown(child_relid=1, gpadl=1))
        end = host.connection(client.device)  # type: ignore[arg-type]
        eventually(lambda: end.error_count, "the host minds")
        assert all(isinstance(error, ProtocolError) for error in end.errors)


def test_lies_come_beside_the_truth() -> None:
    """A client that took no notice of what it does not understand would get on."""
    with raw("hostile:messages:1:times=4") as (host, client):
        client.say(CONTACT)
        client.say(wire.RequestOffers())
        eventually(lambda: counts(host)["lies-in-messages"] == (3, 3), "all answers")
        came = []
        while (packet := client.pair.incoming.receive()) is not None:
            came.append(packet.payload)
        assert len(came) == 6
        kinds = [type(wire.parse_message(data, version=CONTACT.version_requested)) for data in came[1::2]]
        assert kinds == [wire.VersionResponse, wire.OfferChannel, wire.AllOffersDelivered]


def test_what_is_held_back_goes_with_its_connection() -> None:
    with nothing_left(objects=False), raw("delay:messages:1:60s") as (host, client):
        client.say(CONTACT)
        eventually(lambda: counts(host)["messages-to-host"] == (1, 1), "the question is held")
        client.restart()
        client.say(CONTACT)
        eventually(lambda: counts(host)["messages-to-host"] == (2, 2), "another one")
        client.restart()


def test_messages_of_several_devices_are_counted_for_each() -> None:
    with EmbeddedHost(faults=FaultPlan.parse(["delay:messages:1:1ms"])) as host:
        nics = [host.add_nic(name) for name in ("left", "right")]
        with RawClient(host.attach(*nics)) as client:
            client.connect()
        counters = host.fault_counters("left")
        assert counters == host.fault_counters("right")
        assert counters["fault_delay_messages_to_host"] >= 2
        assert host.fault_counters("other") == {}


def test_faults_on_messages_leave_rescinding_and_closing_alone() -> None:
    with talk("delay:messages:1/2:1ms", "drop:packets:1:after=1000") as rig:
        end = connection(rig)
        rig.host.rescind(rig.device)
        rig.client.hear(wire.RescindChannelOffer)
        eventually(lambda: rig.device.context is None, "the device's end is closed")
        assert end.error_count == 0
