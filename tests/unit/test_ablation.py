"""One setting at a time: what is run again, what is copied, what is compared, and what is refused.

No model runs: a stage's process is replaced by what writes that stage's files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from sg_local import ablation
from sg_local.ablation import BASELINES, Switch, parse_switches
from sg_local.errors import InputError
from sg_local.records import write_rows
from sg_local.run import Run
from sg_local.settings import STAGES, Settings
from sg_local.stages.evaluate import MANY_SHOT

Call = Callable[..., Result]

WRITES = {
    "generate": ["inputs.jsonl"],
    "annotate": ["outputs.jsonl"],
    "curate": ["train.jsonl"],
    "train": ["adapter/adapter_config.json"],
    "export": ["adapter.gguf", "model.gguf", "Modelfile"],
}
N_ROWS = 40


class Stages:
    """In place of a stage's process; the tuned model is right on 30 of 40 rows, with a switch on `right`."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []  # (run, stage)
        self.right = 20
        self.untuned_answers: dict[str, str] = {}  # run -> what evaluate found of the untuned model's answers
        self.failing: str | None = None

    def __call__(self, run: Run, stage: str) -> int:
        name = str(run.path).split("out/")[-1]
        if name == self.failing:
            return 1
        self.ran.append((name, stage))
        if stage == "evaluate":
            self._evaluate(run, name)
            return 0
        with run.stage(stage, reads=[], writes=WRITES[stage]):
            for path in WRITES[stage]:
                run.file(path).parent.mkdir(exist_ok=True)
                run.file(path).write_text(f"{name} {stage}")
        return 0

    def _evaluate(self, run: Run, name: str) -> None:
        right = self.right if "ablations" in name else 30
        untuned = run.file("predictions/base_few_shot.jsonl")
        self.untuned_answers[name] = untuned.read_text() if untuned.exists() else ""
        scores = {"mean": 0.5, "interval_95": [0.4, 0.6]}
        entry = {
            "exact_match": scores,
            "rouge_l": scores,
            "no_label_share": 0.0,
            "label_distance": 0.1,
            "demonstrations": 9,
        }
        gain = {"mean": 0.5, "interval_95": [0.2, 0.8], "p": 0.001, "verdict": "better"}
        names = ["base_zero_shot", "base_few_shot", "base_label_scoring", "tuned_adapter", "tuned_merged"]
        names += [MANY_SHOT] if run.settings.many_shot else []
        with run.stage("evaluate", reads=[], writes=["evaluation.json", "predictions/tuned_merged.jsonl"]):
            run.file("predictions").mkdir(exist_ok=True)
            untuned.write_text(f"answers of {name}\n")
            write_rows(
                run.file("predictions/tuned_merged.jsonl"),
                [{"input": f"{row}", "exact_match": float(row < right)} for row in range(N_ROWS)],
            )
            told = {
                "task": run.task.name,
                "metric": "exact_match",
                "n_rows": N_ROWS,
                "contenders": dict.fromkeys(names, entry),
                "gain": gain,
                "gain_over_label_scoring": gain,
            }
            run.file("evaluation.json").write_text(json.dumps(told))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    monkeypatch.setattr("sg_local.pipeline._in_own_process", found)
    return found


@pytest.fixture
def bench(sg: Call, task: Path, model: Path, stages: Stages) -> Call:
    directory = task.parent / "tasks"
    directory.mkdir()
    for name in ("inbox.toml", "inbox.test.jsonl"):
        task.with_name(name).rename(directory / name)

    def call(*arguments: object) -> Result:
        return sg("bench", directory, "--model", model, "--run", "out", *arguments)

    return call


@pytest.mark.parametrize(
    ("switch", "again"),
    [
        ("input_temperature=0.7", STAGES),
        ("n_layouts=1", STAGES[1:]),
        ("calibrate=false", STAGES[2:]),
        ("rank=8", STAGES[3:]),
        ("quant=F16", STAGES[4:]),
    ],
)
def test_only_stages_that_the_setting_reaches_run_again(
    bench: Call, stages: Stages, switch: str, again: tuple[str, ...]
) -> None:
    assert bench().exit_code == 0
    stages.ran.clear()
    result = bench("--ablate", switch)
    assert result.exit_code == 0, result.stderr
    name = f"ablations/{switch}/inbox"
    assert stages.ran == [(name, stage) for stage in again]
    for stage in STAGES[: STAGES.index(again[0])]:
        for path in WRITES[stage]:
            assert (Path("out") / name / path).read_text() == f"inbox {stage}"
    reused = switch.startswith("input") or stages.untuned_answers[name] == "answers of inbox\n"
    assert reused
    stages.ran.clear()
    assert bench("--ablate", switch).exit_code == 0
    assert stages.ran == []


def test_the_difference_is_told_over_the_same_rows_with_a_paired_test(bench: Call, stages: Stages) -> None:
    result = bench("--ablate", "n_layouts=1", "--ablate", "calibrate=false", "--json")
    found = json.loads(result.stdout)
    assert len(stages.ran) == 6 + 5 + 4
    [second, first] = found["ablations"]
    assert (first["switch"], first["default"], first["switched"]) == ("n_layouts=1", 0.75, 0.5)
    assert first["difference"]["mean"] == 0.25
    assert first["difference"]["p"] == pytest.approx(2 / 2**10, rel=1e-2)  # ten rows differ, all to one side
    assert found["ablations_summary"]["n_layouts=1"] == {"n_tasks": 1, "mean": 0.25, "interval_95": None}
    assert second["switch"] == "calibrate=false"
    table = Path("out/results.md").read_text()
    assert "| n_layouts=1 | inbox | 0.750 | 0.500 | +0.250 [" in table
    assert [row["task"] for row in found["tasks"]] == ["inbox"]  # a run with a switch is no task of its own


def test_baselines_are_the_demonstrations_alone_and_many_made_pairs(bench: Call, stages: Stages) -> None:
    result = bench("--baselines")
    assert result.exit_code == 0, result.stderr
    name = f"ablations/{BASELINES}/inbox"
    assert [stage for run, stage in stages.ran if run == name] == list(STAGES[2:])
    assert "| inbox | 0.750 | 0.500 | +0.250 [" in result.stdout
    assert result.stdout.rstrip().endswith("| 0.500 | 9 |")


def test_a_switch_that_fails_does_not_stop_the_others(bench: Call, stages: Stages) -> None:
    stages.failing = "ablations/n_layouts=1/inbox"
    result = bench("--ablate", "n_layouts=1", "--ablate", "rank=8")
    assert result.exit_code == 1
    assert "inbox with n_layouts=1" in result.stderr
    assert list(json.loads(Path("out/bench.json").read_text())["failed"]) == ["inbox with n_layouts=1"]
    assert ("ablations/rank=8/inbox", "evaluate") in stages.ran
    stages.failing = None
    assert bench("--ablate", "n_layouts=1").exit_code == 0
    assert json.loads(Path("out/bench.json").read_text())["failed"] == {}


def test_all_wrong_switches_are_told_at_once(bench: Call, stages: Stages) -> None:
    result = bench(
        "--ablate", "n_layout=1", "--ablate", "rank=many", "--ablate", "rank=16", "--ablate", "choose_by=x"
    )
    assert result.exit_code == 2
    for told in (
        "--ablate n_layout=1: there is no setting n_layout: did you mean n_layouts?",
        "--ablate rank=many: rank = 'many' should be a whole number",
        "--ablate rank=16: rank has this value already",
        "--ablate choose_by=x: choose_by = 'x' should be one of information, consensus, votes",
    ):
        assert told in result.stderr
    assert stages.ran == []


def test_switches_are_written_as_they_are_read() -> None:
    texts = ["calibrate=false", "learning_rate=0.001", "n-layouts=1", "n_layouts=1"]
    found = parse_switches(texts, Settings())
    assert found == [Switch("calibrate", False), Switch("learning_rate", 0.001), Switch("n_layouts", 1)]
    assert [switch.text for switch in found] == ["calibrate=false", "learning_rate=0.001", "n_layouts=1"]
    with pytest.raises(InputError, match="there is no setting"):
        parse_switches(["colour=red"], Settings())


def test_a_summary_has_an_interval_over_tasks() -> None:
    def row(task: str, mean: float) -> dict[str, Any]:
        return {"switch": "n_layouts=1", "task": task, "difference": {"mean": mean}}

    [found] = ablation.summary([row("a", 0.1), row("b", 0.3)]).values()
    assert (found["n_tasks"], found["mean"]) == (2, 0.2)
    low, high = found["interval_95"]
    assert low < 0 < high  # two tasks say little
