"""Ablations and other baselines as tables: a row for each task and switch, and means over the tasks.

    {"switch": "n_layouts=1", "task": "sst2", "metric": "exact_match", "default": 0.79, "switched": 0.74,
     "difference": {"mean": 0.05, "interval_95": [-0.01, 0.11], "p": 0.13, "verdict": "no difference shown"}}
    -> | n_layouts=1 | sst2 | 0.790 | 0.740 | +0.050 [-0.010, +0.110] | 0.13 |

Layout: as in bench.py; the baselines are those of SELF-GUIDE (arXiv 2407.12874).
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from sg_local.report import tables
from sg_local.selfguide.metrics import METRICS
from sg_local.selfguide.statistics import Difference, MeanOverTasks, mean_over_tasks

# The paper's other baselines: the tuned model of the demonstrations alone, and the made pairs as a long prompt.
BASELINES = "train_rows=demonstrations"
SEED = "seed"  # the setting that is no part of the method: what differs with it is chance


class AblationRow(TypedDict):
    """A task with a switch, beside the same task without it."""

    switch: str
    task: str
    metric: str
    default: float
    switched: float
    difference: Difference
    # Of another seed:
    base_few_shot: NotRequired[float]
    seed: NotRequired[int]  # without the switch
    # Of the baselines:
    base_many_shot: NotRequired[float]
    many_shot_demonstrations: NotRequired[int]
    gain_over_many_shot: NotRequired[Difference]


class SwitchSummary(MeanOverTasks):
    """The mean difference that a switch makes."""

    n_tasks: int
    gain_over_many_shot: NotRequired[MeanOverTasks]


class SeedRow(TypedDict):
    """A task's scores by seed."""

    task: str
    metric: str
    base_few_shot: float
    scores: dict[str, float]
    mean: float
    gain: float


class SeedSummary(MeanOverTasks):
    """The mean gain over the tasks of a metric."""

    n_tasks: int


class Seeds(TypedDict):
    """All tasks with more than one seed."""

    tasks: list[SeedRow]
    summary: dict[str, SeedSummary]


def summary(rows: Sequence[AblationRow]) -> dict[str, SwitchSummary]:
    """For each switch: the mean difference over its tasks, with the interval over tasks."""
    summaries: dict[str, SwitchSummary] = {}
    for switch in dict.fromkeys(row["switch"] for row in rows):
        switched = [row for row in rows if row["switch"] == switch]
        mean = mean_over_tasks([row["difference"]["mean"] for row in switched])
        summaries[switch] = {
            "n_tasks": len(switched),
            "mean": mean["mean"],
            "interval_95": mean["interval_95"],
        }
        over = [row["gain_over_many_shot"]["mean"] for row in switched if "gain_over_many_shot" in row]
        if over:
            summaries[switch]["gain_over_many_shot"] = mean_over_tasks(over)
    return summaries


def seeds(rows: Sequence[AblationRow]) -> Seeds:
    """For each task its scores by seed and their mean; for each metric the mean gain, with the interval over tasks.

    {"tasks": [{"task": "sst2", "metric": "exact_match", "base_few_shot": 0.66, "scores": {"0": 0.83, "1": 0.87},
                "mean": 0.85, "gain": 0.19}],
     "summary": {"exact_match": {"n_tasks": 1, "mean": 0.19, "interval_95": null}}}
    """
    scores: dict[str, dict[str, float]] = {}  # task -> seed -> score
    first_rows: dict[str, AblationRow] = {}
    for row in rows:
        if "seed" in row:
            first_rows.setdefault(row["task"], row)
            of_task = scores.setdefault(row["task"], {str(row["seed"]): row["default"]})
            of_task[row["switch"].partition("=")[2]] = row["switched"]
    seed_rows = [_seed_row(row, scores[task]) for task, row in first_rows.items()]
    gains: dict[str, list[float]] = {}
    for seed_row in seed_rows:
        gains.setdefault(seed_row["metric"], []).append(seed_row["gain"])
    return {
        "tasks": seed_rows,
        "summary": {
            metric: {"n_tasks": len(of_tasks), **mean_over_tasks(of_tasks)}
            for metric, of_tasks in gains.items()
        },
    }


def markdown(rows: Sequence[AblationRow]) -> str:
    """The comparisons as tables, seeds and baselines apart; "" without any."""
    summaries = summary(rows)
    lines = _seed_lines(seeds(rows))
    if ablated := [
        switch for switch in summaries if switch != BASELINES and not switch.startswith(f"{SEED}=")
    ]:
        lines += ["### Ablations: the default's score, and without it", ""]
        heads = ["setting", "task", "default", "switched", "default - switched [95 %]", "p"]
        lines += tables.markdown_heads(heads, 2)
        for switch in ablated:
            lines += [tables.markdown_row([switch, *_cells(row)]) for row in rows if row["switch"] == switch]
            mean = _mean_of(summaries[switch]["n_tasks"])
            lines.append(
                tables.markdown_row([switch, mean, "", "", _mean_gain(summaries[switch]), ""], is_total=True)
            )
        lines.append("")
    if BASELINES in summaries:
        baselines = [row for row in rows if row["switch"] == BASELINES]
        lines += _baseline_lines(baselines, summaries[BASELINES])
    return "\n".join(lines)


def _seed_row(row: AblationRow, scores: dict[str, float]) -> SeedRow:
    scores = dict(sorted(scores.items(), key=lambda item: int(item[0])))
    mean = sum(scores.values()) / len(scores)
    return {
        "task": row["task"],
        "metric": row["metric"],
        "base_few_shot": row["base_few_shot"],
        "scores": scores,
        "mean": round(mean, 5),
        "gain": round(mean - row["base_few_shot"], 5),
    }


def _seed_lines(by_seed: Seeds) -> list[str]:
    if not by_seed["tasks"]:
        return []
    columns = sorted({seed for row in by_seed["tasks"] for seed in row["scores"]}, key=int)
    heads = ["task", "few-shot", *(f"seed {seed}" for seed in columns), "mean", "gain over few-shot [95 %]"]
    lines = ["### Tuned merged, with other seeds", "", *tables.markdown_heads(heads)]
    for metric, total in by_seed["summary"].items():
        for row in by_seed["tasks"]:
            if row["metric"] == metric:
                scores = [
                    tables.score(row["scores"][seed]) if seed in row["scores"] else "" for seed in columns
                ]
                few_shot, mean = map(tables.score, (row["base_few_shot"], row["mean"]))
                lines.append(
                    tables.markdown_row([row["task"], few_shot, *scores, mean, tables.gain(row["gain"])])
                )
        name = f"{_mean_of(total['n_tasks'])}, {METRICS[metric].heading}"
        cells = [name, "", *([""] * len(columns)), "", _mean_gain(total)]
        lines.append(tables.markdown_row(cells, is_total=True))
    return [*lines, ""]


def _baseline_lines(rows: Sequence[AblationRow], total: SwitchSummary) -> list[str]:
    heads = ["task", "tuned", "tuned on the demonstrations alone", "gain [95 %]", "p"]
    heads += ["many-shot", "pairs", "gain over many-shot [95 %]", "p"]
    lines = ["### Other baselines", "", *tables.markdown_heads(heads)]
    for row in rows:
        many_shot = [tables.score(row["base_many_shot"]), str(row["many_shot_demonstrations"])]
        lines.append(
            tables.markdown_row([*_cells(row), *many_shot, *_gain_and_p(row["gain_over_many_shot"])])
        )
    cells = [_mean_of(total["n_tasks"]), "", "", _mean_gain(total), "", "", ""]
    cells += [_mean_gain(total["gain_over_many_shot"]), ""]
    return [*lines, tables.markdown_row(cells, is_total=True), ""]


def _cells(row: AblationRow) -> list[str]:
    scores = [tables.score(row["default"]), tables.score(row["switched"])]
    return [row["task"], *scores, *_gain_and_p(row["difference"])]


def _gain_and_p(difference: Difference) -> list[str]:
    return [tables.gain(difference["mean"], difference["interval_95"]), tables.p_value(difference["p"])]


def _mean_gain(mean: MeanOverTasks) -> str:
    return tables.gain(mean["mean"], mean["interval_95"])


def _mean_of(n_tasks: int) -> str:
    return f"mean of {n_tasks}"
