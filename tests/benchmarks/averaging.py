"""What the mean of several trainings is worth: finished runs, trained with other seeds on the same rows, and averaged.

    task        seeds  n=1: mean  sd     n=2: mean  sd     n=4    kept by the rank: 2, 4
    sms-spam    4      0.690      0.021  0.700      0.012  0.705  0.83 0.71
    mean of 1          0.690      0.021  0.700      0.012  0.705

    python tests/benchmarks/averaging.py RUN [RUN ...] [--n-trainings 4] [--results averaging.jsonl]

Each run is copied, and trained on its own train.jsonl with the seeds 0, 1, ... of the training alone: the made data
stays. Scored is base + adapter.gguf on the run's test rows, as `evaluate` scores it. n=2 has one mean for each pair
(0, 1), (2, 3), ..., which share no training; sd is between those, and between the single trainings. n=4 is the mean of
all.

A JSON line for each adapter goes to the results file, and what is there already is not computed again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from export_types import read_results

from sg_local.runs.directory import Run, open_run

LEFT_OUT = ("*.gguf", "predictions", ".work", "evaluation.json", "adapter", "checkpoints")  # of a run's copy


def main() -> None:
    """Trains, averages and scores what is not in the results file yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--n-trainings", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path("averaging.jsonl"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "averaging")
    parser.add_argument("--train", type=int, help="Train this seed of RUN, a copy; for the script itself.")
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(open_run(arguments.runs[0]), arguments.train)
        return
    found = {(row["task"], *row["seeds"]): row for row in read_results(arguments.results)}
    for run in map(open_run, arguments.runs):
        seeds = range(arguments.n_trainings)
        groups = [(seed,) for seed in seeds] + [(seed, seed + 1) for seed in seeds[:-1:2]] + [tuple(seeds)]
        for group in sorted(groups, key=lambda group: (max(group), len(group))):
            if (run.task.name, *group) not in found:
                work = arguments.work / run.task.name
                if not (work / "run").exists():  # nothing is written into the run itself
                    shutil.copytree(run.path, work / "run", ignore=shutil.ignore_patterns(*LEFT_OUT))
                row = measured(open_run(work / "run"), group, work)
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                found[run.task.name, *group] = row
    print_table([*found.values()])


def train(run: Run, seed: int) -> None:
    """Trains with a seed of the training's own: `run_stage` would make the data anew with it."""
    from sg_local.stages.train import run_train

    run.forget_from("train", keep_partial=False)
    run_train(replace(run, settings=replace(run.settings, seed=seed).seen_by("train")))


def measured(run: Run, seeds: tuple[int, ...], work: Path) -> dict[str, Any]:
    """The score of the mean of the trainings with these seeds."""
    from sg_local.finetune.average import average_adapters
    from sg_local.gguf_io.adapter import write_adapter_gguf
    from sg_local.selfguide.contenders import Contender
    from sg_local.stages import evaluate

    directories = [trained(run, seed, work) for seed in seeds]
    metric = "exact_match" if run.task.is_classification else "rouge_l"
    with tempfile.TemporaryDirectory(prefix="averaging-") as place:
        mean, adapter = Path(place) / "adapter", Path(place) / "adapter.gguf"
        kept = 1.0
        if len(seeds) > 1:
            kept = average_adapters(directories, mean)
        else:
            mean = directories[0]
        write_adapter_gguf(mean, run.model.path, adapter, {})
        rows, _ = evaluate._scored_rows(run)
        way = evaluate.Way(run.model.path, adapter, evaluate.demonstrations(run))
        answered, _ = evaluate._predict(run, Contender.TUNED_ADAPTER, way, rows, lambda _n_rows: None)
    return {
        "task": run.task.name,
        "seeds": seeds,
        "metric": metric,
        "score": statistics.fmean(dict(row)[metric] for row in answered),
        "kept": kept,
        "predictions": [row["prediction"] for row in answered],
    }


def trained(run: Run, seed: int, work: Path) -> Path:
    """The adapter that a seed gives, trained where it is not there yet."""
    adapter = work / f"seed-{seed}"
    if not adapter.exists():
        subprocess.run([sys.executable, __file__, str(run.path), "--train", str(seed)], check=True)
        run.file("adapter").rename(adapter)
    return adapter


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each task, then the mean of each column."""
    print(
        f"{'task':18} {'n=1: mean':>9} {'sd':>6} {'n=2: mean':>10} {'sd':>6} {'n=4':>6}  kept by the rank: 2, 4"
    )
    columns: list[list[float]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_n = {n: [row for row in rows if row["task"] == task and len(row["seeds"]) == n] for n in (1, 2, 4)}
        scores = {n: [row["score"] for row in of_n[n]] for n in of_n}
        if min(map(len, scores.values())) == 0 or len(scores[2]) < 2:
            print(f"{task:18} is not finished: {scores}")
            continue
        line = [statistics.fmean(scores[1]), statistics.stdev(scores[1])]
        line += [statistics.fmean(scores[2]), statistics.stdev(scores[2]), scores[4][0]]
        columns.append(line)
        kept = [statistics.fmean(row["kept"] for row in of_n[n]) for n in (2, 4)]
        print(_line(task, line), " ".join(f"{share:.2f}" for share in kept))
    if columns:
        means = [statistics.fmean(column) for column in zip(*columns, strict=True)]
        print(_line(f"mean of {len(columns)}", means))


def _line(name: str, values: list[float]) -> str:
    return f"{name:18} {values[0]:9.3f} {values[1]:6.3f} {values[2]:10.3f} {values[3]:6.3f} {values[4]:6.3f} "


if __name__ == "__main__":
    main()
