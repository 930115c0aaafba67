"""Scores of many tasks as one table: a row for each task, means and an interval over the tasks of a kind.

    row_of(run's evaluation, run's manifest)
    -> {"task": "task190", "kind": "classification", "n_rows": 300, "minutes": 11.2,
        "scores": {"base_few_shot": 0.31, "base_label_scoring": 0.40, "tuned_merged": 0.52},
        "gain": {"mean": 0.21, "interval_95": [0.14, 0.28], "p": 3e-08, "verdict": "better"},
        "gain_over_best": {"over": "base_label_scoring", "mean": 0.12, ...}}

Layout: what SELF-GUIDE (arXiv 2407.12874, section 4) tells of its tasks, with the interval and the test beside it.
"""

from collections.abc import Sequence
from typing import Any

from sg_local.errors import SgLocalError
from sg_local.report.scores import gain_over_best
from sg_local.selfguide.contenders import GAIN_OVER_BEST, MANY_SHOT, OPPONENTS
from sg_local.selfguide.metrics import VERDICTS, interval_over_tasks

Row = dict[str, Any]

# Contender in evaluation.json -> head of its column.
COLUMNS = {
    "base_zero_shot": "zero-shot",
    "base_few_shot": "few-shot",
    "base_few_shot_first_line": "its first line",
    "base_label_scoring": "label scoring",
    MANY_SHOT: "many-shot",
    "tuned_adapter": "tuned hot",
    "tuned_merged": "tuned merged",
}
METRICS = {"classification": "Exact Match", "generation": "ROUGE-L"}
# Where it makes a difference to cut few-shot answers at the end of their first line, that is one more contender.
FIRST_LINE, GAIN_OVER_FIRST_LINE = "base_few_shot_first_line", "gain_over_first_line"
# Whose shares of answers that are no label are shown, and whose distances from the truth.
BASE, TUNED = "base_few_shot", "tuned_merged"


def row_of(evaluation: dict[str, Any], manifest: dict[str, Any]) -> Row:
    """A task's row from its run's evaluation.json and manifest.json. Raises SgLocalError where they are older."""
    contenders, metric = evaluation["contenders"], evaluation["metric"]
    is_classification = metric == "exact_match"
    left_out = set() if is_classification else {"base_label_scoring"}
    if GAIN_OVER_FIRST_LINE not in evaluation:
        left_out.add(FIRST_LINE)
    if MANY_SHOT not in contenders:
        left_out.add(MANY_SHOT)
    wanted = [name for name in COLUMNS if name not in left_out]
    if missing := [name for name in wanted if name not in contenders]:
        raise SgLocalError(f"evaluation.json has no {missing[0]}: run `sg-local evaluate --redo` on it")
    row: Row = {
        "task": evaluation["task"],
        "kind": "classification" if is_classification else "generation",
        "n_rows": evaluation["n_rows"],
        "minutes": round(sum(entry["seconds"] for entry in manifest["stages"].values()) / 60, 1),
        **_types(manifest["stages"].get("export", {})),
        "scores": {name: contenders[name][metric]["mean"] for name in wanted},
        "gain": evaluation["gain"],
        GAIN_OVER_BEST: gain_over_best(evaluation),
    }
    if FIRST_LINE in wanted:
        row[GAIN_OVER_FIRST_LINE] = evaluation[GAIN_OVER_FIRST_LINE]
    if is_classification:
        row["gain_over_label_scoring"] = evaluation["gain_over_label_scoring"]
        for key in ("no_label_share", "label_distance"):
            row[key] = {name: contenders[name][key] for name in (BASE, TUNED)}
        row["agreement"] = manifest["stages"].get("curate", {}).get("agreement") or None
    return row


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """For each kind of task: means of the columns, mean gains with their interval over tasks, and the verdicts."""
    found = {}
    for kind in METRICS:
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        verdicts = [row[GAIN_OVER_BEST]["verdict"] for row in own]
        found[kind] = {
            "n_tasks": len(own),
            "means": {
                name: _mean([_score(row, name) for row in own])
                for name in COLUMNS
                if any(name in row["scores"] for row in own)
            },
            "gain": _mean_gain([row["gain"]["mean"] for row in own]),
            **{verdict.replace(" ", "_"): verdicts.count(verdict) for verdict in VERDICTS},
            "minutes": round(sum(row["minutes"] for row in own), 1),
        }
        opponents = [COLUMNS[name] for name in OPPONENTS if name in found[kind]["means"]]
        if len(opponents) > 1:
            found[kind]["better_of"] = opponents
            found[kind]["gain_over_better_base"] = _mean_gain([row[GAIN_OVER_BEST]["mean"] for row in own])
        if kind == "classification":
            for key in ("no_label_share", "label_distance"):
                found[kind][key] = {name: _mean([row[key][name] for row in own]) for name in (BASE, TUNED)}
    return found


def markdown(rows: Sequence[Row], failed: dict[str, str]) -> str:
    """The table, a part for each kind of task, and under it the tasks that did not finish."""
    parts = []
    for kind, totals in summary(rows).items():
        own = [row for row in rows if row["kind"] == kind]
        parts += [f"### {kind.capitalize()}: {METRICS[kind]}", ""]
        parts += _table(own, totals, kind == "classification")
        parts += ["", _in_words(totals), ""]
    parts += _type_lines(rows)
    for task, reason in sorted(failed.items()):
        parts.append(f"- {task} is not finished: {'; '.join(reason.splitlines())}")
    return "\n".join(parts).strip() + "\n" if parts else "no task is finished\n"


def _types(export: dict[str, Any]) -> Row:
    """The type of the merged file, and that of the base where it was too coarse (stages/export.py)."""
    found = {"merged_type": "parity", "too_coarse": "too_coarse"}
    return {key: export[entry]["merged_type"] for key, entry in found.items() if entry in export}


def _type_lines(rows: Sequence[Row]) -> list[str]:
    """Which merged files have another type than the base."""
    return [
        f"- {row['task']}: model.gguf is {row['merged_type']}, as {row['too_coarse']} was too coarse for what was "
        "trained"
        for row in rows
        if "too_coarse" in row
    ]


def _table(rows: Sequence[Row], totals: dict[str, Any], is_classification: bool) -> list[str]:
    columns = [name for name in COLUMNS if name in totals["means"]]
    heads = ["task", *(COLUMNS[name] for name in columns), "gain over few-shot [95 %]"]
    heads += ["gain over the base's best [95 %]", "p", "verdict"]
    if is_classification:
        heads += ["no label", "label distance", "as asked (chance)"]
    heads.append("minutes")
    lines = [_line(heads), _line([" --- ", *(["---:"] * (len(heads) - 1))])]
    for row in rows:
        cells = [row["task"], *(f"{_score(row, name):.3f}" for name in columns)]
        best = row[GAIN_OVER_BEST]
        cells += [_gain(row["gain"]), _gain(best), f"{best['p']:.2g}", best["verdict"]]
        if is_classification:
            cells += [*_shares(row), _agreement(row["agreement"])]
        lines.append(_line([*cells, f"{row['minutes']:.0f}"]))
    cells = [
        "**mean**",
        *(f"{totals['means'][name]:.3f}" for name in columns),
        _gain(totals["gain"]),
        _gain(totals.get("gain_over_better_base", totals["gain"])),
        "",
        "",
    ]
    if is_classification:
        cells += [*_shares(totals), ""]
    return [*lines, _line([*cells, f"{totals['minutes'] / totals['n_tasks']:.0f}"])]


def _shares(row: Row) -> list[str]:
    """Answers that are no label, and the distance from the truth's labels: of the base -> of the tuned model."""
    shares, distances = row["no_label_share"], row["label_distance"]
    return [f"{shares[BASE]:.1%} → {shares[TUNED]:.1%}", f"{distances[BASE]:.2f} → {distances[TUNED]:.2f}"]


def _agreement(agreement: dict[str, Any] | None) -> str:
    """In the made data: how often the label fits what an input was made for, and how often by chance."""
    return f"{agreement['share']:.0%} ({agreement['chance']:.0%})" if agreement else ""


def _in_words(totals: dict[str, Any]) -> str:
    n_tasks = totals["n_tasks"]
    counts = ", ".join(f"{totals[verdict.replace(' ', '_')]} {verdict}" for verdict in VERDICTS)
    text = f"{n_tasks} task{'s' * (n_tasks != 1)}, against the base's best way: {counts}. "
    text += f"Mean gain over few-shot {_gain(totals['gain'])}"
    if "gain_over_better_base" in totals:
        *others, last = totals["better_of"]
        gain = _gain(totals["gain_over_better_base"])
        text += f", over the better of {', '.join(others)} and {last} {gain}"
    return text + (" (95 % interval over tasks)." if n_tasks > 1 else ".")


def _score(row: Row, contender: str) -> float:
    """Few-shot answers of one line are what they are when they are cut at its end."""
    scores: dict[str, float] = row["scores"]
    return scores[BASE] if contender == FIRST_LINE and FIRST_LINE not in scores else scores[contender]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)


def _mean_gain(values: Sequence[float]) -> dict[str, Any]:
    bounds = interval_over_tasks(values)
    return {"mean": _mean(values), "interval_95": bounds and [round(bound, 5) for bound in bounds]}


def _gain(gain: dict[str, Any]) -> str:
    if gain["interval_95"] is None:
        return f"{gain['mean']:+.3f}"
    low, high = gain["interval_95"]
    return f"{gain['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"
