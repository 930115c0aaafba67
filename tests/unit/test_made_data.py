"""The numbers of made data, their table and warnings, and the life of one row."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Contents
from finished_run import write_inputs, write_outputs, write_train_rows
from messages import assert_says

from sg_local.files import read_rows, write_rows
from sg_local.report.made_data import data_report
from sg_local.report.made_data_lines import report_lines
from sg_local.report.made_data_warnings import warnings
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.lock import lock_run
from sg_local.selfguide.rows import DropReason
from sg_local.settings import Settings, as_flag
from sg_local.stages.curate import run_curate
from sg_local.task import Example, Task, load_task

Rows = list[dict[str, Any]]

BOXES = Task(
    "boxes",
    "Which box?",
    (Example("I want my money back.", "refund"), Example("I cannot log in.", "login")),
    ("refund", "login"),
)
FREE = Task("polite", "Say it politely.", (Example("Send it.", "Could you send it?"),))


def made(*rows: tuple[str, str | None, str | None]) -> Rows:
    """Rows of inputs.jsonl: input, label, drop."""
    return [
        {"id": number, "input": text, "label": label, "drop": drop}
        for number, (text, label, drop) in enumerate(rows)
    ]


def curated(*rows: tuple[int, str, str, str | None, int]) -> Rows:
    """Rows of train.jsonl: id, input, output, drop, copies."""
    return [
        {"id": number, "input": text, "output": output, "drop": drop, "copies": copies}
        for number, text, output, drop, copies in rows
    ]


def answered(rows: Rows) -> Rows:
    """Rows of outputs.jsonl, every one with an answer."""
    return [{"id": row["id"], "output": row["output"], "drop": None} for row in rows]


def told(rows: Rows, task: Task) -> dict[str, Any]:
    """The report where every input passed the filters of generate and was answered."""
    label = task.labels[-1] if task.labels else None
    return data_report(made(*((row["input"], label, None) for row in rows)), answered(rows), rows, task)


INPUTS = made(
    ("Pay me back now.", "refund", None),
    ("Pay me back now!", "login", "duplicate"),
    ("The door of my account is shut.", "login", None),
    ("x", "login", "length"),
    ("Where is the bill?", "refund", None),
)
ROWS = curated(
    (0, "Pay me back now.", "refund", None, 2),
    (2, "The door of my account is shut.", "login", None, 3),
    (4, "Where is the bill?", "refund", "low_confidence", 0),
)


def test_the_funnel_is_told_by_stage_reason_and_label() -> None:
    report = data_report(INPUTS, answered(ROWS), ROWS, BOXES)
    assert (report["attempts"], report["kept"]) == (5, 2)
    assert report["dropped"] == {
        "generate": {
            "duplicate": {"n": 1, "by_label": {"login": 1}},
            "length": {"n": 1, "by_label": {"login": 1}},
        },
        "annotate": {},
        "curate": {"low_confidence": {"n": 1, "by_label": {"refund": 1}}},
    }
    assert report["labels"]["refund"] == {
        "made_for": 2,
        "annotated": 2,
        "kept": 1,
        "shown": 2,
        "longer_share": None,
        "demonstrations": 1,
    }
    lines = report_lines(report)
    assert lines[:6] == [
        "     5 inputs were asked for",
        "    -1 duplicate         20%  1 login",
        "    -1 length            20%  1 login",
        "     3 inputs to answer",
        "    -1 low_confidence    20%  1 refund",
        "     2 made rows are left",
    ]


def test_one_reason_in_two_stages_is_told_twice() -> None:
    inputs = made(("Go.", None, "length"), ("Go on.", None, None), ("Come in.", None, None))
    outputs = [
        {"id": 1, "output": "Please " * 40, "drop": None},
        {"id": 2, "output": None, "drop": "unfinished"},
    ]
    rows = curated((1, "Go on.", "Please " * 40, "length", 0), (2, "Come in.", "", "unfinished", 0))
    dropped = data_report(inputs, outputs, rows, FREE)["dropped"]
    assert {
        stage: {reason: entry["n"] for reason, entry in own.items()} for stage, own in dropped.items()
    } == {
        "generate": {"length": 1},
        "annotate": {"unfinished": 1},
        "curate": {"length": 1},
    }


def test_a_row_without_an_answer_counts_for_the_label_that_it_was_made_for() -> None:
    inputs = made(("Pay me back now.", "refund", None))
    outputs = [{"id": 0, "output": None, "drop": "over_context"}]
    rows: Rows = [{**inputs[0], "output": None, "drop": "over_context", "copies": 0}]
    report = data_report(inputs, outputs, rows, BOXES)
    assert report["dropped"]["annotate"] == {"over_context": {"n": 1, "by_label": {"refund": 1}}}
    assert report["dropped"]["curate"] == {}


def test_distinctness_and_lengths() -> None:
    rows = curated(
        (0, "a b", "refund", None, 1), (1, "a b c", "login", None, 1), (2, "d e f g", "login", None, 1)
    )
    report = told(rows, BOXES)
    assert report["distinct_1"] == round(7 / 9, 4)  # a and b occur twice
    assert report["distinct_2"] == round(5 / 6, 4)
    assert report["nearest_rouge_l"] == round((0.8 + 0.8 + 0) / 3, 4)
    assert report["input_characters"]["made"] == {"min": 3, "quartiles": [3, 5, 7], "max": 7}
    assert report["input_characters"]["demonstrations"]["min"] == 16
    assert report["input_characters"]["demonstrations"]["max"] == 21


def test_of_very_many_rows_some_are_compared_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each text has its twin far away: a sample compared with itself alone would hardly find it.
    rows = curated(*((n, f"w{n % 100} v{n % 100}", "login", None, 1) for n in range(200)))
    monkeypatch.setattr("sg_local.report.variety.MAX_COMPARISONS", 1000)
    report = told(rows, BOXES)
    assert (report["nearest_rouge_l"], report["nearest_rouge_l_rows"]) == (1.0, 50)
    assert "(by 50 of them)" in "\n".join(report_lines(report))
    assert report == told(rows, BOXES)


def test_the_demonstrations_are_no_made_rows() -> None:
    gold = curated((0, "a", "refund", None, 4))
    gold[0]["id"] = "demonstration-1"
    report = data_report(INPUTS, answered(ROWS), gold + ROWS, BOXES)
    assert report["kept"] == 2
    assert report["labels"]["refund"]["shown"] == 6  # in training they count


def test_free_answers_are_told_by_how_they_vary() -> None:
    rows = curated(
        (7, "go on", "Go on!", None, 1), *((n, f"thing {n}", "Could you?", None, 1) for n in range(3))
    )
    inputs = [{"id": row["id"], "input": row["input"], "label": None, "drop": None} for row in rows]
    report = data_report(inputs, answered(rows), rows, FREE)
    assert (report["distinct_outputs"], report["commonest_output_share"]) == (2, 0.75)
    assert report["copied_input_share"] == {"made": 0.25, "demonstrations": 0.0}
    assert "labels" not in report
    assert any(
        all(part in line for part in ("one answer", "75%", "sg-local explain RUN 0"))
        for line in warnings(report)
    )


def test_copies_of_inputs_are_warned_of_unless_a_demonstration_is_one() -> None:
    rows = curated(*((n, f"Do thing {n}.", f"do thing {n}", None, 1) for n in range(4)))
    [line] = [line for line in warnings(told(rows, FREE)) if "repeat their input" in line]
    assert_says(line, "100%", "--form-filter")
    kept_as_it_is = Task("polite", "Say it politely.", (Example("Could you send it?", "Could you send it?"),))
    assert not any("repeat their input" in line for line in warnings(told(rows, kept_as_it_is)))


def test_answers_that_resemble_a_demonstration_are_counted() -> None:
    rows = curated(
        (0, "Open the door.", "Could you open it?", None, 1),  # 3 of 4 words of "Could you send it?"
        (1, "Close the door.", "Please close the door, my dear.", None, 1),
        (2, "Send it now.", "Would you be so kind?", None, 1),  # the demonstration's whole input
    )
    like = told(rows, FREE)["like_demonstrations"]
    assert like == {"from_rouge_l": 0.5, "input_share": 0.3333, "output_share": 0.3333}


def test_the_words_that_demonstrations_share_make_no_input_like_them() -> None:
    fixed = Task(
        "facts",
        "Is it true?",
        (Example("Fact: the fire is hot", "yes"), Example("Fact: the fire is cold", "no")),
        ("yes", "no"),
    )
    rows = curated(*((n, f"Fact: the w{n} is v{n}", "yes", None, 1) for n in range(3)))
    like = told(rows, fixed)["like_demonstrations"]
    assert like == {"from_rouge_l": 0.8, "input_share": 0.0}


def test_what_looks_bad_is_said_with_what_helps() -> None:
    rows = curated(*((n, f"I want my money back {n}", "refund", None, 1) for n in range(9)))
    lines = warnings(told(rows, BOXES))
    assert [line.split(" ")[0] for line in lines] == ["inputs", "100%", "0"]
    assert "--input-temperature" in lines[0]
    assert "'login'" in lines[2]
    assert warnings(data_report(INPUTS, answered(ROWS), ROWS, BOXES)) == []


@pytest.mark.parametrize(
    ("characters", "word"), [(43, "more"), (42, None), (9, None)], ids=["long", "at the bound", "short"]
)
def test_lengths_far_from_the_demonstrations_are_warned_of(characters: int, word: str | None) -> None:
    """The longest demonstration has 21 characters, the shortest 16, and 20 to either side are no wonder."""
    rows = curated(*((n, f"{n}" * characters, ("refund", "login")[n % 2], None, 1) for n in range(4)))
    lines = warnings(told(rows, BOXES))
    assert len(lines) == (1 if word else 0)
    for line in lines:
        assert_says(line, f"{characters} characters or {word}", "16 to 21", "--length")


@pytest.mark.parametrize(("n_rows", "gap", "share"), [(12, 30, 1.0), (12, 0, 0.5), (9, 30, None)])
def test_a_label_that_its_length_tells_is_warned_of(n_rows: int, gap: int, share: float | None) -> None:
    """Equal lengths are none, and nine rows of a label are too few to say so."""
    lengths = {"refund": 20 + gap, "login": 20}
    rows = curated(
        *(
            (n, f"{n:03}".ljust(lengths[label], "x"), label, None, 1 + n % 2)
            for n, label in enumerate(["refund", "login"] * n_rows)
        )
    )
    report = told(rows, BOXES)
    assert report["labels"]["refund"]["longer_share"] == share
    lines = [line for line in warnings(report) if "of equal lengths" in line]
    if share == 1.0:
        assert len(lines) == 1
        assert_says(lines[0], "'refund' are longer", "100% of the pairs")
    else:
        assert lines == []


def test_of_many_labels_the_table_and_the_warnings_stay_short() -> None:
    many = Task("many", "Which?", (Example("a", "l0"),), tuple(f"l{n}" for n in range(77)))
    rows = curated(*((n, f"w{n} v{n}", "l0", None, 1) for n in range(20)))
    inputs = made(*((f"x{n}", many.labels[n % 77], "length") for n in range(100, 300)))
    report = data_report(inputs + told_inputs(rows), answered(rows), rows, many)
    lines = report_lines(report)
    assert "and 47 labels more, in manifest.json" in lines
    assert len(lines) < 45
    assert max(map(len, lines)) < 120
    assert lines[1].endswith("labels more")
    assert "73 labels more have as few rows" in warnings(report)[-1]
    assert len(warnings(report)) < 8
    assert len(report["labels"]) == 77


def told_inputs(rows: Rows) -> Rows:
    return [{"id": row["id"], "input": row["input"], "label": row["output"], "drop": None} for row in rows]


def test_nothing_made_is_a_report_too() -> None:
    report = data_report(made(("x", "refund", "length")), [], [], BOXES)
    assert report["kept"] == 0
    assert report_lines(report)
    free = data_report([], [], [], FREE)
    assert free["commonest_output_share"] == 0.0
    assert report_lines(free)
    assert warnings(free) == []


# One row


@pytest.fixture
def told_run(new_run: Run) -> Run:
    """Three rows: one in training, one that annotate saw last, one that generate dropped."""
    write_inputs(
        new_run,
        [
            {"id": 0, "input": "Pay me.", "label": "refund", "prompt": "turns", "seed": 5},
            {"id": 1, "input": "In \x1b[31mred", "label": "login", "prompt": "turns", "seed": 6},
            {"id": 2, "input": "x" * 5000, "label": "login", "prompt": "turns", "drop": "length", "seed": 7},
        ],
    )
    scores = [{"refund": -0.1, "login": -3.0}]
    write_outputs(new_run, [{"id": n, "label_logprobs": scores, "output": "refund"} for n in (0, 1)])
    write_train_rows(
        new_run,
        [
            {"id": "demonstration-1", "input": "Money back.", "output": "refund", "copies": 1},
            {"id": 0, "input": "Pay me.", "output": "refund", "confidence": 0.9, "copies": 2},
            {"id": 1, "input": "In red", "output": "refund", "drop": "low_confidence", "copies": 0},
        ],
    )
    return new_run


@pytest.mark.parametrize(
    ("row_id", "told", "is_in_training"),
    [
        ("0", ["label           refund", "-3.00", "copies          2", "as it was made for: yes"], True),
        (
            "1",
            [
                "In \\x1b[31mred",
                "as it was made for: no",
                "low_confidence: ",
            ],
            False,
        ),
        (
            "2",
            [
                "drop            length",
                "annotated: no",
                "curated: no",
                "(5000 characters)",
                "(--length-filter)",
            ],
            False,
        ),
        ("demonstration-1", ["demonstration:", "I want my money back.", "copies          1"], True),
    ],
)
def test_a_rows_life(
    sg: Call,
    told_run: Run,
    contents: Contents,
    row_id: str,
    told: list[str],
    is_in_training: bool,
) -> None:
    before = contents(told_run.path)
    result = sg("explain", told_run.path, row_id)
    assert result.exit_code == 0, result.stderr
    for text in told:
        assert text in result.stdout
    assert f"in training: {'yes' if is_in_training else 'no'}" in result.stdout
    assert "\x1b" not in result.stdout
    assert len(result.stdout) < 5000
    assert contents(told_run.path) == before
    found = json.loads(sg("explain", told_run.path, row_id, "--json").stdout)
    assert found["in_training"] is is_in_training


def test_an_unknown_row_is_refused_with_those_that_are(sg: Call, told_run: Run, new_run: Run) -> None:
    result = sg("explain", told_run.path, "9")
    assert result.exit_code == 2
    assert_says(result.stderr, "row '9'", "0 to 2", "demonstration-1")


def test_a_run_without_rows_says_so(sg: Call, new_run: Run) -> None:
    result = sg("explain", new_run.path, "0")
    assert (result.exit_code, "generate has not made any yet" in result.stderr) == (2, True)
    told = sg("explain", new_run.path, "demonstration-1")
    assert "I want my money back." in told.stdout
    assert told.stdout.endswith("curated: no\nin training: no\n")


def test_a_row_is_explained_while_its_stage_is_at_work_and_takes_no_lock(
    sg: Call, new_run: Run, contents: Contents
) -> None:
    row = {"id": 0, "input": "Pay me.", "label": "refund", "prompt": "turns", "drop": "cut_off", "seed": 5}
    new_run.file("inputs.jsonl").write_text(json.dumps(row) + '\n{"id": 1, "inp')  # a kill tore the last line
    before = contents(new_run.path)
    with lock_run(new_run.path):
        result = sg("explain", new_run.path, "0")
    [line] = [line for line in result.stdout.splitlines() if "cut_off: " in line]
    assert_says(line, "the input", "limit of tokens", "(--max-input-tokens 0)")
    assert "annotated: no" in result.stdout
    assert sg("explain", new_run.path, "1").exit_code == 2
    assert contents(new_run.path) == before
    new_run.file("inputs.jsonl").write_text("[]\n")
    assert "line 1" in sg("explain", new_run.path, "0").stderr


def test_label_scores_are_told_as_curate_weighed_them(sg: Call, new_run: Run) -> None:
    """raw -> without the bias of all rows -> with the label that was asked for; the last gives curate's confidence."""
    logprobs = [(-0.1, -6.0), (-6.0, -0.1)] * 18 + [(-0.6, -0.8), (-0.8, -0.6), (-0.1, -9.0), (-9.0, -0.1)]
    asked = ["refund", "login"] * 18 + ["login", "refund", "login", "refund"]
    write_inputs(new_run, made(*((f"message {n}", label, None) for n, label in enumerate(asked))))
    outputs = [
        {
            "id": n,
            "label_logprobs": [{"refund": first, "login": second}, {"refund": first - 1, "login": second}],
            "output": "refund",
        }
        for n, (first, second) in enumerate(logprobs)
    ]
    write_outputs(new_run, outputs)

    def scores(row_id: int) -> dict[str, dict[str, float | None]]:
        found = sg("explain", new_run.path, row_id, "--json").stdout
        return dict(json.loads(found)["label_scores"])

    assert scores(0)["refund"]["with_evidence"] is None  # curate decides how much it counts
    run_curate(new_run)
    assert scores(36)["refund"]["raw"] == pytest.approx(0.4256, abs=1e-3)  # e^(0.2 - 0.5) against 1
    for row in read_rows(new_run.file("train.jsonl"))[1:]:
        own = scores(row["id"])
        assert row["output"] == max(own, key=lambda label: own[label]["with_evidence"] or 0)
        first, second = sorted((score["with_evidence"] or 0 for score in own.values()), reverse=True)
        assert first - second == pytest.approx(row["confidence"], abs=2e-4)
    table = sg("explain", new_run.path, 36).stdout
    assert "label     raw  calibrated  with evidence   log-probability by prompt" in table
    assert "-0.60 -1.60" in table


def test_without_calibration_no_score_is_called_calibrated(
    sg: Call, tmp_path: Path, task: Path, model: Path
) -> None:
    settings = Settings(calibrate=False, agreement="never")
    run, _ = create_or_open_run(tmp_path / "plain", load_task(task), model, settings)
    write_inputs(run, made(("a", "login", None)))
    row = {"id": 0, "label_logprobs": [{"refund": -1.0, "login": -1.0}], "output": "refund"}
    write_outputs(run, [row])
    found = json.loads(sg("explain", run.path, "0", "--json").stdout)
    assert found["label_scores"]["login"] == {"raw": 0.5, "calibrated": None, "with_evidence": None}


def test_a_made_for_label_that_curate_did_not_believe_is_no_evidence(
    sg: Call, tmp_path: Path, task: Path, model: Path
) -> None:
    """Of 6 labels chance is 0.1667 in the manifest, which is more than 1/6."""
    labels = ["refund", "login", "c", "d", "e", "f"]
    task.write_text(task.read_text().replace('["refund", "login"]', json.dumps(labels)))
    run, _ = create_or_open_run(tmp_path / "six", load_task(task), model, Settings())
    write_inputs(run, made(*((f"message {n}", labels[n % 5 + 1], None) for n in range(10))))
    outputs = [
        {"id": n, "label_logprobs": [{label: -float(n + place) for place, label in enumerate(labels)}]}
        for n in range(10)
    ]
    write_outputs(run, [{"output": "refund", **row} for row in outputs])
    run_curate(run)
    agreement = run.manifest()["stages"]["curate"]["agreement"]
    assert agreement["reliability"] == agreement["chance"] == 0.1667
    scores = json.loads(sg("explain", run.path, "0", "--json").stdout)["label_scores"]
    assert {score["with_evidence"] for score in scores.values()} == {None}


def test_equal_samples_are_told_once(sg: Call, tmp_path: Path, task: Path, model: Path) -> None:
    task.write_text('name = "free"\ninstruction = "Go."\n\n[[examples]]\ninput = "a"\noutput = "b"\n')
    run, _ = create_or_open_run(tmp_path / "free", load_task(task), model, Settings())
    write_inputs(run, made(("What?", None, None)))
    samples = ["That.", "That.", "", "\x1b[2J"]
    write_outputs(run, [{"id": 0, "samples": samples, "output": "That.", "share": 0.5}])
    told = sg("explain", run.path, "0").stdout
    assert "    2 of 4         That." in told
    [cut] = [line for line in told.splitlines() if "--max-new-tokens" in line]
    assert cut.startswith("    1 of 4         (")
    assert "    1 of 4         \\x1b[2J" in told


def test_what_an_earlier_curate_wrote_is_not_called_training(sg: Call, told_run: Run) -> None:
    told_run.forget_from("annotate", keep_partial=False)
    told = sg("explain", told_run.path, "0").stdout
    assert_says(told, "curate is not finished", "\nin training: no")


def test_curate_ends_with_the_table_on_stderr_and_its_numbers_in_the_manifest(
    sg: Call, told_run: Run
) -> None:
    result = sg("curate", told_run.path, "--redo")
    assert (result.exit_code, result.stdout) == (0, "")
    for line in (
        "  3 inputs were asked for",
        "-1 length ",
        "  2 inputs to answer",
        "distinct words",
        "label ",
    ):
        assert line in result.stderr
    report = told_run.manifest()["stages"]["curate"]["report"]
    assert report["dropped"]["generate"]["length"] == {"n": 1, "by_label": {"login": 1}}
    assert told_run.manifest()["stages"]["curate"]["counts"]["kept"] == report["kept"] + 1


def test_fewer_rows_than_labels_are_not_told_as_none_expected() -> None:
    lines = warnings(told(curated((0, "Pay me back now.", "refund", None, 1)), BOXES))
    assert any("'login'" in line and "less than one" in line for line in lines)


@pytest.mark.parametrize("reason", DropReason)
def test_every_reason_to_drop_a_row_is_explained(sg: Call, new_run: Run, reason: DropReason) -> None:
    write_inputs(new_run, [{"id": 0, "input": "Pay me.", "label": "refund", "drop": reason}])
    flag = (
        f" ({as_flag(reason.setting, getattr(new_run.settings, reason.setting))})" if reason.setting else ""
    )
    told = sg("explain", new_run.path, "0").stdout
    assert reason.meaning
    assert f"dropped: {reason.value}: {reason.meaning}{flag}\n" in told


def test_a_persons_own_word_for_a_drop_is_told_as_it_stands(sg: Call, new_run: Run) -> None:
    write_inputs(new_run, [{"id": 0, "input": "Pay me.", "label": "refund", "drop": "not ours"}])
    assert "dropped: not ours\n" in sg("explain", new_run.path, "0").stdout


def test_a_row_that_a_person_broke_is_refused_with_its_line(sg: Call, told_run: Run) -> None:
    rows = read_rows(told_run.file("train.jsonl"))
    rows[1]["copies"] = "two"
    del rows[2]["drop"]
    write_rows(told_run.file("train.jsonl"), rows)
    result = sg("explain", told_run.path, "0")
    assert result.exit_code == 2
    assert "train.jsonl, line 2: copies is 'two', not int" in result.stderr
    assert "train.jsonl, line 3: the row has no drop" in result.stderr
