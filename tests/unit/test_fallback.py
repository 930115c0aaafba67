"""`run --fallback`: what is handed out where the tuned model is not better than the base. No model runs."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Contents, given, one_line
from finished_run import rewrite
from messages import assert_says
from scripted_engine import ScriptedEngine

from sg_local.errors import SgLocalError
from sg_local.proof.verify import verify_run
from sg_local.runs.directory import Run, open_run
from sg_local.selfguide.contenders import OPPONENTS, TUNED, Contender
from sg_local.selfguide.evaluation import FROM_TEST_FILE, from_made
from sg_local.selfguide.fallback import choice_of

WAY = "fallback/way.json"


def score(run: Run, means: dict[str, float], rows_from: str = FROM_TEST_FILE, verdict: str = "") -> Any:
    """Gives a run an evaluation with these means, as if `evaluate` had written it."""
    evaluation = json.loads(run.file("evaluation.json").read_text())
    contenders = evaluation["contenders"]
    for name, mean in means.items():
        template = contenders[TUNED]
        contenders[name] = {**template, "exact_match": {"mean": mean, "interval_95": [0.1, 0.9]}}
    best = max((one for one in OPPONENTS if one in means), key=lambda one: means[one])
    gain = means[TUNED] - means[best]
    verdict = verdict or ("better" if gain > 0.25 else "worse" if gain < -0.25 else "no difference shown")
    evaluation["gain_over_best"] |= {"over": best, "mean": gain, "verdict": verdict}
    evaluation["rows_from"] = rows_from
    rewrite(run, "evaluation.json", json.dumps(evaluation))
    return evaluation


FEW_SHOT_BEST = {"base_few_shot": 0.8, "base_label_scoring": 0.7, "tuned_merged": 0.6}
SCORING_BEST = {"base_few_shot": 0.7, "base_label_scoring": 0.8, "tuned_merged": 0.6}


@pytest.fixture(autouse=True)
def chat_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer: the files say what they would show."""

    def write(_run: Run, shown: Any, more_stops: Any = ()) -> tuple[str, str]:
        examples = " ".join(example.input for example in shown)
        return f"template: {examples}", f"FROM ./model.gguf\n# {examples} {[*more_stops]}\n"

    monkeypatch.setattr("sg_local.llama.chat_files.chat_files", write)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    scripted = ScriptedEngine(
        lambda file, _prompt: f"{file}\nand more", lambda _prompt, labels: [-2.0, -0.1][: len(labels)]
    )
    scripted.replace_llama_cpp(monkeypatch)
    return scripted


@pytest.mark.parametrize(
    ("means", "rows_from", "expected"),
    [
        (FEW_SHOT_BEST, FROM_TEST_FILE, ("base_few_shot", "base_few_shot")),
        (SCORING_BEST, FROM_TEST_FILE, ("base_label_scoring", "base_few_shot")),
        ({**SCORING_BEST, "base_few_shot": 0.5}, FROM_TEST_FILE, ("base_label_scoring", None)),
        (dict.fromkeys(FEW_SHOT_BEST, 0.6), FROM_TEST_FILE, ("base_few_shot", "base_few_shot")),
        ({**FEW_SHOT_BEST, "base_few_shot_first_line": 0.9}, FROM_TEST_FILE, ("base_few_shot_first_line",) * 2),
        ({**FEW_SHOT_BEST, "tuned_merged": 0.81}, FROM_TEST_FILE, None),  # not shown, and still the better guess
        ({**FEW_SHOT_BEST, "tuned_merged": 1.0}, FROM_TEST_FILE, None),
        (FEW_SHOT_BEST, from_made(None), None),  # the base would be held to its own answers
    ],
)  # fmt: skip
def test_what_answers_in_place_of_the_tuned_model(
    finished_run: Run, means: dict[str, float], rows_from: str, expected: tuple[str, str | None] | None
) -> None:
    assert choice_of(score(finished_run, means, rows_from)) == expected


def test_the_base_is_handed_out_where_it_scored_higher(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, FEW_SHOT_BEST)
    told = sg(*given(finished_run, task)).stdout
    assert_says(told.splitlines()[0], "no gain is shown", "0.600", "0.800")
    assert_says(told.splitlines()[1], "--fallback", "few-shot")
    assert not finished_run.file("fallback").exists()

    told = sg(*given(finished_run, task), "--fallback").stdout
    assert_says(told.splitlines()[1], "the base by few-shot answers", "0.800", "0.600")
    assert told.index(str(finished_run.file("fallback/Modelfile"))) < told.index(
        f"{finished_run.file('model.gguf')}  ("
    )
    example = finished_run.task.examples[0].input
    assert finished_run.file("fallback/chat_template.jinja").read_text() == f"template: {example}"
    assert (
        finished_run.file("fallback/Modelfile").read_text().startswith(f'FROM "{finished_run.model.path}"\n')
    )
    assert_says(told, f"--chat-template-file {finished_run.file('fallback/chat_template.jinja')}")

    answered = sg("predict", "--model", finished_run.path, "-", input="Where?\n")
    assert json.loads(answered.stdout)["output"] == f"{finished_run.model.path.name}\nand more"
    assert example in engine.asked[-1]
    assert_says(
        answered.stderr, "few-shot answers in place of the tuned model", finished_run.file("model.gguf")
    )
    tuned = sg("predict", "--model", finished_run.file("model.gguf"), "-", input="Where?\n")
    assert json.loads(tuned.stdout)["output"] == "model.gguf\nand more"
    assert example not in engine.asked[-1]
    sg("predict", "--model", finished_run.path, "--task", task, "-", input="Where?\n")
    assert engine.opened[-1][0] == "model.gguf"  # another task: the scores were not for it


def test_label_scoring_is_done_by_predict(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, {**SCORING_BEST, "base_few_shot": 0.5})
    result = sg(*given(finished_run, task), "--fallback")
    assert_says(result.stdout, "no chat program", "`sg-local predict`", "for chat programs model.gguf")
    assert [path.name for path in finished_run.file("fallback").iterdir()] == ["way.json"]
    answered = sg("predict", "--model", finished_run.path, "--probabilities", "-", input="Where?\n")
    row = json.loads(answered.stdout)
    assert row["output"] == finished_run.task.labels[1]
    assert row["probabilities"][row["output"]] > 0.8
    assert "probability" not in json.loads(
        sg("predict", "--model", finished_run.path, "-", input="Where?\n").stdout
    )
    assert sg("chat", finished_run.path, input="Where?\n").stdout.strip() == finished_run.task.labels[1]
    assert engine.asked == []  # nothing is generated

    score(finished_run, SCORING_BEST)
    assert_says(sg(*given(finished_run, task), "--fallback").stdout, "for chat programs few-shot", "0.700")
    assert finished_run.file("fallback/Modelfile").exists()


def test_of_an_answer_that_goes_on_the_first_line_counts(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, {**FEW_SHOT_BEST, Contender.FIRST_LINE: 0.9})
    sg(*given(finished_run, task), "--fallback")
    assert r"['\n']" in finished_run.file("fallback/Modelfile").read_text()
    answered = sg("predict", "--model", finished_run.path, "-", input="Where?\n")
    assert json.loads(answered.stdout)["output"] == finished_run.model.path.name


def test_the_base_may_be_best_without_examples(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, {**FEW_SHOT_BEST, "base_zero_shot": 0.9})
    result = sg(*given(finished_run, task), "--fallback")
    assert_says(result.stdout, "the base by zero-shot", "0.900")
    example = finished_run.task.examples[0].input
    assert example not in finished_run.file("fallback/chat_template.jinja").read_text()
    answered = sg("predict", "--model", finished_run.path, "-", input="Where?\n")
    assert json.loads(answered.stdout)["output"].startswith(finished_run.model.path.name)
    assert example not in engine.asked[-1]


def test_a_tuned_model_that_scored_higher_stays(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, FEW_SHOT_BEST)
    sg(*given(finished_run, task), "--fallback")
    score(finished_run, {**FEW_SHOT_BEST, "tuned_merged": 0.9})
    # By other scores: it holds no more, though it lies there.
    answered = sg("predict", "--model", finished_run.path, "-", input="Where?\n")
    assert json.loads(answered.stdout)["output"] == "model.gguf\nand more"
    result = sg(*given(finished_run, task), "--fallback")
    assert result.exit_code == 0
    assert_says(result.stderr, "model.gguf stays", "scored higher")
    assert_says(result.stdout.splitlines()[0], "no gain is shown", "0.900", "0.800")
    assert not finished_run.file("fallback").exists()


def test_held_out_made_rows_decide_nothing(sg: Call, finished_run: Run, task: Path) -> None:
    score(finished_run, FEW_SHOT_BEST, from_made(None))
    result = sg(*given(finished_run, task), "--fallback")
    assert_says(result.stderr, "model.gguf stays", "its own answers", "labelled rows")
    assert "--fallback hands out" not in result.stdout
    assert not finished_run.file("fallback").exists()


def test_a_run_with_a_gain_says_nothing_of_it(
    sg: Call, finished_run: Run, task: Path, contents: Contents
) -> None:
    before = contents(finished_run.path)
    result = sg(*given(finished_run, task))
    assert "no gain" not in result.stdout
    assert "fallback" not in result.stdout
    assert contents(finished_run.path) == before


def test_other_commands_know_what_was_handed_out(sg: Call, finished_run: Run, task: Path) -> None:
    score(finished_run, FEW_SHOT_BEST)
    result = sg(*given(finished_run, task), "--fallback", "--json")
    assert json.loads(result.stdout)["fallback"]["way"] == "base_few_shot"
    assert "Handed out: the base by few-shot" in finished_run.file("report.html").read_text()
    [item] = json.loads(sg("runs", finished_run.path.parent, "--json").stdout)
    assert_says(item["handed_out"], "few-shot", "0.800")
    assert item["handed_out"] in sg("runs", finished_run.path.parent).stdout
    passed = {check.what for check in verify_run(finished_run, with_parity=False)}
    assert WAY in passed
    finished_run.file("fallback/Modelfile").write_text("FROM ./another\n")
    with pytest.raises(SgLocalError, match=r"fallback/Modelfile is not what --fallback wrote"):
        list(verify_run(finished_run, with_parity=False))


@pytest.mark.parametrize(
    "edit",
    [
        lambda _told: "{",
        lambda told: json.dumps({**told, "way": "tuned"}),
        lambda told: json.dumps({**told, "way": "tuned_merged"}),
        lambda told: json.dumps({**told, "in_chat": "base_label_scoring"}),
        lambda told: json.dumps({**told, "examples": [{"input": 1, "output": "a"}]}),
        lambda told: json.dumps({**told, "sha256": {"../other": "a"}}),
    ],
)
def test_a_damaged_file_is_told(sg: Call, finished_run: Run, task: Path, edit: Any) -> None:
    score(finished_run, FEW_SHOT_BEST)
    sg(*given(finished_run, task), "--fallback")
    path = finished_run.file(WAY)
    path.write_text(edit(json.loads(path.read_text())))
    line = one_line(sg("predict", "--model", finished_run.path, "-", input="Where?\n"), 2)
    assert_says(line, path)


def test_a_fallback_before_there_are_scores(sg: Call, finished_run: Run, task: Path) -> None:
    line = one_line(sg(*given(finished_run, task), "--fallback", "--until=train"), 2)
    assert_says(line, "--fallback", "--until train")


def test_gate_fallback_and_json_together(sg: Call, finished_run: Run, task: Path) -> None:
    score(finished_run, FEW_SHOT_BEST, verdict="worse")
    result = sg(*given(finished_run, task), "--gate", "--fallback", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["fallback"]["way"] == "base_few_shot"
    assert_says(result.stderr, "significantly worse than base_few_shot")
    assert finished_run.file(WAY).is_file()  # what is handed out is there, whatever the exit code


def test_worse_at_the_bases_own_answers_is_told_as_that(sg: Call, finished_run: Run, task: Path) -> None:
    """It is no accuracy wherever a verdict stands: in the first line, in the last, and in that of --gate."""
    score(finished_run, FEW_SHOT_BEST, from_made(0.4), verdict="worse")
    result = sg(*given(finished_run, task), "--gate", "--fallback")
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert_says(lines[0], "worse than the base at its best", "the base's own answers, which is no accuracy")
    [verdict] = [line for line in lines if line.startswith("verdict")]
    assert_says(verdict, "the base's own answers, which is no accuracy")
    assert_says(
        result.stderr,
        "significantly worse than base_few_shot",
        "the base's own answers, which is no accuracy",
    )
    score(finished_run, FEW_SHOT_BEST, verdict="worse")
    result = sg(*given(finished_run, task), "--gate")
    assert "no accuracy" not in result.stdout + result.stderr


def test_a_copied_run_hands_out_the_same(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine, tmp_path: Path
) -> None:
    score(finished_run, FEW_SHOT_BEST)
    sg(*given(finished_run, task), "--fallback")
    shutil.copytree(finished_run.path, tmp_path / "elsewhere" / "copy")
    answered = sg("predict", "--model", tmp_path / "elsewhere" / "copy", "-", input="Where?\n")
    assert json.loads(answered.stdout)["output"] == f"{finished_run.model.path.name}\nand more"
    copied = open_run(tmp_path / "elsewhere" / "copy")
    assert WAY in {check.what for check in verify_run(copied, with_parity=False)}
    finished_run.model.path.unlink()
    result = sg("predict", "--model", copied.path, "-", input="Where?\n")
    assert result.exit_code == 2
    assert_says(result.stderr.splitlines()[-1], "Error: ", finished_run.model.path)


def test_scores_of_other_test_rows_take_the_fallback_back(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, FEW_SHOT_BEST)
    sg(*given(finished_run, task), "--fallback")
    finished_run.forget_from("evaluate", keep_partial=False)  # as `evaluate --redo` begins, or new test rows
    answered = sg("predict", "--model", finished_run.path, "-", input="Where?\n")
    assert answered.exit_code == 0, answered.stderr
    assert json.loads(answered.stdout)["output"] == "model.gguf\nand more"
    assert [item for item in verify_whats(finished_run) if item == WAY] == []


def verify_whats(run: Run) -> list[str]:
    """What verify passes, whatever else it finds."""
    passed = []
    with suppress(SgLocalError):
        for check in verify_run(run, with_parity=False):
            passed.append(check.what)
    return passed


def test_a_chat_names_what_answers_beside_the_base(
    sg: Call, finished_run: Run, task: Path, engine: ScriptedEngine
) -> None:
    score(finished_run, FEW_SHOT_BEST)
    sg(*given(finished_run, task), "--fallback")
    result = sg("chat", finished_run.path, "--compare", input="Where?\n")
    heads = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert heads == ["base", "fallback"]  # nothing that is called tuned
    assert_says(result.stderr, finished_run.file("model.gguf"))
    assert "--model" not in result.stderr  # which chat does not have
    tuned = sg("chat", finished_run.file("model.gguf"), input="Where?\n")
    assert tuned.stdout.startswith("model.gguf")
