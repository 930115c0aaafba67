"""`sg-local run`: a finished run, a changed call, and everything that is refused before a run begins."""

import errno
import json
import os
from pathlib import Path

import pytest
from command_line import Call, Contents, given, in_a_process, one_line
from finished_run import HEADER, TENSORS
from gguf_bytes import tiny_gguf

from sg_local.files import write_rows
from sg_local.run.directory import Run


def test_a_finished_run_says_so_and_shows_its_result(
    sg: Call, finished_run: Run, task: Path, contents: Contents
) -> None:
    before = contents(finished_run.path)
    result = sg(*given(finished_run, task))
    assert result.exit_code == 0
    assert "is finished, nothing to do" in result.stderr
    assert "tuned_merged" in result.stdout
    assert "+0.500" in result.stdout
    for name in ("adapter.gguf", "model.gguf", "Modelfile"):
        assert str(finished_run.file(name)) in result.stdout
    assert contents(finished_run.path) == before


def test_the_result_as_json(sg: Call, finished_run: Run, task: Path) -> None:
    result = sg(*given(finished_run, task), "--json")
    assert json.loads(result.stdout)["gain"]["verdict"] == "better"


def test_a_finished_part_says_so(sg: Call, finished_run: Run, task: Path) -> None:
    result = sg(*given(finished_run, task), "--until=curate")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "is finished until curate, nothing to do" in result.stderr


@pytest.mark.parametrize(
    ("interval", "verdict", "exit_code"),
    [
        ([-0.8, -0.2], "worse", 3),
        ([-0.8, -0.2], "no difference shown", 0),  # the test decides
        ([-0.2, 0.1], "no difference shown", 0),
        ([0.2, 0.8], "better", 0),
    ],
)
def test_the_gate(
    sg: Call, finished_run: Run, task: Path, interval: list[float], verdict: str, exit_code: int
) -> None:
    path = finished_run.file("evaluation.json")
    evaluation = json.loads(path.read_text())
    evaluation["gain_over_best"] |= {"interval_95": interval, "verdict": verdict}
    path.write_text(json.dumps(evaluation))
    assert sg(*given(finished_run, task)).exit_code == 0
    result = sg(*given(finished_run, task), "--gate")
    assert result.exit_code == exit_code
    assert "tuned_merged" in result.stdout
    assert ("significantly worse" in result.stderr) == (exit_code == 3)


def test_a_gate_before_there_are_scores(sg: Call, finished_run: Run, task: Path) -> None:
    line = one_line(sg(*given(finished_run, task), "--gate", "--until=train"), 2)
    assert "--until train stops before them" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--n-inputs=8"],
            "was begun with --n-inputs 7, and is called with --n-inputs 8: call it as it was begun",
        ),
        (["--preset=quick"], "--max-new-tokens 128"),
        (["--load-in-4bit"], "was begun with --no-load-in-4bit, and is called with --load-in-4bit"),
        (["--prompt-format=vicuna"], "the prompt format gguf"),
    ],
)
def test_a_changed_setting_is_named(
    sg: Call, finished_run: Run, task: Path, contents: Contents, arguments: list[str], told: str
) -> None:
    before = contents(finished_run.path)
    line = one_line(sg(*given(finished_run, task), *arguments), 2)
    assert told in line
    assert "--run DIR" in line
    assert contents(finished_run.path) == before


def test_the_run_of_another_task_or_model(sg: Call, finished_run: Run, task: Path, tmp_path: Path) -> None:
    line = one_line(sg(*given(finished_run, Path("support-inbox"))), 2)
    assert "was begun with the task inbox, and is called with the task support-inbox" in line
    other = tmp_path / "other.gguf"
    other.write_bytes(finished_run.model.path.read_bytes() + bytes(32))
    line = one_line(sg(*given(finished_run, task), "--model", other), 2)
    assert f"and is called with the model {other}" in line


def test_new_test_rows_are_noticed(sg: Call, finished_run: Run, task: Path) -> None:
    write_rows(task.with_name("inbox.test.jsonl"), [{"input": "New.", "output": "login"}])
    assert "is called with other test rows" in one_line(sg(*given(finished_run, task)), 2)


def test_a_directory_that_cannot_be_a_run(sg: Call, model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    line = one_line(sg("run", task, "--model", model, "--run", tmp_path / "photos"), 2)
    assert "holds other files (cat.jpg) and is no run: choose another directory" in line
    line = one_line(sg("run", task, "--model", model, "--run", model / "run"), 1)
    assert "cannot be made (Not a directory): choose another directory" in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(sg: Call, model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "choose another directory" in one_line(
        sg("run", task, "--model", model, "--run", tmp_path / "locked/run"), 1
    )
    assert "choose another directory" in one_line(
        sg("run", task, "--model", model, "--run", tmp_path / "locked"), 1
    )


def test_a_full_disk_is_told_and_the_second_call_goes_on(
    sg: Call, model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["run", task, "--model", model, "--run", tmp_path / "run", "--until=generate"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = one_line(sg(*arguments), 1)
    assert "could not be written: No space left on device: free some space on this disk" in line
    assert not (tmp_path / "run/settings.toml").exists()
    monkeypatch.setattr("sg_local.run.process.in_child_process", lambda _run, _stage: 0)
    result = sg(*arguments)
    assert result.exit_code == 0
    assert "new run" in result.stderr


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "is missing: give the path of a GGUF file"),
        (b"", "is empty; download it again"),
        (b"<!doctype html>", "is not a GGUF file"),
        (tiny_gguf(HEADER, TENSORS)[:-9], "truncated"),
        (
            tiny_gguf({**HEADER, "general.type": "adapter"}, TENSORS),
            "is a LoRA adapter, not a model; give the base",
        ),
        (tiny_gguf({**HEADER, "general.architecture": "mamba"}, TENSORS), "has the architecture 'mamba'"),
        (tiny_gguf(HEADER), "holds a vocabulary only, no tensors"),
        (tiny_gguf(HEADER, TENSORS), "carries no chat template: say `--prompt-format vicuna` if"),
    ],
    ids=["missing", "empty", "not a GGUF", "truncated", "adapter", "architecture", "vocabulary", "template"],
)
def test_a_model_that_is_none(sg: Call, task: Path, tmp_path: Path, data: bytes | None, told: str) -> None:
    path = tmp_path / "bad.gguf"
    if data is not None:
        path.write_bytes(data)
    line = one_line(sg("run", task, "--model", path), 2)
    assert str(path) in line
    assert told in line
    assert not Path("runs").exists()


def test_a_model_that_was_not_pulled(sg: Call, task: Path) -> None:
    line = one_line(sg("run", task, "--model", "vicuna-7b-v1.5"), 2)
    assert "run `sg-local models pull vicuna-7b-v1.5`" in line


def test_settings_out_of_bounds_are_told_at_once(sg: Call, task: Path, model: Path) -> None:
    result = sg("run", task, "--model", model, "--n-inputs=0", "--rank=9999", "--learning-rate=nan")
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    for fault in (
        "n_inputs = 0 should be at least 1",
        "rank = 9999 should be at most 512",
        "learning_rate = nan",
    ):
        assert fault in result.stderr


@pytest.mark.usefixtures("without_torch")
def test_without_torch_nothing_is_begun_that_cannot_be_finished(
    sg: Call, new_run: Run, task: Path, contents: Contents
) -> None:
    """Not after the hours that making the data takes."""
    before = contents(new_run.path)
    result = sg(*given(new_run, task))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "training needs torch" in result.stderr
    assert "pip install 'sg-local[train]'" in result.stderr
    assert "generate" not in result.stderr
    assert contents(new_run.path) == before


def test_a_stage_that_fails_is_told_once_and_the_run_is_kept(
    new_run: Run, task: Path, contents: Contents
) -> None:
    """llama.cpp refuses the model, whose header alone is right; that happens in the stage's own process."""
    before = contents(new_run.path)
    result = in_a_process(*given(new_run, task), "--until=generate")
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2
    assert str(new_run.model.path) in errors[0]
    assert (
        "generate did not finish (see above): the run is kept; `sg-local run` with the same arguments"
        in errors[1]
    )
    after = contents(new_run.path)
    assert {name: after[name] for name in before} == before


def test_a_stage_imports_nothing_from_the_directory_it_is_called_in(new_run: Run, task: Path) -> None:
    for name in ("click", "numpy", "llama_cpp", "filelock", "jinja2"):
        Path(f"{name}.py").write_text("open('imported', 'w').close()\n")
    result = in_a_process(*given(new_run, task), "--until=generate")
    assert "generate did not finish" in result.stderr
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (-9, "annotate was ended by SIGKILL (as the system does when memory runs out): the run is kept"),
        (-11, "annotate was ended by SIGSEGV: the run is kept"),
        (-4, "`sg-local doctor` tries whether llama.cpp works here at all"),
        (1, "annotate did not finish (see above): the run is kept"),
    ],
)
def test_a_stage_that_dies_is_told(
    sg: Call, finished_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    finished_run.file("outputs.jsonl").unlink()
    monkeypatch.setattr("sg_local.run.process.in_child_process", lambda _run, _stage: code)
    result = sg(*given(finished_run, task))
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr
    assert "`sg-local run` with the same arguments goes on with annotate" in result.stderr
