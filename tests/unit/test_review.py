"""A person's word on made rows: which row is asked about, what is kept of the word, and what curate makes of it."""

import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, one_line
from finished_run import (
    ScriptedStages,
    review_row,
    write_inputs,
    write_outputs,
    write_stage,
    write_train_rows,
)
from messages import assert_says

import sg_local.runs.lock as lock
from sg_local.errors import InputError, SgLocalError
from sg_local.files import read_rows, write_rows
from sg_local.report.review import recorded_summary, review_lines
from sg_local.report.scores import score_table
from sg_local.review.session import Session, open_session
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.review import read_review
from sg_local.runs.rows import read_inputs
from sg_local.runs.second_try import run_from
from sg_local.selfguide.review import (
    DRAW_EVERY,
    ModelAnswer,
    information_density,
    review_order,
    review_sample,
    summary,
)
from sg_local.selfguide.rows import Word
from sg_local.settings import Settings
from sg_local.stages.curate import run_curate
from sg_local.task import load_task

N_ROWS = 12
OUTPUT = {"refund": "login", "login": "refund"}


@pytest.fixture
def run(new_run: Run) -> Run:
    """A curated one: of 12 rows each is less sure than the one before it, in turn of each label."""
    texts = [f"message {number} about {'money' if number % 2 else 'passwords'}" for number in range(N_ROWS)]
    write_inputs(
        new_run,
        [
            {"id": number, "input": text, "label": ["refund", "login"][number % 2], "source": "made"}
            for number, text in enumerate(texts)
        ],
    )
    likely = [
        (-0.1, -6.0 + number / 4) if number % 2 == 0 else (-6.0 + number / 4, -0.1)
        for number in range(N_ROWS)
    ]
    write_outputs(
        new_run,
        [
            {"id": number, "label_logprobs": [{"refund": first, "login": second}], "output": "refund"}
            for number, (first, second) in enumerate(likely)
        ],
    )
    run_curate(new_run)
    return new_run


def curated(run: Run) -> dict[str, dict[str, Any]]:
    return {str(row["id"]): row for row in read_rows(run.file("train.jsonl"))}


def shown(session: Session) -> str:
    row = session.state()["row"]
    assert row is not None
    return row["id"]


def answers(confidences: list[float], texts: list[str] | None = None, outputs: str = "") -> list[ModelAnswer]:
    given = texts or [f"text {number}" for number in range(len(confidences))]
    return [
        ModelAnswer(number, text, (outputs or "a" * len(given))[number], confidence, None)
        for number, (text, confidence) in enumerate(zip(given, confidences, strict=True))
    ]


# Which row is asked about


def test_the_least_sure_rows_come_first_and_every_fourth_is_drawn() -> None:
    rows = answers([number / 40 for number in range(40)], ["the same words"] * 40)
    order = review_order(rows, by_label=False, seed=3)
    assert sorted(order) == list(range(40))
    drawn = order[DRAW_EVERY - 1 :: DRAW_EVERY]
    sample = review_sample(range(40), seed=3)
    assert drawn[:2] == sample[:2]
    assert drawn[2] == next(row_id for row_id in sample if row_id not in order[: 3 * DRAW_EVERY - 1])
    least_sure = [row_id for place, row_id in enumerate(order, 1) if place % DRAW_EVERY]
    assert least_sure[:9] == [row_id for row_id in range(12) if row_id not in drawn[:2]][:9]


def test_labels_come_in_turn() -> None:
    rows = answers([0.01] * 20 + [0.9] * 4, outputs="a" * 20 + "b" * 4)
    order = review_order(rows, by_label=True, seed=0)
    labels = [rows[int(row_id)].output for place, row_id in enumerate(order, 1) if place % DRAW_EVERY]
    assert Counter(labels[:6]) == {"a": 3, "b": 3}


def test_a_row_that_many_resemble_comes_before_a_lonely_one() -> None:
    texts = ["my parcel is late"] * 5 + ["zebras juggle quietly", "my parcel is late today"]
    values = information_density(answers([0.5] * 7, texts))
    assert values[5] == min(values) < values[6]
    assert all(0 < value <= 1 for value in values)


def test_the_order_is_the_same_again_and_another_by_another_seed() -> None:
    rows = answers([0.5] * 30)
    orders = [review_order(rows, by_label=True, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert review_order([], by_label=True, seed=0) == []
    assert information_density(answers([0.5], ["..."])) == [1.0]


def test_the_place_in_the_sample_does_not_depend_on_the_other_rows() -> None:
    whole = review_sample([*range(50), "given-1"], seed=0)
    assert review_sample(range(0, 50, 2), seed=0) == [row_id for row_id in whole if row_id in range(0, 50, 2)]


# What the words come to


def test_agreement_on_the_drawn_rows_is_that_of_all_rows_though_most_were_chosen_as_unsure() -> None:
    """300 runs of 200 rows, of which the unsure ones are right half the time and the others always."""
    chance = random.Random(0)
    means: dict[str, list[float]] = {"agreement": [], "drawn_agreement": []}
    for seed in range(300):
        rows = answers([number / 200 for number in range(200)])
        is_right = [number >= 100 or chance.random() < 0.5 for number in range(200)]
        said = {
            row_id: review_row(row_id, "", "accept" if is_right[int(row_id)] else "answer", "a")
            for row_id in review_order(rows, by_label=False, seed=seed)[:40]
        }
        found: Any = summary(said, review_sample(range(200), seed))  # type: ignore[arg-type]
        for name, values in means.items():
            values.append(found[name]["mean"])
    assert sum(means["drawn_agreement"]) / 300 == pytest.approx(0.75, abs=0.02)
    assert sum(means["agreement"]) / 300 < 0.65


def test_a_summary_counts_and_says_for_which_rows_it_holds() -> None:
    said: Any = {
        0: review_row(0, "", "accept", "a", model_drop="low_confidence"),
        1: review_row(1, "", "answer", "b", model_drop=None),
        2: review_row(2, "", "drop"),
        3: review_row(3, "", "accept", "a"),
    }
    found = summary(said, [3, 2, 1, 7, 0])
    assert found == {
        "reviewed": 4,
        "accepted": 2,
        "corrected": 1,
        "dropped": 1,
        "brought_back": 1,
        "agreement": {"mean": 0.66667, "interval_95": [0.20766, 0.93851]},
        "n_drawn": 2,  # 3 and 1: 2 was dropped, and 7 was not looked at
        "drawn_agreement": {"mean": 0.5, "interval_95": [0.09453, 0.90547]},
    }
    lines = review_lines(found)
    assert_says(lines[0], "4 rows", "2 as the model", "1 corrected", "1 dropped", "1 of them are back")
    assert_says(lines[1], "0.667 (95 % interval 0.208 to 0.939) on 3 rows", "least sure")
    assert_says(lines[2], "2 rows drawn at random", "0.500")
    assert review_lines(summary({}, [1, 2])) == []


def test_a_summary_of_another_version_is_none() -> None:
    whole = dict(summary({1: review_row(1, "", "accept", "a")}, [1]))  # type: ignore[dict-item]
    assert recorded_summary({"review": whole}) == whole
    for wrong in (
        {},
        {"review": []},
        {"review": whole | {"n_drawn": "1"}},
        {"review": whole | {"agreement": 1}},
    ):
        assert recorded_summary(wrong) is None


# A sitting


def test_a_word_is_on_the_disk_before_the_next_row_is_shown(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        session.say_word(first, Word.ACCEPT)
        (row,) = read_rows(run.file("review.jsonl"))
        assert (str(row["id"]), row["word"]) == (first, "accept")
        assert row["output"] == row["model_output"] == curated(run)[first]["output"]
        assert shown(session) != first
        assert session.state()["n_reviewed"] == 1


def test_sittings_add_up_and_the_order_goes_on(run: Run) -> None:
    with open_session(run.path) as session:
        whole = [shown(session)]
        for _ in range(N_ROWS - 1):
            session.say_word(whole[-1], Word.DROP)
            whole.append(shown(session))
    run.file("review.jsonl").unlink()
    asked = []
    for _ in range(N_ROWS):
        with open_session(run.path) as session:
            asked.append(shown(session))
            session.say_word(asked[-1], Word.DROP)
    assert asked == whole
    assert sorted(asked, key=int) == [str(number) for number in range(N_ROWS)]
    with open_session(run.path) as session:
        assert session.state()["row"] is None
        assert session.summary["dropped"] == N_ROWS


def test_a_line_torn_by_a_kill_is_no_word_and_the_next_word_is_whole(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        session.say_word(first, Word.ACCEPT)
        second = shown(session)
    whole = run.file("review.jsonl").read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        run.file("review.jsonl").write_bytes(whole + whole[:cut])
        assert len(read_review(run, read_inputs(run))) == 1  # also without a sitting in between
        with open_session(run.path) as session:
            assert shown(session) == second
            session.say_word(second, Word.DROP)
        assert [row["word"] for row in read_rows(run.file("review.jsonl"))] == ["accept", "drop"]


def die_in_the_middle(run_dir: str, n_words: int) -> None:
    with open_session(Path(run_dir)) as session:
        for _ in range(n_words):
            session.say_word(shown(session), Word.ACCEPT)
        os._exit(9)


def test_a_word_costs_no_new_draw_of_all_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(run.path) as session:
        monkeypatch.setattr("sg_local.selfguide.review.row_seed", None)
        for _ in range(N_ROWS):
            session.say_word(shown(session), Word.ACCEPT)
        assert session.summary["n_drawn"] == N_ROWS


def test_a_killed_sitting_loses_nothing_and_holds_nothing(run: Run) -> None:
    for n_words in (1, 3):
        process = multiprocessing.get_context("fork").Process(
            target=die_in_the_middle, args=(str(run.path), n_words)
        )
        process.start()
        process.join(60)
        assert process.exitcode == 9
    with open_session(run.path) as session:
        assert session.summary["accepted"] == 4


def test_a_full_disk_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        monkeypatch.setattr(os, "write", lambda _descriptor, _data: 0)
        with pytest.raises(SgLocalError, match=r"review\.jsonl could not be written"):
            session.say_word(first, Word.ACCEPT)
        monkeypatch.undo()
        assert (shown(session), session.state()["n_reviewed"]) == (first, 0)
    assert read_rows(run.file("review.jsonl")) == []


def test_two_at_once_are_refused(run: Run, sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.1)
    with open_session(run.path):
        assert_says(
            one_line(sg("review", run.path, "--terminal"), 2), "another sg-local is working on", run.path
        )


def test_back_and_a_new_word_in_place_of_the_old_one(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        session.back()
        assert shown(session) == first
        session.say_word(first, Word.ACCEPT)
        second = shown(session)
        session.back()
        assert shown(session) == first
        assert session.state()["row"]["word"] == "accept"  # type: ignore[index]
        session.say_word(first, Word.DROP)
        assert shown(session) == second
        session.back()
        session.forward()
        session.forward()
        assert shown(session) == second
        assert session.summary["reviewed"] == session.summary["dropped"] == 1
    with open_session(run.path) as session:  # earlier sittings can be gone back to
        assert shown(session) == second
        session.back()
        assert shown(session) == first


def test_undo_takes_one_word_after_the_other_back_also_of_earlier_sittings(run: Run) -> None:
    seen = []
    for word in (Word.ACCEPT, Word.DROP):
        with open_session(run.path) as session:
            seen.append(shown(session))
            session.say_word(seen[-1], word)
    with open_session(run.path) as session:
        third = shown(session)
        session.undo()
        assert shown(session) == seen[1]
        session.undo()
        assert shown(session) == seen[0]
        session.undo()
        assert not session.state()["can_undo"]
        assert session.summary["reviewed"] == 0
        for row_id in (*seen, third):
            assert shown(session) == row_id
            session.say_word(row_id, Word.ACCEPT)
    assert read_review(run, read_inputs(run)).keys() == {*map(int, (*seen, third))}


def test_rows_that_were_seen_and_taken_back_come_again_at_the_end(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        session.say_word(first, Word.ACCEPT)
        session.undo()
        session.forward()
        for _ in range(N_ROWS - 1):
            assert shown(session) != first
            session.say_word(shown(session), Word.ACCEPT)
        assert shown(session) == first
        session.say_word(first, Word.ACCEPT)
        for move in (session.forward, session.forward):
            move()
            assert session.state()["row"] is None
        session.back()
        assert shown(session) != first
        assert session.summary["reviewed"] == N_ROWS


def test_where_there_is_no_row_there_is_nothing_to_say(run: Run) -> None:
    rows = [row for row in read_rows(run.file("train.jsonl")) if row["id"] == "demonstration-1"]
    write_rows(run.file("train.jsonl"), rows)
    with open_session(run.path) as session:
        for move in (session.back, session.forward, session.undo):
            move()
        assert (session.state()["row"], session.state()["n_rows"]) == (None, 0)
        with pytest.raises(InputError, match="is not the one that is shown"):
            session.say_word("0", Word.DROP)


def test_a_vote_that_is_no_label_cannot_be_accepted_but_corrected(
    tmp_path: Path, task: Path, model: Path
) -> None:
    run, _ = create_or_open_run(tmp_path / "votes", load_task(task), model, Settings(label_answers="samples"))
    said = ["refund", "refund", "no idea"]
    write_inputs(
        run, [{"id": number, "input": f"message {number}", "label": "refund"} for number in range(3)]
    )
    write_outputs(
        run,
        [{"id": number, "output": text, "samples": [text], "share": 1.0} for number, text in enumerate(said)],
    )
    run_curate(run)
    assert curated(run)["2"]["drop"] == "no_label"
    with open_session(run.path) as session:
        while shown(session) != "2":
            session.say_word(shown(session), Word.DROP)
        with pytest.raises(InputError, match="is no label of the task"):
            session.say_word("2", Word.ACCEPT)
        session.say_word("2", Word.ANSWER, "login")
    assert read_review(run, read_inputs(run))[2]["output"] == "login"


def test_only_a_label_of_the_list_on_the_row_that_is_shown(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        for output in ("Refund", "", None, "delivery\x1b[2J"):
            with pytest.raises(InputError, match="is no label of the task: its labels are refund, login"):
                session.say_word(first, Word.ANSWER, output)
        with pytest.raises(InputError, match="is not the one that is shown"):
            session.say_word("none", Word.DROP)
        assert shown(session) == first
    assert not run.file("review.jsonl").exists()


def test_the_models_own_label_is_an_acceptance(run: Run) -> None:
    with open_session(run.path) as session:
        session.say_word(shown(session), Word.ANSWER, session.state()["row"]["output"])  # type: ignore[index]
        assert session.summary["accepted"] == 1


def test_before_curate_has_chosen_there_is_nothing_to_review(new_run: Run, sg: Call) -> None:
    assert_says(one_line(sg("review", new_run.path, "--terminal"), 2), "generate", "sg-local generate")


# A word is bound to its row


def test_a_word_does_not_land_on_another_input_of_the_same_id(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        session.say_word(first, Word.ANSWER, OUTPUT[curated(run)[first]["output"]])
    rows = read_rows(run.file("inputs.jsonl"))
    rows[int(first)]["input"] = "Something else."
    write_rows(run.file("inputs.jsonl"), rows)
    assert read_review(run, read_inputs(run)) == {}
    run_curate(run)
    assert "reviewed" not in curated(run)[first]
    rows[int(first)]["input"] = f"message {first} about {'money' if int(first) % 2 else 'passwords'}"
    write_rows(run.file("inputs.jsonl"), rows)
    assert len(read_review(run, read_inputs(run))) == 1  # it is there again with its row


def test_faults_of_an_edited_file_are_told_at_once(run: Run) -> None:
    texts = {row["id"]: row["input"] for row in read_rows(run.file("inputs.jsonl"))}
    write_rows(
        run.file("review.jsonl"),
        [
            review_row(0, texts[0], "perhaps", "refund"),
            review_row(1, texts[1], "answer", "delivery"),
            review_row(2, texts[2], "accept", " "),
            review_row("gone-1", "gone", "perhaps"),
        ],
    )
    with pytest.raises(InputError) as caught:
        read_review(run, read_inputs(run))
    assert_says(str(caught.value), "row 0", "'perhaps'", "row 1", "'delivery'", "row 2", "no output")
    assert "gone-1" not in str(caught.value)


# What curate makes of it


def test_reviewed_rows_are_gold_and_others_are_as_before(run: Run) -> None:
    before = curated(run)
    unsure = next(row_id for row_id, row in before.items() if row["drop"] == "low_confidence")
    sure = [row_id for row_id, row in before.items() if row["drop"] is None and row_id.isdecimal()]
    said = {unsure: OUTPUT[before[unsure]["output"]], sure[0]: before[sure[0]]["output"]}
    texts = {str(row["id"]): row["input"] for row in read_rows(run.file("inputs.jsonl"))}
    write_rows(
        run.file("review.jsonl"),
        [
            *(review_row(int(row_id), texts[row_id], "answer", output) for row_id, output in said.items()),
            review_row(int(sure[1]), texts[sure[1]], "drop"),
        ],
    )
    run_curate(run)
    after = curated(run)
    for row_id, output in said.items():
        row = after[row_id]
        assert (row["output"], row["drop"], row["reviewed"], row["source"]) == (output, None, True, "made")
    assert (after[sure[1]]["drop"], after[sure[1]]["copies"]) == ("review", 0)
    others = before.keys() - {*said, sure[1]}
    for row_id in others:
        assert {**after[row_id], "copies": 0} == {**before[row_id], "copies": 0}
    # As a labelled row would be: at least twice what the others are.
    plain = [row["copies"] for row in after.values() if row["copies"] and not row.get("reviewed")]
    assert min(after[row_id]["copies"] for row_id in said) >= 2 * min(plain)
    found = run.manifest()["stages"]["curate"]["review"]
    assert (found["reviewed"], found["dropped"]) == (3, 1)


def test_a_row_that_was_dropped_by_hand_stays_dropped_whatever_was_said(run: Run) -> None:
    texts = {row["id"]: row["input"] for row in read_rows(run.file("inputs.jsonl"))}
    write_rows(run.file("review.jsonl"), [review_row(0, texts[0], "accept", "refund")])
    outputs = read_rows(run.file("outputs.jsonl"))
    outputs[0]["drop"] = "rude"
    write_rows(run.file("outputs.jsonl"), outputs)
    run_curate(run)
    assert curated(run)["0"]["drop"] == "rude"


def test_what_a_person_answered_is_never_held_out(tmp_path: Path, task: Path, model: Path, run: Run) -> None:
    task.write_text(task.read_text().replace('test = "inbox.test.jsonl"\n', ""))
    untested, _ = create_or_open_run(tmp_path / "untested", load_task(task), model, Settings())
    for name in ("inputs.jsonl", "outputs.jsonl"):
        untested.file(name).write_bytes(run.file(name).read_bytes())
    run_curate(untested)
    held_out = {row_id for row_id, row in curated(untested).items() if row["drop"] == "held_out"}
    assert held_out
    texts = {str(row["id"]): row["input"] for row in read_rows(run.file("inputs.jsonl"))}
    write_rows(
        untested.file("review.jsonl"),
        [review_row(int(row_id), texts[row_id], "accept", "login") for row_id in held_out],
    )
    run_curate(untested)
    after = curated(untested)
    assert all(after[row_id]["drop"] is None for row_id in held_out)
    assert any(row["drop"] == "held_out" for row in after.values())


def test_a_review_makes_curate_and_what_follows_out_of_date_and_run_goes_on_there(
    run: Run, sg: Call, task: Path, stages: ScriptedStages
) -> None:
    begun = ["run", task, "--model", run.model.path, "--run", run.path, "--n-inputs=7"]
    assert sg(*begun).exit_code == 0
    stages.ran.clear()
    with open_session(run.path) as session:
        session.say_word(shown(session), Word.DROP)
    assert run.first_unfinished("annotate") is None
    assert_says(run.first_unfinished("curate").reason, "review.jsonl was added")  # type: ignore[union-attr]
    with open_session(run.path):  # more words may follow
        pass
    assert sg(*begun).exit_code == 0
    assert [stage for _, stage in stages.ran] == ["curate", "train", "export", "evaluate"]
    with open_session(run.path) as session:
        session.say_word(shown(session), Word.DROP)
    assert_says(run.first_unfinished("curate").reason, "review.jsonl was changed")  # type: ignore[union-attr]


def test_a_run_of_the_version_before_is_out_of_date_once_it_is_reviewed(run: Run) -> None:
    manifest = json.loads(run.file("manifest.json").read_text())
    del manifest["stages"]["curate"]["looks_for"]["review.jsonl"]
    run.file("manifest.json").write_text(json.dumps(manifest))
    assert run.is_finished("curate")
    with open_session(run.path) as session:
        session.say_word(shown(session), Word.DROP)
    assert not run.is_finished("curate")


def test_after_curate_took_a_word_in_it_can_be_changed_and_the_models_answer_is_still_shown(run: Run) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        model_output = curated(run)[first]["output"]
        session.say_word(first, Word.ANSWER, OUTPUT[model_output])
    run_curate(run)
    assert curated(run)[first]["output"] == OUTPUT[model_output]
    with open_session(run.path) as session:
        session.back()
        row = session.state()["row"]
        assert row is not None
        assert (row["id"], row["output"], row["said"]) == (first, model_output, OUTPUT[model_output])
        session.undo()
    run_curate(run)
    assert curated(run)[first]["output"] == model_output


def test_a_person_never_passes_for_the_model_where_the_words_were_removed(run: Run, sg: Call) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        session.say_word(first, Word.ANSWER, OUTPUT[curated(run)[first]["output"]])
    run_curate(run)
    run.file("review.jsonl").unlink()
    assert_says(
        one_line(sg("review", run.path, "--terminal"), 2), f"row {first}", f"sg-local curate {run.path}"
    )
    run_curate(run)
    with open_session(run.path) as session:
        assert shown(session) == first


def test_a_second_try_keeps_what_was_said(
    run: Run, task: Path, stages: ScriptedStages, tmp_path: Path
) -> None:
    with open_session(run.path) as session:
        session.say_word(shown(session), Word.DROP)
    run_curate(run)
    run_from(task, run.path, {"epochs": 1}, run_dir=tmp_path / "second", until="curate")
    second = open_run(tmp_path / "second")
    assert stages.ran == []
    assert second.is_finished("curate")
    assert second.file("review.jsonl").read_bytes() == run.file("review.jsonl").read_bytes()


# Where it is told


def test_a_rows_life_has_the_word_that_is_in_force(run: Run, sg: Call) -> None:
    with open_session(run.path) as session:
        first = shown(session)
        assert "reviewed" not in sg("explain", run.path, first).stdout
        session.say_word(first, Word.ANSWER, OUTPUT[curated(run)[first]["output"]])
        told = sg("explain", run.path, first).stdout  # while the review is at work
        assert_says(told, "reviewed:", "word", "answer", "model_output")
    found = json.loads(sg("explain", run.path, first, "--json").stdout)
    assert found["reviewed"]["output"] == OUTPUT[curated(run)[first]["output"]]
    with open_session(run.path) as session:
        session.undo()
    assert json.loads(sg("explain", run.path, first, "--json").stdout)["reviewed"] is None


def test_the_scores_of_a_reviewed_run_say_how_often_the_model_was_right(run: Run, sg: Call) -> None:
    for stage in ("train", "export", "evaluate"):
        write_stage(run, stage)
    assert "reviewed" not in score_table(run)
    with open_session(run.path) as session:
        for _ in range(5):
            session.say_word(shown(session), Word.ACCEPT)
    run_curate(run)
    for stage in ("train", "export", "evaluate"):
        write_stage(run, stage)
    assert_says(
        score_table(run),
        "5 rows reviewed",
        "1.000 (95 % interval 0.566 to 1.000) on 5 rows",
        "drawn at random",
    )


# Free answers


@pytest.fixture
def free_run(tmp_path: Path, task: Path, model: Path) -> Run:
    task.write_text(
        'name = "polite"\ninstruction = "Make it polite."\n\n[[examples]]\ninput = "Send me the report today."\n'
        'output = "Could you please send me the report today?"\n'
    )
    run, _ = create_or_open_run(
        tmp_path / "free", load_task(task), model, Settings(choose_by="consensus", form_filter=False)
    )
    texts = [f"Close the {thing} for me now, please." for thing in ("door", "window", "gate", "shop", "book")]
    write_inputs(run, [{"id": number, "input": text} for number, text in enumerate(texts)])
    write_outputs(
        run,
        [
            {"id": number, "samples": ["x"], "output": f"Could you please {text.lower()[:-1]}?", "share": 0.5}
            for number, text in enumerate(texts)
        ],
    )
    run_curate(run)
    return run


def test_a_free_answer_is_edited_and_checked(free_run: Run) -> None:
    with open_session(free_run.path) as session:
        first = shown(session)
        for wrong in ("", " \n", None, "a\x1b[31m", "half \ud800", "x" * 20_001):
            with pytest.raises(InputError):
                session.say_word(first, Word.ANSWER, wrong)
        session.say_word(first, Word.ANSWER, "  Would you mind?\n")
    run_curate(free_run)
    assert curated(free_run)[first]["output"] == "Would you mind?"


def test_an_empty_answer_cannot_be_accepted(free_run: Run) -> None:
    rows = [{**row, "output": " ", "drop": "low_confidence"} for row in curated(free_run).values()]
    write_train_rows(free_run, [row for row in rows if row["source"] == "made"])
    with open_session(free_run.path) as session:
        with pytest.raises(InputError, match="the model's answer is empty"):
            session.say_word(shown(session), Word.ACCEPT)
        session.say_word(shown(session), Word.DROP)
    assert words(free_run) == ["drop"]


@pytest.mark.parametrize(("output", "reason"), [("none at all", "shape"), ("?!", "empty")])
def test_every_answer_that_curate_drops_can_be_corrected(
    tmp_path: Path, task: Path, model: Path, output: str, reason: str
) -> None:
    examples = "".join(
        f"[[examples]]\ninput = 'Box {n} is full.'\noutput = '{{\"box\": {n}}}'\n" for n in (1, 2)
    )
    task.write_text(f"name = 'boxes'\ninstruction = 'Which box?'\n{examples}")
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, Settings(choose_by="consensus"))
    write_inputs(run, [{"id": n, "input": f"Box {n} is full."} for n in range(3, 9)])
    answers = [f'{{"box": {n}}}' for n in range(3, 8)] + [output]
    write_outputs(
        run, [{"id": n, "samples": ["x"], "output": text, "share": 0.9} for n, text in enumerate(answers, 3)]
    )
    run_curate(run)
    assert curated(run)["8"]["drop"] == reason
    with open_session(run.path) as session:
        while shown(session) != "8":
            session.say_word(shown(session), Word.ACCEPT)
        session.say_word("8", Word.ANSWER, '{"box": 8}')
    run_curate(run)
    assert (curated(run)["8"]["drop"], curated(run)["8"]["output"]) == (None, '{"box": 8}')


# The shell


@pytest.fixture
def typed(run: Run, sg: Call) -> Callable[[str], Any]:
    return lambda keys: sg("review", run.path, "--terminal", input=keys)


def words(run: Run) -> list[str]:
    return [row["word"] for row in read_rows(run.file("review.jsonl"))]


def test_keys_say_words(run: Run, typed: Callable[[str], Any]) -> None:
    result = typed("a1du?xelogin\nbbfq")
    assert result.exit_code == 0, result.output
    said = words(run)
    assert said[0] == "accept"
    assert said[1] in {"accept", "answer"}
    assert said[2:4] == ["drop", "undo"]
    assert len(said) == 5
    assert_says(
        result.stdout, "4 rows reviewed" if said[4] == "drop" else "3 rows reviewed", "sg-local curate"
    )
    assert_says(result.stderr, "0 of 12 reviewed", "1 refund  2 login")


def test_what_ends_without_q_is_kept(run: Run, typed: Callable[[str], Any]) -> None:
    assert typed("aa").exit_code == 0
    assert typed("aaa\x04").exit_code == 0
    assert words(run) == ["accept"] * 5


def test_a_label_that_is_none_is_told_and_asked_again(run: Run, typed: Callable[[str], Any]) -> None:
    result = typed("edelivery\n9q")
    assert_says(result.stderr, "Error: 'delivery' is no label of the task")
    assert not run.file("review.jsonl").exists()
    assert (
        typed("eREFUND\nelOgIn\nq").exit_code == 0
    )  # what a person types need not have the label's spelling
    assert [row["output"] for row in read_rows(run.file("review.jsonl"))] == ["refund", "login"]


HOSTILE = (
    "a\x1b[31m\x1b]0;t\x07\x9b2J\u202egnp.exe\u2066\r<script>alert(1)</script>\nError: forged\nok forged"
)


def make_hostile(run: Run) -> None:
    """Inputs and answers by a stranger."""
    write_inputs(run, [{"id": number, "input": f"{HOSTILE}{number}"} for number in range(5)])
    write_outputs(
        run,
        [
            {"id": number, "samples": ["x"], "output": f"{number}{HOSTILE}", "share": 0.5}
            for number in range(5)
        ],
    )
    run_curate(run)


def test_hostile_text_is_shown_and_does_nothing(free_run: Run, sg: Call) -> None:
    make_hostile(free_run)
    result = sg("review", free_run.path, "--terminal", input="dq")
    assert result.exit_code == 0, result.output
    assert not {"\x1b", "\x9b", "\u202e", "\u2066", "\r", "\x07"} & {*result.output}
    assert "\\x1b[31m" in result.stderr
    assert not any(line.startswith(("Error:", "ok ")) for line in result.stderr.splitlines())
