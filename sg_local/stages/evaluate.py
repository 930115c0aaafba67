"""Stage 6: score the files that are served, beside the untuned model (SELF-GUIDE, section 4).

reads  test.jsonl, or the held-out rows of train.jsonl; adapter.gguf model.gguf; train.jsonl for --many-shot
writes evaluation.json
    {"contenders": {"tuned_merged": {"exact_match": {"mean": 0.71, "interval_95": [0.61, 0.79]}}},
     "gain": {"over": "base_few_shot", "mean": 0.42, "interval_95": [0.31, 0.53], "p": 1e-10, "verdict": "better"},
     "gain_over_best": {"over": "base_label_scoring", "mean": 0.12, ...}}
       predictions/<contender>.jsonl
    {"input": "...", "prediction": "refund", "reference": "refund", "exact_match": 1.0, "rouge_l": 1.0}

Contenders, all greedy through llama.cpp: base_zero_shot, base_few_shot, tuned_adapter (base + adapter.gguf),
tuned_merged (model.gguf). Where the task has labels also base_label_scoring: the likeliest label after the same prompt
as base_few_shot, so that the base is not counted as wrong for its format. Where every demonstration's answer has one
line and some of base_few_shot's go on, also base_few_shot_first_line: the same answers up to the end of their first
line. With --many-shot also base_many_shot: as many of the made pairs before the demonstrations as fit (the paper's
in-context learning on its own data).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sg_local.chat.template import ChatTemplate
from sg_local.errors import InputError
from sg_local.files import read_rows, sha256_file, write_rows, write_text
from sg_local.llama.asking import (
    INPUTS_PER_CALL,
    QUESTIONS_PER_CALL,
    answer_inputs,
    counters,
    likeliest,
    longest_answer,
    open_with,
    score_labels,
    speed,
)
from sg_local.llama.engine import Engine
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.progress import progress
from sg_local.run.directory import Run
from sg_local.run.in_flight import guarded_call
from sg_local.run.prompt import demonstrations, template_source
from sg_local.selfguide.contenders import (
    BASELINE,
    FIRST_LINE,
    GAIN_OVER_BEST,
    GAINS,
    LABEL_SCORING,
    MANY_SHOT,
    TUNED,
    strongest_opponent,
)
from sg_local.selfguide.metrics import (
    exact_match,
    interval,
    is_label,
    label_counts,
    label_distance,
    paired_difference,
    paired_test,
    rouge_l,
    verdict,
)
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.rows import DEMONSTRATION
from sg_local.selfguide.selection import in_turns
from sg_local.task import Example

# The longest prompt, with its answer. Evaluated once, but every answer attends to all of it: time grows with it.
MAX_MANY_SHOT_TOKENS = 2048


class Contender(NamedTuple):
    """A way to answer: which files, which demonstrations are in the prompt, and whether labels are scored."""

    model: Path
    adapter: Path | None
    shown: Sequence[Example]
    scores_labels: bool = False


def run_evaluate(run: Run) -> None:
    """Answers the test rows with every contender and writes the scores."""
    with run.stage("evaluate") as details:
        contenders = _contenders(run)
        rows, source = _scored_rows(run)
        run.file("predictions").mkdir(exist_ok=True)
        answered = {}
        details["engine"] = {}
        for name, contender in contenders.items():
            path = run.file(f"predictions/{name}.jsonl")
            done = read_rows(path) if path.exists() else []
            if [(row["input"], row["reference"]) for row in done] != [
                (row.input, row.output) for row in rows
            ]:
                found, details["engine"][name] = _predict(run, name, contender, rows)
                write_rows(path, found)
            answered[name] = read_rows(path)
            if name == BASELINE and (cut := _first_lines(answered[name], run.task.examples)):
                write_rows(run.file(f"predictions/{FIRST_LINE}.jsonl"), cut)
                answered[FIRST_LINE] = cut
        sha256 = {run.file(name): sha256 for name, sha256 in details["reads"].items()}
        sha256[run.model.path] = sha256_file(run.model.path)
        contenders[FIRST_LINE] = contenders[BASELINE]
        evaluation = _evaluation(run, answered, contenders, sha256, source)
        write_text(run.file("evaluation.json"), json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
        details["counts"] = {"rows": len(rows)}


def _contenders(run: Run) -> dict[str, Contender]:
    base, tuned_shows = run.model.path, demonstrations(run)
    found = {
        "base_zero_shot": Contender(base, None, ()),
        BASELINE: Contender(base, None, run.task.examples),
    }
    if run.task.is_classification:
        found[LABEL_SCORING] = Contender(base, None, run.task.examples, scores_labels=True)
    if run.settings.many_shot:
        found[MANY_SHOT] = Contender(base, None, many_shots(run, _scored_rows(run)[0]))
    found["tuned_adapter"] = Contender(base, run.file("adapter.gguf"), tuned_shows)
    found[TUNED] = Contender(run.file("model.gguf"), None, tuned_shows)
    return found


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
    run: Run, name: str, contender: Contender, rows: list[Example]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A contender's answers with their scores, and what the engine counted."""
    with (
        open_with(run.settings, contender.model, contender.adapter) as engine,
        progress(f"evaluate {name}", len(rows), "rows", detail=lambda: speed(engine)) as advance,
    ):
        template = engine.tokenizer.chat_template(template_source(run))
        answer = _label_answers if contender.scores_labels else _greedy_answers
        per_call = QUESTIONS_PER_CALL if contender.scores_labels else INPUTS_PER_CALL
        answers: list[str | None] = []
        for start in range(0, len(rows), per_call):
            part = [row.input for row in rows[start : start + per_call]]
            answers += guarded_call(
                run,
                f"evaluate {name}",
                range(start, start + len(part)),
                lambda places, part=part: answer(  # type: ignore[misc]
                    run, engine, template, contender, [part[place] for place in places], advance
                ),
                lambda _place: None,
            )
        counted = counters(engine)
    # What does not fit the context, or crashed, is no answer.
    found = [_scored(row.input, answer or "", row.output) for row, answer in zip(rows, answers, strict=True)]
    return found, counted


def _scored(text: str, prediction: str, reference: str) -> dict[str, Any]:
    """A row of predictions/<contender>.jsonl."""
    return {
        "input": text,
        "prediction": prediction,
        "reference": reference,
        "exact_match": exact_match(prediction, reference),
        "rouge_l": round(rouge_l(prediction, reference), 5),
    }


def _first_lines(rows: list[dict[str, Any]], examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The answers up to the end of their first line, or none where that changes nothing or examples have more lines.

    A model that was never tuned to chats often does not end its answer; who uses one cuts it there.
    """
    if any("\n" in example.output.strip() for example in examples):
        return []
    if not any("\n" in row["prediction"] for row in rows):
        return []
    return [
        _scored(row["input"], row["prediction"].partition("\n")[0].strip(), row["reference"]) for row in rows
    ]


def _greedy_answers(
    run: Run,
    engine: Engine,
    template: ChatTemplate,
    contender: Contender,
    inputs: list[str],
    advance: Callable[[int], None],
) -> list[str | None]:
    answers = answer_inputs(
        engine,
        template,
        run.task.instruction,
        inputs,
        demonstrations=contender.shown,
        max_new_tokens=longest_answer(engine, run.task.labels, run.settings.max_new_tokens),
        on_finished=advance,
    )
    return [answer.text.strip() if answer else None for answer in answers]


def _label_answers(
    run: Run,
    engine: Engine,
    template: ChatTemplate,
    _contender: Contender,
    inputs: list[str],
    advance: Callable[[int], None],
) -> list[str | None]:
    found = score_labels(engine, template, run.task, inputs, advance)
    return [likeliest(scores) if scores else None for scores in found]


def _evaluation(
    run: Run,
    answered: dict[str, list[dict[str, Any]]],
    contenders: dict[str, Contender],
    sha256: dict[Path, str],
    source: str,
) -> dict[str, Any]:
    metric = run.task.metric
    scores: dict[str, Any] = {}
    for name, rows in answered.items():
        contender = contenders[name]
        served = contender.adapter or contender.model
        entry: dict[str, Any] = {
            "served": served.name,
            "served_sha256": sha256[served],
            "demonstrations": len(contender.shown),
        }
        for key in ("exact_match", "rouge_l"):
            values = [row[key] for row in rows]
            low, high = interval(values)
            entry[key] = {
                "mean": round(sum(values) / len(values), 5),
                "interval_95": [round(low, 5), round(high, 5)],
            }
        if run.task.is_classification:
            answers = [row["prediction"] for row in rows]
            references = [row["reference"] for row in rows]
            outside = sum(not is_label(answer, run.task.labels) for answer in answers)
            entry["no_label_share"] = round(outside / len(rows), 5)
            entry["label_distance"] = round(label_distance(answers, references, run.task.labels), 5)
            entry["labels"] = label_counts(answers, references, run.task.labels)
        scores[name] = entry
    return {
        "task": run.task.name,
        "metric": metric,
        "rouge_l": "word level, F-measure (rouge-score)",
        "rows_from": source,
        "n_rows": len(answered[TUNED]),
        "contenders": scores,
        **{key: _gain(answered, over, metric) for key, over in GAINS.items() if over in answered},
        GAIN_OVER_BEST: _gain(answered, strongest_opponent(scores, metric), metric),
    }


def _gain(answered: dict[str, list[dict[str, Any]]], over: str, metric: str) -> dict[str, Any]:
    after, before = ([row[metric] for row in answered[name]] for name in (TUNED, over))
    mean, low, high = paired_difference(after, before)
    p = paired_test(after, before)
    return {
        "of": TUNED,
        "over": over,
        "mean": round(mean, 5),
        "interval_95": [round(low, 5), round(high, 5)],
        "test": "McNemar, exact" if metric == "exact_match" else "sign changes of the differences",
        "p": float(f"{p:.3g}"),
        "verdict": verdict(p, mean),
    }


def many_shots(run: Run, rows: Sequence[Example]) -> list[Example]:
    """Kept pairs, each label in turn, the most confident first, and after them the demonstrations.

    As many as leave room for the longest input of `rows` and an answer, in the smallest of n_ctx, the context that the
    model was trained for, and MAX_MANY_SHOT_TOKENS.
    """
    made = [
        row
        for row in read_rows(run.file("train.jsonl"))
        if row["drop"] is None and not str(row["id"]).startswith(DEMONSTRATION)
    ]
    made.sort(key=lambda row: -row["confidence"])  # stable: ties keep the order of the file
    labels = [row["output"] if run.task.is_classification else "" for row in made]
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))

        def n_tokens(text: str, shown: Sequence[Example]) -> int:
            return len(tokenizer.encode_prompt(template, answer_messages(run.task.instruction, text, shown)))

        room = min(run.settings.n_ctx, model.n_ctx_train, MAX_MANY_SHOT_TOKENS) - run.settings.max_new_tokens
        room -= max(n_tokens(row.input, run.task.examples) for row in rows)
        nothing = n_tokens("", ())
        shown: list[Example] = []
        for index in in_turns(labels):
            example = Example(made[index]["input"], made[index]["output"])
            room -= n_tokens("", (example,)) - nothing
            if room < 0:
                break
            shown.append(example)
    return [*shown, *run.task.examples]
