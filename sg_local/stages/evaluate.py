"""Stage 6: score the files that are served, beside the untuned model (SELF-GUIDE, section 4).

reads  test.jsonl, or the held-out rows of train.jsonl; adapter.gguf model.gguf; train.jsonl for --many-shot
writes evaluation.json
    {"contenders": {"tuned_merged": {"exact_match": {"mean": 0.71, "interval_95": [0.615, 0.79]}}},
     "gain": {"over": "base_few_shot", "mean": 0.37, "interval_95": [0.25, 0.49], "p": 2.4e-07, "verdict": "better"},
     "gain_over_best": {"over": "base_label_scoring", "mean": 0.23, ...}}
       predictions/<contender>.jsonl
    {"input": "...", "prediction": "refund", "reference": "refund", "exact_match": 1.0, "rouge_l": 1.0}
    where a test row has several right outputs, also "references"; each metric takes the best
    of base_label_scoring and tuned_merged also "label_logprobs": {"refund": -0.05, "login": -3.1}

Contenders, all greedy through llama.cpp: base_zero_shot, base_few_shot, tuned_adapter (base + adapter.gguf),
tuned_merged (model.gguf). Where the task has labels also base_label_scoring: the likeliest label after the same prompt
as base_few_shot, so that the base is not counted as wrong for its format. Where every demonstration's answer has one
line and some of base_few_shot's go on, also base_few_shot_first_line: the same answers up to the end of their first
line. With --many-shot also base_many_shot: as many of the made pairs before the demonstrations as fit (the paper's
in-context learning on its own data).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sg_local.chat.template import ChatTemplate
from sg_local.errors import InputError
from sg_local.files import own_directory, read_rows, remove_tree, sha256_file, write_json, write_rows
from sg_local.llama.asking import (
    INPUTS_PER_CALL,
    QUESTIONS_PER_CALL,
    answer_inputs,
    counters,
    likeliest,
    longest_answer,
    open_with,
    score_labels,
)
from sg_local.llama.engine import Engine
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.progress import progress, working
from sg_local.runs.directory import Run
from sg_local.runs.in_flight import guarded_call
from sg_local.runs.made_from import base_facts, is_made_from, key_of, note_made_from, task_facts
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.runs.rows import read_pairs
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.evaluation import (
    FROM_LABELLED,
    FROM_TEST_FILE,
    PredictionRow,
    Served,
    evaluation_of,
    first_line_rows,
    from_made,
    is_prediction,
    prediction_row,
    predictions_file,
    predictions_note,
    references_of,
)
from sg_local.selfguide.given import labelled_id
from sg_local.selfguide.metrics import Metric, metric_of
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.rows import DEMONSTRATION, DropReason, Source, is_kept, source_of
from sg_local.selfguide.selection import in_turns
from sg_local.task import Example

# The longest prompt, with its answer. Evaluated once, but every answer attends to all of it: time grows with it.
MAX_MANY_SHOT_TOKENS = 2048


class Reply(NamedTuple):
    """A contender's answer to a row; log p of each label, in nats, where they are scored."""

    text: str
    label_logprobs: dict[str, float] | None = None


class Way(NamedTuple):
    """How a contender answers: with which files, which demonstrations in the prompt, and whether by label scoring."""

    model: Path
    adapter: Path | None
    demonstrations: Sequence[Example]
    scores_labels: bool = False
    has_probabilities: bool = False  # beside its greedy answers, those of the labels

    @property
    def served(self) -> Path:
        return self.adapter or self.model


def run_evaluate(run: Run) -> None:
    """Answers the test rows with every contender and writes the scores."""
    with run.stage("evaluate") as details:
        ways = ways_to_answer(run)
        rows, source = _scored_rows(run)
        sha256 = {run.file(name): sha256 for name, sha256 in details["reads"].items()}
        sha256[run.model.path] = sha256_file(run.model.path)
        own_directory(run.file("predictions"))
        keys = {
            contender: _key(run, way, [sha256[file] for file in (way.model, way.adapter) if file], rows)
            for contender, way in ways.items()
        }
        by_contender = _kept_answers(run, keys, rows)
        details["engine"] = {}
        with progress("evaluate", len(ways) * len(rows), "rows", len(by_contender) * len(rows)) as advance:
            for contender, way in ways.items():
                if contender in by_contender:
                    continue
                with working(f"evaluate: {contender}", is_short=True):
                    predictions, details["engine"][contender] = _predict(run, contender, way, rows, advance)
                path = run.file(predictions_file(contender))
                write_rows(path, predictions)
                by_contender[contender] = predictions
                note_made_from(run.file(predictions_note(contender)), keys[contender], path)
        answered: dict[Contender, list[PredictionRow]] = {}
        for contender in ways:
            answered[contender] = by_contender[contender]
            if contender == Contender.FEW_SHOT and (
                first_lines := first_line_rows(answered[contender], run.task)
            ):
                write_rows(run.file(predictions_file(Contender.FIRST_LINE)), first_lines)
                answered[Contender.FIRST_LINE] = first_lines
        for contender in set(Contender) - answered.keys():  # of an earlier call with other settings or rows
            remove_tree(run.file(predictions_file(contender)))
            remove_tree(run.file(predictions_note(contender)))
        ways[Contender.FIRST_LINE] = ways[Contender.FEW_SHOT]
        served = {
            contender: Served(way.served.name, sha256[way.served], len(way.demonstrations))
            for contender, way in ways.items()
        }
        evaluation = evaluation_of(run.task, answered, served, source)
        write_json(run.file("evaluation.json"), evaluation)
        details["counts"] = {"rows": len(rows)}


def _kept_answers(
    run: Run, keys: Mapping[Contender, str], rows: list[Example]
) -> dict[Contender, list[PredictionRow]]:
    """The answers of those contenders that an earlier call finished."""
    answered = {}
    for contender, key in keys.items():
        path = run.file(predictions_file(contender))
        if is_made_from(run.file(predictions_note(contender)), key, path):
            predictions = _finished_predictions(path, rows, metric_of(run.task))
            if predictions is not None:
                answered[contender] = predictions
    return answered


def ways_to_answer(run: Run) -> dict[Contender, Way]:
    """How each contender answers, in the order of the tables, but for the first lines of few-shot answers."""
    base, tuned_demonstrations = run.model.path, demonstrations(run)
    ways = {
        Contender.ZERO_SHOT: Way(base, None, ()),
        Contender.FEW_SHOT: Way(base, None, run.task.examples),
    }
    if run.task.is_classification:
        ways[Contender.LABEL_SCORING] = Way(base, None, run.task.examples, scores_labels=True)
    if run.settings.many_shot:
        ways[Contender.MANY_SHOT] = Way(base, None, many_shots(run, _scored_rows(run)[0]))
    ways[Contender.TUNED_ADAPTER] = Way(base, run.file("adapter.gguf"), tuned_demonstrations)
    ways[Contender.TUNED_MERGED] = Way(
        run.file("model.gguf"), None, tuned_demonstrations, has_probabilities=run.task.is_classification
    )
    return ways


def _key(run: Run, way: Way, sha256: Sequence[str], rows: Sequence[Example]) -> str:
    """The key of a contender's answers. sha256: of the files that it answers with."""
    shown = [[example.input, example.output] for example in way.demonstrations]
    asked = [[row.input, *row.outputs] for row in rows]
    limits = [run.settings.n_ctx, run.settings.max_new_tokens]
    how = ["probabilities"] if way.has_probabilities else way.scores_labels
    return key_of(task_facts(run), base_facts(run), list(sha256), shown, how, limits, asked)


def _finished_predictions(path: Path, rows: list[Example], judge: Metric) -> list[PredictionRow] | None:
    """The answers that an earlier call left for these rows; None where there are no such ones."""
    stored = read_rows(path) if path.exists() else []
    predictions = [row for row in stored if is_prediction(row)]
    answered = [(row["input"], *references_of(row)) for row in predictions]
    is_complete = len(predictions) == len(stored) and answered == [(row.input, *row.outputs) for row in rows]
    if not is_complete:
        return None
    # Scored anew: an earlier version may have scored them by fewer metrics.
    return [
        prediction_row(
            row["input"],
            row["prediction"],
            *references_of(row),
            judge=judge,
            label_logprobs=row.get("label_logprobs"),
        )
        for row in predictions
    ]


def _scored_rows(run: Run) -> tuple[list[Example], str]:
    if rows := run.test_rows:
        return rows, FROM_TEST_FILE
    pairs = [
        row for row in read_pairs(run) if row["drop"] == DropReason.HELD_OUT and row["output"] is not None
    ]
    labelled = [row for row in pairs if source_of(row) == Source.LABELLED]
    if labelled:
        also_right = {
            (labelled_id(number), row.output): row.other_outputs
            for number, row in enumerate(run.labelled_rows, 1)
        }
        return [
            Example(row["input"], output, also_right.get((str(row["id"]), output), ()))
            for row in labelled
            for output in [str(row["output"])]
        ], FROM_LABELLED
    held_out = [Example(row["input"], str(row["output"])) for row in pairs]
    if not held_out:
        raise InputError(
            f"{run.path} has no test rows and no made pair was held out: begin a new run with a test "
            "file in the task, or with more --n-inputs"
        )
    return held_out, from_made(run.manifest()["stages"]["curate"].get("held_out_same_share"))


def _predict(
    run: Run, contender: Contender, way: Way, rows: list[Example], advance: Callable[[int], None]
) -> tuple[list[PredictionRow], dict[str, object]]:
    """A contender's answers with their scores, and what the engine counted."""
    with open_with(run.settings, way.model, way.adapter) as engine:
        template = engine.tokenizer.chat_template(template_source(run))
        answer = _label_answers if way.scores_labels else _greedy_answers
        per_call = QUESTIONS_PER_CALL if way.scores_labels else INPUTS_PER_CALL
        replies: list[Reply | None] = []
        for start in range(0, len(rows), per_call):
            part = [row.input for row in rows[start : start + per_call]]
            replies += guarded_call(
                run,
                f"evaluate {contender}",
                range(start, start + len(part)),
                lambda places, part=part: answer(  # type: ignore[misc]
                    run, engine, template, way, [part[place] for place in places], advance
                ),
                lambda _place: None,
            )
        counted = counters(engine)
    # What does not fit the context, or crashed, is no answer.
    predictions = [
        prediction_row(
            row.input,
            reply.text,
            *row.outputs,
            judge=metric_of(run.task),
            label_logprobs=reply.label_logprobs,
        )
        for row, reply in zip(rows, (reply or Reply("") for reply in replies), strict=True)
    ]
    return predictions, counted


def _greedy_answers(
    run: Run,
    engine: Engine,
    template: ChatTemplate,
    way: Way,
    inputs: list[str],
    advance: Callable[[int], None],
) -> list[Reply | None]:
    answers = answer_inputs(
        engine,
        template,
        run.task.instruction,
        inputs,
        demonstrations=way.demonstrations,
        max_new_tokens=longest_answer(engine.tokenizer, run.task.labels, run.settings.max_new_tokens),
        on_finished=advance,
    )
    label_logprobs: list[dict[str, float] | None] = [None] * len(inputs)
    if way.has_probabilities:
        asked = replace(run.task, examples=tuple(way.demonstrations))
        label_logprobs = score_labels(engine, template, asked, inputs, lambda _n_inputs: None)
    return [
        Reply(answer.text.strip(), scores) if answer else None
        for answer, scores in zip(answers, label_logprobs, strict=True)
    ]


def _label_answers(
    run: Run,
    engine: Engine,
    template: ChatTemplate,
    _way: Way,
    inputs: list[str],
    advance: Callable[[int], None],
) -> list[Reply | None]:
    label_logprobs = score_labels(engine, template, run.task, inputs, advance)
    return [Reply(likeliest(scores), scores) if scores else None for scores in label_logprobs]


def many_shots(run: Run, rows: Sequence[Example]) -> list[Example]:
    """Kept pairs, each label in turn, the most confident first, and after them the demonstrations.

    As many as leave room for the longest input of `rows` and an answer, in the smallest of n_ctx, the context that the
    model was trained for, and MAX_MANY_SHOT_TOKENS.
    """
    made = [row for row in read_pairs(run) if is_kept(row) and not str(row["id"]).startswith(DEMONSTRATION)]
    made.sort(key=lambda row: -(row["confidence"] or 0.0))  # stable: ties keep the order of the file
    labels = [row["output"] if run.task.is_classification else "" for row in made]
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))

        def n_tokens(text: str, examples: Sequence[Example]) -> int:
            return len(
                tokenizer.encode_prompt(template, answer_messages(run.task.instruction, text, examples))
            )

        room = min(run.settings.n_ctx, model.n_ctx_train, MAX_MANY_SHOT_TOKENS) - run.settings.max_new_tokens
        room -= max(n_tokens(row.input, run.task.examples) for row in rows)
        nothing = n_tokens("", ())
        chosen: list[Example] = []
        for index in in_turns(labels):
            example = Example(made[index]["input"], made[index]["output"])
            room -= n_tokens("", (example,)) - nothing
            if room < 0:
                break
            chosen.append(example)
    return [*chosen, *run.task.examples]
