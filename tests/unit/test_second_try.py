"""`sg-local run TASK --from RUN`: what is kept of the other run, what runs again, what is refused, and what says so.

No model runs: a stage's process is replaced by what writes that stage's files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Contents, given, one_line
from finished_run import ScriptedStages, write_train_rows
from messages import assert_says

from sg_local.files import read_rows, write_rows
from sg_local.runs.directory import Run, open_run
from sg_local.runs.lock import lock_run
from sg_local.runs.made_from import note_made_from, stage_key
from sg_local.settings import STAGES


@pytest.fixture
def second(sg: Call, finished_run: Run, task: Path, stages: ScriptedStages) -> Call:
    """Calls `run` with --from the finished run."""
    return lambda *arguments, **options: sg("run", task, "--from", finished_run.path, *arguments, **options)


def test_what_was_made_is_gone_on_with_where_more_is_wanted(
    second: Call, finished_run: Run, stages: ScriptedStages, contents: Contents
) -> None:
    note_made_from(finished_run.file(".generate.json"), stage_key(finished_run, "generate"))
    before = contents(finished_run.path)
    result = second("--n-inputs=9", "--run", "more")
    assert result.exit_code == 0, result.stderr
    assert f"kept of {finished_run.path}: made inputs with their answers" in result.stderr
    assert stages.ran == [("more", stage) for stage in STAGES]
    assert Path("more/.generate.json").read_bytes() == finished_run.file(".generate.json").read_bytes()
    assert contents(finished_run.path) == before
    assert "kept of" in (told := second("--seed=1", "--run", "other").stderr)
    assert "made inputs" not in told


@pytest.mark.parametrize(
    ("setting", "again"),
    [
        ("seed=1", STAGES),
        ("input_temperature=0.7", STAGES),
        ("n_layouts=1", STAGES[1:]),
        ("keep_confident=0.9", STAGES[2:]),
        ("epochs=5", STAGES[3:]),
        ("quant=F16", STAGES[4:]),
        ("max_test_rows=1", STAGES[5:]),
    ],
)
def test_stages_that_the_setting_does_not_reach_are_kept_and_say_from_where(
    second: Call,
    finished_run: Run,
    stages: ScriptedStages,
    contents: Contents,
    setting: str,
    again: tuple[str, ...],
) -> None:
    before = contents(finished_run.path)
    name, _, value = setting.partition("=")
    result = second(f"--{name.replace('_', '-')}", value)
    assert result.exit_code == 0, result.stderr
    new = open_run(finished_run.path.with_name(f"run-{setting}"))
    assert stages.ran == [(new.path.name, stage) for stage in again]
    assert (new.settings.n_inputs, str(getattr(new.settings, name))) == (7, value)
    entries = new.manifest()["stages"]
    for stage in STAGES:
        source = None if stage in again else str(finished_run.path.resolve())
        assert entries[stage].get("from_run") == source, stage
        if stage not in again:
            for path in entries[stage]["writes"]:
                assert new.file(path).read_bytes() == finished_run.file(path).read_bytes()
    assert new.is_finished(STAGES[-1])
    assert contents(finished_run.path) == before
    assert f"sg-local compare {finished_run.path} {new.path}" in result.stdout


def test_the_base_answers_again_only_where_the_setting_reaches_it(
    second: Call, finished_run: Run, stages: ScriptedStages
) -> None:
    answered = read_rows(finished_run.file("predictions/base_few_shot.jsonl"))[0]["input"]
    assert second("--epochs=5").exit_code == 0
    assert second("--max-new-tokens=9", "--run", "shorter").exit_code == 0
    assert stages.baselines_there == {"run-epochs=5": answered, "shorter": None}


def test_the_same_call_goes_on_and_then_has_nothing_to_do(
    second: Call, finished_run: Run, stages: ScriptedStages, contents: Contents
) -> None:
    stages.failing.add("new")
    assert second("--epochs=5", "--run", "new").exit_code == 1
    write_train_rows(
        finished_run, [{"id": 0, "input": "another pair", "output": "login"}]
    )  # the new run has its own
    stages.failing.clear()
    assert second("--epochs=5", "--run", "new").exit_code == 0
    assert stages.ran == [("new", stage) for stage in STAGES[3:]]
    before = contents(Path("new"))
    assert "nothing to do" in second("--epochs=5", "--run", "new").stderr
    assert contents(Path("new")) == before
    assert [row["input"] for row in read_rows(Path("new/train.jsonl"))] != ["another pair"]


def test_a_copy_that_was_interrupted_is_made_again(
    second: Call, stages: ScriptedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Run, other: Run, _stages: Any) -> None:
        shutil.copyfile(other.file("outputs.jsonl"), self.file("inputs.jsonl"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "take_over", interrupted)
        assert second("--epochs=5", "--run", "new").exit_code == 130
    assert second("--epochs=5", "--run", "new").exit_code == 0
    assert stages.ran == [("new", stage) for stage in STAGES[3:]]


def test_only_finished_stages_are_kept(second: Call, finished_run: Run, stages: ScriptedStages) -> None:
    finished_run.file("outputs.jsonl").unlink()
    result = second("--rank=8", "--run", "new")
    assert result.exit_code == 0, result.stderr
    assert stages.ran == [("new", stage) for stage in STAGES[1:]]
    assert f"kept of {finished_run.path}: generate\n" in result.stderr


@pytest.mark.parametrize(
    ("changes", "again"),
    [("instruction", STAGES), ("no test rows", STAGES[2:]), ("test rows", STAGES[5:])],
)
def test_a_changed_task_reaches_what_reads_it(
    sg: Call, finished_run: Run, task: Path, stages: ScriptedStages, changes: str, again: tuple[str, ...]
) -> None:
    if changes == "instruction":
        task.write_text(task.read_text().replace("Which box", "Which big box"))
    elif changes == "test rows":
        write_rows(task.with_name("inbox.test.jsonl"), [{"input": "New.", "output": "login"}])
    else:
        task.write_text(task.read_text().replace('test = "inbox.test.jsonl"\n', ""))
    result = sg("run", task, "--from", finished_run.path, "--run", "new")
    assert result.exit_code == 0, result.stderr
    assert stages.ran == [("new", stage) for stage in again]
    kept = ", ".join(stage for stage in STAGES if stage not in again)
    assert f"kept of {finished_run.path}: {kept or 'nothing'}" in result.stderr
    assert "out of date" not in result.stderr  # nothing is copied to be thrown away


def test_another_base_makes_everything_anew(
    second: Call, finished_run: Run, stages: ScriptedStages, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(finished_run.model.path.read_bytes() + bytes(32))
    result = second("--model", other, "--run", "new")
    assert result.exit_code == 0, result.stderr
    assert stages.ran == [("new", stage) for stage in STAGES]
    assert open_run(Path("new")).model.path == other


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ["no setting differs", "--epochs", "--run DIR"]),
        (["--run", "new"], ["nothing differs", "--epochs"]),
        (["--epochs=3", "--run", "new"], ["nothing differs"]),
        (["--epochs=5", "--preset=quick"], ["--preset", "--from", "leave one out"]),
        (["--epochs=0"], ["epochs = 0", "at least 1"]),
    ],
)
def test_what_makes_no_second_try_is_refused_and_nothing_is_left(
    second: Call, finished_run: Run, arguments: list[str], told: list[str]
) -> None:
    assert finished_run.settings.epochs == 3
    assert_says(one_line(second(*arguments), 2), *told)
    assert not Path("new").exists()
    assert not [*finished_run.path.parent.glob("run-*")]


def test_the_run_itself_is_not_its_second_try(second: Call, finished_run: Run, contents: Contents) -> None:
    before = contents(finished_run.path)
    line = one_line(second("--epochs=5", "--run", finished_run.path), 2)
    assert_says(line, finished_run.path, "choose another", "--run DIR")
    assert contents(finished_run.path) == before


def test_a_run_that_is_at_work_is_waited_for(
    second: Call, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_local.runs.lock.LOCK_SECONDS", 0.1)
    with lock_run(finished_run.path):
        result = second("--epochs=5", "--run", "new")
    assert result.exit_code == 2
    assert f"another sg-local is working on {finished_run.path}" in result.stderr
    assert second("--epochs=5", "--run", "new").exit_code == 0


def test_a_second_try_that_goes_on_does_not_need_the_other_run(
    second: Call, finished_run: Run, stages: ScriptedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_made_from(finished_run.file(".generate.json"), stage_key(finished_run, "generate"))
    assert second("--n-inputs=9", "--run", "more", "--until", "generate").exit_code == 0
    monkeypatch.setattr("sg_local.runs.lock.LOCK_SECONDS", 0.1)
    with lock_run(finished_run.path):
        result = second("--n-inputs=9", "--run", "more")
    assert result.exit_code == 0, result.stderr
    assert f"answered anew: another sg-local is working on {finished_run.path}" in result.stderr
    assert stages.ran == [("more", stage) for stage in STAGES]


def test_a_second_try_of_a_second_try_goes_on_with_what_the_first_one_made(
    second: Call, finished_run: Run, sg: Call, task: Path
) -> None:
    note_made_from(finished_run.file(".generate.json"), stage_key(finished_run, "generate"))
    assert second("--epochs=5", "--run", "longer", "--until", "train").exit_code == 0
    result = sg("run", task, "--from", "longer", "--n-inputs=9", "--run", "more", "--until", "generate")
    assert result.exit_code == 0, result.stderr
    assert "kept of longer: made inputs with their answers" in result.stderr
    assert Path("more/.generate.json").read_bytes() == finished_run.file(".generate.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--epochs=5", "--rank=8"], "--rank 8 --epochs 5"),
        (["--no-calibrate"], "--no-calibrate"),
        (["--n-inputs=8"], None),  # it reaches everything
    ],
)
def test_a_finished_run_with_other_settings_says_this_way_out(
    sg: Call, finished_run: Run, task: Path, arguments: list[str], command: str | None
) -> None:
    line = one_line(sg(*given(finished_run, task), *arguments), 2)
    if command is None:
        assert "--from" not in line
        return
    kept = "generate, annotate" + ("" if "calibrate" in command else ", curate") + ","
    assert_says(line, f"`sg-local run {task} --from {finished_run.path} {command}`", kept, "--run DIR")


def test_the_command_of_the_way_out_works(
    sg: Call, finished_run: Run, task: Path, stages: ScriptedStages
) -> None:
    line = one_line(sg(*given(finished_run, task), "--epochs=5"), 2)
    words = line.split("`")[1].split()[1:]
    assert sg(*words).exit_code == 0
    assert [stage for _, stage in stages.ran] == [*STAGES[3:]]


def test_mistyped_base_weights_leave_no_run_behind(sg: Call, task: Path, model: Path) -> None:
    line = one_line(sg("run", task, "--model", model, "--base-weights", "wieghts"), 2)
    assert_says(line, "wieghts", "is no directory")
    assert not Path("runs").exists()


def test_the_result_as_json_is_json_alone(second: Call) -> None:
    assert json.loads(second("--epochs=5", "--json").stdout)["gain"]["verdict"] == "better"
