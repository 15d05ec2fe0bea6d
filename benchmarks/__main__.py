"""`python -m benchmarks [--only PREFIX] [--rounds N]`: run benches, print a table, write build/bench/."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import benchmarks
from benchmarks import cacheline, machine, report
from benchmarks.harness import ROUNDS, Bench, Outcome, Run, run_bench, select


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a bench failed, 2 for a wrong command line, 130 when interrupted."""
    asked = _parser().parse_args(arguments)
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"benchmarks.{module.name}")  # registers its benches
    benches = select(asked.only)
    if not benches:
        names = ", ".join(each.name for each in select()) or "none"
        print(f"no bench has a name that starts with {asked.only!r}; there are: {names}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # so that yardsticks are cleaned up then too
    facts: dict[str, Any] = {**machine.describe(), "rounds": asked.rounds}
    outcomes, probes = _run(benches, asked.rounds)
    if outcomes:
        _write(outcomes, probes, facts)
    failed = any(each.failed for each in outcomes)
    return 130 if len(outcomes) < len(benches) else int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure vfio-vmbus beside its yardsticks, in turn, and report medians.",
        epilog="example: python -m benchmarks --only ring/ --rounds 9",
    )
    parser.add_argument("--only", metavar="PREFIX", default="", help="only benches whose names start with this")
    parser.add_argument("--rounds", type=_rounds, default=ROUNDS, metavar="N", help=f"rounds of each bench (default {ROUNDS})")
    return parser


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError(f"{rounds} rounds: at least 1 is needed")
    return rounds


def _run(benches: Sequence[Bench], rounds: int) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """All outcomes, or those so far when the user interrupts, and a probe of the machine for each round."""
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    probes: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(benches))

        def before_round(number: int) -> None:
            name = benches[len(outcomes)].name
            probe = cacheline.round_trip_ns()
            probes.append({"bench": name, "round": number + 1, "ns": probe})
            distance = "" if probe is None else f", cores {probe:.0f} ns apart"
            progress.update(task, description=f"{name} round {number + 1}/{rounds}{distance}")

        try:
            with Run(rounds, before_round) as run:
                for each in benches:
                    progress.update(task, description=each.name)
                    outcomes.append(_with_warning(run_bench(each, run), probes))
                    progress.advance(task)
                    if not console.is_terminal:
                        print(f"{each.name}: {outcomes[-1].verdict or 'done'}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted: what was measured so far follows", file=sys.stderr)
    return outcomes, probes


def _with_warning(outcome: Outcome, probes: Sequence[dict[str, Any]]) -> Outcome:
    """The outcome, with a note where the machine changed its state while it was measured."""
    distances = [each["ns"] for each in probes if each["bench"] == outcome.bench.name and each["ns"] is not None]
    if not distances or max(distances) < 2 * min(distances):
        return outcome
    moved = f"the cores moved between {min(distances):.0f} and {max(distances):.0f} ns of each other: measure it again"
    return replace(outcome, note="; ".join(filter(None, (outcome.note, moved))))


def _write(outcomes: Sequence[Outcome], probes: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    report.print_table(outcomes, Console())
    machine.BUILD.mkdir(parents=True, exist_ok=True)
    (machine.BUILD / "conditions.json").write_text(report.conditions_json(facts, probes, outcomes))
    (machine.BUILD / "results.json").write_text(report.results_json(outcomes))
    measurements = [each.measurement for each in outcomes if each.measurement]
    if measurements:
        report.plot(measurements, machine.BUILD / "results.png")
    where = machine.BUILD.relative_to(machine.ROOT)
    distances = [each["ns"] for each in probes if each["ns"] is not None]
    apart = f"; cores {min(distances):.0f}-{max(distances):.0f} ns apart" if distances else ""
    print(f"medians of {facts['rounds']} rounds{apart}; samples and conditions: {where}/")


if __name__ == "__main__":
    sys.exit(main())
