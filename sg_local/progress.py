"""What a command shows while it works: one line that moves on a terminal, plain lines elsewhere.

    [2/6] annotate 96/198 inputs, 12.4/s, 8 s left, run 4 min left (310 prompt tok/s, 16 in flight)
    [5/6] export: comparing llama.cpp with torch, for 42 s

What does not fit the terminal is left out, the least needed first. Nothing is guessed before something was counted for
some seconds; until then the time that was told for the stage counts down, where there is one. All of it goes to stderr;
stdout carries answers and data. Names of files and texts out of them are shown through `escape.printable`, so that none
of them can steer the terminal.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from sg_local.escape import printable

SECONDS_BETWEEN_LINES = 10.0
MOST_SECONDS_WITHOUT_A_LINE = 30.0
SECONDS_TO_COUNT = 3.0  # before a rate is told


@dataclass(frozen=True)
class PlaceInRun:
    """Which stage of a run is shown, and what was told of it and of those after it, in seconds."""

    number: str = ""  # "2/6"
    told_seconds: float | None = None
    later_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)


_place = PlaceInRun()
_place_since = 0.0
_shown: "list[_Status]" = []  # what is shown now: one thing, or nothing


@contextmanager
def at_place(place: PlaceInRun) -> Iterator[None]:
    """Where in a run the lines of the body are."""
    global _place, _place_since
    before = _place, _place_since
    _place, _place_since = place, time.monotonic()
    try:
        yield
    finally:
        _place, _place_since = before


def get_place() -> PlaceInRun:
    """Where in a run this process is."""
    return _place


def say(text: str) -> None:
    """One line for the person who waits."""
    if sys.stderr is None:  # the caller closed it; print would take stdout
        return
    print(printable(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as it is told: "8 s", "4 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{max(0, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def restore_terminal() -> None:
    """Brings the cursor back that a bar hides, and begins a line: for a process that ends in the middle of one."""
    if _draws():
        stream = sys.__stderr__  # a bar replaces sys.stderr
        os.write(stream.fileno() if stream else 2, b"\x1b[?25h\n")


@contextmanager
def progress(
    title: str,
    total: int,
    unit: str,
    done: int = 0,
    detail: Callable[[], str] = str,
    *,
    is_part: bool = False,
) -> Iterator[Callable[[int], None]]:
    """Shows how far the work is; yields a function that is told how many units were done since its last call.

    detail: what else is to be shown beside it, asked whenever it is. is_part: there is more to do in the stage than
    these units, so that their rate does not say how long that takes.
    """
    status = _Status(title, total, unit, done, detail, is_part)
    if not _draws():
        n_left = total - done
        say(f"{title}: {n_left} {unit.removesuffix('s') if n_left == 1 else unit}")
    with _showing(status):
        yield status.advance


@contextmanager
def working(text: str, *, is_short: bool = False) -> Iterator[None]:
    """Shows what is being done where nothing can be counted, and since when.

    is_short: it mostly takes a moment, so no line is left of it.
    """
    if not is_short:
        say(text)
    if _shown:
        status = _shown[-1]
        status.doing.append(text.rpartition(": ")[2])
        try:
            yield
        finally:
            status.doing.pop()
        return
    with _showing(_Status(text)):
        yield


@dataclass
class _Status:
    """What is known of some work, and the line that tells it."""

    title: str
    total: int = 0  # 0 where nothing is counted
    unit: str = ""
    done: int = 0
    detail: Callable[[], str] = str
    is_part: bool = False
    doing: list[str] = field(default_factory=list)
    said_at: float = 0.0
    _started: float = field(default_factory=lambda: time.monotonic())
    _first: tuple[float, int] | None = None  # when the first units were done, and how many were then

    def __post_init__(self) -> None:
        self.said_at = self._started

    def advance(self, n: int) -> None:
        """More units are done."""
        self.done = min(self.done + n, self.total)  # what goes on may do some of it again
        now = time.monotonic()
        if self._first is None:
            self._first = (now, self.done)
        if not _draws() and now - self.said_at >= SECONDS_BETWEEN_LINES and self._rate(now):
            self.tell(now)

    def tell(self, now: float) -> None:
        """Says the line."""
        self.said_at = now
        say(self.line(now))

    def line(self, now: float, width: int = 1 << 20) -> str:
        """What is to be seen, in as many characters as there are."""
        number = f"[{_place.number}] " if _place.number else ""
        line = f"{number}{self.title}" + (f" {self.done}/{self.total} {self.unit}" if self.total else "")
        parts = [text for text in self._parts(now) if text]
        while parts and len(line) + sum(len(text) + 2 for _, text in parts) > width:
            parts.remove(max(parts))  # the least needed
        tail = "".join(f" ({text})" if need == _DETAIL else f", {text}" for need, text in parts)
        return (line + tail)[:width]

    def _parts(self, now: float) -> Iterator[tuple[int, str]]:
        """The parts of the line in their order, each with how little it is needed."""
        rate, left = self._rate(now), self._seconds_left(now)
        is_done = bool(self.total) and self.done >= self.total
        if self.doing:
            yield _DOING, self.doing[-1]
        if rate:
            yield _RATE, f"{rate:.1f}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"
        if left is not None and not is_done:
            yield _LEFT, f"{duration(left)} left"
            if _place.later_seconds:
                yield _RUN, f"run {duration(left + _place.later_seconds)} left"
        elif not is_done and now - self._started >= 1:
            yield _LEFT, f"for {duration(now - self._started)}"
        if text := self.detail():
            yield _DETAIL, text

    def _rate(self, now: float) -> float | None:
        """Units a second since the first ones were done: before that, something was loaded."""
        if self._first is None or self.done == self._first[1] or now - self._first[0] < SECONDS_TO_COUNT:
            return None
        return (self.done - self._first[1]) / (now - self._first[0])

    def _seconds_left(self, now: float) -> float | None:
        if not self.is_part and (rate := self._rate(now)):
            return max(0.0, (self.total - self.done) / rate)
        if self.total and _place.told_seconds is not None:
            left = _place.told_seconds - (now - _place_since)
            return left if left > 0 else None
        return None


_LEFT, _RUN, _DOING, _RATE, _DETAIL = range(5)


def _showing(status: _Status) -> AbstractContextManager[None]:
    return _live(status) if _draws() else _told_now_and_then(status)


def _draws() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _told_now_and_then(status: _Status) -> Iterator[None]:
    """A plain line wherever there was none for some time."""
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.wait(max(0.1, status.said_at + MOST_SECONDS_WITHOUT_A_LINE - time.monotonic())):
            if (now := time.monotonic()) >= status.said_at + MOST_SECONDS_WITHOUT_A_LINE:
                status.tell(now)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    _shown.append(status)
    try:
        yield
    finally:
        _shown.remove(status)
        is_over.set()
        teller.join()


@contextmanager
def _live(status: _Status) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)

    def line() -> Text:
        text = printable(status.line(time.monotonic(), console.width))
        return Text(text, no_wrap=True, overflow="ellipsis")

    # Rich would send what is printed meanwhile to its own console, that is to stderr.
    with Live(get_renderable=line, console=console, redirect_stdout=False, transient=not status.total):
        _shown.append(status)
        try:
            yield
        finally:
            _shown.remove(status)
