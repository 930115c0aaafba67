"""The prompts of SELF-GUIDE as chat messages: one for answers, one for inputs.

answering (annotate, train, evaluate, predict)   [{"role": "system", "content": "<instruction>"},
                                                  {"role": "user", "content": "<input>"}]
    with demonstrations                          user/assistant turns between them; a template without a system
                                                 turn gets the instruction in the first turn of the user
making inputs (generate)      meta     the paper's: "as an InputGenerator", with inputs to equal and to surpass
                              list     a list of examples, which the assistant has begun; with labels, the label
                                       first and then the input (Self-Instruct, arXiv 2212.10560, section 2.2,
                                       "output-first")
                              turns    user/assistant turns: "Write a new example of: <label>", "<input>"

trials.py measures which of the three a base follows. With the paper's request a small model copies its examples; with
turns it keeps to the label best.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from sg_local.chat.template import Message
from sg_local.task import Example, Task

INPUT_PROMPTS = ("meta", "turns", "list")
N_POOR_INPUTS = 10  # at most (SELF-GUIDE, section 3.1)
# The place of the instruction: as a system message, above the first input, or above every input.
INSTRUCTION_PLACES = ("system", "first_turn", "every_turn")


class PromptVariant(NamedTuple):
    """One way to ask for an answer: the place of the instruction, and the order of the demonstrations."""

    place: str  # one of INSTRUCTION_PLACES
    demonstrations: tuple[Example, ...]


def prompt_variants(examples: Sequence[Example], n_variants: int) -> list[PromptVariant]:
    """n_variants ways to ask for an answer, or as many as there are.

    The first is the prompt for sampled answers and for the evaluation. From one to the next, the place of the
    instruction changes and the demonstrations rotate, since the last one weighs most (arXiv 2104.08786).
    """
    n_places = len(INSTRUCTION_PLACES)
    variants = []
    for number in range(n_variants):
        lap, place = divmod(number, n_places)
        turn = (lap + place) % len(examples)
        variants.append(PromptVariant(INSTRUCTION_PLACES[place], (*examples[turn:], *examples[:turn])))
    return list(dict.fromkeys(variants))


def answer_messages(
    instruction: str, text: str, demonstrations: Sequence[Example] = (), place: str = INSTRUCTION_PLACES[0]
) -> list[Message]:
    """The conversation whose next turn is the answer to `text`."""
    messages: list[Message] = []
    for example in demonstrations:
        messages.append({"role": "user", "content": example.input})
        messages.append({"role": "assistant", "content": example.output})
    messages.append({"role": "user", "content": text})
    if place == "system":
        return [{"role": "system", "content": instruction}, *messages]
    for message in [message for message in messages if message["role"] == "user"]:
        message["content"] = f"{instruction}\n\n{message['content']}"
        if place == "first_turn":
            break
    return messages


def input_request(
    style: str, task: Task, label: str | None, rng: random.Random, earlier: Sequence[str] = ()
) -> tuple[list[Message], str]:
    """Messages, and the beginning of the assistant's turn ("" for none), after which the model writes one input.

    style is one of INPUT_PROMPTS; `label` is the made-for label, or None. `rng` shuffles the demonstrations; "meta"
    also draws from `earlier`, the inputs made so far.
    """
    if style == "turns":
        return turns_request(task, label, rng), ""
    if style == "list":
        return list_request(task, label, rng)
    return meta_request(task, label, rng, earlier), ""


def turns_request(task: Task, label: str | None, rng: random.Random) -> list[Message]:
    """The demonstrations as turns: the user asks for an example, and the assistant writes its input.

    Those with the wanted label come last, where they weigh most.
    """
    messages: list[Message] = [{"role": "system", "content": task.instruction}]
    shuffled = rng.sample(task.examples, len(task.examples))
    for example in sorted(shuffled, key=lambda example: example.output == label):
        messages.append({"role": "user", "content": _one_more(None if label is None else example.output)})
        messages.append({"role": "assistant", "content": example.input})
    messages.append({"role": "user", "content": _one_more(label)})
    return messages


def _one_more(label: str | None) -> str:
    return "Write a new example." if label is None else f"Write a new example of: {label}"


def meta_request(task: Task, label: str | None, rng: random.Random, earlier: Sequence[str]) -> list[Message]:
    """The paper's request: the inputs of the demonstrations as good ones, up to ten made inputs as poor ones."""
    good = rng.sample(task.examples, len(task.examples))
    poor = rng.sample(earlier, min(len(earlier), rng.randint(1, N_POOR_INPUTS)))
    parts = [
        "You are an InputGenerator: you are given the instruction of a task and inputs for it, and you write one "
        "new input.",
        f"Instruction: {task.instruction}",
        "Inputs of high quality:",
        *(example.input for example in good),
    ]
    if poor:
        parts += ["Inputs of low quality, which yours should surpass:", *poor]
    wanted = "" if label is None else f" whose output is: {label}"
    parts.append(f"Write one new input{wanted}. Write nothing but the input, and copy none of those above.")
    return [{"role": "user", "content": "\n\n".join(parts)}]


def list_request(task: Task, label: str | None, rng: random.Random) -> tuple[list[Message], str]:
    """A request for a list, and the beginning of the assistant's list, with the demonstrations."""
    examples = []
    for number, example in enumerate(rng.sample(task.examples, len(task.examples)), 1):
        lines = [f"Input: {example.input}", f"Output: {example.output}"]
        if label is not None:
            lines.reverse()
        examples.append("\n".join([f"Example {number}", *lines, "", ""]))
    begun = "Input:" if label is None else f"Output: {label}\nInput:"
    request = f"{task.instruction}\n\nWrite a list of varied examples of this task."
    return [{"role": "user", "content": request}], f"{''.join(examples)}Example {len(examples) + 1}\n{begun}"


def input_stops(task: Task) -> tuple[str, ...]:
    """Texts that end a made input: the end of the line or, if examples have several lines, a heading of the list.

    A heading that occurs in the input of an example is part of the task and ends no input.
    """
    inputs = [example.input for example in task.examples]
    if not any("\n" in text for text in inputs):
        return ("\n",)
    headings = ("\nExample", "\nOutput:", "\nInput:")
    return tuple(heading for heading in headings if not any(heading in text for text in inputs))
