"""What a stage reads is declared, noticed when it changes, and all that it reads."""

import builtins
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from finished_run import (
    MESSAGE,
    ScriptedStages,
    finish_run,
    review_row,
    write_inputs,
    write_outputs,
    write_stage,
)
from scripted_engine import ScriptedEngine

import sg_local.runs.directory as run_directory
from sg_local.errors import InputError
from sg_local.files import SAMPLED_BYTES, sha256_file, write_rows
from sg_local.proof.verify import verify_run
from sg_local.report.scores import read_evaluation
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, Unfinished, open_run
from sg_local.runs.pipeline import run_pipeline
from sg_local.runs.stage_files import REVIEW, STAGE_FILES
from sg_local.settings import STAGES
from sg_local.stages.curate import run_curate
from sg_local.stages.evaluate import run_evaluate
from sg_local.task import load_task

Call = Callable[..., Result]

READS = [(stage, name) for stage, files in STAGE_FILES.items() for name in files.reads]
ADAPTER_CONFIG = "adapter/adapter_config.json"
PREDICTIONS = "predictions/tuned_merged.jsonl"
WEIGHTS = {"adapter/adapter_model.safetensors", "adapter.gguf", "model.gguf"}
# What a run of the version before this table recorded.
EARLIER_READS = {
    "generate": ["task.toml"],
    "annotate": ["inputs.jsonl"],
    "curate": ["inputs.jsonl", "outputs.jsonl"],
    "train": ["train.jsonl"],
    "export": ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    "evaluate": ["test.jsonl", "adapter.gguf", "model.gguf"],
}


@pytest.fixture
def task(task: Path) -> Path:
    """With all the files that a task may name."""
    line = 'test = "inbox.test.jsonl"\n'
    task.write_text(
        task.read_text().replace(line, f'{line}inputs = "inbox.txt"\nlabelled = "inbox.labelled.jsonl"\n')
    )
    task.with_name("inbox.txt").write_text("were is my money\n")
    write_rows(task.with_name("inbox.labelled.jsonl"), [{"input": "Let me in!", "output": "login"}])
    return task


@pytest.fixture
def reviewed_run(new_run: Run) -> Run:
    """A finished one with a person's word on its row."""
    write_rows(new_run.file(REVIEW), [review_row(0, MESSAGE, "answer", "refund", model_output="login")])
    finish_run(new_run)
    return new_run


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def finished_stages(run: Run) -> list[str]:
    return [stage for stage in STAGES if run.is_finished(stage)]


def test_stages_read_what_earlier_ones_wrote_or_the_run_began_with() -> None:
    there = {"task.toml", "test.jsonl", "given.jsonl", "labelled.jsonl", "review.jsonl"}
    for files in STAGE_FILES.values():
        assert set(files.reads) | set(files.looks_for) <= there
        there |= set(files.writes)


@pytest.mark.parametrize(("stage", "name"), READS)
def test_the_manifest_has_what_a_stage_read_and_wrote(reviewed_run: Run, stage: str, name: str) -> None:
    entry = reviewed_run.manifest()["stages"][stage]
    assert len(entry["reads"][name]) == 64
    assert set(entry["reads"]) == set(STAGE_FILES[stage].reads)
    patterns = STAGE_FILES[stage].writes
    assert all(any(Path(written).match(pattern) for pattern in patterns) for written in entry["writes"])
    assert all(any(Path(written).match(pattern) for written in entry["writes"]) for pattern in patterns)


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, name in READS if name not in WEIGHTS | {ADAPTER_CONFIG}]
)
def test_a_changed_file_makes_the_first_stage_that_read_it_out_of_date(
    reviewed_run: Run, stage: str, name: str
) -> None:
    edit(reviewed_run.file(name))
    first = next(reader for reader, other in READS if other == name)
    assert reviewed_run.first_unfinished() == Unfinished(first, f"is out of date ({name} was changed since)")
    assert stage not in finished_stages(reviewed_run)


@pytest.mark.parametrize("name", sorted(WEIGHTS | {ADAPTER_CONFIG, "evaluation.json", PREDICTIONS}))
@pytest.mark.parametrize("damage", [edit, empty, lambda path: path.write_bytes(b"x" * path.stat().st_size)])
def test_what_no_person_edits_has_to_stay_as_it_was_written(
    finished_run: Run, name: str, damage: Callable[[Path], object]
) -> None:
    damage(finished_run.file(name))
    stage = next(stage for stage, files in STAGE_FILES.items() if matches(name, files.writes))
    reason = f"is not finished ({name} is not as it was written)"
    assert finished_run.first_unfinished() == Unfinished(stage, reason)
    with pytest.raises(Exception, match=f"{name} is not what {stage} wrote"):
        list(verify_run(finished_run, with_parity=False))


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, files in STAGE_FILES.items() for name in files.editable]
)
def test_what_a_person_may_edit_is_not_made_again_unless_it_is_empty(
    finished_run: Run, stage: str, name: str
) -> None:
    edit(finished_run.file(name))
    assert finished_run.is_finished(stage)
    empty(finished_run.file(name))
    assert finished_run.first_unfinished() == Unfinished(stage, f"is not finished ({name} is empty)")


def test_what_was_taken_back_is_not_shown(finished_run: Run) -> None:
    finished_run.forget_from("train", keep_partial=False)
    assert finished_run.file("evaluation.json").exists()
    with pytest.raises(InputError, match=r"not finished: `sg-local evaluate .* makes it"):
        read_evaluation(finished_run)


def test_large_files_are_looked_at_in_samples(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished_run.file("model.gguf")
    with finished_run.stage("export"):
        path.write_bytes(bytes(range(256)) * (SAMPLED_BYTES // 128))
    write_stage(finished_run, "evaluate")
    monkeypatch.setattr(
        run_directory,
        "sha256_file",
        lambda path: pytest.fail(path) if path.suffix == ".gguf" else sha256_file(path),
    )
    assert finished_run.first_unfinished() is None
    whole = path.read_bytes()
    for damaged in (
        whole[:200],
        whole[:-1],
        whole + b"\0",
        b"?" + whole[1:],
        whole[:-1] + b"?",
        bytes(len(whole)),
        whole[: len(whole) // 2] + bytes(len(whole) // 2),
    ):
        path.write_bytes(damaged)
        assert finished_run.first_unfinished() is not None
    path.write_bytes(whole)
    assert finished_run.first_unfinished() is None


def test_large_files_of_an_earlier_version_are_left_to_verify(finished_run: Run) -> None:
    with finished_run.stage("export"):
        finished_run.file("model.gguf").write_bytes(bytes(SAMPLED_BYTES + 9))
    write_stage(finished_run, "evaluate")
    record_less(finished_run)
    assert finished_run.first_unfinished() is None
    finished_run.file("model.gguf").write_bytes(bytes(SAMPLED_BYTES + 1))
    assert finished_run.first_unfinished() is None
    finished_run.file("model.gguf").write_bytes(bytes(200))
    assert finished_run.first_unfinished() is not None


def test_another_base_in_the_settings_is_noticed(finished_run: Run) -> None:
    path = finished_run.file("settings.toml")
    path.write_text(path.read_text().replace('prompt_format = "gguf"', 'prompt_format = "vicuna"'))
    reason = "is out of date (the base in settings.toml was changed since)"
    assert open_run(finished_run.path).first_unfinished() == Unfinished("generate", reason)


def test_new_test_rows_cost_an_evaluation_and_no_training(finished_run: Run) -> None:
    write_rows(finished_run.file("test.jsonl"), [{"input": "New.", "output": "login"}])
    assert finished_stages(finished_run) == list(STAGES[:-1])


def test_test_rows_that_come_or_go_are_noticed_by_curate(finished_run: Run) -> None:
    """Without any, curate holds rows out, which are then not trained on."""
    rows = finished_run.file("test.jsonl").read_bytes()
    finished_run.file("test.jsonl").unlink()
    assert finished_run.first_unfinished() == Unfinished(
        "curate", "is out of date (test.jsonl was removed since)"
    )
    with pytest.raises(Exception, match=r"test\.jsonl is gone since curate ran"):
        list(verify_run(finished_run, with_parity=False))
    finish_run(finished_run)
    assert "test.jsonl" not in finished_run.manifest()["stages"]["evaluate"]["reads"]
    assert finished_run.is_finished(STAGES[-1])
    finished_run.file("test.jsonl").write_bytes(rows)
    assert finished_run.first_unfinished() == Unfinished(
        "curate", "is out of date (test.jsonl was added since)"
    )
    with pytest.raises(Exception, match=r"test\.jsonl was not there when curate ran"):
        list(verify_run(finished_run, with_parity=False))


def test_what_is_edited_while_a_stage_works_was_not_read(finished_run: Run) -> None:
    with finished_run.stage("evaluate"):
        edit(finished_run.file("train.jsonl"))
    assert finished_run.first_unfinished() == Unfinished(
        "train", "is out of date (train.jsonl was changed since)"
    )
    assert (
        finished_run.manifest()["stages"]["evaluate"]["reads"]["train.jsonl"]
        == finished_run.manifest()["stages"]["train"]["reads"]["train.jsonl"]
    )


def test_verify_reports_a_file_once_with_the_stage_that_read_it_first(finished_run: Run) -> None:
    edit(finished_run.file("task.toml"))
    with pytest.raises(Exception, match=r"task\.toml is not what generate read") as caught:
        list(verify_run(finished_run, with_parity=False))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "stage"),
    [
        ("n_threads = 0", "n_threads = 2", "generate"),
        ("rank = 16", "rank = 8", "train"),
        ('quant = "auto"', 'quant = "Q8_0"', "export"),
    ],
)
def test_a_changed_setting_makes_the_first_stage_that_may_read_it_out_of_date(
    finished_run: Run, old: str, new: str, stage: str
) -> None:
    path = finished_run.file("settings.toml")
    path.write_text(path.read_text().replace(old, new))
    name = old.split()[0]
    run = open_run(finished_run.path)
    assert run.first_unfinished() == Unfinished(
        stage, f"is out of date ({name} in settings.toml was changed since)"
    )
    with pytest.raises(Exception, match=f"settings.toml is not what {stage} ran with"):
        list(verify_run(run, with_parity=False))


def test_a_setting_that_is_not_recorded_had_its_default(finished_run: Run) -> None:
    """It came with a later version than the stage ran in."""
    manifest = finished_run.manifest()
    for entry in manifest["stages"].values():
        del entry["settings"]["n_threads"]
    finished_run.file("manifest.json").write_text(json.dumps(manifest))
    assert finished_run.is_finished(STAGES[-1])
    path = finished_run.file("settings.toml")
    path.write_text(path.read_text().replace("n_threads = 0", "n_threads = 2"))
    assert not open_run(finished_run.path).is_finished("generate")


def test_a_run_of_an_ablation_is_verified_by_what_each_stage_could_read(
    finished_run: Run, tmp_path: Path, task: Path
) -> None:
    settings = replace(finished_run.settings, rank=8)
    other, _ = create_or_open_run(tmp_path / "other", load_task(task), finished_run.model.path, settings)
    other.take_over(finished_run, STAGES[:3])
    for stage in STAGES[3:]:
        write_stage(other, stage)
    assert other.is_finished(STAGES[-1])
    assert "model.gguf" in {check.what for check in verify_run(other, with_parity=False)}


def record_less(run: Run) -> None:
    """Makes the manifest one of the version before."""
    manifest = run.manifest()
    for stage, entry in manifest["stages"].items():
        del entry["looks_for"], entry["samples"], entry["base"]
        entry["reads"] = {name: entry["reads"][name] for name in EARLIER_READS[stage]}
    run.file("manifest.json").write_text(json.dumps(manifest))


def test_a_finished_run_of_the_version_before_is_finished_shown_and_verified(
    sg: Call, finished_run: Run, task: Path
) -> None:
    record_less(finished_run)
    before = finished_run.file("manifest.json").read_bytes()
    result = sg("run", task, "--model", finished_run.model.path, "--run", finished_run.path, "--n-inputs=7")
    assert result.exit_code == 0
    assert "is finished, nothing to do" in result.stderr
    assert "tuned_merged" in result.stdout
    assert "model.gguf" in {check.what for check in verify_run(finished_run, with_parity=False)}
    assert sg("evaluate", finished_run.path).exit_code == 0
    assert finished_run.file("manifest.json").read_bytes() == before
    edit(finished_run.file("outputs.jsonl"))  # what it did record is noticed as ever
    assert finished_stages(finished_run) == ["generate", "annotate"]


def test_a_run_that_the_version_before_began_is_gone_on_with(new_run: Run) -> None:
    for stage in STAGES[:3]:
        write_stage(new_run, stage)
    record_less(new_run)
    stages = ScriptedStages()
    assert run_pipeline(new_run, start_stage=stages)
    assert [stage for _, stage in stages.ran] == list(STAGES[3:])
    assert new_run.is_finished(STAGES[-1])
    assert "model.gguf" in {check.what for check in verify_run(new_run, with_parity=False)}


class Opened:
    """The files of a run that are opened for reading, by name."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        own_open = io.open

        def noted_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if "r" in mode and isinstance(file, str | Path) and Path(file).is_relative_to(run.path):
                self.names.add(Path(file).relative_to(run.path).as_posix())
            return own_open(file, mode, *arguments, **options)

        monkeypatch.setattr(io, "open", noted_open)
        monkeypatch.setattr(builtins, "open", noted_open)


# Not of a stage: the run's own records, and what a stage goes on with or wrote itself.
OF_THE_RUN = {"settings.toml", "manifest.json", ".lock", ".in_flight.json"}


def undeclared(opened: Opened, stage: str) -> set[str]:
    files = STAGE_FILES[stage]
    own = (*files.writes, *files.pieces)
    return {
        name
        for name in opened.names - OF_THE_RUN - set(files.reads)
        if not any(Path(name).match(pattern) for pattern in own)
    }


def test_curate_reads_what_it_declares(
    tmp_path: Path, task: Path, new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": number, "input": f"I want item {number} back.", "label": "refund"} for number in range(12)]
    write_inputs(new_run, rows)
    write_outputs(
        new_run,
        [
            {"id": row["id"], "output": "refund", "label_logprobs": [{"refund": -0.1, "login": -2.5}]}
            for row in rows
        ],
    )
    opened = Opened(new_run, monkeypatch)
    run_curate(new_run)
    assert {"inputs.jsonl", "outputs.jsonl"} <= opened.names
    assert undeclared(opened, "curate") == set()


@pytest.mark.parametrize("has_test_rows", [False, True])
def test_evaluate_reads_what_it_declares(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, has_test_rows: bool
) -> None:
    ScriptedEngine(label_logprobs=lambda _prompt, _labels: [-1.0, -2.0]).replace_llama_cpp(monkeypatch)
    if not has_test_rows:  # the held-out ones are scored
        finished_run.file("test.jsonl").unlink()
        finish_run(finished_run)
        row = {"id": 0, "input": "Pay me.", "output": "refund", "drop": "held_out"}
        rows = [{**row, "confidence": None, "targets": None, "copies": 0}]
        with finished_run.stage("curate"):
            write_rows(finished_run.file("train.jsonl"), rows)
        write_stage(finished_run, "train")
        write_stage(finished_run, "export")
    opened = Opened(finished_run, monkeypatch)
    run_evaluate(finished_run)
    assert {"adapter.gguf", "model.gguf", "train.jsonl"} <= opened.names
    assert ("test.jsonl" in opened.names) == has_test_rows
    assert undeclared(opened, "evaluate") == set()


def test_another_run_takes_over_what_is_finished(finished_run: Run, tmp_path: Path, task: Path) -> None:
    other, _ = create_or_open_run(
        tmp_path / "other", load_task(task), finished_run.model.path, finished_run.settings
    )
    other.take_over(finished_run, STAGES[:4])
    assert finished_stages(open_run(other.path)) == list(STAGES[:4])
    assert other.file("adapter/adapter_config.json").read_bytes() == (
        finished_run.file("adapter/adapter_config.json").read_bytes()
    )
