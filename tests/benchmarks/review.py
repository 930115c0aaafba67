"""What 60 answers in a review are worth, beside 60 on rows that were drawn at random; the person is the truth.

    python tests/benchmarks/review.py runs/sms-spam TRUTH.jsonl reviewed                    seconds: training rows alone
    python tests/benchmarks/review.py runs/sms-spam TRUTH.jsonl reviewed --until evaluate   minutes: trains each

RUN is curated and has given inputs whose right outputs stand in TRUTH (JSON lines with input and output); it is only
read. Each way is a copy of it in the directory OUT with a review.jsonl: none, in the order of `sg-local review`, and in
random order, by several seeds. Told is, of the training rows with a known truth, copies counted, how many are right;
how often the person agreed; what the drawn rows say of all; and with --until evaluate the tuned model's score.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sg_local.files import write_rows
from sg_local.report.scores import read_evaluation
from sg_local.runs.directory import Run, open_run
from sg_local.runs.pipeline import run_pipeline
from sg_local.runs.review import read_review, summary_of
from sg_local.runs.rows import read_inputs, read_pairs
from sg_local.runs.stage_files import REVIEW
from sg_local.selfguide.contenders import TUNED
from sg_local.selfguide.evaluation import metric_mean
from sg_local.selfguide.metrics import METRICS, exact_match
from sg_local.selfguide.review import (
    ModelAnswer,
    RowId,
    input_sha256,
    is_reviewable,
    review_order,
    review_sample,
)
from sg_local.selfguide.rows import ReviewRow, Word
from sg_local.task_files.rows import load_test_rows

N_ANSWERS = 60
SEEDS = (1001, 1002, 1003)  # none of which draws the rows of a review


def answers_of(run: Run, truth: dict[str, str]) -> dict[RowId, ModelAnswer]:
    """The rows that could be reviewed, and whose truth is known."""
    return {
        row["id"]: ModelAnswer(row["id"], row["input"], row["output"] or "", row["confidence"], row["drop"])
        for row in read_pairs(run)
        if is_reviewable(row) and row["input"] in truth
    }


def words_of(answers: Sequence[ModelAnswer], truth: dict[str, str]) -> list[ReviewRow]:
    """What a person who knows the truth says of these rows."""
    return [
        {
            "id": answer.id,
            "input_sha256": input_sha256(answer.input),
            "word": Word.ACCEPT if exact_match(answer.output, truth[answer.input]) else Word.ANSWER,
            "output": truth[answer.input],
            "model_output": answer.output,
            "model_confidence": answer.confidence,
            "model_drop": answer.drop,
        }
        for answer in answers
    ]


def copied(run: Run, place: Path, words: Sequence[ReviewRow], until: str) -> Run:
    """The run with these words, as far as it is wanted."""
    shutil.copytree(run.path, place, ignore=shutil.ignore_patterns("checkpoints", ".work", ".lock"))
    other = replace(run, path=place)
    write_rows(other.file(REVIEW), words)
    run_pipeline(other, until)
    return other


def told(way: str, run: Run, truth: dict[str, str]) -> str:
    """A line of the table."""
    pairs = read_pairs(run)
    known = [row for row in pairs if row["copies"] and row["input"] in truth and row["output"] is not None]
    n_copies = sum(row["copies"] for row in known)
    n_right = sum(row["copies"] * exact_match(row["output"] or "", truth[row["input"]]) for row in known)
    cells = [f"{way:10}", f"{len(known):4} rows", f"{n_right / max(1, n_copies):.3f} right"]
    found = summary_of(run, read_review(run, read_inputs(run)), pairs)
    if agreement := found["agreement"]:
        cells.append(f"agreed {agreement['mean']:.3f}")
    if drawn := found["drawn_agreement"]:
        cells.append(f"on {found['n_drawn']} drawn {drawn['mean']:.3f} {drawn['interval_95']}")
    if "evaluate" in run.manifest()["stages"]:
        evaluation = read_evaluation(run)
        mean = metric_mean(evaluation["contenders"][TUNED], METRICS[evaluation["metric"]])
        cells.append(f"{TUNED} {mean['mean']:.3f} {mean['interval_95']}")
    return "  ".join(cells)


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--answers", type=int, default=N_ANSWERS)
    parser.add_argument("--until", choices=("curate", "evaluate"), default="curate")
    given = parser.parse_args()
    run = open_run(given.run)
    truth = {row.input: row.output for row in load_test_rows(given.truth, run.task.labels)}
    answers = answers_of(run, truth)
    is_right = [exact_match(answer.output, truth[answer.input]) for answer in answers.values()]
    print(
        f"{len(answers)} rows with a known truth; the model is right on {sum(is_right) / max(1, len(is_right)):.3f}"
    )
    by_label = run.task.is_classification
    ways: dict[str, list[RowId]] = {
        "none": [],
        "review": review_order(list(answers.values()), by_label=by_label, seed=run.settings.seed),
        **{f"random-{seed}": review_sample(answers, seed) for seed in SEEDS},
    }
    for way, order in ways.items():
        asked = [answers[row_id] for row_id in order[: given.answers]]
        other = copied(run, given.out / way, words_of(asked, truth), given.until)
        print(told(way, other, truth), flush=True)


if __name__ == "__main__":
    main()
