"""Stage 6 with a scripted engine: who is asked what, and what evaluation.json says of the answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Call
from finished_run import rewrite
from messages import assert_says
from scripted_engine import ScriptedEngine, ScriptedTokenizer

import sg_local.stages.evaluate as evaluate
from sg_local.files import read_rows, write_rows
from sg_local.llama.generation import Completion
from sg_local.report.scores import score_table
from sg_local.runs.directory import Run
from sg_local.runs.stage import run_stage
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.evaluation import gain_over_best
from sg_local.task import Example

ONE_OF_TWO = [
    {"input": "My password is lost.", "output": "login"},
    {"input": "Pay me back.", "output": "refund"},
]


def login_if_tuned(file: str, _prompt: str) -> str:
    return "login" if file in {"adapter.gguf", "model.gguf"} else "Refund, I think."


def label_logprobs(prompt: str, labels: list[str]) -> list[float]:
    """Right for both test rows, where it is shown the demonstration: login is likelier if the message names a password.

    Asked as the tuned model is, it prefers login for any.
    """
    assert labels == ["refund", "login"]
    if "I want my money back." not in prompt:
        return [-3.0, -0.05]
    return [-2.0, -0.1] if "password" in prompt else [-0.1, -2.0]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    scripted = ScriptedEngine(login_if_tuned, label_logprobs)
    scripted.replace_llama_cpp(monkeypatch)
    return scripted


@pytest.fixture
def evaluation(finished_run: Run, engine: ScriptedEngine) -> dict[str, Any]:
    """What the stage writes for the two test rows of the run, and for one that is too long."""
    with open(finished_run.file("test.jsonl"), "a") as file:
        file.write(json.dumps({"input": "long " * 50, "output": "login"}) + "\n")
    assert run_stage(finished_run, "evaluate", redo=True)
    found: dict[str, Any] = json.loads(finished_run.file("evaluation.json").read_text())
    return found


def predictions(run: Run, name: str) -> list[str]:
    return [row["prediction"] for row in read_rows(run.file(f"predictions/{name}.jsonl"))]


def test_the_base_is_scored_by_its_labels_too(evaluation: dict[str, Any], finished_run: Run) -> None:
    assert predictions(finished_run, "base_few_shot") == ["Refund, I think."] * 2 + [""]
    assert predictions(finished_run, "base_label_scoring") == ["login", "refund", ""]
    scores = evaluation["contenders"]["base_label_scoring"]
    assert scores["exact_match"]["mean"] == pytest.approx(2 / 3, abs=1e-5)
    assert scores["demonstrations"] == 1
    assert scores["served"] == finished_run.model.path.name
    assert "base_few_shot_first_line" not in evaluation["contenders"]  # all answers have one line
    assert evaluation["gain_over_label_scoring"]["over"] == "base_label_scoring"
    assert evaluation["gain_over_label_scoring"]["mean"] == pytest.approx(-1 / 3, abs=1e-5)


def test_what_is_told_of_the_labels(evaluation: dict[str, Any]) -> None:
    """The truth is login, refund, login; an answer that is too long for the context is no label."""
    told = {
        name: (scores["no_label_share"], scores["label_distance"])
        for name, scores in evaluation["contenders"].items()
    }
    third = pytest.approx(1 / 3, abs=1e-5)
    assert told["base_few_shot"] == (1.0, 1.0)
    assert told["base_label_scoring"] == (third, third)
    assert told["tuned_merged"] == (third, third)
    assert evaluation["contenders"]["base_label_scoring"]["labels"] == {
        "refund": {"rows": 1, "given": 1, "right": 1},
        "login": {"rows": 2, "given": 1, "right": 1},
    }


def test_the_tuned_model_is_asked_for_its_probabilities_as_it_was_trained(
    evaluation: dict[str, Any], finished_run: Run
) -> None:
    rows = read_rows(finished_run.file("predictions/tuned_merged.jsonl"))
    assert [row.get("label_logprobs") for row in rows] == [{"refund": -3.0, "login": -0.05}] * 2 + [None]
    told = evaluation["contenders"]["tuned_merged"]["calibration"]
    # It is 95 % sure of login twice, and right once: 0.45 too sure.
    assert told["calibration_error"] == pytest.approx(0.45, abs=0.001)
    assert [item["right"] for item in told["risk_coverage"]] == [0.5] * 3 + [1.0] * 3
    assert told["temperature"] > 5
    assert "tuned_merged, right among the surest: 100% 0.500" in score_table(finished_run)
    assert "calibration" in evaluation["contenders"]["base_label_scoring"]
    assert "calibration" not in evaluation["contenders"]["base_few_shot"]
    assert "calibration error" in evaluation["calibration_error"]


@pytest.mark.usefixtures("evaluation")
def test_the_table_tells_each_label_and_whether_one_is_given_to_all(finished_run: Run) -> None:
    lines = score_table(finished_run).splitlines()
    assert "label               rows      given  right      given  right" in lines
    assert "refund                 1          0      0          0      0" in lines
    assert "login                  2          0      0          2      1" in lines
    assert not any("does not tell these apart" in line for line in lines)

    write_rows(finished_run.file("test.jsonl"), ONE_OF_TWO)
    assert run_stage(finished_run, "evaluate", redo=True)
    told = [line for line in score_table(finished_run).splitlines() if "does not tell these apart" in line]
    assert len(told) == 1
    assert_says(told[0], "tuned_merged", "'login'", "2 of 2 rows", "1 are")


@pytest.mark.usefixtures("evaluation")
def test_scores_of_an_earlier_version_are_shown_without_labels(finished_run: Run) -> None:
    path = finished_run.file("evaluation.json")
    found = json.loads(path.read_text())
    for scores in found["contenders"].values():
        del scores["labels"]
        scores.pop("calibration", None)
    rewrite(finished_run, path.name, json.dumps(found))
    assert "tuned_merged over base_few_shot" in score_table(finished_run)
    assert "given" not in score_table(finished_run)
    assert "surest" not in score_table(finished_run)


def test_the_gain_has_a_test_and_its_verdict(evaluation: dict[str, Any], finished_run: Run) -> None:
    gain = evaluation["gain"]
    assert (gain["of"], gain["over"]) == ("tuned_merged", "base_few_shot")
    assert (gain["test"], gain["p"], gain["verdict"]) == ("McNemar, exact", 1.0, "no difference shown")
    lines = score_table(finished_run).splitlines()
    assert any(line.startswith("base_label_scoring ") for line in lines)
    assert lines[-3].endswith("p = 1): no difference shown")
    assert "tuned_merged over base_label_scoring: -0.333" in lines[-2]
    assert lines[-1] == "verdict, against the base's best way (base_label_scoring): no difference shown"


def test_the_strongest_opponent_is_named_and_the_first_among_equals(
    evaluation: dict[str, Any], finished_run: Run
) -> None:
    over_labels = evaluation["gain_over_label_scoring"]
    assert evaluation["gain_over_best"] == over_labels
    del evaluation["gain_over_best"]  # as an earlier version wrote it
    assert gain_over_best(evaluation) == over_labels
    rewrite(finished_run, "evaluation.json", json.dumps(evaluation))
    assert "(base_label_scoring): no difference shown" in score_table(finished_run).splitlines()[-1]
    scores = evaluation["contenders"]
    scores["base_few_shot"]["exact_match"]["mean"] = scores["base_label_scoring"]["exact_match"]["mean"]
    assert gain_over_best(evaluation) == evaluation["gain"]


@pytest.mark.usefixtures("evaluation")
def test_answers_that_are_there_are_kept_unless_they_lack_a_score(
    finished_run: Run, engine: ScriptedEngine
) -> None:
    """As after a kill, and as another version, with other metrics, left them."""
    path = finished_run.file("predictions/base_few_shot.jsonl")
    kept = finished_run.file("predictions/tuned_merged.jsonl").read_bytes()
    rows = read_rows(path)
    write_rows(path, [{key: value for key, value in row.items() if key != "rouge_l"} for row in rows])
    engine.opened.clear()
    evaluate.run_evaluate(finished_run)
    assert [opened[:2] for opened in engine.opened] == [(finished_run.model.path.name, None)]
    assert read_rows(path) == rows
    assert finished_run.file("predictions/tuned_merged.jsonl").read_bytes() == kept


def test_every_contender_that_is_expected_has_its_way_to_answer(finished_run: Run) -> None:
    free = replace(finished_run, task=replace(finished_run.task, labels=()))
    for run in (finished_run, free):
        with_labels = run.task.is_classification
        expected = {contender for contender in Contender if contender.is_expected(with_labels=with_labels)}
        assert set(evaluate.ways_to_answer(run)) == expected


@pytest.mark.usefixtures("evaluation")
def test_the_gate_fails_where_label_scoring_is_far_better_though_few_shot_is_not(
    finished_run: Run, task: Path, sg: Call
) -> None:
    """The tuned model says "login" to all. Few-shot answers of the base have 0.000: they are no labels."""
    rows = [{"input": f"Pay me {n} back.", "output": "refund"} for n in range(20)]
    for path in (finished_run.file("test.jsonl"), task.with_name("inbox.test.jsonl")):
        write_rows(path, rows)
    assert run_stage(finished_run, "evaluate", redo=True)
    found = json.loads(finished_run.file("evaluation.json").read_text())
    means = {name: scores["exact_match"]["mean"] for name, scores in found["contenders"].items()}
    assert (means["base_few_shot"], means["base_label_scoring"], means["tuned_merged"]) == (0, 1, 0)
    assert found["gain"]["verdict"] == "no difference shown"
    call = ("run", task, "--model", finished_run.model.path, "--run", finished_run.path, "--n-inputs=7")
    result = sg(*call, "--gate")
    assert result.exit_code == 3
    assert "significantly worse than base_label_scoring" in result.stderr
    assert sg(*call).exit_code == 0


@pytest.mark.usefixtures("evaluation")
def test_free_answers_have_no_labels_to_score(finished_run: Run) -> None:
    free = replace(finished_run, task=replace(finished_run.task, labels=()))
    run_stage(free, "evaluate", redo=True)
    found = json.loads(free.file("evaluation.json").read_text())
    assert "base_label_scoring" not in found["contenders"]
    assert "gain_over_label_scoring" not in found
    assert "label_distance" not in found["contenders"]["tuned_merged"]
    assert found["gain"]["test"] == "sign changes of the differences"
    assert found["gain_over_best"] == found["gain"]


@pytest.mark.usefixtures("evaluation")
def test_few_shot_answers_that_go_on_are_scored_by_their_first_line_too(
    finished_run: Run, engine: ScriptedEngine
) -> None:
    """As those of a model that was never tuned to chats; "login" is right for one row, and one does not fit."""

    def going_on(file: str, prompt: str) -> str | Completion:
        tuned_answer = login_if_tuned(file, prompt)
        return (
            tuned_answer
            if tuned_answer == "login"
            else Completion("login \nInput: and so on", (1,), "length")
        )

    engine.answer = going_on
    assert run_stage(finished_run, "evaluate", redo=True)
    found = json.loads(finished_run.file("evaluation.json").read_text())
    few_shot, first_line = (
        found["contenders"][name] for name in ("base_few_shot", "base_few_shot_first_line")
    )
    third = pytest.approx(1 / 3, abs=1e-5)
    assert (few_shot["exact_match"]["mean"], few_shot["no_label_share"]) == (0, 1)
    assert (first_line["exact_match"]["mean"], first_line["no_label_share"]) == (third, third)
    assert first_line["demonstrations"] == 1
    assert predictions(finished_run, "base_few_shot_first_line") == ["login", "login", ""]
    assert finished_run.is_finished("evaluate")
    assert found["gain_over_first_line"]["mean"] == 0  # the tuned model says the same
    lines = score_table(finished_run).splitlines()
    assert "tuned_merged over base_few_shot_first_line: +0.000" in lines[-3]
    assert lines[-3].endswith("no difference shown")

    example = replace(finished_run.task.examples[0], output="refund\nof money")
    of_two_lines = replace(finished_run, task=replace(finished_run.task, labels=(), examples=(example,)))
    assert run_stage(of_two_lines, "evaluate", redo=True)
    found = json.loads(finished_run.file("evaluation.json").read_text())
    assert "gain_over_first_line" not in found


MADE = [
    ("a sure refund", "refund", 0.9, None),
    ("a dropped one", "refund", 1.0, "low_confidence"),
    ("a doubtful one", "refund", 0.2, None),
    ("another refund", "refund", 0.7, None),
    ("the only login", "login", 0.1, None),
]


@pytest.mark.parametrize(
    ("n_ctx_train", "wanted"),
    [
        (4000, ["a sure refund", "the only login", "another refund", "a doubtful one"]),
        (
            250,
            ["a sure refund", "the only login"],
        ),  # of 250, 100 for an answer, 89 for the rest: 61, and 21 a pair
        (100, []),
    ],
)
def test_many_shots_are_each_label_in_turn_the_surest_first_as_many_as_fit(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, n_ctx_train: int, wanted: list[str]
) -> None:
    @contextmanager
    def load_model(_path: object, *, vocab_only: bool) -> Iterator[SimpleNamespace]:
        assert vocab_only
        yield SimpleNamespace(n_ctx_train=n_ctx_train)

    monkeypatch.setattr(evaluate, "load_model", load_model)
    monkeypatch.setattr(evaluate, "Tokenizer", lambda _model: ScriptedTokenizer())
    common = {"confidence": 1.0, "targets": None, "copies": 1, "drop": None}
    gold = {**common, "id": "demonstration-1", "input": "I want my money back.", "output": "refund"}
    made = [
        {**common, "id": number, "input": text, "output": label, "confidence": confidence, "drop": drop}
        for number, (text, label, confidence, drop) in enumerate(MADE)
    ]
    write_rows(finished_run.file("train.jsonl"), [gold, *made])
    run = replace(finished_run, settings=replace(finished_run.settings, max_new_tokens=100))
    rows = [Example("Pay.", "refund"), Example("My password is wrong, help me.", "login")]
    found = evaluate.many_shots(run, rows)
    assert [shown.input for shown in found] == [*wanted, "I want my money back."]
