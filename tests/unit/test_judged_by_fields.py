"""A task of JSON of one shape: what judges it is the same everywhere, and older runs say what judged them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Call
from finished_run import ScriptedStages, finish_run, rewrite
from messages import assert_says

from sg_local.answers import summary
from sg_local.bench.ablation import Ablation, compared
from sg_local.files import read_rows, write_rows
from sg_local.inputs import Answer, AskedRow
from sg_local.report.bench import markdown, row_of
from sg_local.report.scores import read_evaluation, scores_with_advice
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.evaluation import predictions_file
from sg_local.selfguide.fallback import choice_of
from sg_local.selfguide.metrics import Metric, metric_of
from sg_local.selfguide.served import compare
from sg_local.settings import Settings
from sg_local.task import load_task

ORDER = """name = "order"
instruction = "Write item and number as JSON."
test = "order.test.jsonl"

[[examples]]
input = "We want ten pens."
output = '{"item": "pens", "n": 10}'

[[examples]]
input = "Two cups, please."
output = '{"item": "cups", "n": 2}'
"""


@pytest.fixture
def order(tmp_path: Path) -> Path:
    """A task file with a test row."""
    path = tmp_path / "order.toml"
    path.write_text(ORDER)
    write_rows(tmp_path / "order.test.jsonl", [{"input": "Six mugs.", "output": '{"item": "mugs", "n": 6}'}])
    return path


def begun(place: Path, order: Path, model: Path, **settings: Any) -> Run:
    run, _ = create_or_open_run(place, load_task(order), model, Settings(n_inputs=7, **settings))
    finish_run(run)
    return run


@pytest.fixture
def newer(tmp_path: Path, order: Path, model: Path) -> Run:
    """A finished run of this version."""
    return begun(tmp_path / "newer", order, model, epochs=5)


@pytest.fixture
def older(tmp_path: Path, order: Path, model: Path) -> Run:
    """A finished run from before fields were compared: ROUGE-L judged it, and no score is of fields."""
    run = begun(tmp_path / "older", order, model)
    evaluation = json.loads(run.file("evaluation.json").read_text())
    by_fields = [metric for metric in Metric if metric.needs_json]
    evaluation["metric"] = Metric.ROUGE_L
    for scores in evaluation["contenders"].values():
        for metric in by_fields:
            del scores[metric]
    rewrite(run, "evaluation.json", json.dumps(evaluation))
    for contender in evaluation["contenders"]:
        name = predictions_file(Contender(contender))
        rows = [
            {key: value for key, value in row.items() if key not in by_fields}
            for row in read_rows(run.file(name))
        ]
        rewrite(run, name, "".join(f"{json.dumps(row)}\n" for row in rows))
    return run


def test_a_checked_task_says_what_judges_it(sg: Call, order: Path) -> None:
    assert_says(sg("task", "check", order).stdout, "JSON of one shape", "share_of_fields_right")
    assert json.loads(sg("task", "check", order, "--json").stdout)["metric"] == Metric.FIELDS_RIGHT


def test_every_command_says_what_judged_a_run(sg: Call, older: Run, newer: Run, order: Path) -> None:
    for run, metric in ((older, Metric.ROUGE_L), (newer, Metric.FIELDS_RIGHT)):
        assert metric_of(run.task) == Metric.FIELDS_RIGHT
        told = sg("run", order, "--model", run.model.path, "--run", run.path, *_given(run)).stdout
        assert_says(told, f"gain in {metric}")
        assert sg("report", run.path).exit_code == 0
        assert f"({metric.heading})" in run.file("report.html").read_text()
        assert sg("verify", run.path, "--no-parity").exit_code == 0
        row = row_of(read_evaluation(run), run.manifest())
        assert markdown([row], {}).splitlines()[0].endswith(f": {metric.heading}")
    listed = json.loads(sg("runs", older.path.parent, "--json").stdout)
    assert [item["metric"] for item in listed] == [Metric.FIELDS_RIGHT, Metric.ROUGE_L]


def _given(run: Run) -> tuple[object, ...]:
    return ("--n-inputs", 7, "--epochs", run.settings.epochs)


def test_an_older_run_says_how_it_is_judged_anew(older: Run, newer: Run) -> None:
    assert_says(
        scores_with_advice(older), "judged by ROUGE-L", "share of fields right", "sg-local evaluate", "--redo"
    )
    assert "--redo" not in scores_with_advice(newer)


def test_scores_by_two_metrics_do_not_compare(sg: Call, older: Run, newer: Run) -> None:
    found = json.loads(sg("compare", older.path, newer.path, "--json").stdout)
    assert (found["metric"], found["difference"], found["scores"]) == (None, None, {})
    assert_says(
        "\n".join(found["notes"]),
        f"{older.path} was judged by ROUGE-L",
        f"{newer.path} by share of fields right",
    )
    assert sg("compare", older.path, newer.path).exit_code == 0


def test_what_judges_is_compared_once(sg: Call, newer: Run) -> None:
    found = json.loads(sg("compare", newer.path, newer.path, "--json").stdout)
    assert (found["metric"], [*found["field_scores"]]) == (Metric.FIELDS_RIGHT, [Metric.ALL_FIELDS_RIGHT])
    assert found["scores"][TUNED] == [0.5, 0.5]
    assert found["difference"]["verdict"] == "no difference shown"


def test_tasks_of_another_metric_are_another_kind_in_a_table(older: Run, newer: Run) -> None:
    rows = [row_of(read_evaluation(run), run.manifest()) for run in (older, newer)]
    assert [row["kind"] for row in rows] == ["generation", "structured"]
    heads = [line for line in markdown(rows, {}).splitlines() if line.startswith("###")]
    assert heads == ["### Generation: ROUGE-L", "### Structured: share of fields right"]


def test_a_bench_compares_an_older_run_by_what_judged_it(older: Run, newer: Run) -> None:
    row = compared(Ablation("seed", 5), older, newer)
    assert (row["metric"], row["difference"]["mean"], row["base_few_shot"]) == (Metric.ROUGE_L, 0, 0.5)
    row = compared(Ablation("epochs", 5), newer, older)
    assert (row["metric"], row["difference"]["mean"]) == (Metric.FIELDS_RIGHT, 0)


def test_the_answers_of_a_server_are_judged_by_fields(older: Run) -> None:
    recorded = {TUNED: read_rows(older.file(predictions_file(TUNED)))}
    found = compare(older.task, recorded, ["login", "other"])  # type: ignore[arg-type]
    assert (found.metric, found.score, found.recorded_score) == (Metric.FIELDS_RIGHT, 0.5, 0.5)


def test_the_base_is_handed_out_by_its_fields(newer: Run) -> None:
    evaluation = json.loads(newer.file("evaluation.json").read_text())
    for name, scores in evaluation["contenders"].items():
        scores[Metric.FIELDS_RIGHT] = {"mean": 0.4 if name == TUNED else 0.6, "interval_95": [0.1, 0.9]}
        scores[Metric.ROUGE_L] = {"mean": 0.9 if name == TUNED else 0.8, "interval_95": [0.1, 0.9]}
    evaluation["gain_over_best"] |= {"mean": -0.2}
    choice = choice_of(evaluation)
    assert choice
    assert choice.in_chat == "base_few_shot"


def test_a_bench_of_json_tasks_has_a_table_of_its_own(
    sg: Call, order: Path, model: Path, stages: ScriptedStages
) -> None:
    result = sg("bench", order.parent, "--model", model, "--n-inputs", 7, "--seeds", 2)
    assert result.exit_code == 0, result.output
    assert_says(result.stdout, "### Structured: share of fields right", "order")
    assert sg("report", Path("benches") / order.parent.name).exit_code == 0


def test_a_metric_that_judges_no_task_is_damage(newer: Run, sg: Call) -> None:
    evaluation = json.loads(newer.file("evaluation.json").read_text())
    rewrite(newer, "evaluation.json", json.dumps({**evaluation, "metric": Metric.ALL_FIELDS_RIGHT}))
    assert_says(sg("report", newer.path).stderr, "is damaged", "--redo")


def test_answers_whose_right_output_is_known_are_scored_by_fields(order: Path) -> None:
    rows = [AskedRow("Six mugs.", {}, '{"item": "mugs", "n": 6}')]
    task = load_task(order)
    # What was trained without examples carries none; then the right outputs say what they are.
    for served in (task, replace(task, examples=())):
        [line] = summary(served, rows, [Answer('{"n": 6, "item": "cups"}')])
        assert_says(line, "share of fields right 0.500")
