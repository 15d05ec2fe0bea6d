"""The switch as its user sees it: ports that come and go, waiting, and what is counted."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from switch_rig import BROADCAST, Station, bind, close_all, eventually, frame, mac, step

from vfio_vmbus.errors import ClosedError, UsageError, WaitTimeout
from vfio_vmbus.host.frames import mac_value
from vfio_vmbus.host.netvsp.state import CONTROL, NIC
from vfio_vmbus.host.switch.fdb import fdb_learn, fdb_lookup, fdb_pin
from vfio_vmbus.host.switch.forwarding import switch_round
from vfio_vmbus.host.switch.state import BUCKETS, FLOOD, MAX_PORTS, WAYS
from vfio_vmbus.host.switch.switch import Switch
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED

A, B, C = mac(1), mac(2), mac(3)
MANY = 30 if INTERPRETED else 1000


@pytest.fixture
def switch() -> Iterator[Switch]:
    switch = Switch()
    yield switch
    switch.close()


@pytest.mark.parametrize("poll", ["busy", "adaptive", "interrupt"])
def test_frames_come_through_however_the_worker_waits(poll: str) -> None:
    with Switch(poll=poll) as switch:
        left, right = Station(switch, "left"), Station(switch, "right")
        for number in range(MANY):
            there, back = frame(A, B, 60, number), frame(B, A, 1500, number)
            left.send(there)
            assert right.receive() == there
            right.send(back)
            assert left.receive() == back
        assert [(entry.mac, entry.port, entry.static) for entry in switch.fdb()] == [(A, "left", False), (B, "right", False)]
    for station in (left, right):
        counters = station.port.counters()
        assert (counters.rx_frames, counters.tx_frames, counters.dropped, counters.errors) == (MANY, MANY, 0, 0)
        station.close()


@pytest.mark.parametrize("poll", ["adaptive", "interrupt"])
def test_an_idle_worker_sleeps(poll: str) -> None:
    with Switch(poll=poll) as switch:
        station = Station(switch)
        eventually(lambda: switch.worker.control["sleeps"] > 0, "sleep")
        threading.Event().wait(0.05)  # the addition of the port may just have woken it
        before = switch.state["rounds"]
        threading.Event().wait(0.2)
        assert switch.state["rounds"] - before < 2, "it looks for work though there is none"
        station.close()


def test_a_busy_worker_never_sleeps() -> None:
    with Switch(poll="busy") as switch:
        eventually(lambda: switch.state["rounds"] > 1000, "rounds")
        assert switch.worker.control["sleeps"] == 0


def test_ports_come_and_go_while_frames_pass() -> None:
    with Switch() as switch:
        left, right = Station(switch, "left"), Station(switch, "right")
        for number in range(20):
            data = frame(A, B, 60, number)
            left.send(data)
            assert right.receive() == data
            guest = Station(switch, "guest")
            shout = frame(C, BROADCAST, 60, number)
            guest.send(shout)
            assert [left.receive(), right.receive()] == [shout, shout]
            assert {entry.mac: entry.port for entry in switch.fdb()} == {A: "left", C: "guest"}
            switch.remove(guest.port)
            assert {entry.mac: entry.port for entry in switch.fdb()} == {A: "left"}
            assert guest.port.counters().rx_frames == 1
            guest.close()
    close_all(switch, [left, right])


def test_everything_is_given_back() -> None:
    fds, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        with Switch() as switch:
            stations = [Station(switch) for _ in range(3)]
            switch.add_sink()
            switch.add_generator(A, B, count=100)
            switch.remove(stations[1].port)
            with pytest.raises(UsageError):
                switch.add_tap(-1)
        close_all(switch, stations)
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)


def test_what_cannot_be_asked_of_a_switch(switch: Switch) -> None:
    sink = switch.add_sink("drain")
    with pytest.raises(UsageError, match="has a port drain already"):
        switch.add_sink("drain")
    switch.remove(sink)
    with pytest.raises(UsageError, match="has no port drain"):
        switch.remove(sink)
    with pytest.raises(UsageError, match="port drain was removed"):
        sink.enabled = True
    with pytest.raises(UsageError, match="descriptor 9999 cannot be a port's"):
        switch.add_tap(9999)
    with open(__file__) as file, pytest.raises(UsageError, match="cannot be a port's"):
        switch.add_tap(file.fileno())  # always readable: nothing to wait for
    with pytest.raises(UsageError, match="13 bytes: take 14 to 65536"):
        switch.add_tap(0, max_frame=13)
    with pytest.raises(UsageError, match="aged after 0 s"):
        Switch(age_s=0)
    for bad in (b"\x02\x00\x00\x00\x00", bytes(6), b"\x03" + bytes(5)):
        with pytest.raises(UsageError, match="NIC's address"):
            switch.add_nic(0, 0, bad)
    for number in range(MAX_PORTS):
        switch.add_sink(f"sink {number}")
    with pytest.raises(UsageError, match="has 64 ports already"):
        switch.add_sink()
    switch.close()
    switch.close()
    assert switch.ports == []
    with pytest.raises(ClosedError, match="is closed"):
        switch.add_sink()


def test_a_disabled_port_neither_gives_nor_gets(switch: Switch) -> None:
    left, right = Station(switch), Station(switch)
    right.send(frame(B, A))
    step(switch)
    left.received()
    right.port.enabled = False
    left.send(frame(A, B), frame(A, BROADCAST))
    right.send(frame(B, A))
    step(switch)
    assert (left.received(), right.received()) == ([], [])
    right.port.enabled = True
    step(switch)
    assert left.received() == [frame(B, A)]
    assert right.received() == []
    close_all(switch, [left, right])


def test_a_port_bound_to_an_address_keeps_it_whoever_claims_it(switch: Switch) -> None:
    owner, thief, third = (Station(switch, name) for name in ("owner", "thief", "third"))
    bind(switch, owner.port, A)
    thief.send(frame(A, B, mark=1))
    owner.send(frame(B, BROADCAST, mark=2))
    step(switch)
    assert owner.port.counters().spoofed == 1
    assert third.received() == [frame(A, B, mark=1)], "a frame under the address of a card is forwarded, and teaches nothing"
    third.send(frame(C, A, mark=3))
    step(switch)
    assert frame(C, A, mark=3) in owner.received()
    assert frame(C, A, mark=3) not in thief.received()
    close_all(switch, [owner, thief, third])


@pytest.mark.parametrize("before", ["unknown", "elsewhere", "forgotten"])
def test_what_one_frame_of_a_burst_teaches_the_next_one_knows(switch: Switch, before: str) -> None:
    left, right, third = Station(switch), Station(switch), Station(switch)
    now = 10**12
    if before != "unknown":
        (right if before == "elsewhere" else left).send(frame(B, C))
        step(switch, now)
        now += 400 * 10**9 if before == "forgotten" else 0
    for station in (left, right, third):
        station.received()
    left.send(frame(A, B, mark=1), frame(B, B, mark=2), frame(A, B, mark=3))
    step(switch, now)
    assert right.received() == [frame(A, B, mark=1)]
    assert third.received() == ([] if before == "elsewhere" else [frame(A, B, mark=1)])
    assert left.port.counters().filtered == 2
    close_all(switch, [left, right, third])


def test_addresses_of_one_maker_do_not_crowd_each_other_out(switch: Switch) -> None:
    switch.state["now"] = 10**12
    for number in range(1000):
        fdb_learn(switch.state.address, mac_value(b"\x00\x15\x5d" + number.to_bytes(3, "big")), 1)
    assert switch.state["evicted"] == 0
    assert (switch._entries.array["port"] == 1).sum() == 1000


def test_a_closed_socket_is_an_error_that_is_not_repeated_all_the_time(switch: Switch) -> None:
    left, right, third = Station(switch), Station(switch), Station(switch)
    right.close()
    now = 10**12
    for _ in range(50):
        left.send(frame(A, BROADCAST))
        step(switch, now)
    counters = right.port.counters()
    assert counters.errors == 1 + 50, "one read, and a write of every frame"
    assert right.port.last_error == errno.EPIPE
    assert len(third.received()) == 50
    step(switch, now + 10**9)
    assert right.port.counters().errors == counters.errors + 1
    close_all(switch, [left, third])


def test_what_a_port_has_no_room_for_is_counted_and_holds_nobody_up(switch: Switch) -> None:
    left, right, third = Station(switch), Station(switch), Station(switch)
    sent = 0
    while right.port.counters().no_room == 0:
        left.send(frame(A, BROADCAST, 9000))
        sent += 1
        step(switch)
        assert len(third.received()) == 1
        assert sent < 10_000
    counters = right.port.counters()
    assert (counters.tx_frames, counters.no_room, counters.errors) == (sent - 1, 1, 0)
    assert len(right.received()) == sent - 1
    close_all(switch, [left, right, third])


def test_a_flood_of_addresses_pushes_out_no_static_entry_and_finds_room() -> None:
    switch = Switch()
    switch.state["now"] = 10**12
    pinned = mac_value(A)
    assert fdb_pin(switch.state.address, pinned, 5) == 1
    for number in range(1 << 10 if INTERPRETED else 1 << 16):
        other = mac_value(b"\x06" + (number * 0x9E3779B1 % 2**40).to_bytes(5, "big"))
        assert fdb_learn(switch.state.address, other, 1) == 1
        assert fdb_lookup(switch.state.address, other) == 1
        assert fdb_learn(switch.state.address, pinned, 1) == 0
    assert fdb_lookup(switch.state.address, pinned) == 5
    assert len(switch._entries.array) == BUCKETS * WAYS
    if not INTERPRETED:
        assert switch.state["evicted"] > 0
    switch.close()


def test_of_one_bucket_the_oldest_goes_and_static_ones_stay() -> None:
    switch = Switch()
    twins = _same_bucket(switch, WAYS + 2)
    for moment, address in enumerate(twins[: WAYS + 1]):
        switch.state["now"] = 10**12 + moment
        fdb_learn(switch.state.address, address, 3)
    assert [fdb_lookup(switch.state.address, address) for address in twins] == [FLOOD] + [3] * WAYS + [FLOOD]
    assert switch.state["evicted"] == 1
    for address in twins[:WAYS]:
        assert fdb_pin(switch.state.address, address, 4) == 1
    assert fdb_learn(switch.state.address, twins[WAYS], 3) == 0
    assert fdb_pin(switch.state.address, twins[WAYS], 3) == 0
    assert [fdb_lookup(switch.state.address, address) for address in twins] == [4] * WAYS + [FLOOD] * 2
    switch.close()


def _same_bucket(switch: Switch, count: int) -> list[int]:
    """Addresses that share a bucket, found by learning."""
    places: dict[int, list[int]] = {}
    for number in range(BUCKETS * count):
        address = mac_value(b"\x02\x00\x00" + number.to_bytes(3, "big"))
        switch._entries.array[:] = 0
        fdb_learn(switch.state.address, address, 1)
        bucket = int(switch._entries.array["mac"].argmax()) // WAYS
        places.setdefault(bucket, []).append(address)
        if len(places[bucket]) == count:
            switch._entries.array[:] = 0
            return places[bucket]
    raise AssertionError("by the pigeonhole principle this cannot be")


def test_a_round_ends_when_the_worker_is_called(switch: Switch) -> None:
    sink = switch.add_sink()
    switch.add_generator(A, B, count=None)
    assert switch_round(switch.state.address) > 0
    before = sink.counters()
    switch.worker.control["attention"] = 1
    assert switch_round(switch.state.address) == 0
    assert sink.counters() == before


def test_a_datagram_socket_will_do_for_a_tap(switch: Switch) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with mine, theirs:
        switch.add_tap(theirs.fileno(), "datagrams")
        station = Station(switch)
        mine.send(frame(A, B))
        step(switch)
        assert station.received() == [frame(A, B)]
    station.close()


def test_a_card_has_a_static_address_of_its_own() -> None:
    """Its data plane stays out of this: the record is in the hands of the control plane, so the worker leaves it alone."""
    card, doorbell = Block(NIC), os.eventfd(0)
    card["owner"] = CONTROL
    with Switch() as switch:
        station = Station(switch)
        nic = switch.add_nic(card.address, doorbell, A, "card")
        assert [(entry.mac, entry.port, entry.static, entry.age) for entry in switch.fdb()] == [(A, "card", True, 0.0)]
        with pytest.raises(UsageError, match="02:00:00:00:00:01 is the address of another NIC"):
            switch.add_nic(card.address, doorbell, A)
        other = switch.add_nic(card.address, doorbell, C, "free", allow_spoofing=True)
        assert switch._records.array["bound"][[nic.index, other.index]].tolist() == [mac_value(A), 0]
        station.send(frame(B, A))
        eventually(lambda: nic.counters().no_room == 1, "a frame that the card cannot take")
        assert other.counters().no_room == 0
        switch.remove(nic)
        assert {entry.mac: entry.port for entry in switch.fdb()} == {B: station.port.name, C: "free"}
        switch.add_nic(card.address, doorbell, A)
    os.eventfd_write(doorbell, 1)
    os.close(doorbell)
    station.close()


def test_a_descriptor_can_be_a_port_again() -> None:
    with Switch() as switch:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        station = Station(switch)
        with mine, theirs:
            for number in range(3):
                port = switch.add_tap(theirs.fileno())
                mine.send(frame(A, B, mark=number))
                assert station.receive() == frame(A, B, mark=number)
                switch.remove(port)
    station.close()


def test_a_worker_that_hangs_keeps_its_ports_until_it_ends() -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, theirs:
        switch = Switch(poll="busy")
        port = switch.add_tap(theirs.fileno())
        theirs.setblocking(True)  # the flag belongs to the socket, so the port's descriptor blocks, too
        switch.start()

        def hangs() -> bool:
            with suppress(WaitTimeout), switch.worker.paused(timeout=0.05):
                return False
            return True

        eventually(hangs, "a read that blocks")
        with pytest.raises(WaitTimeout, match="worker switch to end"):
            switch.close(timeout=0.05)
        assert switch.ports == [port]
        theirs.setblocking(False)
        mine.send(frame(A, B))
        switch.close()
        assert switch.ports == []
