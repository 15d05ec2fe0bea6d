"""Whatever one client does, the host takes notice, nothing leaks, nothing of others is touched, and their traffic goes on."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.netvsp.traffic import Traffic
from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.control import Control
from vfio_vmbus.iommu.domain import Fault
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing import judge
from vfio_vmbus.testing.attacker import WHOLE, Attack, Attacker, Outcome, marked_message, range_words
from vfio_vmbus.testing.hostile import ATTACKS, Arena
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import nvsp, rndis

SMALL: dict[str, Any] = {"ring_pages": 16, "receive_buffer": 1 << 20, "send_buffer": 1 << 19}

GOES_ON = re.compile(r"pages/(?!counts|long)|section/(index|size)|rndis/(?!spoofed)|gpadl/second|flood/failures")
"""Attacks whose every request fails by itself; the card stays in use."""
CLOSES = re.compile(
    r"ring/|header/(?!no-list)|section/control|gpadl/(receive|send|torn|unmapped)|control/|nvsp/|pages/(counts|long)"
)
"""Attacks that end the attacker's use of the card."""


OUT_OF_ORDER = ("gpadl/torn-down", "nvsp/twice", "nvsp/side", "control/frame", "control/answer")
"""Attacks that are refused for their place, so that no number is wrong."""


@dataclass
class Stage:
    host: EmbeddedHost
    arena: Arena
    traffic: Traffic


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # three threads of Python take turns: the traffic, the attacker, the host's control plane
    with EmbeddedHost() as host:
        clients: list[tuple[OfferedDevice, Netvsc]] = []
        for name in ("victim", "friend"):
            device = open_device(host.attach(host.add_nic(name)))
            clients.append((device, Netvsc(device, **SMALL)))
        with Arena(host, clients[0][0]) as arena, Traffic(clients[0][1], clients[1][1]) as traffic:
            yield Stage(host, arena, traffic)
        for device, nic in clients:
            assert nic.counters().bad_completions == 0
            nic.close()
            device.close()
    sys.setswitchinterval(interval)


def check_attack(stage: Stage, attack: Attack) -> None:
    """Let it be tried: it is stopped in the way that it should be, nothing is touched, and the others' traffic goes on."""
    with nothing_left(objects=False):
        verdict = stage.arena.judge(attack)
        stage.traffic.go_on()
    outcome = verdict.outcome
    assert stage.traffic.foreign == []
    assert verdict.bytes_touched == 0
    assert verdict.stopped, verdict
    if GOES_ON.match(attack.name):
        assert (outcome.failed, outcome.succeeded, outcome.unanswered) == (outcome.tried, 0, 0)
    if CLOSES.match(attack.name):
        closed = [text for text in verdict.evidence if text.startswith("closed: ")]
        assert closed
        assert re.search(r"\d", closed[0]) or attack.name in OUT_OF_ORDER  # a value, a limit


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_an_attack(stage: Stage, attack: Attack) -> None:
    check_attack(stage, attack)


def test_the_catalogue_covers_what_it_should() -> None:
    """No attack is left to the general verdict alone, other than these."""
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names) >= 70
    others = {name for name in names if not GOES_ON.match(name) and not CLOSES.match(name)}
    assert others == {
        "header/no-list",
        "gpadl/read-only",
        "gpadl/write-only",
        "gpadl/forged",
        "rndis/spoofed",
        "completion/bogus",
        "flood/completions",
        "flood/questions",
        "flood/doorbells",
        "flood/full-doorbell",
        "flood/gpadls",
    }


def test_the_judge_sees_a_host_that_is_not_strict(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks on nothing: marked frames from memory that may be read, and marked bytes written where nobody may write."""
    monkeypatch.setattr(judge, "_PATIENCE", 0.2)

    def leak(attacker: Attacker) -> Outcome:
        attacker.pages(range_words(WHOLE, 0, attacker.trap.pfns[:1]))
        return attacker.outcome()

    def scribble(attacker: Attacker) -> Outcome:
        attacker.mute.mapping.write(100, b"\0" * 24)
        attacker.in_section(attacker.sections, 8)
        return attacker.outcome()

    seen = stage.arena.judge(Attack("leak", "", leak))
    assert (seen.stopped, seen.bytes_touched) == (False, 512)
    stage.traffic.go_on()
    assert [len(data) for data in stage.traffic.foreign] == [512]
    stage.traffic.foreign.clear()
    written = stage.arena.judge(Attack("scribble", "", scribble))
    assert (written.stopped, written.bytes_touched) == (False, 24)
    ignored = stage.arena.judge(Attack("nothing", "", lambda attacker: attacker.outcome()))
    assert (ignored.stopped, ignored.bytes_touched) == (False, 0)


@pytest.fixture
def attacker(stage: Stage) -> Iterator[tuple[Any, Attacker]]:
    """A fresh client of its own card, outside of the arena, and the host's connection with it."""
    name = f"own{len(stage.host.nics)}"
    function = stage.host.attach(stage.host.add_nic(name))
    with open_device(function) as device:
        yield function, Attacker(device, receive_buffer=4 << 20)


def test_faults_name_client_address_and_direction(stage: Stage, attacker: tuple[Any, Attacker]) -> None:
    function, guest = attacker
    guest.pages(range_words(100, 8, [5]))
    guest.pages(range_words(100, 0, [guest.deaf.pfns[0]]))
    guest.pages(range_words(100, 0, [1 << 51]))
    guest.outcome()
    name, deaf = function.info.name, guest.deaf.iova
    assert function.function.domain.faults() == [
        Fault(name, 5 * PAGE + 8, 100, "read", "not mapped"),
        Fault(name, deaf, 100, "read", "not mapped for this direction"),
        Fault(name, 1 << 51, 100, "read", "empty, or wraps around the address space"),
    ]


def test_a_guest_that_rewrites_what_it_sent(stage: Stage, attacker: tuple[Any, Attacker]) -> None:
    """Lengths, offsets and addresses change under the host's eyes: it reads each once, and the traffic of others goes on."""
    _, guest = attacker
    good = marked_message(guest.mac, guest.mac)
    stop = threading.Event()

    def rewrite() -> None:
        lies = [good, good[:4] + b"\xff" * 4 + good[8:], good[:8] + b"\xf0" * 8 + good[16:], good[:28] + b"\x80" * 8 + good[36:]]
        while not stop.is_set():
            for lie in lies:
                guest.fill_section(0, lie)

    thread = threading.Thread(target=rewrite)
    thread.start()
    for _ in range(300):
        guest.in_section(0, len(good))
    outcome = guest.outcome()
    stop.set()
    thread.join()
    assert outcome.succeeded + outcome.failed == 300
    stage.traffic.go_on()


def test_answers_without_room_cost_little(stage: Stage, attacker: tuple[Any, Attacker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers wait for a guest that does not read; worker and control plane do not throw the channel at each other meanwhile.

    When it reads, everything goes on.
    """
    _, guest = attacker
    question = rndis.encode_message(rndis.KeepaliveRequest(request_id=1))
    guest.fill_section(0, question)
    guest.listening = False
    guest.patience = 0.0
    card = next(nic for nic in stage.host.nics.values() if nic.mac == guest.mac)
    while guest.in_section(0, len(question), channel=nvsp.CHANNEL_CONTROL) or not card.counter("full"):
        pass
    calls = 0
    flush = Control.flush

    def counted(control: Control) -> bool:
        nonlocal calls
        calls += 1
        return flush(control)

    monkeypatch.setattr(Control, "flush", counted)
    for _ in range(3):
        stage.traffic.go_on()
        time.sleep(0.1)
    assert calls < 60  # thousands, before
    guest.listening = True
    guest.patience = 20.0
    outcome = guest.outcome()
    assert outcome.succeeded == outcome.tried - outcome.no_room > 1000


def test_a_host_serves_the_next_client_of_the_same_card(stage: Stage) -> None:
    card = stage.host.add_nic("next")
    for attack in ATTACKS[:3]:
        with open_device(stage.host.attach(card)) as device:
            attack.run(Attacker(device))
    with open_device(stage.host.attach(card)) as device, Netvsc(device, **SMALL) as nic:
        assert nic.info.link
    stage.traffic.go_on()
