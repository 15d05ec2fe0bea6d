"""What is ordered: the words, and whom the orders hit. The same seed hits the same ones, whatever else is ordered behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.faults.fate import Desk, Gate, Stream
from vfio_vmbus.host.faults.plan import HOSTILE, LIES, TARGETS, Fault, FaultPlan, Flow, parse_fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("drop:packets:0.01", Fault("drop", "packets", 0.01)),
        ("drop:packets-to-host:.5", Fault("drop", "packets-to-host", 0.5)),
        ("corrupt:completions:1/1000", Fault("corrupt", "completions", 0.001)),
        ("duplicate:messages:10%", Fault("duplicate", "messages", 0.1)),
        ("delay:interrupts:0.05:5ms", Fault("delay", "interrupts", 0.05, 0.005)),
        ("delay:interrupts:1:250us:times=2", Fault("delay", "interrupts", 1.0, 250e-6, times=2)),
        ("delay:messages:1:1.5s:after=3:times=2", Fault("delay", "messages", 1.0, 1.5, after=3, times=2)),
        ("drop:completions:1:times=1:after=100", Fault("drop", "completions", 1.0, after=100, times=1)),
        ("hostile:all:1/100", Fault("hostile", "all", 0.01)),
        ("hostile:ranges:1:after=0", Fault("hostile", "ranges", 1.0)),
    ],
)
def test_orders(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault
    assert parse_fault(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is no kind of fault; take drop, delay, duplicate, corrupt or hostile"),
        ("lose:packets:0.1", "'lose' is no kind of fault"),
        ("drop", "'' is nothing that drop knows; take messages,"),
        ("drop:packet:0.1", "'packet' is nothing that drop knows"),
        ("hostile:packets:0.1", "'packets' is nothing that hostile knows; take all, indices,"),
        ("drop:packets", "rate '': take more than 0, up to 1, such as 0.01, 1% or 1/100"),
        ("drop:packets:0", "rate '0'"),
        ("drop:packets:1.1", "rate '1.1'"),
        ("drop:packets:101%", "rate '101%'"),
        ("drop:packets:1/0", "rate '1/0'"),
        ("drop:packets:-1", "rate '-1'"),
        ("drop:packets:nan", "rate 'nan'"),
        ("drop:packets:1e-3", "rate '1e-3'"),
        ("delay:packets:0.1", "say how long, such as delay:packets:0.1:5ms"),
        ("delay:packets:0.1:times=1", "say how long"),
        ("delay:packets:0.1:5", "time '5': take a number with us, ms or s"),
        ("delay:packets:0.1:0ms", "time '0ms'"),
        ("delay:packets:0.1:61s", "up to 60s"),
        ("drop:packets:0.1:5ms", "'5ms': behind the rate come after=N and times=N"),
        ("drop:packets:0.1:times=0", "'times=0'"),
        ("drop:packets:0.1:times=1:times=2", "'times=2'"),
        ("drop:packets:0.1:after=-1", "'after=-1'"),
        ("drop:packets:0.1:", "'': behind the rate"),
        ("corrupt:interrupts:0.1", "an interrupt carries nothing that could be corrupted"),
    ],
)
def test_what_is_no_order_is_said_in_a_line(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        FaultPlan.parse(["drop:packets:1", text])
    assert str(caught.value).startswith(f"--fault {text}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="dropelayhst:=0123./%m", max_size=40))
def test_any_text_is_an_order_or_an_error(text: str) -> None:
    try:
        fault = parse_fault(text)
    except UsageError:
        return
    assert 0 < fault.rate <= 1


def test_hostile_is_every_lie() -> None:
    fault = parse_fault(HOSTILE)
    assert {lie for flow in fault.flows for lie in fault.lies(flow)} == set(LIES)
    assert parse_fault("hostile:messages:1").flows == (Flow.LIES_IN_MESSAGES,)
    assert {flow for flows in TARGETS.values() for flow in flows} == set(Flow) - {Flow.LIES, Flow.LIES_IN_MESSAGES}


def hits(stream: Stream, count: int) -> list[int]:
    found = []
    for number in range(count):
        if stream.due():
            stream.hit()
            found.append(number)
    return found


def stream(*texts: str, seed: int = 0, device: str = "nic0", flow: Flow = Flow.COMPLETIONS, position: int = 0) -> Stream:
    return Desk(FaultPlan.parse(texts, seed)).streams(device, flow)[position]


def test_who_is_hit_is_the_same_on_every_machine() -> None:
    """These numbers are a promise: seeds that people wrote down go on to mean the same."""
    assert hits(stream("drop:completions:0.1", seed=7), 100) == SEVENTH
    assert hits(stream("drop:completions:0.1"), 100) == NOUGHTH


def test_decisions_depend_on_seed_device_flow_and_place_and_on_nothing_else() -> None:
    one = hits(stream("drop:packets:0.3", flow=Flow.PACKETS_TO_HOST), 200)
    assert one == hits(stream("drop:packets:0.3", "delay:packets:0.5:1ms", flow=Flow.PACKETS_TO_HOST), 200)
    others = [
        hits(stream("drop:packets:0.3", flow=Flow.PACKETS_TO_HOST, seed=1), 200),
        hits(stream("drop:packets:0.3", flow=Flow.PACKETS_TO_HOST, device="nic1"), 200),
        hits(stream("drop:packets:0.3", flow=Flow.PACKETS_TO_GUEST), 200),
        hits(stream("drop:packets:0.3", "drop:packets:0.3", flow=Flow.PACKETS_TO_HOST, position=1), 200),
    ]
    assert len({tuple(each) for each in [one, *others]}) == 5
    assert all(40 < len(each) < 80 for each in others)  # numbers that never change


def test_after_and_times_choose_among_the_same() -> None:
    """They spare events, and shift nothing."""
    every = hits(stream("drop:completions:0.1"), 300)
    assert hits(stream("drop:completions:0.1:after=50"), 300) == [number for number in every if number >= 50]
    assert hits(stream("drop:completions:0.1:after=50:times=3"), 300) == [number for number in every if number >= 50][:3]
    assert hits(stream("drop:completions:1:after=4:times=2"), 300) == [4, 5]


def gate(*texts: str) -> Gate:
    return Desk(FaultPlan.parse(texts)).gate("nic0", Flow.COMPLETIONS)


def test_fates_add_up_and_losing_ends_all() -> None:
    both = gate("duplicate:completions:1", "duplicate:completions:1", "delay:completions:1:1ms", "delay:completions:1:2ms")
    fate = both.judge()
    assert (fate.drop, fate.copies) == (False, 3)
    assert fate.delay is both.streams[3]
    lost = gate("corrupt:completions:1", "drop:completions:1", "duplicate:completions:1")
    assert lost.judge().drop
    assert [stream.hits for stream in lost.streams] == [0, 1, 0]
    assert [stream.seen for stream in lost.streams] == [1, 1, 1]


def test_counts_say_whom_and_how_often() -> None:
    desk = Desk(FaultPlan.parse(["drop:packets:1:times=2", "corrupt:completions:1"]))
    for _ in range(3):
        desk.gate("nic0", Flow.PACKETS_TO_HOST).judge()  # gates come and go with channels, counts stay
    (count,) = desk.counts()
    assert (count.device, count.flow, count.kind) == ("nic0", "packets-to-host", "drop")
    assert (count.fault, count.seen, count.hits) == ("drop:packets:1:times=2", 3, 2)
    assert not desk.touches("nic0", Flow.INTERRUPTS, Flow.MESSAGES_TO_GUEST)
    assert desk.touches("nic1", Flow.INTERRUPTS, Flow.COMPLETIONS)


SEVENTH = [1, 15, 20, 26, 31, 32, 48, 53, 61, 63, 64]
NOUGHTH = [0, 12, 13, 15, 22, 39, 44, 48, 56, 61, 80, 99]
