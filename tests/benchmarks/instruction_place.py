"""Where should the instruction stand? Told by made data alone: no test row is read.

    task           system  first_turn  every_turn
    banking-a       0.577       0.512       0.561
    ...
    mean            0.601       0.580       0.592

    python tests/benchmarks/instruction_place.py BENCH [--n-inputs 100]

BENCH is a directory of `sg-local bench`. For each of its classification tasks: how often the calibrated label scores of
the first kept made inputs say the label that the input was made for; mean of all orders in which the demonstrations can
rotate, which would else be mixed up with the place. The judge is the model that made the data, so only differences
between the places tell something.
"""

import argparse
import statistics
from pathlib import Path

from sg_local.files import read_rows
from sg_local.llama.asking import open_with, score_labels
from sg_local.llama.engine import Engine
from sg_local.proof.working_copies import generating_model
from sg_local.runs.directory import Run, open_run
from sg_local.runs.prompt import template_source
from sg_local.selfguide.labels import label_scores
from sg_local.selfguide.prompts import INSTRUCTION_PLACES, PromptVariant


def main() -> None:
    """Prints the agreement by place of the instruction, a line for each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", type=Path)
    parser.add_argument("--n-inputs", type=int, default=100)
    arguments = parser.parse_args()
    runs = [open_run(path.parent) for path in sorted(arguments.bench.glob("*/settings.toml"))]
    print(f"{'task':12}" + "".join(f"{place:>12}" for place in INSTRUCTION_PLACES))
    found = []
    for run in runs:
        if not run.task.is_classification or not run.is_finished("generate"):
            continue
        with open_with(run.settings, generating_model(run)) as engine:
            found.append([agreement(run, engine, place, arguments.n_inputs) for place in INSTRUCTION_PLACES])
        print(f"{run.task.name:12}" + "".join(f"{share:12.3f}" for share in found[-1]), flush=True)
    means = [statistics.fmean(column) for column in zip(*found, strict=True)]
    print(f"{'mean':12}" + "".join(f"{mean:12.3f}" for mean in means))


def agreement(run: Run, engine: Engine, place: str, n_inputs: int) -> float:
    """Share of the first n_inputs kept made inputs whose likeliest label is the one they were made for, 0..1."""
    rows = [row for row in read_rows(run.file("inputs.jsonl")) if row["drop"] is None][:n_inputs]
    texts = [row["input"] for row in rows]
    template, labels, examples = (
        engine.tokenizer.chat_template(template_source(run)),
        run.task.labels,
        run.task.examples,
    )
    shares = []
    for turn in range(len(examples)):
        variant = PromptVariant(place, (*examples[turn:], *examples[:turn]))
        scores = score_labels(engine, template, run.task, texts, lambda _n_inputs: None, variant)
        scored = [(row["label"], logprobs) for row, logprobs in zip(rows, scores, strict=True) if logprobs]
        made_for, logprobs = zip(*scored, strict=True)
        agreed = label_scores(
            [[prompt] for prompt in logprobs], made_for, labels, removes_bias=True, weighs_evidence=False
        ).agreed
        shares.append(agreed / len(scored))
    return statistics.fmean(shares)


if __name__ == "__main__":
    main()
