"""Asks the engine for a task: answers to inputs, and label scores, with the settings of a run.

    answer_inputs(engine, template, "Sort this message.", ["My parcel is late."], ...)  -> [Completion("delivery")]
    score_labels(engine, template, task, ["My parcel is late."], ...)    -> [{"delivery": -0.31, "refund": -2.9}]

`evaluate` and `predict` call answer_inputs in the same order, so both give the same answers for the same file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sg_local.chat.template import ChatTemplate, Message
from sg_local.llama.engine import Engine, open_engine
from sg_local.llama.generation import Completion, Request, completions
from sg_local.llama.scoring import label_logprobs
from sg_local.llama.tokens import Tokenizer
from sg_local.llama.tree import TokenIds
from sg_local.progress import working
from sg_local.selfguide.prompts import INSTRUCTION_PLACES, PromptVariant, answer_messages
from sg_local.settings import Settings
from sg_local.task import Example, Task

INPUTS_PER_CALL = 128
QUESTIONS_PER_CALL = 64
MIN_ROOM_TOKENS = 2  # for an input and its answer: less is no room for any
LABEL_SLACK_TOKENS = 8  # more than the longest label has: an answer that goes on is no label


@contextmanager
def open_with(
    settings: Settings,
    model_path: Path,
    adapter_path: Path | None = None,
    n_parallel: int | None = None,
    *,
    is_repacked: bool = True,
) -> Iterator[Engine]:
    """`open_engine` with the settings of a run."""
    with ExitStack() as stack:
        with working(f"loading {model_path.name}", is_short=True):
            engine = stack.enter_context(
                open_engine(
                    model_path,
                    n_ctx=settings.n_ctx,
                    n_parallel=n_parallel or settings.n_parallel,
                    n_threads=settings.n_threads,
                    n_gpu_layers=settings.n_gpu_layers,
                    adapter_path=adapter_path,
                    is_repacked=is_repacked,
                )
            )
        yield engine


def counters(engine: Engine) -> dict[str, object]:
    """The engine's numbers for the manifest."""
    totals = engine.counters
    return {
        "tokens": {
            "prompt": totals.prompt_tokens,
            "shared_prompt": totals.shared_prompt_tokens,
            "generated": totals.generated_tokens,
            "evaluated": totals.evaluated_tokens,
        },
        **totals.rates(),
        "engine_seconds": round(totals.seconds, 1),
        "decode_seconds": round(totals.decode_seconds, 1),
    }


def speed(engine: Engine) -> str:
    """The engine's numbers for the progress line."""
    totals = engine.counters
    if not totals.evaluated_tokens:
        return ""
    prompt, generated = totals.rates().values()
    shared = totals.shared_prompt_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
    parts = [f"{prompt:.0f} prompt tok/s ({shared:.0%} shared)", f"{generated:.0f} generated tok/s"]
    if totals.in_flight:
        parts.append(f"{totals.in_flight} in flight")
    return ", ".join(parts)


def longest_answer(tokenizer: Tokenizer, labels: Sequence[str], max_new_tokens: int) -> int:
    """The most tokens that an answer may have."""
    if not labels:
        return max_new_tokens
    longest = max(len(tokenizer.encode_plain(label)) for label in labels)
    return min(max_new_tokens, longest + LABEL_SLACK_TOKENS)


def has_room(
    engine: Engine,
    template: ChatTemplate,
    instruction: str,
    demonstrations: Sequence[Example],
    text: str = "",
) -> bool:
    """Whether template, instruction and examples leave room for the input `text`, or any input, and its answer."""
    messages = answer_messages(instruction, text, demonstrations)
    return prompts_of(engine, template, [messages], MIN_ROOM_TOKENS) != [None]


def prompts_of(
    engine: Engine, template: ChatTemplate, conversations: Sequence[list[Message]], room: int
) -> list[TokenIds | None]:
    """The prompts of conversations; None for one that does not fit the context with `room` tokens after it."""
    prompts: list[TokenIds | None] = []
    for messages in conversations:
        prompt = None
        if not engine.is_over_context("".join(message["content"].strip() for message in messages)):
            prompt = tuple(engine.tokenizer.encode_prompt(template, messages))
        prompts.append(prompt if prompt is not None and engine.fits(len(prompt), room) else None)
    return prompts


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
    """A greedy answer to each input, by one call of the engine; None if the input does not fit the context.

    on_finished gets the number of inputs finished since its last call.
    """
    by_index: dict[int, Completion | None] = {}
    for index, answer in finished_answers(
        engine, template, instruction, inputs, demonstrations=demonstrations, max_new_tokens=max_new_tokens
    ):
        by_index[index] = answer
        on_finished(1)
    return [by_index[index] for index in range(len(inputs))]


def finished_answers(
    engine: Engine,
    template: ChatTemplate,
    instruction: str,
    inputs: Sequence[str],
    *,
    demonstrations: Sequence[Example],
    max_new_tokens: int,
) -> Iterator[tuple[int, Completion | None]]:
    """The same one by one, each with the index of its input, as soon as it is there."""
    conversations = [answer_messages(instruction, text, demonstrations) for text in inputs]
    prompts = prompts_of(engine, template, conversations, max_new_tokens)
    requests = {
        index: Request(prompt, max_new_tokens) for index, prompt in enumerate(prompts) if prompt is not None
    }
    yield from ((index, None) for index, prompt in enumerate(prompts) if prompt is None)
    indices = [*requests]
    for number, completion in completions(engine, [*requests.values()]):
        yield indices[number], completion


def score_labels(
    engine: Engine,
    template: ChatTemplate,
    task: Task,
    inputs: Sequence[str],
    on_finished: Callable[[int], None],
    variant: PromptVariant | None = None,
) -> list[dict[str, float] | None]:
    """log p of each label with its end token, after the examples and each of at least one input.

    None if an input does not fit the context. on_finished gets the number of inputs finished since its last call.
    """
    place, demonstrations = variant or PromptVariant(INSTRUCTION_PLACES[0], task.examples)
    messages = [answer_messages(task.instruction, text, demonstrations, place) for text in inputs]
    answers = [tuple(engine.tokenizer.encode_answer(template, messages[0], label)) for label in task.labels]
    room = max(map(len, answers))
    prompts = prompts_of(engine, template, messages, room)
    fitting = {index: prompt for index, prompt in enumerate(prompts) if prompt is not None}
    logprobs = label_logprobs(engine, [*fitting.values()], answers, lambda _prompt: on_finished(1))
    on_finished(len(inputs) - len(fitting))
    scores = {
        index: dict(zip(task.labels, (round(value, 5) for value in row), strict=True))
        for index, row in zip(fitting, logprobs, strict=True)
    }
    return [scores.get(index) for index in range(len(inputs))]


def likeliest(scores: dict[str, float]) -> str:
    """The label with the highest log-probability, the first of equal ones."""
    return max(scores, key=lambda label: scores[label])
