"""Ablations and other baselines as tables: a row for each task and switch, and means over the tasks.

    {"switch": "n_layouts=1", "task": "sst2", "metric": "exact_match", "default": 0.79, "switched": 0.74,
     "difference": {"mean": 0.05, "interval_95": [-0.01, 0.11], "p": 0.13, "verdict": "no difference shown"}}
    -> | n_layouts=1 | sst2 | 0.790 | 0.740 | +0.050 [-0.010, +0.110] | 0.13 |

Layout: as in bench.py; the baselines are those of SELF-GUIDE (arXiv 2407.12874).
"""

from collections.abc import Sequence
from typing import Any

from sg_local.selfguide.metrics import interval_over_tasks

Row = dict[str, Any]

METRICS = {"exact_match": "Exact Match", "rouge_l": "ROUGE-L"}
# The paper's other baselines: the tuned model of the demonstrations alone, and the made pairs as a long prompt.
BASELINES = "train_rows=demonstrations"
OVER_MANY_SHOT = "gain_over_many_shot"  # key of a row of the baselines
SEED = "seed"  # the setting that is no part of the method: what differs with it is chance


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """For each switch: the mean difference over its tasks, with the interval over tasks."""
    found = {}
    for text in dict.fromkeys(row["switch"] for row in rows):
        own = [row for row in rows if row["switch"] == text]
        found[text] = {"n_tasks": len(own), **_mean([row["difference"]["mean"] for row in own])}
        over = [row[OVER_MANY_SHOT]["mean"] for row in own if OVER_MANY_SHOT in row]
        if over:
            found[text][OVER_MANY_SHOT] = _mean(over)
    return found


def seeds(rows: Sequence[Row]) -> dict[str, Any]:
    """For each task its scores by seed and their mean; for each metric the mean gain, with the interval over tasks.

    {"tasks": [{"task": "sst2", "metric": "exact_match", "base_few_shot": 0.66, "scores": {"0": 0.83, "1": 0.87},
                "mean": 0.85, "gain": 0.19}],
     "summary": {"exact_match": {"n_tasks": 1, "mean": 0.19, "interval_95": null}}}
    """
    found: dict[str, Row] = {}
    for row in rows:
        if SEED in row:
            first = {str(row[SEED]): row["default"]}
            told = {key: row[key] for key in ("task", "metric", "base_few_shot")}
            own = found.setdefault(row["task"], {**told, "scores": first})
            own["scores"][row["switch"].partition("=")[2]] = row["switched"]
    for own in found.values():
        own["scores"] = dict(sorted(own["scores"].items(), key=lambda item: int(item[0])))
        mean = sum(own["scores"].values()) / len(own["scores"])
        own |= {"mean": round(mean, 5), "gain": round(mean - own["base_few_shot"], 5)}
    gains: dict[str, list[float]] = {}
    for own in found.values():
        gains.setdefault(own["metric"], []).append(own["gain"])
    totals = {metric: {"n_tasks": len(values), **_mean(values)} for metric, values in gains.items()}
    return {"tasks": list(found.values()), "summary": totals}


def markdown(rows: Sequence[Row]) -> str:
    """The comparisons as tables, seeds and baselines apart; "" without any."""
    totals = summary(rows)
    parts = _seed_lines(seeds(rows))
    if ablated := [text for text in totals if text != BASELINES and not text.startswith(f"{SEED}=")]:
        parts += ["### Ablations: the default's score, and without it", ""]
        heads = ["setting", "task", "default", "switched", "default - switched [95 %]", "p"]
        parts += _heads(heads, 2)
        for text in ablated:
            shown = text.replace("|", "\\|")
            parts += [_line([shown, *_cells(row)]) for row in rows if row["switch"] == text]
            mean = f"mean of {totals[text]['n_tasks']}"
            parts.append(_line([f"**{shown}**", mean, "", "", _interval(totals[text]), ""]))
        parts.append("")
    if baselines := [row for row in rows if row["switch"] == BASELINES]:
        parts += ["### Other baselines", ""]
        heads = ["task", "tuned", "tuned on the demonstrations alone", "gain [95 %]", "p"]
        parts += _heads([*heads, "many-shot", "pairs", "gain over many-shot [95 %]", "p"], 1)
        for row in baselines:
            over = row[OVER_MANY_SHOT]
            many = [f"{row['base_many_shot']:.3f}", str(row["many_shot_demonstrations"])]
            parts.append(_line([*_cells(row), *many, _interval(over), f"{over['p']:.2g}"]))
        total = totals[BASELINES]
        cells = [f"**mean of {total['n_tasks']}**", "", "", _interval(total), "", "", ""]
        parts += [_line([*cells, _interval(total[OVER_MANY_SHOT]), ""]), ""]
    return "\n".join(parts)


def _seed_lines(found: dict[str, Any]) -> list[str]:
    if not found["tasks"]:
        return []
    columns = sorted({seed for own in found["tasks"] for seed in own["scores"]}, key=int)
    heads = ["task", "few-shot", *(f"seed {seed}" for seed in columns), "mean", "gain over few-shot [95 %]"]
    lines = ["### Tuned merged, with other seeds", "", *_heads(heads, 1)]
    for metric, total in found["summary"].items():
        for own in found["tasks"]:
            if own["metric"] == metric:
                scores = [f"{own['scores'][seed]:.3f}" if seed in own["scores"] else "" for seed in columns]
                few_shot, mean = (f"{own[key]:.3f}" for key in ("base_few_shot", "mean"))
                lines.append(_line([own["task"], few_shot, *scores, mean, f"{own['gain']:+.3f}"]))
        name = f"**mean of {total['n_tasks']}, {METRICS[metric]}**"
        lines.append(_line([name, "", *([""] * len(columns)), "", _interval(total)]))
    return [*lines, ""]


def _mean(values: Sequence[float]) -> dict[str, Any]:
    bounds = interval_over_tasks(values)
    return {
        "mean": round(sum(values) / len(values), 5),
        "interval_95": bounds and [round(bound, 5) for bound in bounds],
    }


def _cells(row: Row) -> list[str]:
    scores = [f"{row[key]:.3f}" for key in ("default", "switched")]
    return [row["task"], *scores, _interval(row["difference"]), f"{row['difference']['p']:.2g}"]


def _heads(heads: Sequence[str], n_texts: int) -> list[str]:
    return [_line(heads), _line(["---"] * n_texts + ["---:"] * (len(heads) - n_texts))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _interval(difference: dict[str, Any]) -> str:
    if difference["interval_95"] is None:
        return f"{difference['mean']:+.3f}"
    low, high = difference["interval_95"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
