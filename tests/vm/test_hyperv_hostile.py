"""A guest that says and writes anything at all: it gets a status, or loses its connection; others are served, and it may begin anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.host.raw_client import eventually
from tests.vm.synic_guest import EVENTS, INPUT, MESSAGES, MONITOR_PAGES, SLOT, SynicGuest
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vm.memory import MIB
from vfio_vmbus.vm.paravirt import Hypercall
from vfio_vmbus.vmbus.gpadl import gpadl_messages, whole_pages
from vfio_vmbus.wire import hyperv
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.hyperv import PostMessage

TOP = 64 * MIB

STATUSES = {
    hyperv.STATUS_SUCCESS,
    hyperv.STATUS_INVALID_HYPERCALL_CODE,
    hyperv.STATUS_INVALID_HYPERCALL_INPUT,
    hyperv.STATUS_INVALID_ALIGNMENT,
    hyperv.STATUS_INVALID_PARAMETER,
    hyperv.STATUS_INVALID_CONNECTION_ID,
    hyperv.STATUS_INSUFFICIENT_BUFFERS,
}


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("nic")
        host.add_nic("other")
        yield host


@pytest.fixture(scope="module")
def other(host: EmbeddedHost) -> Iterator[SynicGuest]:
    with SynicGuest(host, host.nics["other"], name="other") as other:
        yield other.connect()


@pytest.fixture
def guest(host: EmbeddedHost, other: SynicGuest) -> Iterator[SynicGuest]:
    with nothing_left(objects=False), SynicGuest(host, host.nics["nic"], cpus=2) as guest:
        yield guest
    other.ping()


def usable_again(guest: SynicGuest) -> None:
    """A kernel that starts: SynICs off, memory cleared, and so on."""
    for vp in (0, 1):
        guest.disable(vp)
        guest.ram.write(MESSAGES + vp * PAGE, bytes(PAGE))
        guest.ram.write(EVENTS + vp * PAGE, bytes(PAGE))
    guest.heard.clear()
    guest.connect().ping()


words = st.one_of(
    st.integers(0, (1 << 64) - 1), st.integers(0, TOP), st.sampled_from([0, INPUT, TOP - 256, TOP, 1 << 32, 1 << 63])
)
controls = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0x5C, 0x5D, 0x1005C, 0x1005D, 0x5C | 1 << 32, 0x8001]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vp=st.integers(0, 1), control=controls, first=words, second=words, data=st.binary(max_size=256))
def test_any_hypercall_has_a_status(guest: SynicGuest, vp: int, control: int, first: int, second: int, data: bytes) -> None:
    guest.ram.write(INPUT, data)
    assert guest.hyperv.hypercall(Hypercall(vp, control, first, second)) in STATUSES


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.one_of(st.integers(0, (1 << 32) - 1), st.integers(0x40000100, 0x40000105)), value=st.none() | words)
def test_any_msr_is_ours_or_none(guest: SynicGuest, number: int, value: int | None) -> None:
    answer = guest.hyperv.msr(0, number, value)
    assert (answer is None) == (number not in range(0x40000100, 0x40000106))


pages = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from(
        [0, 1, MESSAGES | 1, EVENTS | 1, MESSAGES + PAGE | 1, TOP | 1, TOP - PAGE | 1, INPUT | 1, MONITOR_PAGES[1] | 1]
    ),
)
relids = st.sampled_from([0, 1, 1, 1, 2, 0xFFFFFFFF])
handles = st.sampled_from([1, 1, 2, 0, 0xFFFFFFFF])
pfns = st.lists(st.one_of(st.integers(0, TOP // PAGE), st.integers(0, (1 << 52) - 1)), min_size=1, max_size=30)
messages = st.one_of(
    st.builds(
        lambda version, vp, first, second, info: wire.InitiateContact(
            version_requested=version,
            target_vcpu=vp,
            target_info=wire.TargetInfo(info),
            monitor_page1=first,
            monitor_page2=second,
        ).pack(),
        st.sampled_from([*wire.SUPPORTED_VERSIONS, 0, 1]),
        st.sampled_from([0, 0, 0, 1, 2, 0xFFFFFFFF]),
        st.sampled_from([0, MONITOR_PAGES[0]]),
        st.sampled_from([0, MONITOR_PAGES[1], MONITOR_PAGES[1], TOP, 8]),
        st.sampled_from([2, 2, 2, 0, 0xFFFF]),
    ),
    st.sampled_from([wire.RequestOffers().pack(), wire.RequestOffers().pack(), wire.Unload().pack()]),
    st.builds(
        lambda relid, gpadl, offset, vp: wire.OpenChannel(
            child_relid=relid, ring_gpadl=gpadl, downstream_page_offset=offset, target_vp=vp
        ).pack(),
        relids,
        handles,
        st.sampled_from([0, 2, 4, 4, 4]),
        st.sampled_from([0, 1, 2, wire.VP_INDEX_DISABLE_INTERRUPT]),
    ),
    st.builds(lambda relid: wire.CloseChannel(child_relid=relid).pack(), relids),
    st.builds(lambda relid: wire.RelidReleased(child_relid=relid).pack(), relids),
    st.builds(lambda relid, vp: wire.ModifyChannel(child_relid=relid, target_vp=vp).pack(), relids, st.sampled_from([0, 1, 2])),
    st.builds(lambda relid, gpadl: wire.GpadlTeardown(child_relid=relid, gpadl=gpadl).pack(), relids, handles),
    st.binary(max_size=240),
)
shares = st.tuples(st.just("share"), relids, handles, pfns)
good_shares = st.tuples(st.just("share"), st.just(1), st.just(1), st.just(list(range(300, 308))))
moves = st.tuples(st.just("synic"), st.integers(0, 1), st.sampled_from([0, 1, 1, 1]), pages, pages)
writes = st.tuples(
    st.just("write"), st.sampled_from([MESSAGES + SLOT, EVENTS, MONITOR_PAGES[1], 300 * PAGE, 304 * PAGE]), st.binary(max_size=64)
)
steps = st.one_of(messages, messages, shares, good_shares, moves, writes, st.sampled_from(["take", "rescind", "offer", "settle"]))


def do(host: EmbeddedHost, guest: SynicGuest, step: object) -> None:
    match step:
        case ("share", relid, handle, numbers):
            for message in gpadl_messages(relid, handle, [whole_pages(numbers)]):
                guest.post(message.pack())
        case ("synic", vp, control, events, slots):
            guest.hyperv.synic_changed(vp, control, events, slots)
        case ("write", gpa, data):
            guest.ram.write(gpa, data)
        case "take":
            guest.ram.write(MESSAGES + SLOT, bytes(4))
        case "rescind" | "offer":
            nic = host.nics["nic"]
            if guest.hyperv.connection.has(nic) and step == "rescind" and nic in guest.hyperv.connection._devices:
                guest.hyperv.rescind(nic)
            elif step == "offer" and nic not in guest.hyperv.connection._devices:
                guest.hyperv.offer(nic)
        case "settle":
            host.run(lambda: None)
        case _:
            assert isinstance(step, bytes)
            guest.call(hyperv.CALL_POST_MESSAGE, posted(step))


def posted(data: bytes) -> bytes:
    return PostMessage(connection_id=4, message_type=1, payload_size=len(data), payload=data.ljust(240, b"\0")).pack()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some=st.lists(steps, max_size=30))
def test_whatever_a_guest_does_the_host_lives_and_it_may_begin_anew(
    host: EmbeddedHost, guest: SynicGuest, other: SynicGuest, some: list[object]
) -> None:
    for step in some:
        do(host, guest, step)
    host.run(lambda: None)
    do(host, guest, "offer")
    other.ping()
    usable_again(guest)
    monitor = guest.hyperv.connection.monitor
    assert monitor is not None
    assert monitor.worker.running


def test_a_flood_of_nonsense_starves_nobody(host: EmbeddedHost, guest: SynicGuest, other: SynicGuest) -> None:
    guest.connect()
    for turn in range(2000):
        guest.post(bytes([turn & 0xFF]) * 24)
        if turn % 100 == 0:
            other.ping()
    connection = guest.hyperv.connection
    eventually(lambda: connection.failed, "its connection has ended")
    assert len(connection.errors) <= 64
    usable_again(guest)
