"""The chat template that a tuned model carries: kinds of templates, as other programs call them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from sg_local.chat.served import require_served, served_template
from sg_local.chat.template import VICUNA_TEMPLATE, ChatTemplate, Message
from sg_local.errors import InputError
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import Example

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: thinks unless it is told not to.
THINKS = CHATML.replace(
    "assistant\n' }}",
    "assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
# As DeepSeek-R1's distills: always opens a block of thinking; its own turns have none.
OPENS_THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
# As gpt-oss: the generation prompt leaves it to the model whether it thinks or answers.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DATED = (
    "{{ bos_token }}{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}"
    "{% set today = '26 Jul 2024' %}{% endif %}Today: {{ today }}\n" + CHATML
)
# As Llama 3's: llama.cpp sets the variable to today's date.
DATED_BY_VARIABLE = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}" + (
    "Today: {{ date_string }}\n" + CHATML
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] | trim }}</>\n"
    "{% endfor %}{% if add_generation_prompt %}<model>\n{% endif %}"
)
# As Mistral Nemo's.
LAST_TURN = (
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST]' }}{% if loop.last and system is defined %}"
    "{{ system + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}{% else %}{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
TOOLS = (
    "{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}"
    + CHATML
)
KINDS = {
    "chatml": CHATML,
    "thinks": THINKS,
    "opens-thinking": OPENS_THINKING,
    "channels": CHANNELS,
    "dated": DATED,
    "dated-by-variable": DATED_BY_VARIABLE,
    "no-system": NO_SYSTEM,
    "last-turn": LAST_TURN,
    "tools": TOOLS,
    "newlines": f"\n  {CHATML}\n",
    "vicuna": VICUNA_TEMPLATE,
}
SHOWN = (Example("a {{ b }}", "yes"), Example("it's \\ that", "{% no %}"))
AWKWARD = 'It\'s "x", {{ y }}, {% z %}, {# c #}, C:\\new\\table\n\ttab, 世界 \U0001f600 </think>x'


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def trained(template: ChatTemplate, instruction: str, shown: tuple[Example, ...] = ()) -> str:
    pieces = template.render(answer_messages(instruction, "my parcel", shown), add_generation_prompt=True)
    return "".join(piece.text for piece in pieces)


def as_llama_cpp_python(source: str, messages: list[Message], **variables: object) -> str:
    return Jinja2ChatFormatter(source, "</s>", "<s>")(messages=messages, **variables).prompt  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "shown"),
    [*((kind, SHOWN) for kind in KINDS), ("thinks", ()), ("no-system", ()), ("last-turn", ())],
)
def test_for_a_message_alone_it_writes_the_trained_prompt(kind: str, shown: tuple[Example, ...]):
    template = template_of(KINDS[kind])
    source = require_served(template, AWKWARD, shown)
    expected = trained(template, AWKWARD, shown)
    assert AWKWARD in expected
    assert as_llama_cpp_python(source, [user("my parcel")]) == expected
    assert (
        as_llama_cpp_python(source, [user("my parcel")], enable_thinking=True, date_string="today")
        == expected
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_message_takes_the_place_of_the_instruction(kind: str):
    template = template_of(KINDS[kind])
    source = require_served(template, AWKWARD, SHOWN)
    sent: list[Message] = [{"role": "system", "content": "Translate."}, user("my parcel")]
    assert as_llama_cpp_python(source, sent) == trained(template, "Translate.", SHOWN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("system", ""),
        ("system", " \n"),
        ("developer", ""),
        ("system", None),
        ("system", [{"type": "text", "text": ""}]),  # as llama.cpp writes it for some templates
    ],
)
def test_an_empty_system_message_is_none(kind: str, role: str, content: object):
    """Programs with a field for the system prompt send it empty where the user leaves it empty."""
    template = template_of(KINDS[kind])
    source = require_served(template, AWKWARD, SHOWN)
    sent: list[Any] = [{"role": role, "content": content}, user("my parcel")]
    assert as_llama_cpp_python(source, sent) == trained(template, AWKWARD, SHOWN)


def test_earlier_turns_pass_as_the_base_writes_them():
    source = require_served(template_of(CHATML), "Sort it.")
    sent = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert as_llama_cpp_python(source, sent) == as_llama_cpp_python(
        CHATML, [{"role": "system", "content": "Sort it."}, *sent]
    )


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("chatml", "<|im_start|>assistant\n"),
        ("thinks", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("opens-thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("channels", "<|start|>assistant<|channel|>final<|message|>"),
        ("vicuna", " ASSISTANT:"),  # a space before the answer is the answer's
    ],
)
def test_the_answer_comes_next_and_no_thinking(kind: str, end: str):
    assert trained(template_of(KINDS[kind]), "Sort it.").endswith(f"my parcel{_after(kind)}{end}")


def _after(kind: str) -> str:
    return {"channels": "<|end|>", "vicuna": ""}.get(kind, "<|im_end|>\n")


def test_an_instruction_in_the_last_turn_stays_there():
    template = template_of(LAST_TURN)
    assert template.takes_system
    assert trained(template, "Sort it.") == "<s>[INST]Sort it.\n\nmy parcel[/INST]"
    shown = trained(template, "Sort it.", SHOWN[:1])
    assert shown == "<s>[INST]a {{ b }}[/INST]yes</s>[INST]Sort it.\n\nmy parcel[/INST]"


def test_an_instruction_in_the_last_turn_stays_there_with_an_answer():
    messages = answer_messages("Sort it.", "my parcel", SHOWN[:1])
    pieces = template_of(LAST_TURN).render(
        [*messages, {"role": "assistant", "content": "delivery"}], add_generation_prompt=False
    )
    text = "".join(piece.text for piece in pieces)
    assert text == f"{trained(template_of(LAST_TURN), 'Sort it.', SHOWN[:1])}delivery</s>"


def test_a_system_message_that_only_short_conversations_show_is_put_into_the_first_turn():
    template = template_of(
        "{% for m in messages %}{% if m.role != 'system' or messages | length == 2 %}<{{ m.role }}>{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    assert not template.takes_system
    assert trained(template, "Sort it.", SHOWN[:1]).startswith(
        "<user>Sort it.\n\na {{ b }}<assistant>yes<user>"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML + "{{ strftime_now('%d' + '%m') }}", "as transformers calls it, it writes '.*0301'"),
        ("{{ 'tools' if functions is defined }}" + CHATML, "as llama-cpp-python calls it"),
        (CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"), "in the place of"),
        (CHATML.replace("m['content']", "m['content'][:40]"), "in the place of"),
    ],
)
def test_a_template_that_would_write_another_prompt_elsewhere_is_refused(source: str, reason: str):
    with pytest.raises(InputError, match=reason) as caught:
        require_served(template_of(source), f"{AWKWARD} and more, to be longer than forty characters")
    assert "\n" not in str(caught.value)


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match="surrogate"):
        require_served(template_of(CHATML), "a \ud800")


def test_bos_is_written_for_a_tokenizer_that_adds_it():
    source = require_served(template_of(CHATML), "Sort it.", writes_bos=True)
    assert as_llama_cpp_python(source, [user("my parcel")]) == "<s>" + trained(
        template_of(CHATML), "Sort it."
    )


@settings(max_examples=60)
@given(st.text("{}%#'\"\\ \n\tab-\u2028\u3000é", min_size=1).filter(str.strip))
def test_any_instruction_is_a_string_in_jinja(instruction: str):
    source = served_template(template_of(CHATML), instruction)
    expected = f"<|im_start|>system\n{instruction.strip()}<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
    assert as_llama_cpp_python(source, [user("x")]) == f"{expected}<|im_start|>assistant\n"
