"""From the driver: whatever is sent, in whatever bursts, and whenever completions come, the host sees these frames in this order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.netvsc.driven import SEND_SECTIONS, Driven, driven
from vfio_vmbus.drivers.netvsc.driver import POOL_SLOT, POOL_SLOTS
from vfio_vmbus.drivers.netvsc.receive import queue_at
from vfio_vmbus.drivers.netvsc.transmit import tx_begin, tx_commit, tx_flush
from vfio_vmbus.errors import UsageError
from vfio_vmbus.memory.kernel import kernel
from vfio_vmbus.testing.scripted import SEND_SECTION, ScriptedHost
from vfio_vmbus.wire import nvsp
from vfio_vmbus.wire.frame import PPI_CHECKSUM, Frame, PacketInfo
from vfio_vmbus.wire.rndis import split_messages

WISHES = st.sampled_from([0, 0, 0, 5, 17 | 34 << 16, 0x3FFFFFF])


def content(size: int, seed: int) -> bytes:
    return (bytes((seed + index) & 0xFF for index in range(251)) * (size // 251 + 1))[:size]


def sizes(longest: int) -> st.SearchStrategy[int]:
    limits = [0, 13, 14, 60, 64, longest - 1, longest, longest + 1]
    return st.one_of(st.integers(0, longest + 10), st.sampled_from(limits), st.integers(14, 100))


def bursts(longest: int) -> st.SearchStrategy[list[tuple[bytes, int]]]:
    one = st.builds(lambda size, wish, seed: (content(size, seed), wish), sizes(longest), WISHES, st.integers(0, 255))
    return st.lists(one, min_size=1, max_size=64)


def steps(longest: int) -> st.SearchStrategy[list[tuple[str, Any]]]:
    step = st.one_of(
        st.tuples(st.just("send"), bursts(longest)),
        st.tuples(st.just("send"), bursts(longest)),
        st.tuples(st.just("take"), st.booleans()),
        st.tuples(st.just("complete"), st.integers(0, 200)),
        st.tuples(st.just("bogus"), st.sampled_from([SEND_SECTIONS + POOL_SLOTS, 1 << 31, 1 << 63, (1 << 64) - 1])),
    )
    return st.lists(step, min_size=2, max_size=25)


class Model:
    """What the host should have seen by now, and what the driver should count."""

    def __init__(self, rig: Driven, longest: int) -> None:
        self.rig = rig
        self.longest = longest
        self.sent: list[Frame] = []
        self.too_long = 0
        self.bogus = 0

    def do(self, name: str, value: Any) -> None:
        host = self.rig.host
        if name == "send":
            taken = self.rig.send(value)
            for data, wish in value[:taken]:
                if not 14 <= len(data) <= self.longest:
                    self.too_long += 1
                else:
                    self.sent.append(Frame(data, (PacketInfo.word(PPI_CHECKSUM, wish),) if wish else ()))
        elif name == "take":
            host.completes = value
            host.turn()
        elif name == "complete" and host.outstanding:
            transaction = host.outstanding.pop(value % len(host.outstanding))
            host.complete(transaction, nvsp.SendRndisPacketComplete())
        elif name == "bogus":
            self.bogus += host.complete(value, nvsp.SendRndisPacketComplete())
        assert len(host.outstanding) <= SEND_SECTIONS + POOL_SLOTS

    def settle(self) -> None:
        """Let everything pass and be completed."""
        host = self.rig.host
        host.completes = True
        while host.outstanding or host.turn():
            while host.outstanding and host.complete(host.outstanding[0], nvsp.SendRndisPacketComplete()):
                host.outstanding.pop(0)
            self.rig.received()
        self.rig.received()

    def check(self) -> None:
        host = self.rig.host
        assert host.frames == self.sent
        for data in host.transfers:
            messages = list(split_messages(data))
            assert 1 <= len(messages) <= host.max_messages
            assert len(data) <= (SEND_SECTION if len(messages) > 1 else POOL_SLOT)
            at = 0
            for message in messages:
                assert at % (1 << host.alignment_shift) == 0
                at += len(message)
        counters = self.rig.nic.counters()
        assert (counters.tx_frames, counters.tx_bytes) == (len(self.sent), sum(len(frame.data) for frame in self.sent))
        assert (counters.tx_too_long, counters.tx_failed, counters.bad_completions) == (self.too_long, 0, self.bogus)


@pytest.mark.parametrize(("mtu", "shift", "messages"), [(1500, 3, 8), (1500, 6, 64), (9000, 3, 2), (9000, 12, 1), (68, 3, 64)])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_sent(mtu: int, shift: int, messages: int, data: st.DataObject) -> None:
    host = ScriptedHost()
    host.alignment_shift, host.max_messages = shift, messages
    with driven(host, mtu=mtu) as rig:
        model = Model(rig, mtu + 18)
        for name, value in data.draw(steps(mtu + 18)):
            model.do(name, value)
        model.settle()
        model.check()
        # Nothing got lost of sections and slots: as much as at first can be under way.
        host.completes = False
        taken, full = 0, min(messages, SEND_SECTION // max(48 + 80, 1 << shift))
        while count := rig.send([(content(80, 1), 0)] * full):
            taken += count
            host.turn()
        assert len(host.outstanding) == SEND_SECTIONS
        assert taken == SEND_SECTIONS * full


def test_small_frames_share_a_section() -> None:
    host = ScriptedHost()
    host.max_messages = 64
    with driven(host) as rig:
        frames = [(content(60, index), 0) for index in range(40)]
        packets = rig.nic.queue.channel.outgoing.statistics().packets
        assert rig.send(frames) == 40
        assert rig.nic.queue.channel.outgoing.statistics().packets == packets + 1
        host.turn()
        assert [frame.data for frame in host.frames] == [data for data, _ in frames]
        assert len(host.transfers) == 1


def test_the_hosts_limits_are_kept() -> None:
    """5 messages in a transfer, and no frame across two sections."""
    host = ScriptedHost()
    host.max_messages = 5
    with driven(host) as rig:
        rig.send([(content(60, index), 0) for index in range(12)])
        host.turn()
        assert [len(list(split_messages(data))) for data in host.transfers] == [5, 5, 2]
        host.transfers.clear()
        rig.send([(content(1500, index), 0) for index in range(4)])
        host.turn()
        assert [len(list(split_messages(data))) for data in host.transfers] == [3, 1]


def test_transfers_that_the_host_refuses_are_counted() -> None:
    with driven() as rig:
        rig.host.status = nvsp.STATUS_FAIL
        rig.send([(content(60, 1), 0)] * 3)
        rig.host.turn()
        rig.received()
        assert rig.nic.counters().tx_failed == 1
        assert rig.nic.counters().tx_frames == 3


def test_completions_come_once() -> None:
    """The first one gives a section back, any other one is counted."""
    with driven() as rig:
        rig.host.completes = False
        rig.send([(content(60, 1), 0)])
        rig.host.turn()
        (transaction,) = rig.host.outstanding
        for _ in range(3):
            rig.host.complete(transaction, nvsp.SendRndisPacketComplete())
        rig.received()
        assert rig.nic.counters().bad_completions == 2
        rig.host.completes = True
        for index in range(3 * SEND_SECTIONS):
            assert rig.send([(content(60, index), 0)]) == 1
            rig.host.turn()
            rig.received()
        assert len(rig.host.frames) == 1 + 3 * SEND_SECTIONS


@kernel("i8(i8, i8, i8)")
def ask_for_a_place(queue: int, size: int, commit: int) -> int:
    """As an application does that reads a frame into its place: 1 when there was a place; without a frame nothing is committed."""
    state = queue_at(queue)
    place = tx_begin(state, size, 0)
    if place != 0 and commit != 0:
        tx_commit(state, place, size, 0)
    tx_flush(state)
    return 1 if place != 0 else 0


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_a_place_that_is_not_used_costs_nothing(mtu: int) -> None:
    """It is there again the next time, in front of long and of short frames, and no transfer without a frame is sent."""
    with driven(mtu=mtu) as rig:
        address = rig.nic.queue.address
        packets = rig.nic.queue.channel.outgoing.statistics().packets
        for _ in range(3 * (SEND_SECTIONS + POOL_SLOTS)):
            for size in (100, mtu + 14):
                assert ask_for_a_place(address, size, 0) == 1
        assert rig.nic.queue.channel.outgoing.statistics().packets == packets
        for size in (100, mtu + 14, 60):
            assert ask_for_a_place(address, size, 0) == 1
            assert ask_for_a_place(address, size, 1) == 1
        rig.host.turn()
        assert [len(frame.data) for frame in rig.host.frames] == [100, mtu + 14, 60]


def test_a_table_of_another_kind_is_refused() -> None:
    with driven() as rig:
        with pytest.raises(UsageError, match="FRAME"):
            rig.nic.queue.tx_burst(np.zeros(4, np.int64))
        with pytest.raises(UsageError, match="contiguous"):
            rig.nic.queue.tx_burst(rig._table.array[::2])
