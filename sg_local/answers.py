"""Answers by any GGUF model, with or without an adapter, for inputs from Python or from a file.

    predict(["My parcel is late."], model="runs/support-inbox/model.gguf")    ["delivery"]

read_inputs    {"input": "My parcel is late."}    or a plain line of text
answer_line    {"input": "My parcel is late.", "output": "delivery"}

A tuned GGUF carries its task (`sg_local.task`), so its prompt is the one it was trained on; any other model gets the
task's demonstrations.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sg_local import child_process
from sg_local.chat.template import VICUNA_TEMPLATE, without_template
from sg_local.errors import InputError
from sg_local.escape import json_text, one_line
from sg_local.files import Faults, read_text
from sg_local.gguf_header import GgufHeader, read_header, read_model_header
from sg_local.models import find_by_path, resolve_model
from sg_local.progress import progress, say
from sg_local.runs.given import check_task
from sg_local.settings import Settings
from sg_local.task import CarriedTask, Example, Task, carried_task, load_task

MAX_INPUT_BYTES = 256 << 20


@dataclass(frozen=True)
class _Served:
    """What is asked, and how: as the tuned GGUF says that it was trained."""

    task: Task
    max_new_tokens: int
    prompt_format: str


def predict(
    inputs: Iterable[str],
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    task: str | Path | Task | None = None,
    settings: Settings | None = None,
    prompt_format: str | None = None,
    max_new_tokens: int | None = None,
) -> list[str | None]:
    """The model's answers, greedily, in the order of the inputs; None for an input that does not fit the context.

    model: a GGUF file, or a name of `sg-local models list`. adapter: a LoRA adapter (GGUF) for it. task: a task file,
    the name of a shipped one, or a Task; the task that the tuned GGUF was made for where none is given. settings: of
    the engine, n_ctx and the like. prompt_format, max_new_tokens: those of the tuned GGUF where none are given.

    Raises InputError for a wrong model, adapter, task or input.
    """
    return list(
        answers(
            inputs,
            model=model,
            adapter=adapter,
            task=task,
            settings=settings,
            prompt_format=prompt_format,
            max_new_tokens=max_new_tokens,
        )
    )


def answers(
    inputs: Iterable[str],
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    task: str | Path | Task | None = None,
    settings: Settings | None = None,
    prompt_format: str | None = None,
    max_new_tokens: int | None = None,
    shows_progress: bool = True,
) -> Iterator[str | None]:
    """The same one by one, as soon as they are there."""
    texts = _checked(inputs)
    settings = settings or Settings()
    if prompt_format is not None:
        settings = replace(settings, prompt_format=prompt_format)  # which checks it
    if max_new_tokens is not None:
        settings = replace(settings, max_new_tokens=max_new_tokens)
    model_path = resolve_model(str(model))
    adapter_path = Path(adapter) if adapter else None
    header = read_model_header(model_path)
    carrier = header if adapter_path is None else _adapter_header(adapter_path, model_path)
    served = _served(carrier, task, settings)
    source = _template_source(prompt_format or served.prompt_format, header)
    yield from child_process.values_from_child(
        "predict",
        f"{__name__}.answers_of_engine",
        texts=texts,
        model=str(model_path),
        adapter=adapter_path and str(adapter_path),
        settings=settings.as_dict(),
        template_source=source,
        instruction=served.task.instruction,
        labels=served.task.labels,
        examples=[example.as_row() for example in served.task.examples],
        max_new_tokens=max_new_tokens or served.max_new_tokens,
        shows_progress=shows_progress,
    )


def answers_of_engine(
    texts: list[str],
    model: str,
    adapter: str | None,
    settings: dict[str, Any],
    template_source: str,
    instruction: str,
    labels: list[str],
    examples: list[dict[str, Any]],
    max_new_tokens: int,
    shows_progress: bool,
) -> Iterator[str | None]:
    """What llama.cpp answers, in the process that was made for it."""
    from sg_local.llama.asking import (
        INPUTS_PER_CALL,
        answer_inputs,
        has_room,
        longest_answer,
        open_with,
        speed,
    )

    with open_with(Settings(**settings), Path(model), Path(adapter) if adapter else None) as engine:
        template = engine.tokenizer.chat_template(template_source)
        shown = [Example(**example) for example in examples]
        if not has_room(engine, template, instruction, shown):
            yield from [None] * len(texts)  # and no tokens are made of any of them
            return
        limit = longest_answer(engine, labels, max_new_tokens)
        bar = progress("predict", len(texts), "inputs", detail=lambda: speed(engine))
        with bar if shows_progress else nullcontext(lambda _n_inputs: None) as advance:
            for start in range(0, len(texts), INPUTS_PER_CALL):
                completions = answer_inputs(
                    engine,
                    template,
                    instruction,
                    texts[start : start + INPUTS_PER_CALL],
                    demonstrations=shown,
                    max_new_tokens=limit,
                    on_finished=advance,
                )
                yield from (completion.text.strip() if completion else None for completion in completions)


@cache
def why_no_answer(model: str, settings: Settings) -> str:
    """Why an input got no answer, and what helps: more context only where the model has it."""
    header = read_model_header(resolve_model(model))
    ends_at = header.metadata.get(f"{header.architecture}.context_length")
    advice = "raise --n-ctx, or shorten the input"
    if isinstance(ends_at, int) and ends_at <= settings.n_ctx:
        advice = f"--n-ctx does not help, the model itself ends at {ends_at} tokens; shorten the input"
    return f"input and answer do not fit the context: {advice}"


def answer_line(text: str, answer: str | None, error: str | None = None) -> str:
    """A line of JSON for an input and its answer, or why there is none."""
    row = {"input": text, "output": answer}
    if error is not None:
        row["error"] = error
    return json_text(row)


def _checked(inputs: Iterable[str]) -> list[str]:
    """The inputs as they are asked. Raises InputError with the numbers of those that are no text."""
    faults = Faults()
    texts = []
    for number, item in enumerate(inputs, 1):
        try:
            texts.append(_text(item))
        except ValueError as error:
            faults.add(f"input {number}: {error}")
    faults.raise_any()
    return texts


def _text(value: object, fault: str = "there is no text") -> str:
    """An input without white space around it. Raises ValueError, with `fault` where there is none."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(fault)
    value.encode()  # fails where half of a surrogate pair stands alone
    return value.strip()


def _served(carrier: GgufHeader, task_source: str | Path | Task | None, settings: Settings) -> _Served:
    """How the model is asked: as it was tuned, for the given task."""
    told, reason = carrier.metadata.get("sg_local.task"), ""
    tuned: CarriedTask | None = None
    if isinstance(told, str):
        try:
            tuned = carried_task(told, carrier.path)
        except InputError as error:  # a stranger's file may say anything
            reason = "; ".join(str(error).splitlines())
    if task_source is None:
        if tuned is None:
            words = f" in a form that can be used ({reason})" if reason else ""
            raise InputError(
                f"{carrier.path} does not say what it was tuned for{words}: give the task with --task"
            )
        return _Served(tuned.task, tuned.max_new_tokens, tuned.prompt_format)
    task = load_task(task_source)
    if not task.examples:
        task, _ = check_task(task)
    if tuned is None:
        return _Served(task, settings.max_new_tokens, "auto")
    if task.name != tuned.task.name:
        say(f"predict: {carrier.path} was tuned for {tuned.task.name}, and is asked for {task.name}")
    if not tuned.task.examples:  # what was trained without demonstrations is served without
        task = replace(task, examples=())
    return _Served(task, tuned.max_new_tokens, tuned.prompt_format)


def _adapter_header(path: Path, model_path: Path) -> GgufHeader:
    from sg_local.gguf_io.fingerprint import fingerprint

    header = read_header(path)
    if header.kind != "adapter":
        if header.kind == "model":
            raise InputError(f"{path} is a model, not a LoRA adapter: give it with --model")
        raise InputError(
            f"{path} is a {header.kind!r:.40}, not a LoRA adapter: give a file that `sg-local export` wrote"
        )
    expected = header.metadata.get("sg_local.base_fingerprint")
    if expected is not None and expected != fingerprint(model_path):
        base = header.metadata.get("sg_local.base_sha256")
        raise InputError(
            f"{path} was made for another base than {model_path}: give the one it was tuned on"
            + (f", whose sha256 begins with {one_line(base[:16])}" if isinstance(base, str) else "")
        )
    return header


def _template_source(prompt_format: str, header: GgufHeader) -> str:
    if prompt_format == "auto":
        listed = find_by_path(header.path)
        prompt_format = listed.prompt_format if listed else "gguf"
    source = VICUNA_TEMPLATE if prompt_format == "vicuna" else header.chat_template
    if not source:
        raise InputError(f"{header.path} carries no chat template: {without_template(header)}")
    return source


def read_inputs(file: Path) -> list[str]:
    """The inputs of a file, or of standard input for "-". Raises InputError with the lines that are wrong."""
    if str(file) == "-":
        name, text = "standard input", _standard_input()
    else:
        name, text = str(file), read_text(file, MAX_INPUT_BYTES)
    # Not splitlines(), which would also break an input at a form feed or U+2028.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f'{name} holds no inputs: give JSON lines with "input", or one input a line')
    if file.suffix != ".jsonl" and not (str(file) == "-" and lines[0][1].startswith("{")):
        return [line for _, line in lines]
    faults = Faults()
    inputs = []
    for number, line in lines:
        try:
            row = json.loads(line)
            text_in = row.get("input") if isinstance(row, dict) else None
            inputs.append(_text(text_in, 'there is no text under "input"'))
        except (ValueError, RecursionError) as error:
            faults.add(f"{name}, line {number}: {error}")
    faults.raise_any()
    return inputs


def _standard_input() -> str:
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise InputError(f"standard input is over the limit of {MAX_INPUT_BYTES} bytes: split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 ({error.reason} at byte {error.start})") from error
