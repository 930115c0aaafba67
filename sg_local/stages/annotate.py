"""Stage 2: the model answers its inputs, with the demonstrations before it (SELF-GUIDE, section 3.2).

reads  inputs.jsonl
writes outputs.jsonl   OutputRow of selfguide/rows.py
    {"id": 7, "samples": ["at noon", "at noon", "12"], "output": "at noon", "share": 0.67, "information": 1.83,
     "drop": null}
    {"id": 7, "label_logprobs": [{"delivery": -0.4, "refund": -2.1}, {"delivery": -0.9, "refund": -1.2}],
     "output": "delivery", "drop": null}

Where the task has labels their log-probabilities are computed exactly, with the end token, once for each of
n_layouts prompts; else the answer is chosen among n samples (share: how far the others agree with it; information:
nats that the input adds to each of its tokens). Not done here: calibration and selection (see
choosing.py).
"""

from collections import Counter
from collections.abc import Callable, Sequence

from sg_local.chat.template import ChatTemplate
from sg_local.files import append_rows, recover_rows, remove_tree, row_seed, write_rows
from sg_local.llama.asking import (
    QUESTIONS_PER_CALL,
    counters,
    likeliest,
    open_with,
    prompts_of,
    score_labels,
    speed,
)
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Request, generate
from sg_local.llama.scoring import answer_logprobs
from sg_local.llama.tree import TokenIds
from sg_local.progress import progress
from sg_local.proof.working_copies import generating_model
from sg_local.runs.directory import Run
from sg_local.runs.in_flight import guarded_call, whole_calls
from sg_local.runs.made_from import key_of, stage_key
from sg_local.runs.prompt import template_source
from sg_local.runs.rows import read_inputs, rows_to_answer, scores_labels
from sg_local.selfguide.filters import of_shape, rules_of
from sg_local.selfguide.prompts import answer_messages, prompt_variants
from sg_local.selfguide.rows import DropReason, InputRow, OutputRow
from sg_local.selfguide.selection import consensus, informed_candidates, likeness, most_informed, vote

SAMPLED_INPUTS_PER_CALL = 24
_KEPT = ".kept_outputs.jsonl"  # answers to inputs that were not edited, while the others are answered again


def run_annotate(run: Run) -> None:
    """Answers every input that generate kept."""
    with run.stage("annotate") as details:
        inputs = rows_to_answer(run, read_inputs(run))
        by_scores = scores_labels(run)
        per_call = QUESTIONS_PER_CALL if by_scores else SAMPLED_INPUTS_PER_CALL
        kept, rows = _earlier_rows(run, inputs, per_call)
        n_kept = len(kept)
        unanswered = [row for row in inputs if row["id"] not in kept]
        path, key = run.file("outputs.jsonl"), stage_key(run, "annotate")
        model_path = generating_model(run)
        details["model_file"] = model_path.name
        with (
            open_with(run.settings, model_path) as engine,
            progress(
                "annotate", len(inputs), "inputs", n_kept + len(rows), detail=lambda: speed(engine)
            ) as advance,
        ):
            template = engine.tokenizer.chat_template(template_source(run))
            annotate = _score_labels if by_scores else _sample_answers
            for start in range(len(rows), len(unanswered), per_call):
                part = unanswered[start : start + per_call]

                def answer(places: Sequence[int], part: list[InputRow] = part) -> list[OutputRow]:
                    return annotate(run, engine, template, [part[place] for place in places], advance)

                def dropped(place: int, part: list[InputRow] = part) -> OutputRow:
                    return {"id": part[place]["id"], "output": None, "drop": DropReason.CRASH}

                new = guarded_call(run, "annotate", [row["id"] for row in part], answer, dropped)
                for row, answered in zip(part, new, strict=True):
                    answered["made_from"] = key_of(key, row["input"])
                append_rows(path, new)
                rows += new
            details.update(counters(engine))
        if kept:
            by_id = kept | {row["id"]: row for row in rows}
            rows = [by_id[row["id"]] for row in inputs]
            write_rows(path, rows)
        remove_tree(run.file(_KEPT))
        drops = Counter(str(row["drop"]) for row in rows if row["drop"])
        details["counts"] = {"annotated": len(rows), "dropped": dict(sorted(drops.items()))}


def _earlier_rows(
    run: Run, inputs: list[InputRow], per_call: int
) -> tuple[dict[int | str, OutputRow], list[OutputRow]]:
    """What earlier calls answered: rows that stay, by id, and those of outputs.jsonl, which is gone on with.

    outputs.jsonl holds answers to the first of the inputs that are not among the kept ones, in whole calls. Where it
    holds anything else (an input was edited since, dropped or added), its rows that still fit join the kept ones, and
    it begins anew.
    """
    path, kept_path = run.file("outputs.jsonl"), run.file(_KEPT)
    key = stage_key(run, "annotate")
    keys = {row["id"]: key_of(key, row["input"]) for row in inputs}

    def fitting(rows: list[OutputRow]) -> dict[int | str, OutputRow]:
        return {row["id"]: row for row in rows if keys.get(row["id"]) == row.get("made_from", "unknown")}

    kept, rows = fitting(recover_rows(kept_path, OutputRow)), recover_rows(path, OutputRow)
    unanswered = [row["id"] for row in inputs if row["id"] not in kept]
    if [row["id"] for row in rows] != unanswered[: len(rows)] or len(fitting(rows)) < len(rows):
        kept |= fitting(rows)
        write_rows(kept_path, kept.values())  # first: a row is in one of the two files at any time
        rows = []
    elif len(rows) < len(unanswered):
        rows = whole_calls(rows, per_call)
    write_rows(path, rows)
    return kept, rows


def _score_labels(
    run: Run, engine: Engine, template: ChatTemplate, inputs: list[InputRow], advance: Callable[[int], None]
) -> list[OutputRow]:
    texts = [row["input"] for row in inputs]
    variants = prompt_variants(run.task.examples, run.settings.n_layouts)
    # An input is answered when its last prompt is.
    progress_of = [*([lambda _n_inputs: None] * (len(variants) - 1)), advance]
    scores = [
        score_labels(engine, template, run.task, texts, on_finished, variant)
        for variant, on_finished in zip(variants, progress_of, strict=True)
    ]
    return [_scored_row(row["id"], logprobs) for row, *logprobs in zip(inputs, *scores, strict=True)]


def _scored_row(row_id: int | str, by_prompt: Sequence[dict[str, float] | None]) -> OutputRow:
    """A row with its label scores, or dropped where one of the prompts does not fit the context."""
    logprobs = [scores for scores in by_prompt if scores is not None]
    if len(logprobs) < len(by_prompt):
        return {"id": row_id, "label_logprobs": [], "output": None, "drop": DropReason.OVER_CONTEXT}
    return {"id": row_id, "label_logprobs": logprobs, "output": likeliest(logprobs[0]), "drop": None}


def _sample_answers(
    run: Run, engine: Engine, template: ChatTemplate, inputs: list[InputRow], advance: Callable[[int], None]
) -> list[OutputRow]:
    settings = run.settings
    # Demonstrations of one line ask for answers of one line.
    one_line = not any("\n" in example.output for example in run.task.examples)
    conversations = [answer_messages(run.task.instruction, row["input"], run.task.examples) for row in inputs]
    prompts = prompts_of(engine, template, conversations, settings.max_new_tokens)
    requests, owners = [], []
    for index, (row, prompt) in enumerate(zip(inputs, prompts, strict=True)):
        if prompt is None:
            continue
        for sample in range(settings.n_samples):
            owners.append(index)
            requests.append(
                Request(
                    prompt,
                    settings.max_new_tokens,
                    temperature=settings.output_temperature,
                    top_k=settings.output_top_k,
                    seed=row_seed(settings.seed, "annotate", f"{row['id']}/{sample}"),
                    stop=("\n",) if one_line else (),
                )
            )
    samples: list[list[str]] = [[] for _ in inputs]
    left = Counter(owners)

    def on_finished(request: int) -> None:
        left[owners[request]] -= 1
        if not left[owners[request]]:
            advance(1)

    completions = generate(engine, requests, on_finished)
    advance(len(inputs) - len(set(owners)))
    for index, completion in zip(owners, completions, strict=True):
        # An answer that was cut off is no vote for anything, but still counts as a sample.
        samples[index].append("" if completion.finish_reason == "length" else completion.text.strip())
    rows = [_sampled_row(run, row["id"], texts) for row, texts in zip(inputs, samples, strict=True)]
    if settings.choose_by == "information" and not run.task.is_classification:
        _choose_by_information(run, engine, template, prompts, rows, [row["input"] for row in inputs])
    return rows


def _sampled_row(run: Run, row_id: int | str, samples: list[str]) -> OutputRow:
    """A row with its samples and the one that is chosen, or dropped where there is none."""
    shape = rules_of(run.task).output_shape if run.settings.form_filter else None
    answers = of_shape([sample for sample in samples if sample], shape)
    choose = vote if run.task.is_classification or run.settings.choose_by == "votes" else consensus
    output, agreement = choose(answers) if answers else (None, 0.0)
    share = agreement * len(answers) / len(samples) if samples else 0.0
    drop = None if answers else DropReason.UNFINISHED if samples else DropReason.OVER_CONTEXT
    return {"id": row_id, "samples": samples, "output": output, "share": round(share, 4), "drop": drop}


def _choose_by_information(
    run: Run,
    engine: Engine,
    template: ChatTemplate,
    prompts: Sequence[TokenIds | None],
    rows: list[OutputRow],
    inputs: Sequence[str],
) -> None:
    """Scores candidates with their input and with nothing in its place, and chooses by the difference."""
    rules = rules_of(run.task)
    nothing = answer_messages(run.task.instruction, "", run.task.examples)
    alone = tuple(engine.tokenizer.encode_prompt(template, nothing))
    answers: list[TokenIds] = []
    pairs: list[tuple[TokenIds, TokenIds]] = []
    candidates: list[list[str]] = []  # of each row, different samples
    for prompt, row, text in zip(prompts, rows, inputs, strict=True):
        if prompt is None:  # over the context: a row without samples
            candidates.append([])
            continue
        candidates.append(informed_candidates(run.settings, rules, text, row["samples"]))
        for sample in candidates[-1]:
            answers.append(tuple(engine.tokenizer.encode_answer(template, nothing, sample)))
            pairs.append((prompt, answers[-1]))
    logprobs = answer_logprobs(engine, pairs)
    logprobs_alone = answer_logprobs(engine, [(alone, answer) for answer in answers])
    start = 0
    for row, texts in zip(rows, candidates, strict=True):
        part = slice(start, start := start + len(texts))
        if not texts:
            continue
        n_tokens = [len(answer) for answer in answers[part]]
        best, information = most_informed(logprobs[part], logprobs_alone[part], n_tokens)
        row["output"], row["information"] = texts[best], round(information, 4)
        row["share"] = round(likeness(texts[best], row["samples"]), 4)
