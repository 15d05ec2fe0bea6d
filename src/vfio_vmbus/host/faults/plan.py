"""What faults are ordered: a line each, in the words of tc-netem and of Linux's fault injection (`times`).

    KIND:TARGET:RATE[:TIME][:after=N][:times=N]

    drop:packets:0.01               one packet of a hundred is lost, either way
    delay:interrupts:5%:5ms         one interrupt of twenty comes 5 ms late
    corrupt:completions:1/1000      one bit of one completion of a thousand is turned round
    duplicate:messages:0.1          one control message of ten comes twice
    drop:completions:1:after=100:times=1    the 101st completion is lost, no other
    hostile:ranges:1/50             before one packet of fifty comes one that lies about the receive buffer

Which one is hit depends on the seed, the order and its own number in its flow, on nothing else: so a run can be repeated, as far as
the driver does the same again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ...errors import UsageError


class Flow(StrEnum):
    """What faults hit, each with a count of its own for each device."""

    MESSAGES_TO_GUEST = "messages-to-guest"
    """VMBus control messages: offers, answers to opens and GPADLs, rescinds."""
    MESSAGES_TO_HOST = "messages-to-host"
    PACKETS_TO_GUEST = "packets-to-guest"
    """Ring packets other than completions: of a network card, announcements of received frames (up to 64 in one), RNDIS answers."""
    PACKETS_TO_HOST = "packets-to-host"
    """Likewise: transfers of frames to send, NVSP and RNDIS questions."""
    COMPLETIONS = "completions"
    """Of what the guest sent, frames and questions."""
    COMPLETIONS_TO_HOST = "completions-to-host"
    """The guest's own, of what it received."""
    INTERRUPTS = "interrupts"
    """Signals of a channel to the guest, as they would be due."""
    LIES = "lies"
    """All packets to the guest, completions too: beside which a malformed one may come."""
    LIES_IN_MESSAGES = "lies-in-messages"


TARGETS: dict[str, tuple[Flow, ...]] = {
    "messages": (Flow.MESSAGES_TO_GUEST, Flow.MESSAGES_TO_HOST),
    "messages-to-guest": (Flow.MESSAGES_TO_GUEST,),
    "messages-to-host": (Flow.MESSAGES_TO_HOST,),
    "packets": (Flow.PACKETS_TO_GUEST, Flow.PACKETS_TO_HOST),
    "packets-to-guest": (Flow.PACKETS_TO_GUEST,),
    "packets-to-host": (Flow.PACKETS_TO_HOST,),
    "completions": (Flow.COMPLETIONS,),
    "completions-to-host": (Flow.COMPLETIONS_TO_HOST,),
    "interrupts": (Flow.INTERRUPTS,),
}

LIES: dict[str, Flow] = {
    "indices": Flow.LIES,
    "headers": Flow.LIES,
    "oversize": Flow.LIES,
    "ranges": Flow.LIES,
    "transactions": Flow.LIES,
    "nvsp": Flow.LIES,
    "rndis": Flow.LIES,
    "messages": Flow.LIES_IN_MESSAGES,
}
"""What a hostile host lies about: ring indices, packet descriptors, how long a packet may be, places in the receive buffer, transaction
ids, NVSP messages, RNDIS messages, VMBus control messages. The first two end a channel for a driver that notices."""

_KINDS = ("drop", "delay", "duplicate", "corrupt", "hostile")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MAX_DELAY = 60.0
HOSTILE = "hostile:all:1/100"
"""What `--hostile` stands for."""

HELP = (
    "A fault to order, as KIND:TARGET:RATE (repeat for more). KIND: drop, delay, duplicate, corrupt (one bit) or hostile. "
    f"TARGET: {', '.join(TARGETS)}; of hostile: all, {', '.join(LIES)}. "
    "RATE: 0.01, 1% or 1/100. Then, for delay, how long: 5ms. Then, if wanted, after=N (the first N are spared) and times=N. "
    "Example: drop:completions:1/1000"
)
SEED_HELP = "Of the faults' random numbers: with the same seed the same ones are hit again."


@dataclass(frozen=True)
class Fault:
    """One order. rate: above 0, up to 1. delay: seconds. after: events that are spared first. times: hits at most, None without end.

    The latter two count for each device, and there for each flow of the target.
    """

    kind: str
    target: str
    rate: float
    delay: float = 0.0
    after: int = 0
    times: int | None = None

    @property
    def flows(self) -> tuple[Flow, ...]:
        """What it may hit."""
        if self.kind != "hostile":
            return TARGETS[self.target]
        return tuple(dict.fromkeys(LIES.values())) if self.target == "all" else (LIES[self.target],)

    def lies(self, flow: Flow) -> tuple[str, ...]:
        """What a hostile one lies about in this flow."""
        return tuple(lie for lie, there in LIES.items() if there is flow and self.target in ("all", lie))

    def __str__(self) -> str:
        text = f"{self.kind}:{self.target}:{self.rate:g}"
        text += f":{self.delay * 1e3:g}ms" if self.kind == "delay" else ""
        text += f":after={self.after}" if self.after else ""
        return text + (f":times={self.times}" if self.times is not None else "")


@dataclass(frozen=True)
class FaultPlan:
    """All orders for a host, and the seed. Without orders there is no difference to a host without a plan."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0

    @classmethod
    def parse(cls, texts: Iterable[str], seed: int = 0) -> FaultPlan:
        """Raises UsageError for the first text that is no fault."""
        return cls(tuple(parse_fault(text) for text in texts), seed)

    def __bool__(self) -> bool:
        return bool(self.faults)


def parse_fault(text: str) -> Fault:
    """A fault as it is ordered (see above). Raises UsageError, a line that says what to write instead."""
    kind, target, rate, *rest = [*text.split(":"), "", ""][: max(3, text.count(":") + 1)]
    if kind not in _KINDS:
        raise _wrong(text, f"{kind!r} is no kind of fault; take {_one_of(_KINDS)}")
    targets = ("all", *LIES) if kind == "hostile" else tuple(TARGETS)
    if target not in targets:
        raise _wrong(text, f"{target!r} is nothing that {kind} knows; take {_one_of(targets)}")
    if (kind, target) == ("corrupt", "interrupts"):
        raise _wrong(text, "an interrupt carries nothing that could be corrupted; take drop, delay or duplicate")
    delay = 0.0
    if kind == "delay":
        if not rest or "=" in rest[0]:
            raise _wrong(text, f"say how long, such as delay:{target}:{rate or '0.01'}:5ms")
        delay = _seconds(text, rest.pop(0))
    counts = _counts(text, rest)
    return Fault(kind, target, _rate(text, rate), delay, counts.get("after", 0), counts.get("times"))


def _rate(text: str, rate: str) -> float:
    number = re.fullmatch(r"(\d+)/(\d+)|(\d*\.?\d+)(%?)", rate)
    value = math.nan
    if number is not None and number[3] is not None:
        value = float(number[3]) / (100 if number[4] else 1)
    elif number is not None and int(number[2]):
        value = int(number[1]) / int(number[2])
    if not 0 < value <= 1:
        raise _wrong(text, f"rate {rate!r}: take more than 0, up to 1, such as 0.01, 1% or 1/100")
    return value


def _seconds(text: str, time: str) -> float:
    found = re.fullmatch(r"(\d*\.?\d+)(us|ms|s)", time)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= MAX_DELAY:
        raise _wrong(text, f"time {time!r}: take a number with us, ms or s, up to {MAX_DELAY:g}s, such as 5ms")
    return seconds


def _counts(text: str, rest: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in rest:
        found = re.fullmatch(r"(after|times)=(\d{1,18})", word)
        if found is None or found[1] in counts or (found[1] == "times" and int(found[2]) == 0):
            raise _wrong(
                text, f"{word!r}: behind the rate come after=N and times=N, each once, and of delay the time before them"
            )
        counts[found[1]] = int(found[2])
    return counts


def _one_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(f"--fault {text}: {why}")
