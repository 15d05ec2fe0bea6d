"""Too much of something: completions that nobody asked for, questions without end, doorbells, messages to the bus itself."""

from __future__ import annotations

import os
from contextlib import suppress

from ...memory.mapping import PAGE
from ...wire import nvsp, rndis
from ..attacker import Attack, Attacker, Outcome, marked_message, range_words

_MANY = 2000


def completions(attacker: Attacker) -> Outcome:
    """Completions for transfers that are not outstanding: of sections that exist, that do not, and of numbers that wrap."""
    for transaction in (0, 1, 7, 600, 1 << 20, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        attacker.complete(transaction)
        attacker.complete(transaction)
    return attacker.outcome()


def completion_flood(attacker: Attacker) -> Outcome:
    for number in range(_MANY):
        attacker.complete(number)
    return attacker.outcome()


def bad_flood(attacker: Attacker) -> Outcome:
    """Transfers that fail, as fast as it can, and nobody reads the answers."""
    words = range_words(PAGE, 0, [0])
    for _ in range(_MANY):
        if not attacker.pages(words):
            break
    return attacker.outcome()


def deaf_questions(attacker: Attacker) -> Outcome:
    """Questions whose answers are never taken: they fill the ring towards it, and then the host must stop, but not turn in circles."""
    question = rndis.encode_message(rndis.KeepaliveRequest(request_id=1)) * 40
    attacker.fill_section(0, question)
    attacker.listening = False
    for _ in range(_MANY):
        if not attacker.in_section(0, len(question), channel=nvsp.CHANNEL_CONTROL):
            break
    return attacker.outcome()


def doorbells(attacker: Attacker) -> Outcome:
    """Its own doorbell, again and again, with nothing to see."""
    bell = attacker.channel.doorbell
    for _ in range(20 * _MANY):
        os.eventfd_write(bell, 1)
    attacker.say(marked_message(attacker.mac, attacker.mac))  # to itself: it goes nowhere, and is answered
    return attacker.outcome()


def full_doorbell(attacker: Attacker) -> Outcome:
    """A doorbell's counter filled to its limit, where another write would block."""
    bell = attacker.channel.doorbell
    with suppress(BlockingIOError):
        os.eventfd_read(bell)
    os.eventfd_write(bell, (1 << 64) - 2)
    attacker.say(marked_message(attacker.mac, attacker.mac))
    return attacker.outcome()


def gpadl_flood(attacker: Attacker) -> Outcome:
    """More GPADLs than a client may have."""
    pfns = attacker.trap.pfns[:1]

    def create() -> None:
        for _ in range(_MANY):
            attacker.connection.create_gpadl(attacker.channel.relid, pfns)

    attacker.ask(create)
    return attacker.outcome()


AMOUNTS = (
    Attack("completion/bogus", "completions of transfers that are not outstanding", completions),
    Attack("flood/completions", "thousands of completions that nobody waits for", completion_flood),
    Attack("flood/failures", "thousands of transfers that fail", bad_flood),
    Attack("flood/questions", "questions without end, whose answers are not read", deaf_questions, lawful=True),
    Attack("flood/doorbells", "tens of thousands of doorbells for nothing", doorbells, lawful=True),
    Attack("flood/full-doorbell", "a doorbell filled to its limit", full_doorbell, lawful=True),
    Attack("flood/gpadls", "thousands of GPADLs", gpadl_flood, bus=True),
)
