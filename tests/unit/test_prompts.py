"""The prompts: what is said to the model, to the letter."""

import random

import pytest

from sg_local.chat.template import VICUNA_TEMPLATE, ChatTemplate
from sg_local.selfguide.prompts import (
    N_POOR_INPUTS,
    answer_messages,
    input_request,
    input_stops,
    list_request,
    prompt_variants,
)
from sg_local.task import Example, Task, load_task, shipped_names

TASK = Task(
    "support-or-undermine",
    "Does the perspective support or undermine the claim?",
    (Example("claim: A. perspective: B.", "support"), Example("claim: C. perspective: D.", "undermine")),
    ("support", "undermine"),
)
GENERATION = Task("shorten", "Shorten the sentence.", (Example("It is a very long day.", "A long day."),))


def test_an_answer_is_asked_for_with_instruction_and_input_alone():
    assert answer_messages("Sort this.", "My parcel is lost.") == [
        {"role": "system", "content": "Sort this."},
        {"role": "user", "content": "My parcel is lost."},
    ]


def test_demonstrations_are_earlier_turns_and_the_instruction_stands_once():
    assert answer_messages(TASK.instruction, "claim: E. perspective: F.", TASK.examples) == [
        {"role": "system", "content": TASK.instruction},
        {"role": "user", "content": "claim: A. perspective: B."},
        {"role": "assistant", "content": "support"},
        {"role": "user", "content": "claim: C. perspective: D."},
        {"role": "assistant", "content": "undermine"},
        {"role": "user", "content": "claim: E. perspective: F."},
    ]


def test_prompt_variants_move_the_instruction_and_rotate_the_demonstrations():
    first, second, third, fourth = prompt_variants(TASK.examples, 4)
    assert first == ("system", TASK.examples)  # the prompt that is evaluated
    assert second == ("first_turn", TASK.examples[::-1])
    assert third == ("every_turn", TASK.examples)
    assert fourth == ("system", TASK.examples[::-1])
    three = (*TASK.examples, Example("claim: G. perspective: H.", "support"))
    assert len(set(prompt_variants(three, 9))) == 9
    assert len(prompt_variants(TASK.examples[:1], 9)) == 3  # there are no more


@pytest.mark.parametrize(("place", "n_times"), [("system", 1), ("first_turn", 1), ("every_turn", 3)])
def test_the_instruction_stands_where_the_variant_says(place: str, n_times: int):
    messages = answer_messages(TASK.instruction, "claim: E.", TASK.examples, place)
    texts = [message["content"] for message in messages]
    assert sum(TASK.instruction in text for text in texts) == n_times
    assert texts[0].startswith(TASK.instruction)
    assert (messages[0]["role"] == "system") == (place == "system")
    assert texts[-1] == (f"{TASK.instruction}\n\nclaim: E." if place == "every_turn" else "claim: E.")


def test_a_label_comes_before_its_input():
    messages, begun = list_request(TASK, "undermine", random.Random(0))
    assert messages == [
        {"role": "user", "content": f"{TASK.instruction}\n\nWrite a list of varied examples of this task."}
    ]
    blocks = begun.split("\n\n")
    assert sorted(block.split("\n", 1)[1] for block in blocks[:2]) == [
        "Output: support\nInput: claim: A. perspective: B.",
        "Output: undermine\nInput: claim: C. perspective: D.",
    ]
    assert [block.split("\n", 1)[0] for block in blocks] == ["Example 1", "Example 2", "Example 3"]
    assert blocks[2] == "Example 3\nOutput: undermine\nInput:"


def test_in_turns_the_demonstrations_of_the_label_come_last():
    messages, begun = input_request("turns", TASK, "support", random.Random(0))
    assert messages == [
        {"role": "system", "content": TASK.instruction},
        {"role": "user", "content": "Write a new example of: undermine"},
        {"role": "assistant", "content": "claim: C. perspective: D."},
        {"role": "user", "content": "Write a new example of: support"},
        {"role": "assistant", "content": "claim: A. perspective: B."},
        {"role": "user", "content": "Write a new example of: support"},
    ]
    assert begun == ""
    messages, _ = input_request("turns", GENERATION, None, random.Random(0))
    assert [message["content"] for message in messages[1:]] == [
        "Write a new example.",
        "It is a very long day.",
        "Write a new example.",
    ]


def test_the_papers_request_shows_inputs_alone_and_names_the_label():
    earlier = [f"claim: made {number}." for number in range(30)]
    [message], begun = input_request("meta", TASK, "undermine", random.Random(3), earlier)
    said = message["content"]
    assert begun == ""
    assert said.index(TASK.instruction) < said.index("claim: A.") < said.index("low quality")
    assert "support\n" not in said  # no demonstration's answer is shown
    assert "whose output is: undermine" in said
    assert 1 <= sum(text in said for text in earlier) <= N_POOR_INPUTS
    [first], _ = input_request("meta", GENERATION, None, random.Random(3))
    assert "low quality" not in first["content"]
    assert "output" not in first["content"]


def test_earlier_inputs_are_drawn_by_the_seed():
    earlier = [f"claim: made {number}." for number in range(30)]

    def said(seed: int) -> str:
        return input_request("meta", TASK, "support", random.Random(seed), earlier)[0][0]["content"]

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(10)}) == 10


def test_without_labels_the_input_comes_first():
    _, begun = list_request(GENERATION, None, random.Random(0))
    assert begun == "Example 1\nInput: It is a very long day.\nOutput: A long day.\n\nExample 2\nInput:"


def test_chance_is_an_argument_and_shuffles_the_demonstrations():
    def order(seed: int) -> str:
        return list_request(TASK, "support", random.Random(seed))[1]

    assert order(7) == order(7)
    # Two orders, 40 seeds: all alike by chance once in 2**39.
    assert len({order(seed) for seed in range(40)}) == 2
    assert [example.output for example in TASK.examples] == ["support", "undermine"]


@pytest.mark.parametrize("demonstrations", [(), TASK.examples])
@pytest.mark.parametrize("label", ["support", None])
def test_no_prompt_ends_with_the_word_none(demonstrations: tuple[Example, ...], label: str | None):
    # The reference formats a missing few-shot prompt: every annotate, train and eval prompt ends "…yNone".
    template = ChatTemplate(VICUNA_TEMPLATE, "<s>", "</s>")
    messages = answer_messages(TASK.instruction, "claim: E. perspective: F.", demonstrations)
    prompt = "".join(piece.text for piece in template.render(messages, add_generation_prompt=True))
    assert prompt.endswith("claim: E. perspective: F. ASSISTANT:")
    requests, begun = list_request(TASK, label, random.Random(1))
    assert "None" not in prompt + requests[0]["content"] + begun


def test_generation_tasks_are_not_asked_for_labels():
    # The reference ignores is_generation: every task gets the "help annotate label" prompt.
    messages = answer_messages(GENERATION.instruction, "It is late.", GENERATION.examples)
    requests, begun = list_request(GENERATION, None, random.Random(0))
    said = " ".join([*(message["content"] for message in messages), requests[0]["content"], begun])
    assert "label" not in said.lower()
    assert "annotate" not in said.lower()


def test_an_input_of_one_line_ends_with_it():
    assert input_stops(TASK) == ("\n",)
    assert input_stops(GENERATION) == ("\n",)


def test_an_input_of_several_lines_ends_at_the_lists_next_heading():
    task = Task("t", "i", (Example("one\ntwo", "x"), Example("one", "y")))
    assert set(input_stops(task)) == {"\nOutput:", "\nExample", "\nInput:"}


def test_a_heading_that_belongs_to_the_task_does_not_end_an_input():
    task = Task("t", "Correct the program.", (Example("print(2)\nOutput: 3", "print(3)"),))
    assert input_stops(task) == ("\nExample", "\nInput:")


@pytest.mark.parametrize("name", shipped_names())
def test_the_begun_list_holds_a_shipped_tasks_demonstrations_whole(name: str):
    task = load_task(name)
    label = task.labels[0] if task.labels else None
    _, begun = list_request(task, label, random.Random(0))
    for example in task.examples:
        assert f"Input: {example.input}\n" in begun
        assert f"Output: {example.output}\n" in begun
    # A stop in the middle of a demonstration would cut off what the model writes in its likeness.
    assert not any(stop in example.input for stop in input_stops(task) for example in task.examples)
