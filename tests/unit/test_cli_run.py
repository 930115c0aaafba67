"""`sg-local run`: a finished run, a changed call, and everything that is refused before a run begins."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Call, Contents, given, in_a_process, one_line
from finished_run import HEADER, MODEL, TENSORS, ScriptedStages, rewrite
from gguf_bytes import Value, tiny_gguf
from messages import assert_says

from sg_local.errors import InputError
from sg_local.files import write_rows
from sg_local.report.scores import read_evaluation, read_predictions, score_table, worse_than
from sg_local.runs.begin import read_model, say_about_export
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import Contender
from sg_local.settings import STAGES, Settings
from sg_local.task import Example, Task


def test_a_finished_run_says_so_and_shows_its_result(
    sg: Call, finished_run: Run, task: Path, contents: Contents
) -> None:
    before = contents(finished_run.path)
    result = sg(*given(finished_run, task))
    assert result.exit_code == 0
    assert "is finished" in result.stderr
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
    assert "is finished until curate" in result.stderr


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
    rewrite(finished_run, path.name, json.dumps(evaluation))
    assert sg(*given(finished_run, task)).exit_code == 0
    result = sg(*given(finished_run, task), "--gate")
    assert result.exit_code == exit_code
    assert "tuned_merged" in result.stdout
    assert ("significantly worse" in result.stderr) == (exit_code == 3)


def test_a_gate_before_there_are_scores(sg: Call, finished_run: Run, task: Path) -> None:
    line = one_line(sg(*given(finished_run, task), "--gate", "--until=train"), 2)
    assert_says(line, "--gate", "--until train")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--n-inputs=8"], ["begun with --n-inputs 7,", "called with --n-inputs 8:"]),
        (["--preset=quick"], ["--max-new-tokens 128"]),
        (["--load-in-4bit"], ["begun with --no-load-in-4bit,", "called with --load-in-4bit:"]),
        (["--prompt-format=vicuna"], ["prompt format gguf,", "prompt format vicuna:"]),
    ],
)
def test_a_changed_setting_is_named(
    sg: Call, finished_run: Run, task: Path, contents: Contents, arguments: list[str], told: list[str]
) -> None:
    before = contents(finished_run.path)
    line = one_line(sg(*given(finished_run, task), *arguments), 2)
    assert_says(line, *told, "--run DIR")
    assert contents(finished_run.path) == before


def test_the_run_of_another_task_or_model(sg: Call, finished_run: Run, task: Path, tmp_path: Path) -> None:
    line = one_line(sg(*given(finished_run, Path("support-inbox"))), 2)
    assert_says(line, "begun with the task inbox,", "called with the task support-inbox")
    other = tmp_path / "other.gguf"
    other.write_bytes(finished_run.model.path.read_bytes() + bytes(32))
    line = one_line(sg(*given(finished_run, task), "--model", other), 2)
    assert f"called with the model {other}" in line


def test_new_test_rows_are_noticed(sg: Call, finished_run: Run, task: Path) -> None:
    write_rows(task.with_name("inbox.test.jsonl"), [{"input": "New.", "output": "login"}])
    assert "called with other test rows" in one_line(sg(*given(finished_run, task)), 2)


def test_a_directory_that_cannot_be_a_run(sg: Call, model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    line = one_line(sg("run", task, "--model", model, "--run", tmp_path / "photos"), 2)
    assert_says(line, tmp_path / "photos", "cat.jpg", "choose another directory")
    line = one_line(sg("run", task, "--model", model, "--run", model / "run"), 1)
    assert_says(line, model / "run", "Not a directory", "choose another directory")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(sg: Call, model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    for place in (tmp_path / "locked/run", tmp_path / "locked"):
        line = one_line(sg("run", task, "--model", model, "--run", place), 1)
        assert_says(line, place, "choose another directory")


def test_a_full_disk_is_told_and_the_second_call_goes_on(
    sg: Call, model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["run", task, "--model", model, "--run", tmp_path / "run", "--until=generate"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = one_line(sg(*arguments), 1)
    assert_says(line, "No space left on device", "free some space")
    assert not (tmp_path / "run/settings.toml").exists()
    monkeypatch.setattr("sg_local.runs.process.in_child_process", lambda _run, _stage: 0)
    result = sg(*arguments)
    assert result.exit_code == 0
    assert "new run" in result.stderr


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, ["is missing", "GGUF file"]),
        (b"", ["is empty", "download it again"]),
        (b"<!doctype html>", ["is not a GGUF file"]),
        (tiny_gguf(HEADER, TENSORS)[:-9], ["truncated"]),
        (
            tiny_gguf({**HEADER, "general.type": "adapter"}, TENSORS),
            ["is a LoRA adapter, not a model"],
        ),
        (tiny_gguf({**HEADER, "general.architecture": "mamba"}, TENSORS), ["the architecture 'mamba'"]),
        (tiny_gguf(HEADER), ["vocabulary only"]),
        (tiny_gguf(HEADER, TENSORS), ["chat template", "`--prompt-format vicuna`"]),
    ],
    ids=["missing", "empty", "not a GGUF", "truncated", "adapter", "architecture", "vocabulary", "template"],
)
def test_a_model_that_is_none(
    sg: Call, task: Path, tmp_path: Path, data: bytes | None, told: list[str]
) -> None:
    path = tmp_path / "bad.gguf"
    if data is not None:
        path.write_bytes(data)
    line = one_line(sg("run", task, "--model", path), 2)
    assert_says(line, path, *told)
    assert not Path("runs").exists()


def test_a_model_that_was_not_pulled(sg: Call, task: Path) -> None:
    line = one_line(sg("run", task, "--model", "vicuna-7b-v1.5"), 2)
    assert "run `sg-local models pull vicuna-7b-v1.5`" in line


def test_settings_out_of_bounds_are_told_at_once(sg: Call, task: Path, model: Path) -> None:
    result = sg("run", task, "--model", model, "--n-inputs=0", "--rank=9999", "--learning-rate=nan")
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    for fault in (
        ("n_inputs = 0 ", "at least 1"),
        ("rank = 9999 ", "at most 512"),
        ("learning_rate = nan ", "finite"),
    ):
        assert any(all(part in line for part in fault) for line in result.stderr.splitlines()), fault


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
    assert_says(errors[1], "generate did not finish", "kept", "`sg-local run` with the same arguments")
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
        (-9, ["SIGKILL", "memory runs out"]),
        (-11, ["SIGSEGV", "`sg-local doctor`"]),
        (-4, ["SIGILL", "`sg-local doctor`"]),
        (1, ["annotate did not finish"]),
    ],
)
def test_a_stage_that_dies_is_told(
    sg: Call, finished_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: list[str]
) -> None:
    finished_run.file("outputs.jsonl").unlink()
    monkeypatch.setattr("sg_local.runs.process.in_child_process", lambda _run, _stage: code)
    result = sg(*given(finished_run, task))
    assert (result.exit_code, result.stdout) == (1, "")
    error = result.stderr.splitlines()[-1]
    assert_says(error, *told, "kept", "`sg-local run` with the same arguments goes on with annotate")
    assert ("doctor" in error) == (code in (-11, -4))


EDITS: list[Callable[[str], str]] = [
    lambda _text: "{}",
    lambda _text: "",
    lambda text: text[:200],
    lambda text: text.replace('"better"', '"worse"'),
    lambda text: text.replace("0.5", "0.9"),
]


@pytest.mark.parametrize("edit", EDITS)
def test_scores_that_were_changed_by_hand_are_not_believed(
    finished_run: Run, edit: Callable[[str], str]
) -> None:
    """Not by the readers; `run` and `evaluate` score the answers again."""
    told = f"evaluation.json is not as it was written: `sg-local evaluate {finished_run.path}`"
    path = finished_run.file("evaluation.json")
    path.write_text(edit(path.read_text()))
    assert not finished_run.is_finished("evaluate")
    for read in (score_table, worse_than, read_evaluation):
        with pytest.raises(InputError, match=re.escape(told)):
            read(finished_run)
    row = finished_run.file("predictions/tuned_merged.jsonl")
    row.write_text(row.read_text().replace("login", "refund"))
    with pytest.raises(InputError, match=r"tuned_merged\.jsonl is not as it was written"):
        read_predictions(finished_run, Contender.TUNED_MERGED)


@pytest.mark.parametrize(
    "name", ["evaluation.json", "model.gguf", "adapter.gguf", "adapter/adapter_model.safetensors"]
)
def test_a_run_with_a_damaged_file_is_not_finished(
    sg: Call, finished_run: Run, task: Path, stages: ScriptedStages, name: str
) -> None:
    finished_run.file(name).write_bytes(finished_run.file(name).read_bytes()[:20])
    result = sg(*given(finished_run, task))
    assert result.exit_code == 0
    assert "nothing to do" not in result.stderr
    assert_says(result.stderr, name, "not as it was written")
    first = {"evaluation.json": "evaluate", "model.gguf": "export", "adapter.gguf": "export"}.get(
        name, "train"
    )
    assert [stage for _, stage in stages.ran] == list(STAGES[STAGES.index(first) :])
    assert finished_run.is_finished("evaluate")


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_template_that_fills_the_context_is_refused_before_anything_is_written(
    sg: Call, task: Path, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "long.gguf"
    template = "{% for m in messages %}{{ m.content }}{{ 'x ' * 4200 }}{% endfor %}"
    path.write_bytes(tiny_gguf({**MODEL, "tokenizer.chat_template": template}, TENSORS))
    line = one_line(sg(command, task.parent if command == "bench" else task, "--model", path), 2)
    assert_says(line, "chat template alone", 8401, "512 tokens", "a GGUF with a shorter template")
    assert not Path("runs").exists()
    assert not Path("benches").exists()


def test_a_template_that_other_programs_would_render_otherwise_is_refused_before_anything_is_written(
    sg: Call, task: Path, tmp_path: Path
) -> None:
    path = tmp_path / "dated.gguf"
    template = (
        "{% set form = '%Y' %}{{ strftime_now(form) }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    path.write_bytes(tiny_gguf({**MODEL, "tokenizer.chat_template": template}, TENSORS))
    line = one_line(sg("run", task, "--model", path), 2)
    assert_says(line, path, "other programs", "as transformers calls it, it writes '1999", "of '2024")
    assert not Path("runs").exists()


def test_control_tokens_in_a_task_are_told_when_the_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "control.gguf"
    vocabulary: dict[str, Value] = {
        "tokenizer.ggml.tokens": ["a", "<|end|>", "plain"],
        "tokenizer.ggml.token_type": [1, 3, 4],
    }
    path.write_bytes(tiny_gguf({**MODEL, **vocabulary}, TENSORS))
    for instruction, told in (("Write a plain answer.", ""), ("End with <|end|>.", "<|end|>")):
        say_about_export(read_model(path), Settings(), [Task("t", instruction, (Example("a", "b"),))])
        said = capsys.readouterr().err
        assert ("other programs take it" in said, told in said) == (bool(told), True)
