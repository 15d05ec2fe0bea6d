"""What a run leaves behind: a table on the terminal, results.json, conditions.json and results.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness import Measurement, Outcome

COLOURS = {"ok": "green", "short": "bold red", "failed": "bold red", "skipped": "yellow", "": ""}


def results_json(outcomes: Sequence[Outcome]) -> str:
    """A list of objects {name, unit, value, yardstick, ratio}; the last two null without a yardstick."""
    return json.dumps([asdict(each.measurement) for each in outcomes if each.measurement], indent=1) + "\n"


def conditions_json(facts: dict[str, Any], probes: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> str:
    """The machine, the probes of each round, and all samples in the order taken, by bench."""
    samples = {each.bench.name: [turn.samples for turn in each.taken] for each in outcomes if each.taken}
    return json.dumps({**facts, "cacheline_probes": list(probes), "samples": samples}, indent=1) + "\n"


def table(outcomes: Sequence[Outcome]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "value", "unit", "yardstick", "ratio", "bar", ""):
        made.add_column(column, justify="right" if column in ("value", "yardstick", "ratio") else "left")
    for each in outcomes:
        figure = each.measurement
        made.add_row(
            each.bench.name,
            short(figure.value) if figure else "-",
            each.bench.unit,
            short(figure.yardstick) if figure else "-",
            short(figure.ratio) if figure else "-",
            str(each.bench.bar or ""),
            Text(each.verdict, style=COLOURS[each.verdict]),
        )
    return made


def short(figure: float | None) -> str:
    """Three digits, as a person compares them; "-" where there is none."""
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:#.3g}".rstrip(".")


def print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """The table, and below it a line for each bench that there is something to say about."""
    console.print(table(outcomes))
    for each in outcomes:
        if each.note:
            console.print(Text(f"{each.bench.name}: {each.note}"), soft_wrap=True)


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Bars of value and yardstick by name; one panel for each unit of ring, nic, ..., as others do not compare."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[Measurement]] = {}
    for each in measurements:
        panels.setdefault((each.name.partition("/")[0], each.unit), []).append(each)
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, sum(0.9 + 0.5 * len(panel) for panel in panels.values())),
        height_ratios=[len(panel) for panel in panels.values()],
        squeeze=False,
        layout="constrained",
    )
    for axis, ((_, unit), panel) in zip(axes.flat, panels.items(), strict=True):
        _panel(axis, unit, panel)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, unit: str, panel: Sequence[Measurement]) -> None:
    rows = range(len(panel))
    ours = axis.barh([row - 0.2 for row in rows], [each.value for each in panel], 0.38, label="vfio-vmbus", color="#2563a8")
    yardsticks = axis.barh(
        [row + 0.2 for row in rows],
        [each.yardstick or 0 for each in panel],
        0.38,
        label="yardstick",
        color="#c9c9c9",
    )
    axis.bar_label(ours, [short(each.value) for each in panel], padding=3, fontsize=8)
    axis.bar_label(yardsticks, [short(each.yardstick) if each.yardstick else "" for each in panel], padding=3, fontsize=8)
    axis.set_yticks(list(rows), [each.name for each in panel])
    axis.set_ylim(len(panel) - 0.5, -0.5)  # the first on top
    axis.margins(x=0.12)
    axis.set_xlabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
