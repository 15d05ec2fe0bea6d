"""A bench measures one figure, in turn with its yardstick, and this is what runs it.

A bench is a function registered by name; it gets the `Run` it belongs to and returns `Figures`:

    @bench("ring/64/burst", unit="Mpps", bar=Bar("ratio", at_least=0.9))
    def ring_64_burst(run: Run) -> Figures:
        return run.measure_in_turn({"ours": numba_mpps, "yardstick": c_mpps}).figures()

The machine drifts between fast and slow states within seconds, so figures compare only within one run and
only when taken in turn (A, B, A, B, ...); their medians are the result. A sampler returns one sample, warm:
what compiles or fills caches has happened before. One whose program cannot be had here raises `UnavailableError`;
as yardstick it is left out and the table says why, as "ours" the bench is skipped.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from vfio_vmbus.errors import UnavailableError

ROUNDS = 5

Sampler = Callable[[], float]
Resource = TypeVar("Resource")


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: `of` its value (in the bench's unit) or of its ratio to the yardstick."""

    of: Literal["value", "ratio"]
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a bar has either at_least or at_most")

    def __str__(self) -> str:
        limit = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return limit if self.of == "value" else f"{limit} of it"

    def met(self, measurement: Measurement) -> bool | None:
        """None where there is nothing to judge: a bar on the ratio, and no yardstick."""
        figure = measurement.value if self.of == "value" else measurement.ratio
        if figure is None:
            return None
        if self.at_least is not None:
            return figure >= self.at_least
        return self.at_most is not None and figure <= self.at_most


@dataclass(frozen=True)
class Measurement:
    """One object of results.json; `ratio` is value / yardstick."""

    name: str
    unit: str
    value: float
    yardstick: float | None
    ratio: float | None


@dataclass(frozen=True)
class Figures:
    """What a bench returns, in its unit; `note` is a few words for the table."""

    value: float
    yardstick: float | None = None
    note: str = ""


@dataclass(frozen=True)
class InTurn:
    """All samples in the order taken, their medians, and why a sampler is missing, by sampler's name."""

    medians: dict[str, float]
    samples: dict[str, list[float]]
    missing: dict[str, str]

    def figures(self, note: str = "") -> Figures:
        """The samplers "ours" and "yardstick" as figures of a bench."""
        words = [note] if note else []
        if "yardstick" in self.missing:
            words.append(f"no yardstick: {self.missing['yardstick']}")
        return Figures(self.medians["ours"], self.medians.get("yardstick"), "; ".join(words))


def measure_in_turn(
    samplers: Mapping[str, Sampler], rounds: int = ROUNDS, before_round: Callable[[int], None] | None = None
) -> InTurn:
    """Call each sampler once a round, one after the other.

    A sampler that raises `UnavailableError` is dropped with all its samples and the rest goes on; the error of one
    named "ours", or of the last one left, is the caller's.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds asked for, at least 1 is needed")
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    missing: dict[str, str] = {}
    for number in range(rounds):
        if before_round is not None:
            before_round(number)
        for name in list(samples):
            try:
                samples[name].append(samplers[name]())
            except UnavailableError as reason:
                if name == "ours" or len(samples) == 1:
                    raise
                del samples[name]
                missing[name] = str(reason)
    return InTurn({name: median(taken) for name, taken in samples.items()}, samples, missing)


BenchFunction = Callable[["Run"], Figures]


@dataclass(frozen=True)
class Bench:
    name: str
    unit: str
    bar: Bar | None
    function: BenchFunction


_registry: dict[str, Bench] = {}


def bench(name: str, unit: str, bar: Bar | None = None) -> Callable[[BenchFunction], BenchFunction]:
    """Register a bench. Names are paths such as `ring/64/burst`; one name, one bench."""

    def register(function: BenchFunction) -> BenchFunction:
        if name in _registry:
            raise ValueError(f"the bench {name} is registered twice")
        _registry[name] = Bench(name, unit, bar, function)
        return function

    return register


def select(prefix: str = "") -> list[Bench]:
    """The registered benches whose names start with `prefix`, in the order of registration."""
    return [each for each in _registry.values() if each.name.startswith(prefix)]


@dataclass
class Run:
    """What a bench sees of the run it is part of. A context manager: leaving it closes what was shared."""

    rounds: int = ROUNDS
    before_round: Callable[[int], None] | None = None
    taken: list[InTurn] = field(default_factory=list)
    _shared: dict[Callable[[], Any], Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def measure_in_turn(self, samplers: Mapping[str, Sampler]) -> InTurn:
        """`measure_in_turn` with this run's rounds; the samples are kept for conditions.json."""
        result = measure_in_turn(samplers, self.rounds, self.before_round)
        self.taken.append(result)
        return result

    def shared(self, maker: Callable[[], AbstractContextManager[Resource]]) -> Resource:
        """What `maker` makes, entered at the first call and kept for later benches until the run ends.

        For yardsticks that take long to start and cost nothing while idle. A maker that raises
        UnavailableError is not tried again in this run.
        """
        if maker not in self._shared:
            try:
                self._shared[maker] = self._stack.enter_context(maker())
            except UnavailableError as reason:
                self._shared[maker] = reason
        if isinstance(self._shared[maker], UnavailableError):
            raise UnavailableError(*self._shared[maker].args)
        resource: Resource = self._shared[maker]
        return resource


@dataclass(frozen=True)
class Outcome:
    """What became of a bench: a measurement, or the word why there is none (`failed` if that is an error)."""

    bench: Bench
    measurement: Measurement | None
    note: str = ""
    failed: bool = False
    taken: Sequence[InTurn] = ()

    @property
    def verdict(self) -> str:
        if self.measurement is None:
            return "failed" if self.failed else "skipped"
        met = self.bench.bar.met(self.measurement) if self.bench.bar is not None else None
        return {True: "ok", False: "short", None: ""}[met]


def six_digits(figure: float) -> float:
    return float(f"{figure:.6g}")


def measurement_of(name: str, unit: str, figures: Figures) -> Measurement:
    yardstick = None if figures.yardstick is None else six_digits(figures.yardstick)
    ratio = six_digits(figures.value / figures.yardstick) if figures.yardstick else None
    return Measurement(name, unit, six_digits(figures.value), yardstick, ratio)


def run_bench(each: Bench, run: Run) -> Outcome:
    """Run one bench; an error in it is its outcome, so that the others still run."""
    run.taken.clear()
    try:
        figures = each.function(run)
    except UnavailableError as reason:
        return Outcome(each, None, str(reason))
    except Exception as error:
        traceback.print_exc()
        return Outcome(each, None, f"{type(error).__name__}: {error}", failed=True)
    return Outcome(each, measurement_of(each.name, each.unit, figures), figures.note, taken=tuple(run.taken))
