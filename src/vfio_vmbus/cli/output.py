"""What commands print: tables for people, one JSON object for machines."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_PADDING = 3
"""Columns of the terminal that a table puts around each of its own."""
_PIPE = 120
"""Columns of what is no terminal; a table may be wider there, except for a column that is cut short."""


def print_json(value: Any) -> None:
    """One object (or list) on stdout. Bytes are MAC addresses."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(_plain(value)), indent=2).decode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex(":") if isinstance(value, bytes) else value


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = (), narrow: int | None = None
) -> None:
    """A table on stdout. right: columns of numbers. narrow: a column that is cut short where the terminal is too narrow for it.

    On a terminal that is too narrow even so, each row is a paragraph: names that are broken into pieces are of no use to anybody.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    cells = [[cell if isinstance(cell, str) else count(cell) for cell in row] for row in rows]
    widths = [max((len(row[index]) for row in cells), default=0) for index in range(len(columns))]
    widths = [max(width, len(name)) for width, name in zip(widths, columns, strict=True)]
    frame = _PADDING * len(columns) + 1
    console = Console(width=None if sys.stdout.isatty() else _PIPE if narrow is not None else max(_PIPE, sum(widths) + frame))
    if narrow is not None:
        others = sum(widths) - widths[narrow] + frame
        widths[narrow] = max(min(widths[narrow], console.width - others), len(columns[narrow]))
    if sys.stdout.isatty() and sum(widths) + frame > console.width:
        _print_paragraphs(title, columns, cells, console.width)
        return
    for index, name in enumerate(columns):
        cut = index == narrow
        table.add_column(
            name,
            justify="right" if index in right else "left",
            overflow="ellipsis" if cut else "fold",
            no_wrap=cut,
            width=widths[index] if narrow is not None else None,
        )
    for row in cells:
        table.add_row(*map(Text, row))  # not what would be markup in a name
    console.print(table)


def _print_paragraphs(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    """A row's first cell, and below it the others that say something, each behind its column's name."""
    if title:
        print(title)
    for first, *others in rows:
        print(first)
        said = ", ".join(
            f"{name} {cell}".strip() for name, cell in zip(columns[1:], others, strict=True) if cell not in ("", "-")
        )
        print(
            textwrap.fill(
                said, width, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
        )


def count(value: Any) -> str:
    """A number with thousands set apart; anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.2f}"
    return value.hex(":") if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """What another process said, on one line, and nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


class Progress:
    """What is going on, on stderr: a spinner with the latest word on a terminal, a line a step elsewhere."""

    def __init__(self, spinner: Any) -> None:
        self._spinner = spinner

    def step(self, text: str) -> None:
        """Something new begins."""
        if self._spinner is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._spinner.update(text=text)

    def say(self, text: str) -> None:
        """How far it is."""
        if self._spinner is not None:
            self._spinner.update(text=text)


@contextmanager
def progress(text: str) -> Iterator[Progress]:
    """Show `text` with a spinner while the block runs, on a terminal."""
    if not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    spinner = Spinner("dots", text)
    # What is printed meanwhile goes above the spinner on the terminal, and to a file or pipe where stdout is one.
    on_terminal = sys.stdout.isatty()
    with Live(spinner, console=Console(stderr=True), refresh_per_second=12.5, transient=True, redirect_stdout=on_terminal):
        yield Progress(spinner)
