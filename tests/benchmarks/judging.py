"""How well the base judges real inputs: by the mean over its prompts, and with what made inputs teach; no model runs.

    run           real  kappa  mean over prompts  with the map  trained on
    banking-a      160   0.52               0.75          0.89        0.95

    python tests/benchmarks/judging.py TRUTHS RUN [RUN ...]

RUN is curated and has given inputs beside made ones, as the runs of bring.py have; their right outputs stand in
TRUTHS/TASK.jsonl (JSON lines with input and output). kappa: how far the prompts agree on the real inputs. Beside it
stand shares of real inputs whose likeliest label is right: of all, and of those that are trained on.
"""

import sys
from pathlib import Path

from sg_local.runs.directory import open_run
from sg_local.runs.rows import known_labels, read_inputs, read_outputs, read_pairs
from sg_local.selfguide.given import text_key
from sg_local.selfguide.labels import label_scores
from sg_local.selfguide.metrics import exact_match
from sg_local.selfguide.rows import Source, is_kept, source_of
from sg_local.task_files.rows import load_test_rows


def line(run_dir: Path, truths: Path) -> str:
    """A run's line of the table."""
    run = open_run(run_dir)
    labels = run.task.labels
    truth = {
        text_key(row.input): row.output for row in load_test_rows(truths / f"{run.task.name}.jsonl", labels)
    }
    inputs = {row["id"]: row for row in read_inputs(run)}
    outputs = [
        row
        for row in read_outputs(run, [*inputs.values()])
        if row["drop"] is None and source_of(inputs[row["id"]]) != Source.LABELLED
    ]
    known = known_labels(run, [*inputs.values()], outputs, [row["id"] for row in outputs])
    places = [place for place, real in enumerate(known.is_real) if real]

    def right(made_for: list[str | None]) -> tuple[float, float | None]:
        scores = label_scores(
            [row["label_logprobs"] for row in outputs],
            made_for,
            labels,
            removes_bias=True,
            weighs_evidence=False,
            known=known,
        )
        answers = [labels[scores.last[place].index(max(scores.last[place]))] for place in places]
        texts = [inputs[outputs[place]["id"]]["input"] for place in places]
        return share([*zip(texts, answers, strict=True)]), scores.real_kappa

    def share(answered: list[tuple[str, str]]) -> float:
        known_rows = [(answer, truth[key]) for text, answer in answered if (key := text_key(text)) in truth]
        return sum(exact_match(answer, output) for answer, output in known_rows) / max(1, len(known_rows))

    alone, kappa = right([None] * len(outputs))
    mended, _ = right([inputs[row["id"]]["label"] for row in outputs])
    trained = [row for row in read_pairs(run) if is_kept(row) and source_of(row) == Source.GIVEN]
    of_trained = share([(row["input"], str(row["output"])) for row in trained])
    agreement = "-" if kappa is None else f"{kappa:.2f}"
    numbers = f"{agreement:>6} {alone:18.2f} {mended:13.2f}"
    return f"{run.task.name:12} {len(places):5} {numbers} {f'{of_trained:.2f}' if trained else '-':>11}"


def main(truths: Path, runs: list[Path]) -> None:
    """Prints a line for each run."""
    print("run           real  kappa  mean over prompts  with the map  trained on")
    for run in runs:
        print(line(run, truths))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
