"""Progress: one line that fits the terminal, plain lines where nobody looks, and stdout left alone."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest
from command_line import ROOT

import sg_local.progress as progress_module
from sg_local.progress import PlaceInRun, at_place, duration, get_place, progress, working


class Clock(SimpleNamespace):
    """Stands for `time`; a test moves it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_a_stage_that_fails_leaves_its_place() -> None:
    with suppress(RuntimeError), at_place(PlaceInRun("2/6")):
        assert get_place().number == "2/6"
        raise RuntimeError("planted")
    assert get_place() == PlaceInRun()


@pytest.fixture
def in_run(clock: Clock) -> Iterator[None]:
    """The second stage of six, told 100 s, and 200 s after it."""
    with at_place(PlaceInRun("2/6", 100.0, 200.0)):
        yield


def shown(width: int) -> str:
    return progress_module._shown[-1].line(progress_module.time.monotonic(), width)


def test_progress_is_plain_lines_where_nobody_looks(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("annotate", 100, "inputs", 20, lambda: "95 tok/s") as advance:
        clock.now = 15.0
        advance(20)  # the first ones: what was before them was loading
        clock.now = 16.0
        advance(4)  # too early to tell a rate
        clock.now = 25.0
        advance(16)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "annotate: 80 inputs",
        "annotate 60/100 inputs, 2.0/s, 20 s left (95 tok/s)",
    ]


def test_a_line_comes_where_nothing_is_finished_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "MOST_SECONDS_WITHOUT_A_LINE", 0.2)
    with progress("train", 9, "steps", detail=lambda: "loading"):
        time.sleep(0.7)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "train: 9 steps"
    assert others[:2] == ["train 0/9 steps (loading)"] * 2
    with working("export: comparing llama.cpp with torch"):
        time.sleep(0.5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 2
    assert set(said) == {"export: comparing llama.cpp with torch"}


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            200,
            "[2/6] annotate 60/198 inputs, 2.0/s, 69 s left, run 4 min left (310 prompt tok/s, 16 in flight)",
        ),
        (80, "[2/6] annotate 60/198 inputs, 2.0/s, 69 s left, run 4 min left"),
        (60, "[2/6] annotate 60/198 inputs, 69 s left, run 4 min left"),
        (40, "[2/6] annotate 60/198 inputs, 69 s left"),
    ],
)
def test_what_does_not_fit_is_left_out(clock: Clock, in_run: None, width: int, line: str) -> None:
    with progress("annotate", 198, "inputs", detail=lambda: "310 prompt tok/s, 16 in flight") as advance:
        clock.now = 10.0
        advance(20)
        clock.now = 30.0
        advance(40)
        assert shown(width) == line


def test_before_anything_is_counted_the_told_time_counts_down(clock: Clock, in_run: None) -> None:
    with progress("annotate", 198, "inputs") as advance:
        assert shown(80) == "[2/6] annotate 0/198 inputs, 2 min left, run 5 min left"
        clock.now = 60.0
        with working("loading f16.gguf", is_short=True):
            assert shown(80) == "[2/6] annotate 0/198 inputs, loading f16.gguf, 40 s left, run 4 min left"
        clock.now = 130.0  # slower than told: then nothing is guessed
        assert shown(80) == "[2/6] annotate 0/198 inputs, for 2 min"
        advance(1)
        clock.now = 150.0
        advance(1)
        assert shown(80) == "[2/6] annotate 2/198 inputs, 20 s each, 65 min left, run 69 min left"


def test_a_part_of_a_stage_says_how_long_the_stage_takes(clock: Clock, in_run: None) -> None:
    with progress("generate: trials", 96, "inputs", is_part=True) as advance:
        for clock.now in (10.0, 40.0):
            advance(30)
        assert shown(80) == "[2/6] generate: trials 60/96 inputs, 1.0/s, 60 s left, run 4 min left"
    with progress("generate", 64, "inputs"):  # after it the told time goes on
        assert shown(80) == "[2/6] generate 0/64 inputs, 60 s left, run 4 min left"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3000, "50 min"), (6000, "1.7 h")],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


CODE = """
import time
from sg_local.progress import PlaceInRun, at_place, progress, restore_terminal, working

with at_place(PlaceInRun("2/6", 200.0, 200.0)):
    with working("export: comparing llama.cpp with torch"):
        time.sleep(1.5)
    detail = lambda: "310 prompt tok/s (97% shared), 95 generated tok/s"
    with progress("predict", 2, "inputs", detail=detail) as advance:
        advance(1)
        print("an answer")
        time.sleep(0.5)
        restore_terminal()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 60])
def test_a_line_that_moves_fits_the_terminal_and_leaves_stdout_alone(columns: int) -> None:
    """As in `sg-local predict ... > answers.jsonl`, called from a terminal."""
    terminal, stderr = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            check=True,
        )
        text = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(stderr)
        os.close(terminal)
    assert done.stdout == "an answer\n"
    assert "an answer" not in text
    assert "\x1b[?25h\r\n" in text  # the cursor is back, and a line is begun
    lines = [line.strip() for line in re.split(r"\r|\n|\x1b\[[0-9;?]*[A-Za-z]", text) if line.strip()]
    assert max(map(len, lines)) <= columns
    assert "[2/6] export: comparing llama.cpp with torch, for 1 s" in lines
    assert "[2/6] predict 1/2 inputs, 3 min left, run 7 min left" in lines
    assert "-:--:--" not in text
