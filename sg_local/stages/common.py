"""What several stages share: the engine's settings, a run's chat template, answering inputs, scoring labels.

answer_inputs is used by `evaluate` and by `predict`, with the same calls in the same order, so both give the same
answers for the same file.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sg_local.gguf_header import read_model_header
from sg_local.llama.engine import Engine, open_engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.llama.scoring import label_logprobs
from sg_local.run import Run
from sg_local.selfguide.chat_template import VICUNA_TEMPLATE, ChatTemplate
from sg_local.selfguide.filters import Rules, form_fault, overlap_fault, text_fault
from sg_local.selfguide.prompts import Layout, answer_messages, layouts
from sg_local.settings import Settings
from sg_local.task import Example, Task

INPUTS_PER_CALL = 128
QUESTIONS_PER_CALL = 64
DEMONSTRATION = "demonstration-"  # before its number, the id of a demonstration among made rows
LABEL_SLACK_TOKENS = 8  # room beyond the longest label: an answer that goes on is no label


def open_with(
    settings: Settings, model_path: Path, adapter_path: Path | None = None, n_parallel: int | None = None
) -> AbstractContextManager[Engine]:
    """`open_engine` with the settings of a run."""
    return open_engine(
        model_path,
        n_ctx=settings.n_ctx,
        n_parallel=n_parallel or settings.n_parallel,
        n_threads=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        adapter_path=adapter_path,
    )


def template_source(run: Run) -> str:
    """The Jinja text of the run's chat format."""
    if run.model.prompt_format == "vicuna":
        return VICUNA_TEMPLATE
    return read_model_header(run.model.path).chat_template or VICUNA_TEMPLATE


def chat_template(run: Run, engine: Engine) -> ChatTemplate:
    """The run's chat template, with the token texts of the engine's model."""
    return engine.tokenizer.chat_template(template_source(run))


def demonstrations(run: Run) -> tuple[Example, ...]:
    """What the tuned model sees in its prompt, in training and when it is served."""
    return run.task.examples if run.settings.train_demonstrations else ()


def answer_fault(settings: Settings, rules: Rules, text: str, answer: str) -> str | None:
    """The reason to drop a free answer to an input; None for one that the demonstrations allow."""
    fault = text_fault(answer, rules.noise, rules.output_characters if settings.length_filter else None)
    if fault is None and settings.form_filter:
        return form_fault(answer, rules.output_form) or overlap_fault(answer, text, rules.overlap)
    return fault


def whole_calls(rows: list[dict[str, Any]], rows_per_call: int) -> list[dict[str, Any]]:
    """The rows of the calls that were written whole."""
    return rows[: len(rows) // rows_per_call * rows_per_call]


def counters(engine: Engine) -> dict[str, Any]:
    """The engine's numbers for the manifest."""
    found = engine.counters
    return {
        "tokens": {
            "prompt": found.prompt_tokens,
            "shared_prompt": found.shared_prompt_tokens,
            "generated": found.generated_tokens,
            "evaluated": found.evaluated_tokens,
        },
        **found.rates(),
        "engine_seconds": round(found.seconds, 1),
        "decode_seconds": round(found.decode_seconds, 1),
    }


def speed(engine: Engine) -> str:
    """The engine's numbers for the progress line."""
    found = engine.counters
    if not found.evaluated_tokens:
        return ""
    prompt, generated = found.rates().values()
    shared = found.shared_prompt_tokens / found.prompt_tokens if found.prompt_tokens else 0.0
    parts = [f"{prompt:.0f} prompt tok/s ({shared:.0%} shared)", f"{generated:.0f} generated tok/s"]
    if found.in_flight:
        parts.append(f"{found.in_flight} in flight")
    return ", ".join(parts)


def longest_answer(engine: Engine, labels: Sequence[str], max_new_tokens: int) -> int:
    """Tokens that an answer may have."""
    if not labels:
        return max_new_tokens
    longest = max(len(engine.tokenizer.encode_plain(label)) for label in labels)
    return min(max_new_tokens, longest + LABEL_SLACK_TOKENS)


def answer_inputs(
    engine: Engine,
    template: ChatTemplate,
    instruction: str,
    inputs: Sequence[str],
    *,
    demonstrations: Sequence[Example],
    max_new_tokens: int,
    on_finished: Callable[[int], None],
) -> list[Completion | None]:
    """Greedy answers by one call of the engine, one for each input; None where it does not fit the context.

    on_finished is told the number of inputs since its last call.
    """
    prompts = [
        tuple(engine.tokenizer.encode_prompt(template, answer_messages(instruction, text, demonstrations)))
        for text in inputs
    ]
    fitting = [index for index, prompt in enumerate(prompts) if engine.fits(len(prompt), max_new_tokens)]
    requests = [Request(prompts[index], max_new_tokens) for index in fitting]
    found = generate(engine, requests, lambda _request: on_finished(1))
    on_finished(len(inputs) - len(fitting))
    by_index = dict(zip(fitting, found, strict=True))
    return [by_index.get(index) for index in range(len(inputs))]


def score_labels(
    engine: Engine,
    template: ChatTemplate,
    task: Task,
    inputs: Sequence[str],
    on_finished: Callable[[int], None],
    layout: Layout | None = None,
) -> list[dict[str, float] | None]:
    """log p of each label, its end token included, after the demonstrations and each input, of which there is one.

    None where an input does not fit the context. on_finished is told the number of inputs since its last call.
    """
    place, shown = layout or layouts(task.examples, 1)[0]
    messages = [answer_messages(task.instruction, text, shown, place) for text in inputs]
    prompts = [tuple(engine.tokenizer.encode_prompt(template, item)) for item in messages]
    answers = [tuple(engine.tokenizer.encode_answer(template, messages[0], label)) for label in task.labels]
    room = max(map(len, answers))
    fitting = [index for index, prompt in enumerate(prompts) if engine.fits(len(prompt), room)]
    found = label_logprobs(
        engine, [prompts[index] for index in fitting], answers, lambda _prompt: on_finished(1)
    )
    on_finished(len(inputs) - len(fitting))
    scores = {
        index: dict(zip(task.labels, (round(value, 5) for value in own), strict=True))
        for index, own in zip(fitting, found, strict=True)
    }
    return [scores.get(index) for index in range(len(inputs))]


def likeliest(scores: dict[str, float]) -> str:
    """The label with the highest log-probability, the first of equal ones."""
    return max(scores, key=lambda label: scores[label])
