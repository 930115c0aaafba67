"""Stage 1: the model invents inputs for the task (SELF-GUIDE, section 3.1).

reads  task.toml
writes inputs.jsonl   InputRow of selfguide/rows.py
    {"id": 7, "input": "My parcel is late.", "label": "delivery", "prompt": "turns", "drop": null, "seed": 90417}

How inputs are asked for is chosen by a trial of each way (selfguide/trials.py), unless it is set. Finished trials are
kept in .probe.jsonl, for a second call and for the manifest.

Rows are made and written in calls of ROWS_PER_CALL. A call's rows depend on the task, the settings and the calls
before it, so a killed stage drops what its last call had written, repeats it, and ends with the same file.
"""

import functools
import random
from collections import Counter
from collections.abc import Sequence

from sg_local.chat.template import ChatTemplate
from sg_local.errors import InputError, SgLocalError
from sg_local.files import append_rows, recover_rows, row_seed, write_rows
from sg_local.llama.asking import counters, has_room, open_with, score_labels, speed
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.llama.tree import TokenIds
from sg_local.progress import progress, say
from sg_local.proof.working_copies import generating_model
from sg_local.runs.directory import Run
from sg_local.runs.in_flight import guarded_call, whole_calls
from sg_local.runs.prompt import template_source
from sg_local.selfguide.filters import Pool, Rules, input_fault, rules_of
from sg_local.selfguide.labels import label_scores
from sg_local.selfguide.prompts import INPUT_PROMPTS, input_request, input_stops
from sg_local.selfguide.rows import DropReason, InputRow, Trial
from sg_local.selfguide.trials import best_style
from sg_local.settings import input_limit
from sg_local.task import Task

ROWS_PER_CALL = 64
N_TRIALS = 32  # inputs for each way of asking: some seconds, and a standard error of 8 points at most
_TRIALS = ".probe.jsonl"
_TRIAL_SEEDS = "probe"  # seeds come from this word: with another one, trial inputs would be others
ATTEMPTS_PER_INPUT = 4  # at most, before the stage goes on with what it has

Made = tuple[list[InputRow], list[Completion | None]]  # rows to fill, and their texts


def run_generate(run: Run) -> None:
    """Makes inputs until n_inputs passed the filters, or the attempts are used up."""
    with run.stage("generate") as details:
        path = run.file("inputs.jsonl")
        rows = whole_calls(recover_rows(path, InputRow), ROWS_PER_CALL)
        write_rows(path, rows)
        wanted = run.settings.n_inputs
        attempts = ATTEMPTS_PER_INPUT * max(wanted, ROWS_PER_CALL)
        pool = Pool(run.task.examples, run.settings.near_duplicate_rouge_l)
        for row in rows:
            if row["drop"] is None:
                pool.add(row["input"])
        kept = sum(row["drop"] is None for row in rows)
        rules = rules_of(run.task)
        model_path = generating_model(run)
        details["model_file"] = model_path.name
        with (
            open_with(run.settings, model_path) as engine,
            progress(
                "generate", wanted, "inputs", min(kept, wanted), detail=lambda: speed(engine)
            ) as advance,
        ):
            template = engine.tokenizer.chat_template(template_source(run))
            if not has_room(engine, template, run.task.instruction, run.task.examples):
                raise InputError(
                    f"chat template, instruction and examples alone fill the context of {engine.longest_sequence} "
                    "tokens: shorten them, raise --n-ctx where the model's own context is longer, or take a model with "
                    "a shorter chat template"
                )
            style = rows[0]["prompt"] if rows else run.settings.input_prompt
            if style == "auto":
                style = _chosen_style(run, engine, template, rules)
            trials = recover_rows(run.file(_TRIALS), Trial)
            needs_form = run.settings.form_filter and all(trial["form_filter"] for trial in trials)
            while kept < wanted and len(rows) < attempts:
                earlier = [row["input"] for row in rows if row["drop"] is None]
                ids = range(len(rows), len(rows) + ROWS_PER_CALL)
                requests, new = _requests(run, engine, template, style, ids, earlier)

                def answer(
                    places: Sequence[int], requests: list[Request] = requests
                ) -> list[Completion | None]:
                    return list(generate(engine, [requests[place] for place in places]))

                completions = guarded_call(run, "generate", ids, answer, lambda _place: None)
                _judge(run, rules, pool, new, completions, needs_form)
                append_rows(path, new)
                rows += new
                n_new = sum(row["drop"] is None for row in new)
                advance(min(n_new, wanted - kept))
                kept += n_new
            details.update(counters(engine))
        if trials:
            details["probe"] = trials
        drops = Counter(str(row["drop"]) for row in rows if row["drop"])
        details["counts"] = {"made": len(rows), "kept": kept, "dropped": dict(sorted(drops.items()))}
        if kept == 0:
            advice = "a longer instruction or other examples help most"
            if drops[DropReason.MARKS]:
                advice += (
                    ", or a new run with --no-form-filter, where inputs may lack the marks of the examples"
                )
            raise SgLocalError(
                f"none of {len(rows)} made inputs passed the filters ({dict(drops)}): look at {path}; {advice}"
            )
        if kept < wanted:
            say(f"generate: {kept} of {wanted} inputs after {len(rows)} attempts; going on with these")


def _requests(
    run: Run,
    engine: Engine,
    template: ChatTemplate,
    style: str,
    row_ids: Sequence[int],
    earlier: Sequence[str] = (),
    purpose: str = "generate",
) -> tuple[list[Request], list[InputRow]]:
    """Requests for new inputs, each label in turn, and the rows that they will fill."""
    settings, task = run.settings, run.task
    example_tokens = [len(engine.tokenizer.encode_plain(example.input)) for example in task.examples]
    limit = input_limit(settings.max_input_tokens, example_tokens)
    requests: list[Request] = []
    rows: list[InputRow] = []
    for row_id in row_ids:
        seed = row_seed(settings.seed, purpose, row_id)
        label = task.labels[row_id % len(task.labels)] if task.labels else None
        prompt = _prompt(engine, template, style, task, label, seed, earlier)
        if not engine.fits(len(prompt), limit):
            prompt = _prompt(engine, template, style, task, label, seed, ())
        requests.append(
            Request(
                prompt,
                limit,
                temperature=settings.input_temperature,
                top_k=settings.input_top_k,
                min_p=settings.input_min_p,
                seed=seed,
                stop=input_stops(task),
            )
        )
        rows.append({"id": row_id, "input": "", "label": label, "prompt": style, "drop": None, "seed": seed})
    return requests, rows


def _prompt(
    engine: Engine,
    template: ChatTemplate,
    style: str,
    task: Task,
    label: str | None,
    seed: int,
    earlier: Sequence[str],
) -> TokenIds:
    messages, begun = input_request(style, task, label, random.Random(seed), earlier)
    if begun:
        return tuple(engine.tokenizer.encode_begun(template, messages, begun))
    return tuple(engine.tokenizer.encode_prompt(template, messages))


def _judge(
    run: Run,
    rules: Rules,
    pool: Pool,
    rows: list[InputRow],
    completions: Sequence[Completion | None],
    needs_form: bool,
) -> None:
    """Fills in the inputs, and drops those that a filter refuses, in their order; kept ones join the pool."""
    for row, completion in zip(rows, completions, strict=True):
        if completion is None:
            row["drop"] = DropReason.CRASH
            continue
        text = row["input"] = completion.text.strip()
        if completion.finish_reason == "length":
            row["drop"] = DropReason.CUT_OFF
            continue
        row["drop"] = input_fault(run.settings, rules, run.task.labels, pool, text, needs_form=needs_form)
        if row["drop"] is None:
            pool.add(text)


def _chosen_style(run: Run, engine: Engine, template: ChatTemplate, rules: Rules) -> str:
    """The way of asking that gives the best trial inputs; what each gave is kept in .probe.jsonl.

    Where no trial input has the demonstrations' form, that filter would drop everything, and is left out.
    """
    path = run.file(_TRIALS)
    finished = recover_rows(path, Trial)
    trials: list[Trial] = []

    @functools.cache  # the same inputs are judged with the form filter, and without it where that drops all
    def made(style: str) -> Made:
        return _trial_inputs(run, engine, template, style)

    for needs_form in [True, False] if run.settings.form_filter else [False]:
        trials = [trial for trial in finished if trial["form_filter"] == needs_form]
        for style in INPUT_PROMPTS[len(trials) :]:
            trials.append(_trial(run, engine, template, rules, made(style), needs_form))
            append_rows(path, trials[-1:])
        if any(trial["good"] for trial in trials):
            break
        if needs_form:
            say("generate: no trial input has the form of the examples; trying with inputs of any form")
    style = best_style(trials, len(run.task.labels))
    results = ", ".join(
        f"{trial['style']} {trial['good']}/{trial['made']}"
        + (f" ({trial['agreement']:.0%} of them as asked)" if trial["agreement"] is not None else "")
        for trial in trials
    )
    say(f"generate: asking by {style}, after {N_TRIALS} trial inputs each; good ones: {results}")
    return style


def _trial_inputs(run: Run, engine: Engine, template: ChatTemplate, style: str) -> Made:
    requests, rows = _requests(run, engine, template, style, range(N_TRIALS), purpose=_TRIAL_SEEDS)

    def answer(places: Sequence[int]) -> list[Completion | None]:
        return list(generate(engine, [requests[place] for place in places]))

    return rows, guarded_call(run, f"trial {style}", range(N_TRIALS), answer, lambda _place: None)


def _trial(
    run: Run, engine: Engine, template: ChatTemplate, rules: Rules, made: Made, needs_form: bool
) -> Trial:
    """What one way of asking gave: its trial inputs through the filters, and how often they are as asked."""
    rows, completions = made
    style = rows[0]["prompt"]
    pool = Pool(run.task.examples, run.settings.near_duplicate_rouge_l)
    _judge(run, rules, pool, rows, completions, needs_form)
    good = [row for row in rows if row["drop"] is None]
    agreement = _agreement(run, engine, template, style, good) if run.task.labels and good else None
    return {
        "style": style,
        "made": len(rows),
        "good": len(good),
        "agreement": agreement,
        "form_filter": needs_form,
    }


def _agreement(run: Run, engine: Engine, template: ChatTemplate, style: str, rows: list[InputRow]) -> float:
    """Share of trial inputs whose highest label score is that of the made-for label, 0..1."""

    def score(places: Sequence[int]) -> list[dict[str, float] | None]:
        texts = [rows[place]["input"] for place in places]
        return score_labels(engine, template, run.task, texts, lambda _n_inputs: None)

    ids = [row["id"] for row in rows]
    scores = guarded_call(run, f"trial {style}, label scores", ids, score, lambda _place: None)
    made_for = [row["label"] for row, logprobs in zip(rows, scores, strict=True) if logprobs is not None]
    scored = [[logprobs] for logprobs in scores if logprobs is not None]
    if not scored:
        return 0.0
    agreed = label_scores(scored, made_for, run.task.labels, removes_bias=True, weighs_evidence=False).agreed
    return round(agreed / len(scored), 4)
