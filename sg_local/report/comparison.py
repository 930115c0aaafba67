"""Two runs beside each other: what differs in task, model, settings, made data and scores, and whether that is chance.

    compare(open_run(Path("runs/inbox")), open_run(Path("runs/inbox-epochs=5")))
    -> {"runs": ["runs/inbox", "runs/inbox-epochs=5"], "settings": {"epochs": [3, 5]}, "same_stages": ["generate", ...],
        "scores": {"tuned_merged": [0.69, 0.74]}, "difference": {"mean": 0.05, "p": 0.13, "verdict": ...}, ...}

Shown are files of finished stages, whose hashes are right; rows that a person edited count as they are now, and a note
says so. A difference is the second run minus the first, over the same test rows, of model.gguf.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from sg_local.escape import one_line
from sg_local.files import read_rows, sha256_file
from sg_local.report import tables
from sg_local.report.scores import read_evaluation, read_predictions
from sg_local.runs.directory import Run
from sg_local.runs.stage_files import BEGUN_WITH, STAGE_FILES
from sg_local.selfguide.contenders import TUNED
from sg_local.selfguide.evaluation import Evaluation, metric_mean, metrics_of, references_of, scores_of
from sg_local.selfguide.metrics import METRICS, Metric
from sg_local.selfguide.rows import InputRow, OutputRow, PairRow, is_kept
from sg_local.selfguide.statistics import Difference, difference
from sg_local.settings import STAGES

_TASK_PARTS = ("name", "instruction", "labels", "examples", "shares")
_SHOWN_CHARACTERS = 60  # of one value in the table

Pair = list[Any]  # of the first run and of the second; None where a run has none


class Comparison(TypedDict):
    """What `compare` returns. A part that is equal in both is empty, but for data and scores."""

    runs: list[str]
    task: dict[str, Pair]
    given_rows: list[str]  # files of rows that the runs were begun with, and that differ
    model: dict[str, Pair]
    settings: dict[str, Pair]
    same_stages: list[str]  # finished in both, and wrote the same
    data: dict[str, Pair]  # numbers of rows
    labels: dict[str, Pair]  # rows in training, copies included, by label
    dropped: dict[str, Pair]  # rows by drop reason
    metric: str | None  # of the scores; None where it is not the same
    scores: dict[str, Pair]  # means by contender
    field_scores: dict[
        str, dict[str, Pair]
    ]  # where outputs are JSON: the same by other metrics of their fields
    n_test_rows: Pair
    difference: Difference | None  # None where the runs have no scores of the same test rows
    notes: list[str]


def compare(first: Run, second: Run) -> Comparison:
    """Two runs beside each other. Raises InputError where a file of them is damaged."""
    runs = (first, second)
    finished = [_finished(run) for run in runs]
    notes = [note for run in runs for note in _notes(run)]
    entries = [run.manifest()["stages"] for run in runs]
    counted = [_counts(run, stages) for run, stages in zip(runs, finished, strict=True)]
    evaluations = [
        read_evaluation(run) if STAGES[-1] in stages else None
        for run, stages in zip(runs, finished, strict=True)
    ]
    judged_by = [evaluation["metric"] for evaluation in evaluations if evaluation]
    metric = judged_by[0] if len(set(judged_by)) == 1 else None
    compared = None
    if len(set(judged_by)) > 1:
        one, other = (METRICS[name].heading for name in judged_by)
        notes.append(f"{first.path} was judged by {one}, {second.path} by {other}: the scores do not compare")
    if metric and all(evaluations):
        compared = _difference(first, second, metric)
        if compared is None:
            notes.append("the test rows are not the same: the scores do not compare")
    return {
        "runs": [str(run.path) for run in runs],
        "task": _different({part: [_part(run, part) for run in runs] for part in _TASK_PARTS}),
        "given_rows": [name for name in BEGUN_WITH[1:] if _sha256(first, name) != _sha256(second, name)],
        "model": _different(
            {
                "file": [first.model.path.name, second.model.path.name],
                "sha256": [first.model.sha256, second.model.sha256],
                "prompt_format": [first.model.prompt_format, second.model.prompt_format],
            }
        ),
        "settings": _different(
            _beside(*(_settings(run, stages) for run, stages in zip(runs, finished, strict=True)))
        ),
        "same_stages": [
            stage
            for stage in STAGES
            if all(stage in stages for stages in finished)
            and entries[0][stage]["writes"] == entries[1][stage]["writes"]
        ],
        "data": _beside(*(counts.rows for counts in counted)),
        "labels": _beside(*(counts.labels for counts in counted)),
        "dropped": _beside(*(counts.dropped for counts in counted)),
        "metric": metric,
        "scores": _beside(*(_means(evaluation, metric) for evaluation in evaluations)),
        "field_scores": {
            item: _beside(*(_means(evaluation, item) for evaluation in evaluations))
            for item in Metric
            if item.needs_json
            and item != metric
            and any(item in metrics_of(found) for found in evaluations if found)
        },
        "n_test_rows": [evaluation["n_rows"] if evaluation else None for evaluation in evaluations],
        "difference": compared,
        "notes": notes,
    }


def comparison_lines(compared: Comparison) -> Iterator[str]:
    """The same as lines to read."""
    names = compared["runs"]
    for title in ("task", "model", "settings"):
        part = compared[title]
        yield from _table(title, names, part, str) if part else [f"{title}: the same", ""]
    if compared["given_rows"]:
        yield f"other rows: {', '.join(compared['given_rows'])}"
        yield ""
    if compared["same_stages"]:
        yield f"the same files: {', '.join(compared['same_stages'])}"
        yield ""
    for title, part in (
        ("rows", compared["data"]),
        ("in training, by label", compared["labels"]),
        ("dropped", compared["dropped"]),
    ):
        if _different(part):
            yield from _table(title, names, part, str)
    if compared["scores"]:
        heading = METRICS[compared["metric"]].heading if compared["metric"] else "score"
        yield from _table(heading, names, compared["scores"], tables.score)
    for item, scores in compared["field_scores"].items():
        yield from _table(METRICS[item].heading, names, scores, tables.score)
    yield from map(one_line, compared["notes"])
    if found := compared["difference"]:
        low, high = map(tables.gain, found["interval_95"])
        yield one_line(
            f"{TUNED}, {names[1]} over {names[0]}, the same {compared['n_test_rows'][0]} test rows: "
            f"{tables.gain(found['mean'])} (95 % interval {low} to {high}, p = {tables.p_value(found['p'])}): "
            f"{found['verdict']}"
        )


class _Counts:
    """Numbers of a run's rows, as far as its stages are finished."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.labels: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()


def _counts(run: Run, finished: Sequence[str]) -> _Counts:
    counts = _Counts()
    drops: dict[int | str, str] = {}  # a row that was dropped early may stand in later files too
    if "generate" in finished:
        inputs = read_rows(run.written_file("inputs.jsonl"), InputRow)
        counts.rows["inputs"] = len(inputs)
        counts.rows["inputs kept"] = sum(row["drop"] is None for row in inputs)
        drops |= {row["id"]: row["drop"] for row in inputs if row["drop"]}
    if "annotate" in finished:
        outputs = read_rows(run.written_file("outputs.jsonl"), OutputRow)
        counts.rows["answered"] = sum(row["drop"] is None for row in outputs)
        drops |= {row["id"]: row["drop"] for row in outputs if row["drop"]}
    if "curate" in finished:
        pairs = read_rows(run.written_file("train.jsonl"), PairRow)
        kept = [row for row in pairs if is_kept(row)]
        counts.rows["in training"] = len(kept)
        counts.rows["with repetitions"] = sum(row["copies"] for row in kept)
        drops |= {row["id"]: row["drop"] for row in pairs if row["drop"]}
        if run.task.is_classification:
            for row in kept:
                counts.labels[row["output"]] += row["copies"]
    counts.dropped = Counter(drops.values())
    return counts


def _finished(run: Run) -> tuple[str, ...]:
    first = run.first_unfinished()
    return STAGES[: STAGES.index(first.stage)] if first else STAGES


def _notes(run: Run) -> Iterator[str]:
    """What a reader of the numbers should know of a run."""
    if first := run.first_unfinished():
        yield f"{run.path}: {first.stage} {first.reason}"
    entries = run.manifest()["stages"]
    came: dict[str, list[str]] = {}
    for stage in _finished(run):
        if isinstance(source := entries[stage].get("from_run"), str):
            came.setdefault(source, []).append(stage)
    for source, stages in came.items():
        yield f"{run.path}: {', '.join(stages)} came from {source}"
    for stage in _finished(run):
        for name in STAGE_FILES[stage].editable:
            if (
                name in entries[stage]["writes"]
                and sha256_file(run.file(name)) != entries[stage]["writes"][name]
            ):
                yield f"{run.path}: {name} was edited after {stage} wrote it"


def _difference(first: Run, second: Run, metric: str) -> Difference | None:
    """The second run's answers beside the first one's; None where they are not answers to the same rows."""
    before, after = (read_predictions(run, TUNED) for run in (first, second))
    asked = [[(row["input"], references_of(row)) for row in rows] for rows in (before, after)]
    if asked[0] != asked[1] or not before:
        return None
    return difference(scores_of(after, METRICS[metric]), scores_of(before, METRICS[metric]))


def _means(evaluation: Evaluation | None, metric: str | None) -> dict[str, float]:
    if evaluation is None or metric is None or METRICS[metric] not in metrics_of(evaluation):
        return {}
    return {
        name: metric_mean(scores, METRICS[metric])["mean"]
        for name, scores in evaluation["contenders"].items()
    }


def _settings(run: Run, finished: Sequence[str]) -> dict[str, Any]:
    """The settings that the files were made with: one may have been given to a stage alone, as --quant to export."""
    settings = run.settings.as_dict()
    entries = run.manifest()["stages"]
    for entry in (entries[stage] for stage in finished):
        settings |= {
            name: entry["settings"][name] for name in entry.get("given", ()) if name in entry["settings"]
        }
    return settings


def _part(run: Run, part: str) -> object:
    value = getattr(run.task, part)
    return [example.as_row() for example in value] if part == "examples" else value


def _sha256(run: Run, name: str) -> str | None:
    return sha256_file(run.file(name)) if run.file(name).exists() else None


def _beside(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Pair]:
    return {name: [first.get(name), second.get(name)] for name in {**first, **second}}


def _different(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _table(title: str, runs: Sequence[str], pairs: Mapping[str, Pair], shown: Any) -> Iterator[str]:
    rows = [[title, *runs]]
    for name, pair in pairs.items():
        rows.append([name, *("-" if value is None else _shortened(shown(value)) for value in pair)])
    yield from tables.columns([[*map(one_line, row)] for row in rows], set(map(one_line, runs)))
    yield ""


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
