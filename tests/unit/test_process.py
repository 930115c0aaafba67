"""A stage in a process of its own: what it says, how it ends, and what the pipeline makes of its end."""

import errno
import json
import signal
import threading
from pathlib import Path

import pytest
from finished_run import ScriptedStages

import sg_local.runs.process as process
from sg_local.errors import InputError, SgLocalError
from sg_local.runs.directory import Run
from sg_local.runs.pipeline import MAX_CRASHES_OF_A_STAGE, run_pipeline
from sg_local.runs.process import REASON_FILE, in_child_process, reason_of_failure
from sg_local.settings import STAGES


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage generate raises this."""

    def fail(_run: Run) -> None:
        raise error

    monkeypatch.setattr("sg_local.stages.generate.run_generate", fail)


@pytest.mark.parametrize(
    ("error", "code"), [(SgLocalError("it failed\ntwice"), 1), (InputError("it is wrong"), 2)]
)
def test_an_error_is_said_and_kept_with_its_exit_code(
    new_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: SgLocalError,
    code: int,
) -> None:
    fail_with(error, monkeypatch)
    assert reason_of_failure(new_run) is None
    assert in_child_process(new_run, "generate") == code
    assert capsys.readouterr().err == f"Error: {error}\n"
    assert reason_of_failure(new_run) == str(error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "memory ran out: take a smaller model"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            "a.bin: No space left on device: free some space",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_the_run_is_kept(
    new_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    told: str,
) -> None:
    fail_with(error, monkeypatch)
    assert in_child_process(new_run, "generate") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {told}")
    assert line.endswith("the same command goes on from there")


def test_a_bug_keeps_its_traceback(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(FileNotFoundError(errno.ENOENT, "No such file or directory", "ours"), monkeypatch)
    with pytest.raises(FileNotFoundError):
        in_child_process(new_run, "generate")


def test_a_full_disk_hides_no_reason(
    new_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_path: Path, _text: str) -> None:
        raise SgLocalError("the disk is full")

    fail_with(InputError("it is wrong"), monkeypatch)
    monkeypatch.setattr(process, "write_text", full)
    assert in_child_process(new_run, "generate") == 2
    assert capsys.readouterr().err == "Error: it is wrong\n"


@pytest.mark.usefixtures("real_child")
def test_the_child_says_why_it_failed(new_run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """llama.cpp refuses a model whose header alone is right; the child runs the stage and nothing else."""
    assert in_child_process(new_run, "generate") == 2
    (line,) = capfd.readouterr().err.splitlines()[-1:]
    assert line.startswith("Error: ")
    assert str(new_run.model.path) in line
    assert f"Error: {reason_of_failure(new_run)}" == line
    new_run.model.path.unlink()
    assert in_child_process(new_run, "generate") == 2
    assert "is gone: put it back" in capfd.readouterr().err


@pytest.mark.usefixtures("real_child")
def test_the_child_is_of_the_same_package_as_its_parent(
    new_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version may be installed, or be first on the path."""
    (tmp_path / "other/sg_local").mkdir(parents=True)
    (tmp_path / "other/sg_local/__init__.py").write_text("raise SystemExit(77)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    assert in_child_process(new_run, "annotate") == 2  # generate is not finished


@pytest.mark.usefixtures("real_child")
def test_a_thread_may_start_a_stage(new_run: Run) -> None:
    """Signals belong to the main thread; whoever calls from Python may be in another."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(in_child_process(new_run, "annotate")))
    thread.start()
    thread.join()
    assert codes == [2]  # generate is not finished


def test_the_pipeline_starts_what_is_not_finished_as_it_is_told(new_run: Run) -> None:
    stages = ScriptedStages()
    assert run_pipeline(new_run, "curate", start_stage=stages)
    assert stages.ran == [("run", stage) for stage in STAGES[:3]]
    assert not run_pipeline(new_run, "curate", start_stage=stages)
    assert new_run.is_finished("curate")


def test_a_stage_that_crashes_on_a_row_is_started_again_some_times(
    new_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def crash(run: Run, stage: str) -> int:
        started.append(stage)
        in_flight = {"part": stage, "rows": [3], "crashes": {}}
        run.file(".in_flight.json").write_text(json.dumps(in_flight))
        return -signal.SIGSEGV

    with pytest.raises(SgLocalError, match="generate was ended by SIGSEGV: the run is kept"):
        run_pipeline(new_run, "generate", start_stage=crash)
    assert started == ["generate"] * MAX_CRASHES_OF_A_STAGE
    assert "generate was ended by SIGSEGV on row 3: going on" in capsys.readouterr().err


def test_a_mark_of_a_process_that_is_gone_counts_against_no_row(new_run: Run) -> None:
    """It was killed with rows in flight; later the model itself crashes llama.cpp, before any row."""
    new_run.file(".in_flight.json").write_text('{"part": "generate", "rows": [3], "crashes": {}}')
    with pytest.raises(SgLocalError, match="generate was ended by SIGSEGV"):
        run_pipeline(new_run, "generate", start_stage=lambda _run, _stage: -signal.SIGSEGV)
    assert json.loads(new_run.file(".in_flight.json").read_text()) == {
        "part": "generate",
        "rows": [],
        "crashes": {},
    }


def test_a_reason_of_an_earlier_call_is_forgotten(new_run: Run) -> None:
    new_run.file(REASON_FILE).write_text("earlier")
    with pytest.raises(SgLocalError, match="did not finish"):
        run_pipeline(new_run, "generate", start_stage=lambda _run, _stage: 1)
    assert reason_of_failure(new_run) is None
