"""Progress: plain lines where nobody looks, a bar that leaves stdout alone."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_line import ROOT

import sg_local.progress as progress_module


def test_progress_is_plain_lines_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 4.0, 20.0])
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with progress_module.progress("annotate", 100, "inputs", 20, lambda: "95 tok/s") as advance:
        advance(10)  # after 4 s: too early for a line
        advance(30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "annotate: 80 inputs",
        "annotate: 60/100 inputs, 2.0 inputs/s, 20 s left (95 tok/s)",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_bar_leaves_stdout_alone() -> None:
    """As in `sg-local predict ... > answers.jsonl`, called from a terminal."""
    terminal, stderr = os.openpty()
    code = (
        "from sg_local.progress import progress, restore_terminal\n"
        "with progress('predict', 2, 'inputs') as advance:\n"
        "    advance(1)\n"
        "    print('an answer')\n"
        "    restore_terminal()\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            check=True,
        )
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(stderr)
        os.close(terminal)
    assert done.stdout == "an answer\n"
    assert "predict" in shown
    assert "1/2" in shown
    assert "an answer" not in shown
    assert "\x1b[?25h\r\n" in shown  # the cursor is back, and a line is begun
