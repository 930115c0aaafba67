"""A stage in a process of its own: what it says, how it ends, and what the pipeline makes of its end."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import ROOT
from finished_run import ScriptedStages
from stand_ins import replace_training

import sg_local.runs.process as process
from sg_local.errors import InputError, SgLocalError
from sg_local.finetune.checkpoints import last_complete, mark_complete
from sg_local.runs.directory import Run
from sg_local.runs.pipeline import MAX_CRASHES_OF_A_STAGE, run_pipeline
from sg_local.runs.process import REASON_FILE, in_child_process, reason_of_failure
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES

# What libraries say of a full disk or a file over its limit: safetensors, torch.save, numpy.
FULL_DISKS = [
    Exception('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })'),
    Exception("Error while serializing: I/O error: File too large (os error 27)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    RuntimeError("write(): fd 3 failed with No space left on device"),
    OSError("100000 requested and 12500 written"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
]


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
        *((error, "a file could not be written (") for error in FULL_DISKS),
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
    assert line.startswith("Error: writing the output" if "quota" in str(error) else f"Error: {told}")
    assert "free some space" in line or isinstance(error, MemoryError)
    assert line.endswith("the same command goes on from there")


def test_a_bug_keeps_its_traceback(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(FileNotFoundError(errno.ENOENT, "No such file or directory", "ours"), monkeypatch)
    with pytest.raises(FileNotFoundError):
        in_child_process(new_run, "generate")


def test_what_libraries_say_of_a_file_that_does_not_fit_is_known(tmp_path: Path) -> None:
    """The real ones, under a limit of the file's size; in a process of its own, for the limit stays."""
    program = """if True:
        import resource, signal, sys, numpy, torch
        from safetensors.torch import save_file
        from sg_local.errors import outside_cause
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        path, tensors = sys.argv[1], {"a": torch.zeros(100_000)}
        for write in (
            lambda: save_file(tensors, path),
            lambda: torch.save(tensors, path),
            lambda: torch.save(tensors, path, _use_new_zipfile_serialization=False),
            lambda: numpy.zeros(100_000).tofile(path),
        ):
            try:
                write()
            except Exception as error:
                print(outside_cause(error))
    """
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line in lines:
        assert line.startswith("a file could not be written (")
        assert line.endswith("free some space")


def test_a_full_disk_in_training_keeps_whole_checkpoints_and_leaves_no_half_one(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_training(monkeypatch)
    checkpoints = finished_run.file("checkpoints")
    finished_run.file("adapter/adapter_config.json").unlink()

    def fill_the_disk(*_: object, **__: object) -> None:
        for step in (1, 2):
            (checkpoints / f"checkpoint-{step}").mkdir()
            (checkpoints / f"checkpoint-{step}/optimizer.pt").write_text("moments")
            if step == 1:
                mark_complete(checkpoints / "checkpoint-1", "key")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    with monkeypatch.context() as full:
        full.setattr("sg_local.stages.train.train_adapter", fill_the_disk)
        assert in_child_process(finished_run, "train") == 1
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(said.startswith("train: ") for said in progress)
    assert line.startswith("Error: a file could not be written (")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-1"]
    assert last_complete(checkpoints, "key") == checkpoints / "checkpoint-1"
    assert in_child_process(finished_run, "train") == 0  # with room again
    assert not checkpoints.exists()


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


def test_a_crash_before_any_row_is_counted_for_none(new_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage was killed and left its record; then llama.cpp crashes as it loads the model."""
    record = {"process": "4711-killed", "part": "generate", "rows": [3, 4], "crashes": {}}
    new_run.file(".in_flight.json").write_text(json.dumps(record))
    started: list[str] = []

    def crash(_run: Run, stage: str) -> int:
        started.append(stage)
        return -signal.SIGSEGV

    for _ in range(2):
        with pytest.raises(SgLocalError, match="generate was ended by SIGSEGV: the run is kept"):
            run_pipeline(new_run, "generate", start_stage=crash)
    assert started == ["generate"] * 2
    assert json.loads(new_run.file(".in_flight.json").read_text()) == record
    assert "row" not in capsys.readouterr().err


def test_a_stage_that_ended_well_leaves_no_record_of_its_crashes(new_run: Run) -> None:
    stages, record = ScriptedStages(), new_run.file(".in_flight.json")

    def crash_once(run: Run, stage: str) -> int:
        if record.exists():
            return stages(run, stage)
        record.write_text(json.dumps({"process": "4711-crashed", "part": stage, "rows": [3], "crashes": {}}))
        return -signal.SIGSEGV

    assert run_pipeline(new_run, "generate", start_stage=crash_once)
    assert not record.exists()


def test_redo_counts_crashes_anew(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"process": "4711-crashed", "part": "annotate", "rows": [], "crashes": {"annotate": {"0": 2}}}
    finished_run.file(".in_flight.json").write_text(json.dumps(record))
    monkeypatch.setattr("sg_local.stages.annotate.run_annotate", lambda _run: None)
    run_stage(finished_run, "annotate", redo=True)
    assert not finished_run.file(".in_flight.json").exists()


def test_a_mark_of_a_process_that_is_gone_counts_against_no_row(new_run: Run) -> None:
    """It was killed with rows in flight; later the model itself crashes llama.cpp, before any row."""
    new_run.file(".in_flight.json").write_text('{"part": "generate", "rows": [3], "crashes": {}}')
    with pytest.raises(SgLocalError, match="generate was ended by SIGSEGV"):
        run_pipeline(new_run, "generate", start_stage=lambda _run, _stage: -signal.SIGSEGV)
    assert json.loads(new_run.file(".in_flight.json").read_text())["crashes"] == {}


def test_a_reason_of_an_earlier_call_is_forgotten(new_run: Run) -> None:
    new_run.file(REASON_FILE).write_text("earlier")
    with pytest.raises(SgLocalError, match="did not finish"):
        run_pipeline(new_run, "generate", start_stage=lambda _run, _stage: 1)
    assert reason_of_failure(new_run) is None


def test_the_card_is_tried_before_any_data_is_made(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def unusable(_work: str, function: str, **arguments: str) -> None:
        tried.append((function, arguments))
        raise InputError("training cannot use it")

    monkeypatch.setattr("sg_local.runs.pipeline.card_in_use", lambda: "NVIDIA Z")
    monkeypatch.setattr("sg_local.runs.pipeline.result_from_child", unusable)
    stages: list[str] = []
    with pytest.raises(InputError, match="training cannot use it"):
        run_pipeline(new_run, start_stage=lambda _run, stage: stages.append(stage) or 0)  # type: ignore[func-returns-value]
    trainer = new_run.settings.trainer
    assert tried == [("sg_local.finetune.load.try_card", {"card": "NVIDIA Z", "trainer": trainer})]
    assert not stages
    monkeypatch.setattr("sg_local.runs.pipeline.card_in_use", lambda: "")
    monkeypatch.setattr("sg_local.runs.pipeline.may_have_another_card", lambda: True)
    with pytest.raises(InputError, match="training cannot use it"):  # as Unsloth on a Mac
        run_pipeline(new_run, start_stage=lambda _run, _stage: 1)
    assert tried.pop()[1] == {"card": "", "trainer": trainer}
    with pytest.raises(SgLocalError):  # what does not train needs no card
        run_pipeline(new_run, "curate", start_stage=lambda _run, _stage: 1)
    assert len(tried) == 1
