"""Is model.gguf as good as base + adapter.gguf? Finished runs exported in several types, and scored on their test rows.

    task        --quant  type        MiB  adapter merged difference equal  near
    banking-a   base     base         94    0.643  0.630      0.013 0.953 0.917
    banking-a   auto     base+Q8_0   120    0.643  0.640      0.003 0.983 0.979
    mean of 2, --quant auto: 0.0020; the worst: 0.003 (banking-a)

    python tests/benchmarks/export_types.py BENCH [BENCH ...] [--quant auto] [--quant base] [--results types.jsonl]

BENCH is a directory of `sg-local bench`. Each run is copied and exported anew, in all of the given types (default:
auto, base). Scored are the merged files alone: what base + adapter.gguf answered stands in the run. The metric is that
of the task: Exact Match with labels, else ROUGE-L. equal: share of answers that both files give. near: share of the
trained model's choices near the decision that the file keeps (proof/near.py), as the export measured it.

A JSON line for each task and type goes to the results file, and what is there already is not computed again: a call
that was ended goes on.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sg_local.files import read_rows
from sg_local.runs.directory import Run, open_run
from sg_local.runs.stage import run_stage
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.evaluation import predictions_file
from sg_local.selfguide.metrics import metric_of
from sg_local.stages import evaluate

LEFT_OUT = ("model.gguf", "predictions", ".work", "evaluation.json")  # of a run's copy


def main() -> None:
    """Exports and scores what is not in the results file yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", type=Path, nargs="+")
    parser.add_argument("--quant", action="append")
    parser.add_argument("--results", type=Path, default=Path("export_types.jsonl"))
    arguments = parser.parse_args()
    quants = arguments.quant or ["auto", "base"]
    paths = [path.parent for bench in arguments.bench for path in sorted(bench.glob("*/settings.toml"))]
    found = {(row["task"], row["quant"]): row for row in read_results(arguments.results)}
    for run in map(open_run, paths):
        for quant in quants:
            if (run.task.name, quant) in found:
                continue
            if not run.is_finished("evaluate"):
                print(f"{run.path} is not finished: left out")
                break
            row = measured(run, quant)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            found[run.task.name, quant] = row
    print_table(list(found.values()), quants)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier call; one that its end cut off is taken out of the file."""
    whole, _, cut_off = (path.read_text("utf-8") if path.exists() else "").rpartition("\n")
    if cut_off:
        path.write_text(whole + "\n" if whole else "", "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def measured(run: Run, quant: str) -> dict[str, Any]:
    """A run exported in a type: what it weighs, what the proof says, and the scores of both tuned files."""
    started = time.monotonic()
    metric = metric_of(run.task)
    answered = read_rows(run.file(predictions_file(Contender.TUNED_ADAPTER)))
    with tempfile.TemporaryDirectory(prefix="export-types-") as place:
        path = Path(place) / run.path.name
        shutil.copytree(run.path, path, ignore=shutil.ignore_patterns(*LEFT_OUT))
        copy = open_run(path).with_given({"quant": quant})
        run_stage(copy, "export", redo=True)
        entry = copy.manifest()["stages"]["export"]
        rows, _ = evaluate._scored_rows(copy)
        # Greedy answers alone: the probabilities of the labels are not scored here.
        way = evaluate.ways_to_answer(copy)[Contender.TUNED_MERGED]._replace(has_probabilities=False)
        merged, _ = evaluate._predict(copy, Contender.TUNED_MERGED, way, rows, lambda _n_rows: None)
        size_bytes = way.model.stat().st_size
    assert [row["input"] for row in answered] == [row["input"] for row in merged], "other rows than the run's"
    return {
        "task": run.task.name,
        "quant": quant,
        "parity": entry["parity"],
        "tried": entry.get("tried", []),
        "made_in": entry["made_in"],
        "size_bytes": size_bytes,
        "metric": metric,
        "n_rows": len(merged),
        "adapter": statistics.fmean(row[metric] for row in answered),
        "merged": statistics.fmean(row[metric] for row in merged),
        "equal_answers": statistics.fmean(
            a["prediction"] == b["prediction"] for a, b in zip(answered, merged, strict=True)
        ),
        "seconds": round(time.monotonic() - started, 1),
    }


def print_table(rows: list[dict[str, Any]], quants: list[str]) -> None:
    """A line for each task and type, then a mean for each type."""
    print(f"{'task':20} {'--quant':8} {'type':10} {'MiB':>6} adapter merged difference equal  near")
    for row in rows:
        near = row["parity"].get("near_expected_share")
        print(
            f"{row['task']:20} {row['quant']:8} {row['made_in']:10} {row['size_bytes'] / 2**20:6.0f} "
            f"{row['adapter']:7.3f} {row['merged']:6.3f} {row['adapter'] - row['merged']:10.3f} "
            f"{row['equal_answers']:5.3f} {'-' if near is None else f'{near:.3f}':>5}"
        )
    for quant in quants:
        lost = {row["task"]: row["adapter"] - row["merged"] for row in rows if row["quant"] == quant}
        if lost:
            worst = max(lost, key=lambda task: lost[task])
            mean = statistics.fmean(lost.values())
            print(f"mean of {len(lost)}, --quant {quant}: {mean:.4f}; the worst: {lost[worst]:.3f} ({worst})")


if __name__ == "__main__":
    main()
