"""Stage 1: the real inputs of the task, and others that the model makes (SELF-GUIDE, section 3.1).

reads  task.toml, and given.jsonl and labelled.jsonl where they are
writes inputs.jsonl   InputRow of selfguide/rows.py
    {"id": "given-1", "input": "were is my parcel", "label": null, "prompt": null, "drop": null, "seed": null,
     "source": "given"}
    {"id": 7, "input": "My parcel is late.", "label": "delivery", "prompt": "turns", "drop": null, "seed": 90417,
     "source": "made"}

Real inputs come first, and made ones fill up to n_inputs. What is made does not depend on them, so other real inputs
leave the made ones as they are. Labelled rows stand among the inputs to be scored; how many is no matter of n_inputs.

How inputs are asked for is chosen by a trial of each way (selfguide/trials.py), unless it is set. Finished trials are
kept in .probe.jsonl, for a second call and for the manifest.

Rows are made and written in calls of ROWS_PER_CALL. A call's rows depend on the task, the settings and the calls
before it, so a killed stage drops what its last call had written, repeats it, and ends with the same file.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

from sg_local.chat.template import ChatTemplate
from sg_local.errors import InputError, SgLocalError
from sg_local.files import append_rows, recover_rows, remove_tree, row_seed, write_rows
from sg_local.llama.asking import counters, has_room, open_with, score_labels, speed
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.llama.tree import TokenIds
from sg_local.progress import progress, say, working
from sg_local.proof.working_copies import generating_model
from sg_local.report.tables import counted
from sg_local.runs.directory import Run
from sg_local.runs.in_flight import forget, guarded_call
from sg_local.runs.made_from import GENERATE_NOTE, is_made_from, note_made_from, stage_key
from sg_local.runs.prompt import template_source
from sg_local.selfguide.filters import Pool, Rules, input_fault, rules_of
from sg_local.selfguide.given import real_rows
from sg_local.selfguide.labels import label_scores
from sg_local.selfguide.prompts import INPUT_PROMPTS, input_request, input_stops
from sg_local.selfguide.rows import DropReason, InputRow, Source, Trial, source_of
from sg_local.selfguide.trials import best_style
from sg_local.settings import input_limit, n_wanted_made
from sg_local.task import Task

ROWS_PER_CALL = 64
N_TRIALS = 32  # inputs for each way of asking: some seconds, and a standard error of 8 points at most
_TRIALS = ".probe.jsonl"
_TRIAL_SEEDS = "probe"  # seeds come from this word: with another one, trial inputs would be others
ATTEMPTS_PER_INPUT = 4  # at most, before the stage goes on with what it has

Made = tuple[list[InputRow], list[Completion | None]]  # rows to fill, and their texts


def run_generate(run: Run) -> None:
    """Takes the real inputs, and makes others until n_inputs passed the filters or the attempts are used up."""
    with run.stage("generate") as details:
        path = run.file("inputs.jsonl")
        _discard_outdated(run)
        made = _whole_calls(
            [row for row in recover_rows(path, InputRow) if source_of(row) == Source.MADE],
        )
        model_path = generating_model(run)
        details["model_file"] = model_path.name
        with open_with(run.settings, model_path) as engine:
            template = engine.tokenizer.chat_template(template_source(run))
            if not has_room(engine, template, run.task.instruction, run.task.examples):
                raise InputError(
                    f"chat template, instruction and examples alone fill the context of {engine.longest_sequence} "
                    "tokens: shorten them, raise --n-ctx where the model's own context is longer, or take a model with "
                    "a shorter chat template"
                )
            real = _real_rows(run, engine, template)
            n_given = sum(row["drop"] is None and row["source"] == Source.GIVEN for row in real)
            wanted = n_wanted_made(run.settings, n_given, with_labels=run.task.is_classification)
            _say_real(run, n_given, wanted)
            made = _needed_calls(made, wanted)
            write_rows(path, [*real, *made])
            if wanted:
                _make_inputs(run, engine, template, made, wanted)
            details.update(counters(engine))
        if trials := recover_rows(run.file(_TRIALS), Trial):
            details["probe"] = trials
        details["counts"] = _counts(made, real, n_given)
        _require_inputs(run, made, n_given, wanted)


def _real_rows(run: Run, engine: Engine, template: ChatTemplate) -> list[InputRow]:
    """The rows that are real, dropped ones included."""
    task = run.task
    rows = real_rows(
        task.examples,
        [row.input for row in run.labelled_rows],
        run.given_inputs,
        run.settings.n_inputs,
        run.settings.seed,
        lambda text: has_room(engine, template, task.instruction, task.examples, text),
    )
    drops = Counter(str(row["drop"]) for row in rows if row["drop"])
    if drops:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
        say(f"generate: dropped {counted(drops.total(), 'real input')} ({reasons})")
    return rows


def _say_real(run: Run, n_given: int, n_made: int) -> None:
    """What share of the inputs is real, where some were given."""
    if not run.given_inputs:
        return
    n_inputs, n_all = run.settings.n_inputs, len(run.given_inputs)
    drawn = f"; of {n_all} given ones they are drawn with the seed {run.settings.seed}"
    say(
        f"generate: {n_given} of {n_given + n_made} inputs are real ({n_given / (n_given + n_made):.0%})"
        + (drawn if n_all > n_inputs else "")
    )
    if n_made > n_inputs - n_given:
        say(
            f"generate: {n_made} are made beside them, whose labels are known better: what tells these apart teaches "
            "how to judge real ones (--least-made-share)"
        )


def _needed_calls(rows: list[InputRow], wanted: int) -> list[InputRow]:
    """The rows of as many calls as it takes to keep `wanted`: there may have been fewer real inputs before."""
    needed: list[InputRow] = []
    for _, call in groupby(rows, key=lambda row: int(row["id"]) // ROWS_PER_CALL):
        if sum(row["drop"] is None for row in needed) >= wanted:
            break
        needed += call
    return needed


def _make_inputs(run: Run, engine: Engine, template: ChatTemplate, rows: list[InputRow], wanted: int) -> None:
    """Appends made rows to the file and to `rows` until `wanted` of them passed the filters."""
    attempts = ATTEMPTS_PER_INPUT * max(wanted, ROWS_PER_CALL)
    pool = Pool(run.task.examples, run.settings.near_duplicate_rouge_l)
    for row in rows:
        if row["drop"] is None:
            pool.add(row["input"])
    kept = sum(row["drop"] is None for row in rows)
    rules = rules_of(run.task)
    style = rows[0]["prompt"] if rows else None
    style = style or run.settings.input_prompt
    if style == "auto":
        style = _chosen_style(run, engine, template, rules)
    trials = recover_rows(run.file(_TRIALS), Trial)
    needs_form = run.settings.form_filter and all(trial["form_filter"] for trial in trials)
    with progress("generate", wanted, "inputs", min(kept, wanted), detail=lambda: speed(engine)) as advance:
        while kept < wanted and (first_id := int(rows[-1]["id"]) + 1 if rows else 0) < attempts:
            earlier = [row["input"] for row in rows if row["drop"] is None]
            ids = range(first_id, first_id + ROWS_PER_CALL)
            requests, new = _requests(run, engine, template, style, ids, earlier)

            def answer(places: Sequence[int], requests: list[Request] = requests) -> list[Completion | None]:
                return list(generate(engine, [requests[place] for place in places]))

            completions = guarded_call(run, "generate", ids, answer, lambda _place: None)
            _judge(run, rules, pool, new, completions, needs_form)
            append_rows(run.file("inputs.jsonl"), new)
            rows += new
            n_new = sum(row["drop"] is None for row in new)
            advance(min(n_new, wanted - kept))
            kept += n_new


def _counts(made: list[InputRow], real: list[InputRow], n_given: int) -> dict[str, object]:
    """For the manifest."""
    drops = Counter(str(row["drop"]) for row in (*real, *made) if row["drop"])
    counts: dict[str, object] = {
        "made": len(made),
        "kept": sum(row["drop"] is None for row in made) + n_given,
        "dropped": dict(sorted(drops.items())),
    }
    if real:
        counts |= {
            "given": sum(row["source"] == Source.GIVEN for row in real),
            "given_kept": n_given,
            "labelled": sum(row["source"] == Source.LABELLED for row in real),
        }
    return counts


def _require_inputs(run: Run, made: list[InputRow], n_given: int, wanted: int) -> None:
    """Raises SgLocalError where there is no input; says it where fewer are made than wanted."""
    kept = sum(row["drop"] is None for row in made)
    drops = Counter(str(row["drop"]) for row in made if row["drop"])
    if kept + n_given == 0:
        advice = "a longer instruction or other examples help most"
        if drops[DropReason.MARKS]:
            advice += ", or a new run with --no-form-filter, where inputs may lack the marks of the examples"
        raise SgLocalError(
            f"none of {len(made)} made inputs passed the filters ({dict(drops)}): look at "
            f"{run.file('inputs.jsonl')}; {advice}"
        )
    if kept < wanted:
        say(
            f"generate: {kept} of {counted(wanted, 'input')} to be made, after {counted(len(made), 'attempt')}; going "
            "on with these"
        )


def _discard_outdated(run: Run) -> None:
    """Removes rows and trials of an earlier call where the task or a setting was changed since."""
    note, key = run.file(GENERATE_NOTE), stage_key(run, "generate")
    if is_made_from(note, key):
        return
    pieces = [path for name in ("inputs.jsonl", _TRIALS) if (path := run.file(name)).exists()]
    if pieces:
        say("generate: the task or its settings were changed since: the inputs are made anew")
    for path in pieces:
        remove_tree(path)
    forget(run)
    note_made_from(note, key)


def _whole_calls(rows: list[InputRow]) -> list[InputRow]:
    """The rows of the calls that were written whole: a person may have taken out some before the last."""
    last = int(rows[-1]["id"]) if rows else -1
    return [row for row in rows if int(row["id"]) <= last - (last + 1) % ROWS_PER_CALL]


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
        rows.append(
            {
                "id": row_id,
                "input": "",
                "label": label,
                "prompt": style,
                "drop": None,
                "seed": seed,
                "source": Source.MADE,
            }
        )
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

    n_trials = N_TRIALS * len(INPUT_PROMPTS)
    n_known = N_TRIALS * len({trial["style"] for trial in finished})
    with progress("generate: trials of prompts", n_trials, "inputs", n_known, is_part=True) as advance:

        @functools.cache  # the same inputs are judged with the form filter, and without it where that drops all
        def made(style: str) -> Made:
            return _trial_inputs(run, engine, template, style, advance)

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


def _trial_inputs(
    run: Run, engine: Engine, template: ChatTemplate, style: str, advance: Callable[[int], None]
) -> Made:
    requests, rows = _requests(run, engine, template, style, range(N_TRIALS), purpose=_TRIAL_SEEDS)

    def answer(places: Sequence[int]) -> list[Completion | None]:
        asked = [requests[place] for place in places]
        return list(generate(engine, asked, lambda _request: advance(1)))

    return rows, guarded_call(run, f"trial {style}", range(N_TRIALS), answer, lambda _place: None)


def _trial(
    run: Run, engine: Engine, template: ChatTemplate, rules: Rules, made: Made, needs_form: bool
) -> Trial:
    """What one way of asking gave: its trial inputs through the filters, and how often they are as asked."""
    rows, completions = made
    style = str(rows[0]["prompt"])
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
    with working("generate: label scores of trial inputs", is_short=True):
        scores = guarded_call(run, f"trial {style}, label scores", ids, score, lambda _place: None)
    made_for = [row["label"] for row, logprobs in zip(rows, scores, strict=True) if logprobs is not None]
    scored = [[logprobs] for logprobs in scores if logprobs is not None]
    if not scored:
        return 0.0
    agreed = label_scores(scored, made_for, run.task.labels, removes_bias=True, weighs_evidence=False).agreed
    return round(agreed / len(scored), 4)
