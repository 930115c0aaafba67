"""What is said to the model: the two prompts of SELF-GUIDE, as chat messages.

answering (annotate, train, evaluate, predict)   [{"role": "system", "content": "<instruction>"},
                                                  {"role": "user", "content": "<input>"}]
    with demonstrations                          user/assistant turns between them; a template without a system
                                                 turn gets the instruction in the first turn of the user
inventing inputs (generate)                      a request for a list of examples, and the list's beginning as
                                                 the assistant's own words; the model writes the next input

The paper asks for one new input in words ("as an InputGenerator"). A small student copies its demonstrations when
asked so, but continues a list well: for labels, the label first and then the input (Self-Instruct, arXiv
2212.10560, section 2.2, "output-first").
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from sg_local.selfguide.chat_template import Message
from sg_local.task import Example, Task

# Where the instruction stands: as a system message, above the first input, or above every input.
INSTRUCTION_PLACES = ("system", "first_turn", "every_turn")


class Layout(NamedTuple):
    """One way to put the same question: where the instruction stands, and in which order the demonstrations come."""

    place: str  # one of INSTRUCTION_PLACES
    demonstrations: tuple[Example, ...]


def layouts(examples: Sequence[Example], n_layouts: int) -> list[Layout]:
    """Different ways to put a question, n_layouts of them, or as many as there are.

    The first is the prompt that answers are sampled and evaluated with. From one to the next the instruction changes
    its place, and the demonstrations rotate: what comes last weighs most (arXiv 2104.08786).
    """
    n_places = len(INSTRUCTION_PLACES)
    found = []
    for number in range(n_layouts):
        lap, place = divmod(number, n_places)
        turn = (lap + place) % len(examples)
        found.append(Layout(INSTRUCTION_PLACES[place], (*examples[turn:], *examples[:turn])))
    return list(dict.fromkeys(found))


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


def turns_request(task: Task, label: str | None, rng: random.Random) -> tuple[list[Message], str]:
    """As `input_request`; the demonstrations are earlier turns in which the user asks and the assistant invents.

    They are shuffled by `rng`; those of the label come last, where they weigh most.
    """
    request = "Write a new example."
    messages: list[Message] = [{"role": "system", "content": task.instruction}]
    shown = rng.sample(task.examples, len(task.examples))
    for example in sorted(shown, key=lambda example: example.output == label):
        asked = request if label is None else f"Write a new example of: {example.output}"
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": example.input})
    messages.append(
        {"role": "user", "content": request if label is None else f"Write a new example of: {label}"}
    )
    return messages, ""


def input_request(task: Task, label: str | None, rng: random.Random) -> tuple[list[Message], str]:
    """Messages, and the beginning of the assistant's turn, after which the model writes one new input.

    The demonstrations are shuffled by `rng`. For classification `label` is what the input is made for.
    """
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
    """Where a made input ends: at the end of its line, or, where inputs have several, at the list's next heading.

    A heading that stands in a demonstration's input is part of the task and does not end one.
    """
    inputs = [example.input for example in task.examples]
    if not any("\n" in text for text in inputs):
        return ("\n",)
    headings = ("\nExample", "\nOutput:", "\nInput:")
    return tuple(heading for heading in headings if not any(heading in text for text in inputs))
