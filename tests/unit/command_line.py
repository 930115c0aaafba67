"""What the tests of the command line share: exit code, stdout, stderr, and what is left on the disk.

Nothing is computed with a model there; tests/model does that.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

from sg_local.runs.directory import Run

ROOT = Path(__file__).parents[2]

Call = Callable[..., Result]
Contents = Callable[[Path], dict[str, bytes]]


def in_a_process(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """`python -m sg_local ...`, where this process is not enough: its children, its signals, its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-P", "-m", "sg_local", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, env=environment, timeout=60, check=False, **{"text": True, **streams})


def one_line(result: Result, exit_code: int) -> str:
    """The error that a call ended with: one line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def given(run: Run, task: Path) -> list[object]:
    """The arguments that `new_run` was begun with."""
    return ["run", task, "--model", run.model.path, "--run", run.path, "--n-inputs=7"]


def in_a_shell(command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
