"""Real inputs, labelled rows and shares: what a run does with them, and that nothing it is scored on gets in."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finished_run import write_inputs, write_outputs
from messages import assert_says
from scripted_engine import ScriptedEngine
from stand_ins import make_calls_small, replace_export, replace_sampling, replace_training, scores

import sg_local.stages.generate as generate
from sg_local.errors import InputError
from sg_local.files import read_rows, write_rows
from sg_local.report.explain import explain, explained
from sg_local.report.made_data_lines import report_lines
from sg_local.report.made_data_warnings import warnings
from sg_local.runs.begin import begin_run, create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.given import check_task
from sg_local.runs.second_try import makes_the_same, take_pieces
from sg_local.runs.stage import run_stage
from sg_local.selfguide.given import (
    choose_examples,
    held_out_labelled,
    n_held_out_labelled,
    text_key,
    without_known,
)
from sg_local.settings import STAGES, Settings
from sg_local.stages.curate import run_curate
from sg_local.task import Example, Task, load_task

TASK = """name = "inbox"
instruction = "Which box?"
labels = ["refund", "login"]
{more}

[[examples]]
input = "I want my money back."
output = "refund"
"""
FREE_TASK = """name = "inbox"
instruction = "Answer."
{more}

[[examples]]
input = "I want my money back."
output = "You get it today."
"""

Rows = list[dict[str, Any]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    make_calls_small(monkeypatch, n_rows=4, n_trials=4)
    scripted = ScriptedEngine(label_logprobs=scores)
    scripted.replace_llama_cpp(monkeypatch)
    replace_sampling(monkeypatch)
    replace_training(monkeypatch)
    replace_export(monkeypatch)
    return scripted


def begun(place: Path, model: Path, text: str = TASK, more: str = "", **files: Any) -> Run:
    """A run of a task with these lines; files: rows of NAME.jsonl."""
    settings = files.pop("settings", Settings(n_inputs=12, form_filter=False, n_samples=2))
    place.mkdir(exist_ok=True)
    for name, rows in files.items():
        more += f'\n{name} = "{name}.jsonl"'
        write_rows(place / f"{name}.jsonl", rows)
    (place / "inbox.toml").write_text(text.replace("{more}", more))
    return begin_run(place / "inbox.toml", model, place / "run", settings)[0]


def inputs(*texts: str) -> Rows:
    return [{"input": text} for text in texts]


def pairs(n: int, start: int = 0) -> Rows:
    return [
        {"input": f"Real message number {start + i}.", "output": ["refund", "login"][i % 2]} for i in range(n)
    ]


def stage(run: Run, *names: str) -> None:
    for name in names:
        run_stage(run, name)


# What is scored on is not trained on.


@pytest.mark.parametrize(
    "text",
    ["Pay me back", "PAY  ME\nBACK", "pay me, back!!", "\u201cPay me back\u2026\u201d", "Pay-me back."],
)
def test_texts_are_compared_without_case_space_and_punctuation(text: str) -> None:
    assert text_key(text) == text_key("Pay me back.")
    assert without_known([text, "Pay me."], {text_key("Pay me back.")}) == ["Pay me."]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It's $5", "It\u2019s $5"),  # a sign of ASCII beside one that is not
        ("costs $5", "costs\u00a0$5"),
        ("it's 5 > 4", "\uff49\uff54's 5 \uff1e 4"),  # of full width
        ("I can't", "I can\u00b4t"),  # accents and letters in the place of an apostrophe
        ("I can't, José", "I can`t, José"),
        ("I can't", "I can\u02bct"),
        ("a -> b", "a \u2192 b"),  # what a word processor makes of it
        ("-5 °C", "\u22125 °C"),
        ("I \u2764 it", "I \u2764\ufe0f it"),  # characters that are not seen
        ("Pay me", "\u3164Pay\u2800me"),
        ("👍", "👍🏽"),
        ("istanbul", "İSTANBUL"),
        ("\u0131ş\u0131k", "IŞIK"),
        ("ΐ", "\u03aa\u0301"),
        ("Straße", "STRASSE"),
    ],
)
def test_texts_are_compared_however_they_were_typed(one: str, other: str) -> None:
    assert text_key(one) == text_key(other)


def test_texts_of_other_scripts_are_told_apart() -> None:
    texts = ["金を返して", "金を返せ", "पैसे", "पैसा", "😀", "😡", "?!", "...", "C", "C++ é", "C++ e"]
    texts += ["£5", "€5", "5 ↑", "5 ↓", "∀x", "∃x", "→", "\u00b4"]
    assert len({text_key(text) for text in texts}) == len(texts)
    assert text_key("\uff30\uff21\uff39") == text_key("pay")  # of full width


def test_no_test_row_reaches_what_is_made_for_training(
    tmp_path: Path, model: Path, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    del engine
    test = [{"input": f"Canary {name} sings.", "output": "login"} for name in ("one", "two", "three", "four")]
    run = begun(
        tmp_path,
        model,
        test=test,
        inputs=inputs("canary ONE sings", "A real message.", "Canary two  sings!"),
        labelled=[{"input": "“Canary three” sings", "output": "login"}, *pairs(3)],
        more="",
    )
    assert_says(capsys.readouterr().err, "2 of 3 inputs are test rows", "1 of 4 labelled rows are test rows")
    stage(run, *STAGES)
    canaries = [text_key(row["input"]) for row in test]
    seen = 0
    for path in (path for path in run.path.rglob("*") if path.is_file()):
        is_scored = path.name in {"test.jsonl", "evaluation.json"} or path.parent.name == "predictions"
        found = [canary for canary in canaries if canary in text_key(path.read_bytes().decode("latin-1"))]
        seen += len(found)
        assert is_scored or not found, path
    assert seen >= len(test)
    assert "A real message." in {row["input"] for row in read_rows(run.file("train.jsonl"))}


def test_examples_after_the_third_are_labelled_rows_and_no_test_rows(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "".join(f'[[examples]]\ninput = "Example {n}."\noutput = "login"\n' for n in range(4))
    text = TASK.replace("{more}", "test = 'test.jsonl'") + more
    write_rows(tmp_path / "test.jsonl", [{"input": "example 3", "output": "login"}])
    run = begun(tmp_path, model, text)
    assert_says(capsys.readouterr().err, "examples after the first 3", "1 of 2 labelled rows are test rows")
    assert [example.input for example in run.task.examples] == [
        "I want my money back.",
        "Example 0.",
        "Example 1.",
    ]
    assert run.labelled_rows == [Example("Example 2.", "login")]
    assert load_task(tmp_path / "inbox.toml").more_examples[0] == Example("Example 2.", "login")


def test_examples_are_chosen_among_labelled_rows(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TASK.split("[[examples]]")[0]
    gold = [
        {"input": "a", "output": "login"},
        {"input": "a longer one", "output": "login"},
        {"input": "the longest of the three", "output": "login"},
        {"input": "a longer two", "output": "refund"},
    ]
    test = [{"input": "A longer two!", "output": "refund"}]
    run = begun(tmp_path, model, text, labelled=[*gold, {"input": "Money", "output": "refund"}], test=test)
    assert run.task.examples == (Example("Money", "refund"), Example("a longer one", "login"))
    assert [row.input for row in run.labelled_rows] == ["a", "the longest of the three"]
    assert "chosen among its labelled rows" in capsys.readouterr().err
    with pytest.raises(InputError, match="all of its labelled rows are test rows"):
        begun(tmp_path / "other", model, text, labelled=test, test=test)


def test_examples_of_free_answers_are_chosen_by_length() -> None:
    rows = [Example("x" * length, str(length)) for length in (9, 1, 8, 2, 7, 3, 6, 4, 5)]
    assert [row.output for row in choose_examples(rows, ())] == ["2", "5", "8"]
    assert choose_examples(rows[:2], ()) == [Example("x", "1"), Example("x" * 9, "9")]


def test_a_test_row_that_is_an_example_is_not_scored_on(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = {"input": "i want my money BACK", "output": "refund"}
    run = begun(tmp_path, model, test=[example, *pairs(2)], inputs=inputs("Real message number 1"))
    assert [row.input for row in run.test_rows] == [row["input"] for row in pairs(2)]
    assert_says(
        capsys.readouterr().err, "1 of 3 test rows are examples of the task", "1 of 1 inputs are test"
    )
    assert len(begun(tmp_path / "other", model, test=[example]).test_rows) == 1
    assert_says(capsys.readouterr().err, "all test rows are examples of the task")


def test_labelled_rows_that_contradict_each_other_are_told_and_never_examples_of_both(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = [
        ("Pay me.", "refund"),
        ("pay me", "login"),
        ("Pay me.", "refund"),
        ("I want my money back", "login"),
    ]
    rows = [{"input": text, "output": output} for text, output in gold]
    run = begun(tmp_path, model, TASK.split("[[examples]]")[0], labelled=rows[:3])
    assert run.task.examples == (Example("Pay me.", "refund"),)
    assert_says(capsys.readouterr().err, "1 of 3 labelled rows have the input of an earlier one")
    begun(tmp_path / "other", model, labelled=rows)
    assert_says(capsys.readouterr().err, "2 of 4 labelled rows", "with another output: the first one counts")
    several = [{"input": "Pay me.", "outputs": ["Now.", "Soon."]}, {"input": "Pay me", "output": "Soon."}]
    begun(tmp_path / "free", model, FREE_TASK, labelled=several)
    assert "another output" not in capsys.readouterr().err


# Real inputs.


def test_real_inputs_come_first_and_made_ones_fill_up(
    tmp_path: Path, model: Path, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    del engine
    long = "word " * 60
    odd = "input: input: Sure, I'd be happy to help! " * 2
    run = begun(tmp_path, model, inputs=inputs("First!", "first", odd, "?", "", long, "I want my money back"))
    stage(run, "generate")
    rows = read_rows(run.file("inputs.jsonl"))
    real = [row for row in rows if row["source"] == "given"]
    assert rows[: len(real)] == real
    assert [(row["id"], row["drop"]) for row in real] == [
        ("given-1", None),
        ("given-2", "duplicate"),
        ("given-3", None),  # neither noise, nor too long, nor a repetition
        ("given-4", "empty"),
        ("given-5", "empty"),
        ("given-6", "over_context"),
        ("given-7", "duplicate"),  # of the example
    ]
    made = [row for row in rows if row["source"] == "made" and row["drop"] is None]
    assert len(made) >= 10
    assert_says(
        capsys.readouterr().err, "2 of 14 inputs are real (14%)", "2 duplicate, 2 empty, 1 over_context"
    )
    counts = run.manifest()["stages"]["generate"]["counts"]
    assert (counts["given"], counts["given_kept"], counts["kept"]) == (7, 2, len(made) + 2)


def test_of_many_inputs_a_sample_is_drawn_by_the_seed(
    tmp_path: Path, model: Path, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    del engine
    (tmp_path / "many.csv").write_text("text\n" + "".join(f"Message {n} of many.\n" for n in range(100_000)))
    drawn = []
    for seed in (0, 0, 1):
        run = begun(
            tmp_path,
            model,
            more='inputs = {file = "many.csv", column = "text"}',
            settings=Settings(n_inputs=50, seed=seed, least_made_share=0),
        )
        stage(run, "generate")
        rows = read_rows(run.file("inputs.jsonl"))
        assert len(rows) == 50
        assert all(row["input"] == f"Message {int(row['id'][6:]) - 1} of many." for row in rows)
        drawn.append([row["id"] for row in rows])
        assert "probe" not in run.manifest()["stages"]["generate"]  # nothing is made, nor tried
        (tmp_path / "run").rename(tmp_path / f"run-{len(drawn)}")
    assert drawn[0] == drawn[1] != drawn[2]
    assert_says(capsys.readouterr().err, "50 of 50 inputs are real", "of 100000 given ones", "the seed 0")


def test_with_labels_inputs_are_made_beside_real_ones(
    tmp_path: Path, model: Path, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    del engine
    real = inputs(*(f"Message {n}." for n in range(12)))
    settings = Settings(n_inputs=12, form_filter=False, n_samples=2)
    counted = {}
    for name, task, share in (("default", TASK, 0.5), ("none", TASK, 0), ("free", FREE_TASK, 0.5)):
        run = begun(
            tmp_path / name, model, task, inputs=real, settings=replace(settings, least_made_share=share)
        )
        stage(run, "generate")
        rows = [row for row in read_rows(run.file("inputs.jsonl")) if row["drop"] is None]
        counted[name] = (
            sum(row["source"] == "given" for row in rows),
            sum(row["source"] == "made" for row in rows),
        )
        run.path.rename(tmp_path / f"{name}-run")
    assert counted["default"][0] == 12
    assert counted["default"][1] >= 6
    assert counted["none"] == counted["free"] == (12, 0)
    assert_says(
        capsys.readouterr().err,
        "12 of 18 inputs are real (67%)",
        "6 are made beside them",
        "--least-made-share",
    )


def test_made_rows_are_left_out_beside_real_ones_where_their_labels_are_chance(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    real = inputs(*(f"Message {n}." for n in range(12)))
    dropped = {}
    for name, more in (("chance", {}), ("never", {"agreement": "never"}), ("few", {"n_inputs": 40})):
        settings = Settings(**({"n_inputs": 12, "form_filter": False} | more))
        run = begun(tmp_path / name, model, inputs=real, settings=settings)
        stage(run, "generate", "annotate", "curate")
        pairs = [row for row in read_rows(run.file("train.jsonl")) if row["source"] == "made"]
        dropped[name] = {row["drop"] for row in pairs if row["drop"] != "low_confidence"}
    del engine
    assert dropped["chance"] == {"by_chance"}
    assert "by_chance" not in dropped["never"] | dropped["few"]


def test_other_real_inputs_leave_made_ones_and_answers_as_they_are(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    del engine
    run = begun(tmp_path, model, FREE_TASK, inputs=inputs("First.", "Second.", "Third."))
    alone = begun(tmp_path / "alone", model, FREE_TASK)
    stage(run, "generate", "annotate", "curate")
    stage(alone, "generate")
    made = [row for row in read_rows(run.file("inputs.jsonl")) if row["source"] == "made"]
    assert made == read_rows(alone.file("inputs.jsonl"))[: len(made)]
    before = {row["id"]: row for row in read_rows(run.file("outputs.jsonl"))}
    write_rows(run.file("given.jsonl"), inputs("First.", "Another.", "Third."))
    unfinished = run.first_unfinished()
    assert unfinished
    assert (unfinished.stage, unfinished.reason) == (
        "generate",
        "is out of date (given.jsonl was changed since)",
    )
    stage(run, "generate", "annotate")
    assert [row for row in read_rows(run.file("inputs.jsonl")) if row["source"] == "made"] == made
    after = {row["id"]: row for row in read_rows(run.file("outputs.jsonl"))}
    assert [row_id for row_id in after if after[row_id] != before[row_id]] == ["given-2"]
    write_rows(run.file("given.jsonl"), inputs(*(f"Message {n}." for n in range(12))))
    stage(run, "generate")
    assert [row["source"] for row in read_rows(run.file("inputs.jsonl"))] == ["given"] * 12


def test_a_second_try_with_real_inputs_goes_on_with_what_was_made(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    scored: list[str] = []
    engine.label_logprobs = lambda prompt, labels: scored.append(prompt) or scores(prompt, labels)
    alone = begun(tmp_path / "alone", model)
    stage(alone, "generate", "annotate")
    before = read_rows(alone.file("inputs.jsonl"))
    files = {"inputs": inputs("First.", "Second."), "labelled": pairs(3)}
    whole = begun(tmp_path / "whole", model, **files)
    stage(whole, "generate", "annotate")
    second = begun(tmp_path / "second", model, **files)
    assert makes_the_same(second, alone)
    engine.asked.clear()
    scored.clear()
    for name in ("generate", "annotate"):
        take_pieces(second, alone, name)
        stage(second, name)
    for name in ("inputs.jsonl", "outputs.jsonl"):
        assert read_rows(second.file(name)) == read_rows(whole.file(name))
    assert engine.asked == []
    n_prompts = len(read_rows(second.file("outputs.jsonl"))[0]["label_logprobs"])
    assert len(scored) == n_prompts * 5  # two given, three labelled
    assert read_rows(alone.file("inputs.jsonl")) == before
    more = replace(Settings(n_inputs=14, form_filter=False, n_samples=2), least_made_share=0.9)
    assert makes_the_same(begun(tmp_path / "more", model, settings=more), alone)
    other_seed = replace(more, seed=1)
    assert not makes_the_same(begun(tmp_path / "seed", model, settings=other_seed), alone)
    other_task = begun(tmp_path / "task", model, TASK.replace("Which box?", "Which one?"))
    assert not makes_the_same(other_task, alone)
    alone.file(".generate.json").write_text('{"made_from": "an earlier version"}')
    assert not makes_the_same(second, alone)


def test_a_killed_generate_ends_with_the_same_rows(
    tmp_path: Path, model: Path, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    del engine
    files = {"inputs": inputs("First.", "Second."), "labelled": pairs(3)}
    whole = begun(tmp_path / "whole", model, **files)
    stage(whole, "generate")
    killed = begun(tmp_path / "killed", model, **files)
    calls: list[str] = []

    def append_twice(path: Path, rows: Rows) -> None:
        calls.append(path.name)
        if calls.count("inputs.jsonl") > 2:
            raise KeyboardInterrupt
        with open(path, "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "append_rows", lambda path, rows: append_twice(path, list(rows)))
        with pytest.raises(KeyboardInterrupt):
            stage(killed, "generate")
    stage(killed, "generate")
    assert killed.file("inputs.jsonl").read_bytes() == whole.file("inputs.jsonl").read_bytes()


def test_a_run_called_with_other_rows_says_which(tmp_path: Path, model: Path) -> None:
    begun(tmp_path, model, inputs=inputs("First."), labelled=pairs(2))
    begun(tmp_path, model, inputs=inputs("First."), labelled=pairs(2))
    with pytest.raises(InputError, match="begun with inputs of inbox, and is called with other inputs"):
        begun(tmp_path, model, inputs=inputs("Second."), labelled=pairs(2))
    with pytest.raises(InputError, match="labelled rows of inbox, and is called with other labelled rows"):
        begun(tmp_path, model, inputs=inputs("First."))


# Labelled rows.


def test_a_part_of_the_labelled_rows_is_scored_on_where_there_is_no_test_file(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    del engine
    settings = Settings(n_inputs=8, form_filter=False, keep_confident=1.0)
    run = begun(
        tmp_path,
        model,
        labelled=pairs(40),
        inputs=inputs("First.", "real message NUMBER 3"),
        settings=settings,
    )
    stage(run, "generate", "annotate", "curate")
    rows = read_rows(run.file("train.jsonl"))
    made = next(row for row in rows if row["source"] == "made" and row["drop"] is None)
    made.update(drop="held_out", copies=0)  # by a person: it is not scored beside labelled ones
    write_rows(run.file("train.jsonl"), rows)
    stage(run, "train", "export", "evaluate")
    rows = [row for row in rows if row is not made]
    held_out = [row for row in rows if row["drop"] == "held_out"]
    assert len(held_out) == 20
    assert {row["source"] for row in held_out} == {"labelled"}
    trained = {text_key(row["input"]) for row in rows if row["copies"]}
    assert not trained & {text_key(row["input"]) for row in held_out}
    evaluation = json.loads(run.file("evaluation.json").read_text())
    assert (evaluation["n_rows"], evaluation["rows_from"]) == (
        20,
        "held-out labelled rows: accuracy on labelled rows",
    )
    given = next(row for row in read_rows(run.file("inputs.jsonl")) if row["id"] == "given-2")
    assert given["drop"] == "duplicate"


def test_all_right_outputs_of_labelled_rows_that_are_held_out_count(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    del engine
    gold = [{"input": f"Tell me {n}.", "outputs": [f"It is {n}.", f"{n}, it is."]} for n in range(40)]
    run = begun(tmp_path, model, FREE_TASK, labelled=gold)
    stage(run, *STAGES)
    rows = read_rows(run.file("predictions/tuned_merged.jsonl"))
    outputs = {row["input"]: row["outputs"] for row in gold}
    assert len(rows) == 20
    assert all(row["references"] == outputs[row["input"]] for row in rows)


def test_how_many_labelled_rows_are_held_out() -> None:
    numbers = {n: n_held_out_labelled(n) for n in (0, 39, 40, 66, 67, 100, 1000, 10_000)}
    assert numbers == {0: 0, 39: 0, 40: 20, 66: 20, 67: 20, 100: 30, 1000: 300, 10_000: 300}
    ids = [f"labelled-{n}" for n in range(100)]
    assert held_out_labelled(ids, 0) == held_out_labelled(ids[::-1], 0) != held_out_labelled(ids, 1)


def curated(run: Run, made: Rows, answers: Rows) -> Rows:
    """train.jsonl after two stages wrote these rows."""
    write_inputs(run, made)
    write_outputs(run, answers)
    run_curate(run)
    return read_rows(run.file("train.jsonl"))


def scored_rows(logprobs: list[tuple[float, float]], source: str, prefix: str = "") -> tuple[Rows, Rows]:
    """Inputs of this origin with the log-probabilities of refund and login."""
    ids: list[Any] = [f"{prefix}{number}" if prefix else number for number in range(1, len(logprobs) + 1)]
    labels = ["refund", "login"] * len(ids)
    return (
        [
            {
                "id": row_id,
                "input": f"{source} {row_id}",
                "label": label if source == "made" else None,
                "source": source,
            }
            for row_id, label in zip(ids, labels, strict=False)
        ],
        [
            {"id": row_id, "label_logprobs": [{"refund": first, "login": second}], "output": "refund"}
            for row_id, (first, second) in zip(ids, logprobs, strict=True)
        ],
    )


ALL = Settings(keep_confident=1.0, agreement="never")


def test_labelled_rows_are_shown_more_often_than_made_ones(tmp_path: Path, model: Path) -> None:
    run = begun(tmp_path, model, labelled=pairs(2), test=pairs(2, start=50), settings=ALL)
    of_made = scored_rows([(-0.1, -4.0), (-4.0, -0.1)] * 6, "made")
    gold = scored_rows([(-1.0, -1.0)] * 2, "labelled", "labelled-")
    rows = curated(run, of_made[0] + gold[0], of_made[1] + gold[1])
    copies = {
        source: {row["copies"] for row in rows if row["source"] == source} for source in ("made", "labelled")
    }
    assert min(copies["labelled"]) > max(copies["made"])
    assert {row["id"]: row["output"] for row in rows if row["source"] == "labelled"} == {
        "labelled-1": "refund",
        "labelled-2": "login",
    }
    assert not [row for row in rows if row["drop"]]


def test_labelled_rows_correct_the_calibration_of_real_inputs_the_more_of_them_there_are(
    tmp_path: Path, model: Path
) -> None:
    """The batches put the border at 0, gold rows at -1 (nats, refund over login)."""
    difference = [(value, 0.0) for value in (-2.0, -0.6, -0.4, 0.4, 0.6, 2.0)]
    made, given = scored_rows(difference, "made"), scored_rows(difference, "given", "given-")
    of_given, of_made = {}, {}
    for n in (0, 2, 60):
        labelled: dict[str, Any] = {"labelled": pairs(n)} if n else {}
        run = begun(
            tmp_path / str(n), model, inputs=inputs("Let me in!"), settings=ALL, test=pairs(2, 90), **labelled
        )
        gold = scored_rows([(0.0, 0.0), (-2.0, 0.0)] * (n // 2), "labelled", "labelled-")
        rows = curated(run, given[0] + made[0] + gold[0], given[1] + made[1] + gold[1])
        refunds = [row for row in rows if row["output"] == "refund"]
        of_given[n] = [row["id"] for row in refunds if row["source"] == "given"]
        of_made[n] = [row["id"] for row in refunds if row["source"] == "made"]
        if n:
            assert explained(explain(run, "labelled-1")).splitlines()[1] == "labelled:"
        told = explain(run, "given-2")["label_scores"]
        assert told
        assert ((told["refund"]["calibrated"] or 0) > 0.5) == ("given-2" in of_given[n])
    few = [f"given-{number}" for number in (4, 5, 6)]
    assert of_given == {0: few, 2: few, 60: ["given-2", "given-3", *few]}
    # Made inputs lean to labels in a way of their own, and are made for each label in turn: their batch says enough.
    assert of_made == {n: [4, 5, 6] for n in (0, 2, 60)}


def test_labelled_rows_are_scored_only_where_real_inputs_learn_from_it(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    del engine
    brought: list[dict[str, Any]] = [{}, {"inputs": inputs("Let me in!")}]
    for given in brought:
        run = begun(tmp_path / str(len(given)), model, labelled=pairs(4), test=pairs(2, 90), **given)
        stage(run, "generate", "annotate")
        ids = [str(row["id"]) for row in read_rows(run.file("outputs.jsonl"))]
        assert sum(row_id.startswith("labelled") for row_id in ids) == (4 if given else 0)


def test_made_rows_like_a_real_one_are_dropped(tmp_path: Path, model: Path) -> None:
    run = begun(tmp_path, model, inputs=inputs("Let me in!"), settings=ALL, test=pairs(1))
    of_made, of_given = (
        scored_rows([(-1.0, -2.0), (-2.0, -1.0)], "made"),
        scored_rows([(-1.0, -2.0)], "given", "given-"),
    )
    of_made[0][0]["input"], of_given[0][0]["input"] = "let me in", "Let me in!"
    rows = curated(run, of_given[0] + of_made[0], of_given[1] + of_made[1])
    assert [(row["id"], row["drop"]) for row in rows[1:]] == [("given-1", None), (1, "duplicate"), (2, None)]


def test_labelled_rows_of_free_answers_are_trained_on_and_not_answered(
    tmp_path: Path, model: Path, engine: ScriptedEngine
) -> None:
    del engine
    gold = [{"input": f"Tell me {n}.", "output": f"It is {n}."} for n in range(3)]
    run = begun(tmp_path, model, FREE_TASK, labelled=gold, inputs=inputs("First."))
    stage(run, "generate", "annotate", "curate")
    assert not [row for row in read_rows(run.file("outputs.jsonl")) if str(row["id"]).startswith("labelled")]
    rows = [row for row in read_rows(run.file("train.jsonl")) if row["source"] == "labelled"]
    assert [(row["id"], row["output"], row["copies"] >= 2) for row in rows] == [
        (f"labelled-{n + 1}", f"It is {n}.", True) for n in range(3)
    ]


def test_a_labelled_row_that_is_gone_is_an_error(tmp_path: Path, model: Path) -> None:
    run = begun(tmp_path, model, labelled=pairs(2), settings=ALL)
    rows, answers = scored_rows([(-1.0, -2.0)] * 3, "labelled", "labelled-")
    with pytest.raises(InputError, match=r"labelled\.jsonl has no labelled-3"):
        curated(run, rows, answers)
    rows[0]["source"] = "found"
    with pytest.raises(InputError, match="row labelled-1 is from 'found'; write made or given"):
        curated(run, rows, answers)


# How often labels occur.


def annotated(place: Path, model: Path, shares: str, given: list[tuple[float, float]]) -> Rows:
    run = begun(place, model, more=shares, settings=ALL, test=pairs(1))
    of_made = scored_rows([(-0.1, -3.0), (-3.0, -0.1)] * 20, "made")
    of_given = scored_rows(given, "given", "given-")
    return curated(run, of_given[0] + of_made[0], of_given[1] + of_made[1])


def test_shares_decide_the_labels_of_real_inputs_and_what_is_shown(tmp_path: Path, model: Path) -> None:
    rng = random.Random(3)
    given = [(-1.0 + rng.gauss(0, 0.3), -1.0) for _ in range(200)]
    shown = {}
    for name, shares in (("equal", ""), ("skewed", "shares = {refund = 0.9, login = 0.1}")):
        rows = annotated(tmp_path / name, model, shares, given)
        found = Counter(row["output"] for row in rows if row["source"] == "given")
        made = Counter(row["output"] for row in rows if row["source"] == "made")
        assert made == {"refund": 20, "login": 20}  # these were made for each label in turn
        shown[name] = Counter[str]()
        for row in rows:
            shown[name][row["output"]] += row["copies"]
        assert found["refund"] == pytest.approx(180 if shares else 100, abs=8)
    assert shown["equal"]["refund"] == shown["equal"]["login"]
    assert shown["skewed"]["refund"] == pytest.approx(9 * shown["skewed"]["login"], rel=0.05)


@pytest.mark.parametrize("shares", ["", "shares = {refund = 0.9, login = 0.1}"])
def test_real_inputs_that_speak_against_equal_shares_are_told(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], shares: str
) -> None:
    annotated(tmp_path / "a", model, shares, [(-0.1, -3.0)] * 90 + [(-3.0, -0.1)] * 10)
    told = capsys.readouterr().err
    assert ("annotated unequally (refund 90, login 10)" in told) == (not shares)
    annotated(tmp_path / "b", model, shares, [(-0.1, -3.0)] * 55 + [(-3.0, -0.1)] * 45)
    assert "unequally" not in capsys.readouterr().err


def test_a_run_keeps_the_shares(tmp_path: Path, model: Path) -> None:
    run = begun(tmp_path, model, more="shares = {refund = 0.9, login = 0.1}")
    assert open_run(run.path).task.shares == (0.9, 0.1)
    with pytest.raises(InputError, match="other shares in it"):
        begun(tmp_path, model, more="shares = {refund = 0.8, login = 0.2}")


def test_a_task_from_python_is_checked_with_its_rows(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "gold.jsonl", pairs(3))
    run = begun(tmp_path, model, labelled=pairs(3))
    task = load_task(tmp_path / "inbox.toml")
    assert isinstance(task, Task)
    assert check_task(task)[1].labelled == run.labelled_rows
    again, is_new = create_or_open_run(run.path, task, model, run.settings)
    assert not is_new
    assert again.labelled_rows == run.labelled_rows


def test_nobody_is_warned_of_what_real_inputs_look_like(tmp_path: Path, model: Path) -> None:
    """The same rows as made and as real ones: all alike, longer than the examples, and longer for one label."""
    logprobs = [(-0.1, -3.0)] * 80 + [(-3.0, -0.1)] * 10
    found = {}
    for source, prefix in (("made", ""), ("given", "given-")):
        shares = "shares = {refund = 0.9, login = 0.1}" if prefix else ""
        run = begun(tmp_path / source, model, more=shares, settings=ALL, test=pairs(1))
        rows, answers = scored_rows(logprobs, source, prefix)
        for number, row in enumerate(rows):
            more = " More and more of it." * (number >= 80)
            row["input"] = f"The very same long words again and again, number {number}.{more}"
        curated(run, rows, answers)
        report = run.manifest()["stages"]["curate"]["report"]
        found[source] = [line.split(" ")[0] for line in warnings(report)]
        lines = "\n".join(report_lines(report))
        assert ("90 real ones were given" in lines) == bool(prefix)
    assert len(found["made"]) == 4
    assert found["given"] == []
