"""Stage 1: the model invents inputs for the task (SELF-GUIDE, section 3.1).

reads  task.toml
writes inputs.jsonl   {"id": 7, "input": "My parcel is late.", "label": "delivery", "drop": null, "seed": 90417}

Rows are made and written in calls of ROWS_PER_CALL. A call's rows depend on the task, the settings and the calls
before it, so a killed stage drops what its last call had written, repeats it, and ends with the same file.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sg_local.errors import SgLocalError
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.progress import progress, say
from sg_local.records import append_rows, recover_rows, row_seed, write_rows
from sg_local.run import Run
from sg_local.selfguide.chat_template import ChatTemplate
from sg_local.selfguide.filters import Pool, Rules, form_fault, rules_of, text_fault
from sg_local.selfguide.metrics import is_label
from sg_local.selfguide.prompts import input_request, input_stops
from sg_local.stages.common import chat_template, counters, open_with, speed, whole_calls
from sg_local.stages.in_flight import DROP, guarded_call
from sg_local.stages.weights import generating_model

ROWS_PER_CALL = 64
ATTEMPTS_PER_INPUT = 4  # at most, before the stage goes on with what it has


def run_generate(run: Run) -> None:
    """Makes inputs until n_inputs passed the filters, or the attempts are used up."""
    with run.stage("generate", reads=["task.toml"], writes=["inputs.jsonl"]) as details:
        path = run.file("inputs.jsonl")
        rows = whole_calls(recover_rows(path), ROWS_PER_CALL)
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
            template = chat_template(run, engine)
            while kept < wanted and len(rows) < attempts:
                new = _one_call(run, engine, template, len(rows), pool, rules)
                append_rows(path, new)
                rows += new
                found = sum(row["drop"] is None for row in new)
                advance(min(found, wanted - kept))
                kept += found
            details.update(counters(engine))
        drops = Counter(row["drop"] for row in rows if row["drop"])
        details["counts"] = {"made": len(rows), "kept": kept, "dropped": dict(sorted(drops.items()))}
        if kept == 0:
            raise SgLocalError(
                f"none of {len(rows)} made inputs passed the filters ({dict(drops)}): look at {path}; "
                "a longer instruction or other examples help most"
            )
        if kept < wanted:
            say(f"generate: {kept} of {wanted} inputs after {len(rows)} attempts; going on with these")


def _one_call(
    run: Run, engine: Engine, template: ChatTemplate, first_id: int, pool: Pool, rules: Rules
) -> list[dict[str, Any]]:
    """The next ROWS_PER_CALL rows, filtered in their order; kept ones join the pool."""
    settings, task = run.settings, run.task
    requests, rows = [], []
    row_ids = range(first_id, first_id + ROWS_PER_CALL)
    for row_id in row_ids:
        seed = row_seed(settings.seed, "generate", row_id)
        label = task.labels[row_id % len(task.labels)] if task.labels else None
        messages, begun = input_request(task, label, random.Random(seed))
        prompt = engine.tokenizer.encode_begun(template, messages, begun)
        requests.append(
            Request(
                tuple(prompt),
                settings.max_input_tokens,
                temperature=settings.input_temperature,
                top_k=settings.input_top_k,
                min_p=settings.input_min_p,
                seed=seed,
                stop=input_stops(task),
            )
        )
        rows.append({"id": row_id, "input": "", "label": label, "drop": None, "seed": seed})

    def answer(places: Sequence[int]) -> list[Completion | None]:
        return list(generate(engine, [requests[place] for place in places]))

    completions = guarded_call(run, "generate", row_ids, answer, lambda _place: None)
    for row, completion in zip(rows, completions, strict=True):
        if completion is None:
            row["drop"] = DROP
            continue
        text = completion.text.strip()
        row["input"] = text
        bounds = rules.input_characters if settings.length_filter else None
        form = rules.input_form if settings.form_filter else None
        row["drop"] = (
            "cut_off"
            if completion.finish_reason == "length"
            else text_fault(text, rules.noise, bounds)
            or (form_fault(text, form) if form else None)
            or ("label" if is_label(text, task.labels) else None)
            or pool.fault(text)
        )
        if row["drop"] is None:
            pool.add(text)
    return rows
