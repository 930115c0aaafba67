"""What `shares` and labelled rows are worth in annotating real inputs, from one run's label scores; no model runs.

    python tests/benchmarks/real_inputs.py runs/sms-spam TRUTH.jsonl

RUN has annotated given inputs whose right outputs stand in TRUTH (JSON lines with input and output). Batches are drawn
in which the first of two labels has a share of the rows, 20 for each share, and calibrated as `curate` does: without
calibration, with equal shares, with the true shares, and with labelled rows, which are none of the batch.
"""

import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from sg_local.runs.directory import open_run
from sg_local.runs.rows import read_inputs, read_outputs
from sg_local.selfguide.labels import NOTHING_KNOWN, Known, label_scores
from sg_local.task_files.rows import load_test_rows

N_BATCHES = 20
N_LABELLED = 30  # of each label, kept from the batches
SHARES = (0.15, 0.3, 0.5, 0.7, 0.85)

Scored = tuple[list[dict[str, float]], str]  # label scores by prompt, and the right label


def accuracy(
    batch: Sequence[Scored], labels: Sequence[str], known: Known, *, removes_bias: bool = True
) -> float:
    """Share of rows whose likeliest label is right."""
    scores = label_scores(
        [row for row, _ in batch],
        [None] * len(batch),
        labels,
        removes_bias=removes_bias,
        weighs_evidence=False,
        known=known,
    )
    right = [labels[row.index(max(row))] == label for row, (_, label) in zip(scores.last, batch, strict=True)]
    return statistics.fmean(right)


def ways(
    batch: Sequence[Scored], gold: Sequence[Scored], labels: Sequence[str], share: float
) -> dict[str, float]:
    """The accuracy of each way of calibration."""
    real = [True] * len(batch)
    return {
        "raw": accuracy(batch, labels, NOTHING_KNOWN, removes_bias=False),
        "equal": accuracy(batch, labels, Known(real)),
        **{f"{n} labelled": accuracy(batch, labels, Known(real, gold=gold[:n])) for n in (10, 30, 60)},
        "shares": accuracy(batch, labels, Known(real, (share, 1 - share))),
    }


def main(run_dir: Path, truth_path: Path) -> None:
    """Prints a line for each share."""
    run = open_run(run_dir)
    labels = run.task.labels
    inputs = read_inputs(run)
    text = {row["id"]: row["input"] for row in inputs if row.get("source") == "given"}
    truth = {row.input: row.output for row in load_test_rows(truth_path, labels)}
    rows = [row for row in read_outputs(run, inputs) if row["id"] in text and row["drop"] is None]
    scored = [(row["label_logprobs"], truth[text[row["id"]]]) for row in rows]
    by_label = [[row for row in scored if row[1] == label] for label in labels]
    for share in SHARES:
        found: dict[str, list[float]] = {}
        for seed in range(N_BATCHES):
            first, second = (random.Random(seed).sample(rows, len(rows)) for rows in by_label)
            gold = [row for pair in zip(first[:N_LABELLED], second[:N_LABELLED], strict=True) for row in pair]
            first, second = first[N_LABELLED:], second[N_LABELLED:]
            n_rows = int(min(len(first) / share, len(second) / (1 - share)))
            batch = first[: round(n_rows * share)] + second[: n_rows - round(n_rows * share)]
            for way, value in ways(batch, gold, labels, share).items():
                found.setdefault(way, []).append(value)
        means = "  ".join(f"{way} {statistics.fmean(values):.3f}" for way, values in found.items())
        print(f"{labels[0]} {share:.0%} of {n_rows}: {means}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
