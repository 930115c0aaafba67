"""One setting at a time: what is run again, what is copied, what is compared, and what is refused.

No model runs: a stage's process is replaced by what writes that stage's files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import Call
from finished_run import ScriptedStages, write_train_rows
from messages import assert_says

from sg_local.bench.ablation import Ablation, parse_ablations
from sg_local.errors import InputError
from sg_local.files import read_rows
from sg_local.report.ablation import BASELINES, markdown, summary
from sg_local.runs.directory import Run, open_run
from sg_local.settings import STAGES, Settings


@pytest.fixture
def bench(sg: Call, task: Path, model: Path, stages: ScriptedStages) -> Call:
    directory = task.parent / "tasks"
    directory.mkdir()
    for name in ("inbox.toml", "inbox.test.jsonl"):
        task.with_name(name).rename(directory / name)

    def call(*arguments: object) -> Result:
        return sg("bench", directory, "--model", model, "--out", "out", *arguments)

    return call


@pytest.mark.parametrize(
    ("ablation", "again"),
    [
        ("input_temperature=0.7", STAGES),
        ("n_layouts=1", STAGES[1:]),
        ("calibrate=false", STAGES[2:]),
        ("rank=8", STAGES[3:]),
        ("quant=F16", STAGES[4:]),
    ],
)
def test_only_stages_that_the_setting_reaches_run_again(
    bench: Call, stages: ScriptedStages, ablation: str, again: tuple[str, ...]
) -> None:
    assert bench().exit_code == 0
    stages.ran.clear()
    result = bench("--ablate", ablation)
    assert result.exit_code == 0, result.stderr
    name = f"ablations/{ablation}/inbox"
    assert stages.ran == [(name, stage) for stage in again]
    for stage in STAGES[: STAGES.index(again[0])]:
        for path in open_run(Path("out/inbox")).manifest()["stages"][stage]["writes"]:
            assert (Path("out") / name / path).read_bytes() == Path("out/inbox", path).read_bytes()
    assert stages.baselines_there[name] == "inbox 0"  # they do not depend on the setting
    stages.ran.clear()
    result = bench("--ablate", ablation)
    assert result.exit_code == 0
    assert "out is finished" in result.stderr
    assert stages.ran == []


@pytest.mark.parametrize("ablation", ["n_ctx=512", "max_new_tokens=9", "prompt_format=vicuna"])
def test_the_untuned_model_answers_again_where_the_setting_reaches_it(
    bench: Call, stages: ScriptedStages, ablation: str
) -> None:
    assert bench("--ablate", ablation).exit_code == 0
    assert stages.baselines_there[f"ablations/{ablation}/inbox"] is None


def test_what_was_taken_from_a_run_is_taken_again_where_the_run_was_redone(
    bench: Call, stages: ScriptedStages
) -> None:
    arguments = ("--ablate", "rank=8", "--ablate", "n_layouts=1", "--json")
    assert bench(*arguments).exit_code == 0
    run = open_run(Path("out/inbox"))
    write_train_rows(run, [{"id": 0, "input": "another pair", "output": "login"}])
    stages.ran.clear()
    alone = json.loads(bench("--json").stdout)
    # The run of rank=8 has pairs that the default has no longer; that of n_layouts=1 chose its own.
    assert [row["switch"] for row in alone["ablations"]] == ["n_layouts=1"]
    assert stages.ran == [("inbox", stage) for stage in STAGES[3:]]
    stages.ran.clear()
    again = json.loads(bench(*arguments).stdout)
    assert stages.ran == [("ablations/rank=8/inbox", stage) for stage in STAGES[3:]]
    assert [row["switch"] for row in again["ablations"]] == ["n_layouts=1", "rank=8"]
    assert [row["input"] for row in read_rows(Path("out/ablations/rank=8/inbox/train.jsonl"))] == [
        "another pair"
    ]


def test_an_interrupted_switch_goes_on_where_it_stopped(
    bench: Call, stages: ScriptedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Run, stage: str) -> int:
        if "ablations" in str(run.path) and stage == "export":
            raise KeyboardInterrupt
        return stages(run, stage)

    with monkeypatch.context() as patch:
        patch.setattr("sg_local.runs.process.in_child_process", interrupted)
        assert bench("--ablate", "n_layouts=1").exit_code == 130
    stages.ran.clear()
    assert bench("--ablate", "n_layouts=1").exit_code == 0
    assert stages.ran == [("ablations/n_layouts=1/inbox", stage) for stage in ("export", "evaluate")]


def test_only_chosen_tasks_run_with_the_switch(bench: Call, stages: ScriptedStages, task: Path) -> None:
    directory = task.parent / "tasks"
    (directory / "crates.toml").write_text(
        (directory / "inbox.toml").read_text().replace('"inbox"', '"crates"')
    )
    assert bench("--ablate", "rank=8", "--tasks", "crates").exit_code == 0
    assert {run for run, _ in stages.ran} == {"crates", "ablations/rank=8/crates"}
    result = bench("--ablate", "rank=8", "--json")
    found = json.loads(result.stdout)
    assert [row["task"] for row in found["ablations"]] == ["crates", "inbox"]
    assert found["ablations_summary"]["rank=8"]["interval_95"] == [0.25, 0.25]


def test_a_value_that_is_a_path_stays_one_directory(
    bench: Call, stages: ScriptedStages, tmp_path: Path
) -> None:
    result = bench("--ablate", "base_weights=../../weights")
    assert result.exit_code == 1  # it is told as a failed run: there are no such weights
    [place] = Path("out/ablations").iterdir()
    assert [path.name for path in place.iterdir()] == ["inbox"]
    given = open_run(place / "inbox").settings.base_weights
    assert given == str(Path("../../weights").resolve())  # from wherever it is called again
    assert f"inbox with base_weights={given}" in json.loads(Path("out/bench.json").read_text())["failed"]


def test_a_copy_that_was_set_aside_is_no_comparison(bench: Call, stages: ScriptedStages) -> None:
    assert bench("--ablate", "rank=8").exit_code == 0
    for name in ("old", "rank=08"):
        shutil.copytree("out/ablations/rank=8", f"out/ablations/{name}")
    result = bench("--json")
    assert result.exit_code == 0, result.stderr
    assert [row["switch"] for row in json.loads(result.stdout)["ablations"]] == ["rank=8"]


def test_the_difference_is_told_over_the_same_rows_with_a_paired_test(
    bench: Call, stages: ScriptedStages
) -> None:
    result = bench("--ablate", "n_layouts=1", "--ablate", "calibrate=false", "--json")
    found = json.loads(result.stdout)
    assert len(stages.ran) == 6 + 5 + 4
    [second, first] = found["ablations"]
    assert (first["switch"], first["default"], first["switched"]) == ("n_layouts=1", 0.75, 0.5)
    assert (first["difference"]["mean"], first["difference"]["verdict"]) == (0.25, "better")
    assert first["difference"]["p"] == pytest.approx(2 / 2**10, rel=1e-2)  # ten rows differ, all to one side
    assert found["ablations_summary"]["n_layouts=1"] == {"n_tasks": 1, "mean": 0.25, "interval_95": None}
    assert second["switch"] == "calibrate=false"
    table = Path("out/results.md").read_text()
    assert "| n_layouts=1 | inbox | 0.750 | 0.500 | +0.250 [" in table
    assert [row["task"] for row in found["tasks"]] == [
        "inbox"
    ]  # a run with an ablation is no task of its own


def test_baselines_are_the_demonstrations_alone_and_many_made_pairs(
    bench: Call, stages: ScriptedStages
) -> None:
    result = bench("--baselines")
    assert result.exit_code == 0, result.stderr
    name = f"ablations/{BASELINES}/inbox"
    assert [stage for run, stage in stages.ran if run == name] == list(STAGES[2:])
    [head, _, row, mean] = [line for line in result.stdout.splitlines() if line.startswith("|")][-4:]
    assert "| tuned on the demonstrations alone | gain [95 %] |" in head
    assert row.startswith("| inbox | 0.750 | 0.500 | +0.250 [")
    # The tuned model is right on 30 of 40, and with the prompt of made pairs on 10 of them: 20 rows, all one way.
    assert "| 0.250 | 9 | +0.500 [" in row
    assert row.endswith("| 1.9e-06 |")
    assert mean == "| **mean of 1** |  |  | +0.250 |  |  |  | +0.500 |  |"
    found = json.loads(Path("out/results.json").read_text())
    assert found["ablations"][0]["gain_over_many_shot"]["mean"] == 0.5
    assert found["ablations_summary"][BASELINES]["gain_over_many_shot"]["mean"] == 0.5
    assert [row["task"] for row in found["tasks"]] == ["inbox"]


def test_every_task_runs_with_more_seeds_and_their_mean_is_told(bench: Call, stages: ScriptedStages) -> None:
    stages.right_if_ablated = 24
    result = bench("--seed", "7", "--seeds", "3", "--ablate", "rank=8")
    assert result.exit_code == 0, result.stderr
    assert [run for run, stage in stages.ran if stage == "evaluate"] == [
        "inbox",
        *(f"ablations/{ablation}/inbox" for ablation in ("seed=8", "seed=9", "rank=8")),
    ]
    table = Path("out/results.md").read_text()
    assert "| task | few-shot | seed 7 | seed 8 | seed 9 | mean | gain over few-shot [95 %] |" in table
    assert "| inbox | 0.500 | 0.750 | 0.600 | 0.600 | 0.650 | +0.150 |" in table
    assert "| **mean of 1, Exact Match** |  |  |  |  |  | +0.150 |" in table
    assert "| seed=8 |" not in table  # a seed is no part of the method that would be switched off
    assert "| rank=8 | inbox |" in table
    found = json.loads(Path("out/results.json").read_text())["seeds"]
    assert found["tasks"][0]["scores"] == {"7": 0.75, "8": 0.6, "9": 0.6}
    assert found["summary"] == {"exact_match": {"n_tasks": 1, "mean": 0.15, "interval_95": None}}
    stages.ran.clear()
    assert bench("--seed", "7", "--seeds", "3").exit_code == 0
    assert stages.ran == []


def test_a_seed_that_is_missing_for_a_task_leaves_its_place_empty() -> None:
    gain = {"mean": 0.1, "interval_95": [0.0, 0.2], "p": 0.2}
    both = {"metric": "rouge_l", "default": 0.5, "difference": gain, "base_few_shot": 0.3, "seed": 0}
    rows = [
        {**both, "task": task, "switch": f"seed={seed}", "switched": 0.4}
        for task, seed in (("a", 10), ("a", 2), ("b", 2))
    ]
    lines = markdown(rows).splitlines()
    assert "| task | few-shot | seed 0 | seed 2 | seed 10 | mean | gain over few-shot [95 %] |" in lines
    assert "| a | 0.300 | 0.500 | 0.400 | 0.400 | 0.433 | +0.133 |" in lines
    assert "| b | 0.300 | 0.500 | 0.400 |  | 0.450 | +0.150 |" in lines
    assert any(line.startswith("| **mean of 2, ROUGE-L** |") for line in lines)


def test_baselines_are_added_to_a_finished_bench_and_only_they_score_many_pairs(
    bench: Call, stages: ScriptedStages
) -> None:
    assert bench("--many-shot").exit_code == 0
    stages.ran.clear()
    assert bench("--many-shot", "--baselines", "--ablate", "rank=8").exit_code == 0
    assert {run for run, _ in stages.ran} == {f"ablations/{BASELINES}/inbox", "ablations/rank=8/inbox"}
    assert open_run(Path(f"out/ablations/{BASELINES}/inbox")).settings.many_shot
    assert not open_run(Path("out/ablations/rank=8/inbox")).settings.many_shot


def test_a_switch_that_fails_does_not_stop_the_others(bench: Call, stages: ScriptedStages) -> None:
    stages.failing = {"ablations/n_layouts=1/inbox"}
    result = bench("--ablate", "n_layouts=1", "--ablate", "rank=8")
    assert result.exit_code == 1
    assert "inbox with n_layouts=1" in result.stderr
    assert list(json.loads(Path("out/bench.json").read_text())["failed"]) == ["inbox with n_layouts=1"]
    assert ("ablations/rank=8/inbox", "evaluate") in stages.ran
    stages.failing.clear()
    assert bench("--ablate", "n_layouts=1").exit_code == 0
    assert json.loads(Path("out/bench.json").read_text())["failed"] == {}


def test_all_wrong_switches_are_told_at_once(bench: Call, stages: ScriptedStages) -> None:
    result = bench(
        *(
            "--ablate",
            "n_layout=1",
            "--ablate",
            "rank=many",
            "--ablate",
            "rank=16",
            "--ablate",
            "choose_by=x",
        ),
        *("--ablate", "colour", "--ablate", "rank", "--ablate", "max_test_rows=1"),
    )
    assert result.exit_code == 2
    lines = result.stderr.removeprefix("Error: ").splitlines()
    for ablation, *told in (
        ("n_layout=1", "no setting n_layout", "did you mean n_layouts?"),
        ("rank=many", "rank = 'many'", "whole number"),
        ("rank=16", "rank has this value"),
        ("choose_by=x", "choose_by = 'x'", "information, consensus, votes"),
        ("colour", "no setting colour"),
        ("rank", "rank=VALUE"),
        ("max_test_rows=1", "max_test_rows"),
    ):
        [line] = [line for line in lines if line.startswith(f"--ablate {ablation}: ")]
        assert_says(line, *told)
    assert stages.ran == []


def test_switches_are_written_as_they_are_read() -> None:
    texts = ["calibrate=false", "calibrate", "learning_rate=1e-3", "n-layouts=1", "n_layouts=1"]
    found = parse_ablations(texts, Settings())
    assert found == [Ablation("calibrate", False), Ablation("learning_rate", 0.001), Ablation("n_layouts", 1)]
    assert [ablation.text for ablation in found] == ["calibrate=false", "learning_rate=0.001", "n_layouts=1"]
    with pytest.raises(InputError, match="there is no setting"):
        parse_ablations(["colour=red"], Settings())


def test_a_summary_has_an_interval_over_tasks() -> None:
    def row(task: str, mean: float) -> dict[str, Any]:
        return {"switch": "n_layouts=1", "task": task, "difference": {"mean": mean}}

    [found] = summary([row("a", 0.1), row("b", 0.3)]).values()
    assert (found["n_tasks"], found["mean"]) == (2, 0.2)
    low, high = found["interval_95"]
    assert low < 0 < high  # two tasks say little


def test_a_value_does_not_break_the_table() -> None:
    gain = {"mean": 0.1, "interval_95": [0.0, 0.2], "p": 0.2}
    row = {"switch": "base_weights=/a|b", "task": "a", "default": 0.5, "switched": 0.4, "difference": gain}
    lines = [line.replace("\\|", "") for line in markdown([row]).splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [7] * 4
    assert markdown([]) == ""
