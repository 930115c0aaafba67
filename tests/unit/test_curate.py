"""Stage 3 on made rows, without a model: which are kept, which label they get, and how often they are shown."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finished_run import write_inputs, write_outputs
from messages import assert_says

from sg_local.errors import SgLocalError
from sg_local.files import read_rows, write_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.selfguide.selection import likeness
from sg_local.settings import Settings
from sg_local.stages.curate import run_curate
from sg_local.task import load_task

Rows = list[dict[str, Any]]

GENERATION = """name = "polite"
instruction = "Make it polite."

[[examples]]
input = "Send me the report today."
output = "Could you please send me the report today?"
"""


def curated(run: Run, inputs: Rows, outputs: Rows) -> Rows:
    """train.jsonl of a run whose first two stages wrote these rows."""
    write_inputs(run, inputs)
    write_outputs(run, outputs)
    run_curate(run)
    return read_rows(run.file("train.jsonl"))


def scored(logprobs: list[tuple[float, float]], labels: list[str] | None = None) -> tuple[Rows, Rows]:
    """Inputs and outputs with these log-probabilities of refund and login."""
    asked = labels or ["refund", "login"] * len(logprobs)
    inputs = [
        {"id": number, "input": f"message {number}", "label": asked[number]}
        for number in range(len(logprobs))
    ]
    outputs = [
        {"id": number, "label_logprobs": [{"refund": first, "login": second}], "output": "refund"}
        for number, (first, second) in enumerate(logprobs)
    ]
    return inputs, outputs


def test_a_bias_that_all_rows_share_does_not_choose_the_label(new_run: Run) -> None:
    # refund is likelier everywhere; where it is less so than on average, the answer is login
    rows = curated(new_run, *scored([(-0.1, -6.0), (-0.1, -6.2), (-0.4, -2.0), (-0.4, -2.1)]))
    made = [row for row in rows if isinstance(row["id"], int)]
    assert [row["output"] for row in made] == ["refund", "refund", "login", "login"]


def test_every_label_is_shown_equally_often_and_the_demonstrations_come_first(new_run: Run) -> None:
    logprobs = [(-0.1, -8.0 - number / 10) for number in range(12)] + [(-3.0, -0.1)] * 3
    rows = curated(new_run, *scored(logprobs))
    assert [row["id"] for row in rows[:1]] == ["demonstration-1"]
    shown: Counter[str] = Counter()
    for row in rows:
        shown[row["output"]] += row["copies"]
        assert (row["copies"] == 0) == (row["drop"] is not None)
    assert shown["refund"] == shown["login"] > 0
    report = new_run.manifest()["stages"]["curate"]["report"]
    assert report["labels"]["refund"]["shown"] == shown["refund"]
    assert report["kept"] == sum(row["drop"] is None for row in rows) - 1


def test_the_least_confident_of_each_label_are_dropped(tmp_path: Path, task: Path, model: Path) -> None:
    run = begun(tmp_path, task, model, agreement="never")
    logprobs = [(-0.1, -5.0 - number) for number in range(5)] + [(-5.0 - number, -0.1) for number in range(5)]
    rows = curated(run, *scored(logprobs))
    assert [row["id"] for row in rows if row["drop"] == "low_confidence"] == [0, 5]


@pytest.mark.parametrize("follows", [True, False])
def test_disagreement_drops_rows_only_where_the_student_follows_labels(
    tmp_path: Path, task: Path, model: Path, follows: bool
) -> None:
    run = begun(tmp_path, task, model, agreement="auto")
    logprobs = [(-0.1, -6.0) if number % 2 == 0 else (-6.0, -0.1) for number in range(60)]
    asked = ["refund" if number % 2 == 0 else "login" for number in range(60)]
    if follows:
        asked[0] = "login"  # one of 60 was written for another label
    else:
        asked = asked[30:] + asked[1:31]  # half of them
    rows = curated(run, *scored(logprobs, asked))
    dropped = [row["id"] for row in rows if row["drop"] == "disagreement"]
    assert dropped == ([0] if follows else [])
    agreement = run.manifest()["stages"]["curate"]["agreement"]
    assert agreement["used_as_filter"] is follows


def test_the_label_that_a_row_was_made_for_decides_where_its_score_is_in_doubt(new_run: Run) -> None:
    # 36 clear rows of 40 are what they were made for; 2 doubtful and 2 clear ones are not.
    logprobs = [(-0.1, -6.0), (-6.0, -0.1)] * 18 + [(-0.6, -0.8), (-0.8, -0.6), (-0.1, -9.0), (-9.0, -0.1)]
    asked = ["refund", "login"] * 18 + ["login", "refund", "login", "refund"]
    rows = curated(new_run, *scored(logprobs, asked))
    assert [row["output"] for row in rows[-4:]] == ["login", "refund", "refund", "login"]
    assert new_run.manifest()["stages"]["curate"]["agreement"]["reliability"] == pytest.approx(
        0.8671, abs=1e-3
    )


def test_the_label_that_a_row_was_made_for_counts_nothing_where_agreement_is_chance(new_run: Run) -> None:
    logprobs = [(-0.1, -6.0), (-6.0, -0.1)] * 19 + [(-0.6, -0.8), (-0.8, -0.6)]
    asked = (["refund"] * 2 + ["login"] * 2) * 9 + ["login", "refund"] * 2
    rows = curated(new_run, *scored(logprobs, asked))
    assert [row["output"] for row in rows[-2:]] == ["refund", "login"]


@pytest.mark.parametrize(("n_agreed", "is_told"), [(20, True), (24, True), (30, False)])
def test_labels_that_agree_as_by_chance_are_told_before_the_training(
    new_run: Run, capsys: pytest.CaptureFixture[str], n_agreed: int, is_told: bool
) -> None:
    """Of 40: 24 or more come by chance in 13 % of cases, 30 in 0.1 %."""
    logprobs = [(-0.1, -6.0), (-6.0, -0.1)] * 20
    labels = ["refund", "login"] * 20
    asked = labels[:n_agreed] + ["login" if label == "refund" else "refund" for label in labels[n_agreed:]]
    curated(new_run, *scored(logprobs, asked))
    told = capsys.readouterr().err
    assert_says(told, f"{n_agreed / 40:.0%} of 40 rows", "chance: 50%")
    assert ("hardly tells the labels apart" in told) == is_told
    found = new_run.manifest()["stages"]["curate"]["agreement"]
    assert (found["share"], found["n_rows"]) == (n_agreed / 40, 40)
    assert found["p"] == pytest.approx({20: 0.563, 24: 0.134, 30: 0.00111}[n_agreed], rel=1e-2)


def begun(tmp_path: Path, task: Path, model: Path, **settings: Any) -> Run:
    return create_or_open_run(tmp_path / "other", load_task(task), model, Settings(**settings))[0]


def test_the_run_foresees_a_gain_where_the_chosen_labels_fit_better_than_few_shot_answers(
    new_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    # few-shot prompting would say refund to all; without that bias every label is what the input was made for
    curated(new_run, *scored([(-0.1, -6.0), (-0.4, -2.0)] * 10))
    found = new_run.manifest()["stages"]["curate"]["forecast"]
    assert (found["few_shot_share"], found["chosen_share"], found["n_rows"]) == (0.5, 1.0, 20)
    assert found["verdict"] == "better"
    assert_says(capsys.readouterr().err, "a gain over few-shot prompting is likely", "100% of 20 rows", "50%")


@pytest.mark.parametrize("agrees", [True, False])
def test_real_rows_are_trained_on_where_the_prompts_agree_on_them(
    new_run: Run, capsys: pytest.CaptureFixture[str], agrees: bool
) -> None:
    def prompts(first: int, second: int) -> dict[str, Any]:
        says = [{"refund": -0.1, "login": -3.0}, {"refund": -3.0, "login": -0.1}]
        return {"label_logprobs": [says[first], says[second]], "output": "refund"}

    made = [
        {"id": number, "input": f"message {number}", "label": ["refund", "login"][number % 2]}
        for number in range(24)
    ]
    real = [
        {"id": f"given-{number}", "input": f"real {number}", "label": None, "source": "given"}
        for number in range(1, 41)
    ]
    outputs = [{"id": row["id"], **prompts(row["id"] % 2, row["id"] % 2)} for row in made]
    for number, row in enumerate(real):
        outputs.append({"id": row["id"], **prompts(number % 2, (number if agrees else number // 2) % 2)})
    write_rows(new_run.file("given.jsonl"), [{"input": row["input"]} for row in real])
    rows = curated(new_run, [*real, *made], outputs)
    drops = Counter(row["drop"] for row in rows if row["source"] == "given")
    assert drops == ({None: 20, "low_confidence": 20} if agrees else {"prompts_differ": 40})
    assert ("hardly agree on real inputs (kappa 0.00)" in capsys.readouterr().err) != agrees
    assert sum(row["copies"] for row in rows if row["source"] == "made") > 0


def test_what_several_prompts_say_is_averaged_after_each_lost_its_own_bias(new_run: Run) -> None:
    # The first prompt leans to refund, the second to login and is surer of itself.
    inputs, outputs = scored([(-0.1, -4.0), (-0.2, -3.6)])
    for row, (refund, login) in zip(outputs, [(-9.0, -0.1), (-3.0, -0.2)], strict=True):
        row["label_logprobs"].append({"refund": refund, "login": login})
    rows = curated(new_run, inputs, outputs)
    assert [row["output"] for row in rows if isinstance(row["id"], int)] == ["login", "refund"]


def test_soft_targets_are_the_calibrated_probabilities_of_all_labels(
    tmp_path: Path, task: Path, model: Path
) -> None:
    soft = {"label_targets": "soft", "agreement": "never", "keep_confident": 1.0}
    run = begun(tmp_path, task, model, **soft, soft_temperature=1.0)
    rows = curated(run, *scored([(-0.1, -2.1), (-2.1, -0.1), (-0.1, -1.1), (-1.1, -0.1)]))
    assert rows[0]["targets"] is None  # the demonstration is gold
    assert [row["targets"]["refund"] for row in rows[1:]] == pytest.approx(
        [0.8808, 0.1192, 0.7311, 0.2689], abs=1e-4
    )
    sharp = begun(tmp_path / "sharp", task, model, **soft, soft_temperature=0.1)
    rows = curated(sharp, *scored([(-0.1, -2.1), (-2.1, -0.1)]))
    assert [row["targets"]["refund"] for row in rows[1:]] == pytest.approx([1.0, 0.0], abs=1e-4)


def test_sampled_labels_are_voted_on(tmp_path: Path, task: Path, model: Path) -> None:
    run = begun(tmp_path, task, model, label_answers="samples", keep_confident=1.0, agreement="never")
    samples = [
        ["refund", "Refund.", "refund"],
        ["login", "login", "refund"],
        ["password", "password", "login"],
        ["a", "b", "c", "login"],
    ]
    inputs = [{"id": number, "input": f"message {number}", "label": "login"} for number in range(4)]
    outputs = [
        {"id": number, "samples": own, "output": own[0], "share": own.count(own[0]) / len(own)}
        for number, own in enumerate(samples)
    ]
    outputs[0]["output"], outputs[0]["share"] = "Refund.", 0.33
    rows = curated(run, inputs, outputs)[1:]
    assert [(row["output"], row["drop"]) for row in rows[:2]] == [("refund", None), ("login", None)]
    assert [row["drop"] for row in rows[2:]] == ["no_label", "no_label"]


def test_test_rows_are_not_held_out_of_the_made_data_and_vice_versa(
    new_run: Run, tmp_path: Path, task: Path, model: Path
) -> None:
    logprobs = [(-0.1, -6.0), (-6.0, -0.1)] * 10
    assert not [row for row in curated(new_run, *scored(logprobs)) if row["drop"] == "held_out"]
    task.write_text(task.read_text().replace('test = "inbox.test.jsonl"\n', ""))
    untested, _ = create_or_open_run(tmp_path / "untested", load_task(task), model, Settings())
    held_out = [row for row in curated(untested, *scored(logprobs)) if row["drop"] == "held_out"]
    assert len(held_out) == 3  # 15 % of the 16 that are confident enough, rounded up
    assert all(row["copies"] == 0 for row in held_out)


def test_free_answers_that_are_noise_or_not_agreed_on_are_dropped(
    tmp_path: Path, task: Path, model: Path
) -> None:
    task.write_text(GENERATION)
    run = begun(tmp_path, task, model, choose_by="consensus", keep_confident=1.0)
    texts = [
        ("Could you please close the door?", 0.9, None),
        ("Sure, here is the polite question you want", 0.9, "noise"),
        ("Could you please open the window now?", 0.2, "low_share"),
        ("Could you please " + "very " * 40 + "politely come?", 0.9, "length"),
        (None, 0.0, "unfinished"),
        ("Could you please come here now, dear?", 1.0, None),
        ("Could you please wait for me outside?", 1.0, None),
    ]
    inputs = [
        {"id": number, "input": f"{text or 'Do it now, as I asked you?'}"[17:].capitalize()}
        for number, (text, _, _) in enumerate(texts)
    ]
    outputs = [
        {
            "id": number,
            "samples": [text or ""],
            "output": text,
            "share": share,
            "drop": drop if text is None else None,
        }
        for number, (text, share, drop) in enumerate(texts)
    ]
    rows = curated(run, inputs, outputs)
    drops = {row["id"]: row["drop"] for row in rows if row["drop"] != "held_out"}
    for number, (_, _, drop) in enumerate(texts):
        assert drops.get(number) == drop
    assert sum(row["drop"] == "held_out" for row in rows) == 1


def test_the_free_answers_that_the_input_says_least_of_are_dropped(
    tmp_path: Path, task: Path, model: Path
) -> None:
    task.write_text(GENERATION)
    run = begun(tmp_path, task, model)
    inputs = [{"id": n, "input": f"Bring the thing {n} to me."} for n in range(5)]
    outputs = [
        {
            "id": n,
            "samples": ["x"],
            "output": f"Could you please bring the thing {n} to me?",
            "share": 0.1,  # samples of a high temperature agree little
            "information": information,
        }
        for n, information in enumerate([1.5, -0.2, 2.5, 2.0, 1.0])
    ]
    rows = curated(run, inputs, outputs)[1:]
    assert [row["id"] for row in rows if row["drop"] == "low_confidence"] == [1]
    assert [row["confidence"] for row in rows] == [1.5, -0.2, 2.5, 2.0, 1.0]


@pytest.mark.parametrize(("choose_by", "n_chosen"), [("information", 4), ("votes", 0)])
def test_short_answers_that_repeat_are_chosen_by_how_many_samples_say_them(
    tmp_path: Path, task: Path, model: Path, choose_by: str, n_chosen: int
) -> None:
    task.write_text(GENERATION)
    run = begun(tmp_path, task, model, keep_confident=1.0, choose_by=choose_by, form_filter=False)
    inputs = [{"id": n, "input": f"Bring the thing {n} to me."} for n in range(4)]
    outputs: Rows = []
    for n in range(4):
        said, informed = f"Could you please bring thing {n}?", f"Would you carry the thing {n} here?"
        samples = [informed, said, said, "", f"Please bring thing {n} here now."]
        share = round(likeness(informed, samples), 4)
        outputs = [
            *outputs,
            {"id": n, "samples": samples, "output": informed, "share": share, "information": 1.0},
        ]
    rows = curated(run, inputs, outputs)[1:]
    assert sum(row["output"].startswith("Could you please") for row in rows) == n_chosen


def test_json_of_another_shape_is_dropped_and_the_run_tells_how_sure_held_out_answers_are(
    tmp_path: Path, task: Path, model: Path
) -> None:
    task.write_text(
        GENERATION.replace(
            '"Could you please send me the report today?"', """'{"what": "the report", "n": 1}'"""
        )
    )
    run = begun(tmp_path, task, model, keep_confident=1.0)
    inputs = [{"id": n, "input": f"Send me {n} parts of the report {n}."} for n in range(4)]
    texts = ['{"what": "the report", "n": 0}', '{"what": "parts", "n": "1"}', "parts of the report"]
    texts += ['{"n":3,"what":"parts"}']
    outputs = [
        {"id": n, "samples": [text, text, "", "other"], "output": text, "share": 0.5, "information": 1.0}
        for n, text in enumerate(texts)
    ]
    rows = curated(run, inputs, outputs)[1:]
    assert [row["drop"] for row in rows][1:3] == ["shape", "shape"]
    assert {rows[0]["drop"], rows[3]["drop"]} == {None, "held_out"}
    assert run.manifest()["stages"]["curate"]["held_out_same_share"] == 0.5


def test_a_run_without_a_good_row_says_what_happened_to_them(tmp_path: Path, task: Path, model: Path) -> None:
    task.write_text(GENERATION)
    run, _ = create_or_open_run(tmp_path / "free", load_task(task), model, Settings())
    outputs = [{"id": 0, "samples": ["", ""], "output": None, "share": 0.0, "drop": "unfinished"}]
    with pytest.raises(SgLocalError, match="'unfinished': 1"):
        curated(run, [{"id": 0, "input": "Do it now."}], outputs)
    assert not run.is_finished("curate")
