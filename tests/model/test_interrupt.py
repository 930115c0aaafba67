"""A run that is interrupted or killed while a real stage works: nothing of it stays alive, and nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sg_local.files import read_rows
from sg_local.runs.directory import open_run

ROOT = Path(__file__).parents[2]
SMALL = ["--until=generate", "--n-inputs=8", "--max-input-tokens=32", "--n-parallel=16"]

pytestmark = pytest.mark.skipif(
    shutil.which("pgrep") is None or shutil.which("ps") is None,
    reason="processes are looked up with pgrep and ps",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all of this file: each test interrupts it, or goes on with it."""
    return tmp_path_factory.mktemp("interrupted") / "run"


_started: "list[subprocess.Popen[str]]" = []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A test that fails leaves no process behind that would hold the run for the next."""
    yield
    while _started:
        with _started.pop() as process:  # closes its pipes
            process.kill()


def start(*arguments: object) -> "subprocess.Popen[str]":
    """Calls the command line as the leader of a process group, as a shell does in the foreground."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sg_local", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where these tests run in the background of a script, the shell lets them inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _started.append(process)
    return process


def start_working(*arguments: object) -> "subprocess.Popen[str]":
    """The same, and returns when the model is loaded and generates."""
    process = start(*arguments)
    assert process.stderr
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("generate: "):
            time.sleep(0.3)
            return process
    raise AssertionError(f"it ended before it worked: {''.join(seen)}")


def stages_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def is_alive(pid: int) -> bool:
    """A dead process that nobody has waited for yet is dead."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() not in {"", "Z", "Z+", "Zs", "Zl"}


def end_of(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def command(run_dir: Path, smollm2: Path) -> list[object]:
    return ["run", "support-inbox", "--model", smollm2, "--run", run_dir, *SMALL]


@pytest.mark.parametrize("whom", ["all", "run"])
def test_ctrl_c_ends_run_and_stage_with_one_line(command: list[object], whom: str) -> None:
    """A terminal signals every process of the group; `kill -INT` only the one."""
    process = start_working(*command)
    stages = stages_of(process.pid)
    assert len(stages) == 1
    (os.killpg if whom == "all" else os.kill)(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr == "Error: interrupted; what is finished is kept, and the same command goes on from there\n"
    assert end_of(stages, within_s=0.5)


def test_a_killed_run_leaves_no_stage_behind(command: list[object]) -> None:
    process = start_working(*command)
    stages = stages_of(process.pid)
    assert len(stages) == 1
    process.kill()
    process.communicate(timeout=20)
    assert end_of(stages, within_s=3)


def test_ctrl_c_ends_a_stage_called_by_itself(run_dir: Path, command: list[object]) -> None:
    process = start_working("generate", run_dir)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "Error: interrupted; what is finished is kept, and the same command goes on from there\n"


def test_the_same_command_goes_on(run_dir: Path, command: list[object]) -> None:
    process = start(*command)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stderr.startswith("run "), "it was begun before"
    rows = read_rows(run_dir / "inputs.jsonl")
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert sum(row["drop"] is None for row in rows) >= 8


def test_a_stage_that_goes_on_keeps_the_numbers_of_its_trials(run_dir: Path, command: list[object]) -> None:
    run = open_run(run_dir)
    probe = run.manifest()["stages"]["generate"]["probe"]
    assert [trial["style"] for trial in probe] == ["meta", "turns", "list"]
    run.forget_from("generate", keep_partial=True)  # as if it had been killed after its last row
    process = start(*command)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "asking by" not in stderr
    assert run.manifest()["stages"]["generate"]["probe"] == probe
