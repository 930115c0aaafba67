"""Stage 6: score the files that are served, beside the untuned model (SELF-GUIDE, section 4).

reads  test.jsonl, or the held-out rows of train.jsonl; adapter.gguf model.gguf
writes evaluation.json
    {"contenders": {"tuned_merged": {"exact_match": {"mean": 0.71, "interval_95": [0.61, 0.79]}}}}
       predictions/<contender>.jsonl
    {"input": "...", "prediction": "refund", "reference": "refund", "exact_match": 1.0, "rouge_l": 1.0}

Contenders, all greedy through llama.cpp: base_zero_shot, base_few_shot, tuned_adapter (base + adapter.gguf),
tuned_merged (model.gguf).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sg_local.errors import InputError
from sg_local.llama.generation import Completion
from sg_local.progress import progress
from sg_local.records import read_json, read_rows, sha256_file, write_rows, write_text
from sg_local.run import Run
from sg_local.selfguide.metrics import exact_match, interval, is_label, paired_difference, rouge_l
from sg_local.stages.common import (
    INPUTS_PER_CALL,
    answer_inputs,
    chat_template,
    counters,
    demonstrations,
    longest_answer,
    open_with,
    speed,
)
from sg_local.stages.in_flight import guarded_call
from sg_local.task import Example

BASELINE = "base_few_shot"
TUNED = "tuned_merged"
MAX_EVALUATION_BYTES = 1 << 20


def run_evaluate(run: Run) -> None:
    """Answers the test rows with every contender and writes the scores."""
    run.require("evaluate")
    contenders = _contenders(run)
    predictions = [f"predictions/{name}.jsonl" for name in contenders]
    reads = [name for name in ("test.jsonl", "adapter.gguf", "model.gguf") if run.file(name).exists()]
    with run.stage("evaluate", reads=reads, writes=["evaluation.json", *predictions]) as details:
        rows, source = _scored_rows(run)
        run.file("predictions").mkdir(exist_ok=True)
        answered = {}
        details["engine"] = {}
        for name, (model, adapter, shown) in contenders.items():
            path = run.file(f"predictions/{name}.jsonl")
            done = read_rows(path) if path.exists() else []
            if [(row["input"], row["reference"]) for row in done] != [
                (row.input, row.output) for row in rows
            ]:
                found, details["engine"][name] = _predict(run, name, rows, model, adapter, shown)
                write_rows(path, found)
            answered[name] = read_rows(path)
        evaluation = _evaluation(run, answered, contenders, source)
        write_text(run.file("evaluation.json"), json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
        details["counts"] = {"rows": len(rows)}


def score_table(run: Run) -> str:
    """The evaluation as lines to read: a row for each contender, the gain, and what was scored."""
    evaluation = read_json(run.file("evaluation.json"), MAX_EVALUATION_BYTES)
    metric = evaluation["metric"]
    lines = [f"{run.task.name}: {evaluation['n_rows']} rows, {evaluation['rows_from']}", ""]
    is_classification = run.task.is_classification
    lines.append(f"{'':16}{'Exact Match':>12}  {'95 % interval':15}{'ROUGE-L':>8}  {'95 % interval':15}"
                 + ("no label" if is_classification else ""))  # fmt: skip
    for name, scores in evaluation["contenders"].items():
        cells = [f"{name:16}"]
        for key, width in (("exact_match", 12), ("rouge_l", 8)):
            low, high = scores[key]["interval_95"]
            cells.append(f"{scores[key]['mean']:>{width}.3f}  {f'{low:.3f} - {high:.3f}':15}")
        if is_classification:
            cells.append(f"{scores['no_label_share']:>8.1%}")
        lines.append("".join(cells))
    gain = evaluation["gain"]
    low, high = gain["interval_95"]
    lines += [
        "",
        f"gain in {metric}, {gain['of']} over {gain['over']}: {gain['mean']:+.3f} "
        f"(95 % interval {low:+.3f} to {high:+.3f}): {gain['verdict']}",
    ]
    return "\n".join(lines)


def is_worse(run: Run) -> bool:
    """Whether the tuned model is significantly worse than the base with demonstrations."""
    evaluation = read_json(run.file("evaluation.json"), MAX_EVALUATION_BYTES)
    return bool(evaluation["gain"]["interval_95"][1] < 0)


def _contenders(run: Run) -> dict[str, tuple[Path, Path | None, Sequence[Example]]]:
    """Name -> model file, adapter file, demonstrations in the prompt."""
    base, tuned_shows = run.model.path, demonstrations(run)
    return {
        "base_zero_shot": (base, None, ()),
        BASELINE: (base, None, run.task.examples),
        "tuned_adapter": (base, run.file("adapter.gguf"), tuned_shows),
        TUNED: (run.file("model.gguf"), None, tuned_shows),
    }


def _scored_rows(run: Run) -> tuple[list[Example], str]:
    if rows := run.test_rows:
        return rows, "the task's test file"
    held_out = [
        Example(row["input"], row["output"])
        for row in read_rows(run.file("train.jsonl"))
        if row["drop"] == "held_out"
    ]
    if not held_out:
        raise InputError(
            f"{run.path} has no test rows and no made pair was held out: give the task a test file, "
            "or raise --n-inputs in a new run"
        )
    return held_out, "held-out made data: agreement with the student's own answers, not accuracy"


def _predict(
    run: Run, name: str, rows: list[Example], model: Path, adapter: Path | None, shown: Sequence[Example]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A contender's answers with their scores, and what the engine counted."""
    with (
        open_with(run.settings, model, adapter) as engine,
        progress(f"evaluate {name}", len(rows), "rows", detail=lambda: speed(engine)) as advance,
    ):
        template = chat_template(run, engine)
        limit = longest_answer(engine, run.task.labels, run.settings.max_new_tokens)

        def answer_part(part: Sequence[Example]) -> list[Completion | None]:
            return answer_inputs(
                engine,
                template,
                run.task.instruction,
                [row.input for row in part],
                demonstrations=shown,
                max_new_tokens=limit,
                on_finished=advance,
            )

        answers: list[Completion | None] = []
        for start in range(0, len(rows), INPUTS_PER_CALL):
            part = rows[start : start + INPUTS_PER_CALL]
            answers += guarded_call(
                run,
                f"evaluate {name}",
                range(start, start + len(part)),
                lambda places, part=part: answer_part([part[place] for place in places]),  # type: ignore[misc]
                lambda _place: None,
            )
        counted = counters(engine)
    found = []
    for row, answer in zip(rows, answers, strict=True):
        text = (
            answer.text.strip() if answer else ""
        )  # what does not fit the context, or crashed, is no answer
        found.append(
            {
                "input": row.input,
                "prediction": text,
                "reference": row.output,
                "exact_match": exact_match(text, row.output),
                "rouge_l": round(rouge_l(text, row.output), 5),
            }
        )
    return found, counted


def _evaluation(
    run: Run,
    answered: dict[str, list[dict[str, Any]]],
    contenders: dict[str, tuple[Path, Path | None, Sequence[Example]]],
    source: str,
) -> dict[str, Any]:
    metric = run.task.metric
    scores: dict[str, Any] = {}
    for name, rows in answered.items():
        model, adapter, shown = contenders[name]
        entry: dict[str, Any] = {
            "served": adapter.name if adapter else model.name,
            "served_sha256": sha256_file(adapter or model),
            "demonstrations": len(shown),
        }
        for key in ("exact_match", "rouge_l"):
            values = [row[key] for row in rows]
            low, high = interval(values)
            entry[key] = {
                "mean": round(sum(values) / len(values), 5),
                "interval_95": [round(low, 5), round(high, 5)],
            }
        if run.task.is_classification:
            outside = sum(not is_label(row["prediction"], run.task.labels) for row in rows)
            entry["no_label_share"] = round(outside / len(rows), 5)
        scores[name] = entry
    mean, low, high = paired_difference(
        [row[metric] for row in answered[TUNED]], [row[metric] for row in answered[BASELINE]]
    )
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return {
        "task": run.task.name,
        "metric": metric,
        "rouge_l": "word level, F-measure (rouge-score)",
        "rows_from": source,
        "n_rows": len(answered[TUNED]),
        "contenders": scores,
        "gain": {
            "of": TUNED,
            "over": BASELINE,
            "mean": round(mean, 5),
            "interval_95": [round(low, 5), round(high, 5)],
            "verdict": verdict,
        },
    }
