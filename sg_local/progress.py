"""What a command shows while it works: a bar with rate and remaining time on a terminal, plain lines elsewhere.

    annotate: 96/240 inputs, 12.4 inputs/s, 12 s left (310 prompt tok/s, 95 generated tok/s, 16 in flight)

All of it goes to stderr; stdout carries answers and data. Names of files and texts out of them are shown through
`escape.printable`, so that none of them can steer the terminal.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sg_local.escape import printable

SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """One line for the person who waits."""
    if sys.stderr is None:  # the caller closed it; print would take stdout
        return
    print(printable(text), file=sys.stderr, flush=True)


def restore_terminal() -> None:
    """Brings the cursor back that a bar hides, and begins a line: for a process that ends in the middle of one."""
    if _draws_bars():
        stream = sys.__stderr__  # a bar replaces sys.stderr
        os.write(stream.fileno() if stream else 2, b"\x1b[?25h\n")


@contextmanager
def progress(
    title: str, total: int, unit: str, done: int = 0, detail: Callable[[], str] = str
) -> Iterator[Callable[[int], None]]:
    """Shows how far the work is; yields a function that is told how many units were done since its last call.

    detail: what else is to be shown beside it, asked whenever it is.
    """
    if _draws_bars():
        with _bar(title, total, unit, done, detail) as advance:
            yield advance
        return
    started = time.monotonic()
    first = done
    last_line = started
    say(f"{title}: {total - done} {unit}")

    def advance_plainly(n: int) -> None:
        nonlocal done, last_line
        done += n
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES and done > first:
            last_line = now
            rate = (done - first) / (now - started)
            left = max(0.0, (total - done) / rate)
            more = f" ({text})" if (text := detail()) else ""
            say(f"{title}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left{more}")

    yield advance_plainly


def _draws_bars() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _bar(
    title: str, total: int, unit: str, done: int, detail: Callable[[], str]
) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "")

    class Detail(ProgressColumn):
        def render(self, _task: Task) -> Text:
            return Text(detail(), style="dim")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        Detail(),
    )
    # Rich would send what is printed meanwhile to its own console, that is to stderr.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance_bar(n: int) -> None:
            bar.update(task, advance=n)

        yield advance_bar
