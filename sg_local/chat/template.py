"""Turns messages into prompt text, with the chat template in the GGUF.

    [{"role": "user", "content": "Sort this: my parcel is lost"}]
    -> [Piece("<|im_start|>user\\n", is_data=False), Piece("Sort this: my parcel is lost", is_data=True),
        Piece("<|im_end|>\\n<|im_start|>assistant\\n", is_data=False)]

A template is code that somebody else wrote. It never sees the contents of the messages, only a placeholder for each. So
the text of a task or a model can neither change the prompt's structure nor become a control token. The output of the
template depends only on the roles: it runs once for each sequence of roles, in a sandbox in a separate process with
limits (sandbox.py).

Sources: Hugging Face chat templates; Vicuna v1.1 as in FastChat's conversation.py, "vicuna_v1.1".
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sg_local.errors import InputError, SgLocalError
from sg_local.gguf_header import GgufHeader

MAX_TEMPLATE_CHARACTERS = 256 * 1024
# What it may write itself. Tools and dates are not asked for; the longest in use write some 2,000 characters.
MAX_OWN_CHARACTERS = 64 * 1024
MAX_OWN_CHARACTERS_PER_MESSAGE = 4 * 1024
# Of text, far more than any vocabulary packs into a token on average: what is longer is surely over the context.
MAX_CHARACTERS_PER_TOKEN = 16
# Of wall clock, for systems without a limit on CPU time; many, since a busy machine starts processes slowly.
MAX_SECONDS = 20

MAX_KEPT_OUTPUTS = 256

VICUNA_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Call(NamedTuple):
    """One call of a template: roles of the messages, and who calls it, of the PROGRAMS in sandbox.py."""

    roles: tuple[str, ...]
    add_generation_prompt: bool = True
    program: str = "sg-local"


# Conversations in which a template has to show a system message, and where it does so. One is not enough: there are
# templates that show it in the first turn alone, and those that put it into the last turn of the user.
_WITH_SYSTEM = tuple(("system", "user", *("assistant", "user") * n_turns) for n_turns in range(3))

_WITH_ANSWER = ("system", "user", "assistant")

# A question, with and without the generation prompt, and its answer.
_TURNS = (Call(("user",)), Call(("user",), False), Call(("user", "assistant"), False))

# A generation prompt that ends within a block of thinking, and how such blocks end: DeepSeek-R1, Seed-OSS, Magistral,
# Command R7B.
_OPENED_THINKING = re.compile(
    r"(?:<(?P<name>(?:\w+:)?think)>|(?P<mistral>\[THINK\])|<\|START_THINKING\|>)(\s*)$"
)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Private-use characters around the number of a message. No template writes them, and trimming, comparing or
# concatenating does not take them apart.
_PLACEHOLDER = re.compile("\ue0f0([0-9]+)\ue0f1")


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: text of the template, which may hold special tokens, or plain data."""

    text: str
    is_data: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, and the token texts that it may use."""

    source: str
    bos_token: str
    eos_token: str

    @property
    def takes_system(self) -> bool:
        """Whether the template writes a system message, in any turn, and not as an assistant's turn."""
        return _traits(self).takes_system

    @property
    def closing(self) -> str:
        """What follows the template's own generation prompt, so that an answer comes next and no thinking; often ""."""
        return _traits(self).closing

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> list[Piece]:
        """Renders messages into pieces whose texts, joined, are the prompt. The contents are stripped.

        If the template takes no system message, its text is put at the beginning of the user's first turn. A system
        message stands where the template writes it.

        Raises InputError if the template is broken, refuses these roles, exceeds a limit, or does not show each
        message once and in order.
        """
        if messages[0]["role"] == "system" and not self.takes_system:
            messages = without_system(messages)
        elif messages[0]["role"] == "system" and messages[-1]["role"] == "assistant":
            messages = messages if _traits(self).shows_system_with_answer else _system_in_last_turn(messages)
        roles = tuple(message["role"] for message in messages)
        texts, numbers = self.split_at_messages(roles, add_generation_prompt=add_generation_prompt)
        if not _shows_each_once(roles, numbers) or re.search("[\ue0f0\ue0f1]", "".join(texts)):
            raise InputError(
                f"the chat template does not show each of {len(messages)} messages once, whole and in order: "
                "use a GGUF with another template"
            )
        if add_generation_prompt:
            texts[-1] += self.closing
        pieces = [Piece(texts[0], is_data=False)]
        for number, text in zip(numbers, texts[1:], strict=True):
            pieces.append(Piece(messages[int(number)]["content"].strip(), is_data=True))
            pieces.append(Piece(text, is_data=False))
        return [piece for piece in pieces if piece.text]

    def split_at_messages(
        self, roles: tuple[str, ...], *, add_generation_prompt: bool
    ) -> tuple[list[str], list[str]]:
        """The texts that the template writes for these roles, and the numbers of the messages between them.

        Raises InputError if the template is broken, refuses these roles or exceeds a limit.
        """
        if len(self.source) > MAX_TEMPLATE_CHARACTERS:
            raise InputError(
                f"the chat template has {len(self.source)} characters, the limit is {MAX_TEMPLATE_CHARACTERS}: "
                "use a GGUF with a smaller template"
            )
        parts = _PLACEHOLDER.split(_run(self, roles, add_generation_prompt))
        return parts[::2], parts[1::2]


def placeholder(number: int) -> str:
    """What a template is shown in the place of a message's content."""
    return f"\ue0f0{number}\ue0f1"


def without_system(messages: list[Message]) -> list[Message]:
    """The system message as the beginning of the first turn."""
    system, first, *others = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]


def _system_in_last_turn(messages: list[Message]) -> list[Message]:
    """The system message as the beginning of the last question, where Mistral Nemo's template writes it."""
    system, *others, question, answer = messages
    return [*others, {**question, "content": f"{system['content']}\n\n{question['content']}"}, answer]


def require_template(template: ChatTemplate, n_ctx: int) -> None:
    """Checks before any work that a template renders one message, and leaves room for it in n_ctx tokens.

    Raises InputError as `ChatTemplate.render`, and where its own text is surely over the context.
    """
    pieces = template.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    n_characters = sum(len(piece.text) for piece in pieces)
    if n_characters > n_ctx * MAX_CHARACTERS_PER_TOKEN:
        raise InputError(
            f"the chat template alone writes {n_characters} characters, which do not fit a context of {n_ctx} tokens: "
            "use a GGUF with a shorter template"
        )


@lru_cache(maxsize=64)
def template_text(template: ChatTemplate) -> str:
    """What a template writes around a conversation with every role, its parts apart; "" where it refuses that."""
    roles = ("system", "user", "assistant", "user")
    messages: list[Message] = [{"role": role, "content": "x"} for role in roles]
    try:
        pieces = template.render(messages, add_generation_prompt=True)
    except InputError:
        return ""
    return "\0".join(piece.text for piece in pieces if not piece.is_data)


def header_template(header: GgufHeader) -> ChatTemplate | None:
    """The model's own chat template with the texts of its BOS and EOS; None where it carries none."""
    if not header.chat_template:
        return None
    return ChatTemplate(header.chat_template, _token_text(header, "bos"), _token_text(header, "eos"))


def _token_text(header: GgufHeader, name: str) -> str:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(tokens, list) or not isinstance(token, int) or not 0 <= token < len(tokens):
        return ""
    return str(tokens[token])


def may_be_vicuna(header: GgufHeader) -> bool:
    """Whether a model says that it is Vicuna, or only that it is some llama, as conversions of Vicuna do."""
    stated = _stated_names(header)
    return header.architecture == "llama" and (
        not stated or "llama" in stated or "vicuna" in stated or "vicuna" in header.path.name.lower()
    )


def _stated_names(header: GgufHeader) -> str:
    names = [header.metadata.get(key) for key in ("general.name", "general.basename", "general.finetune")]
    return " ".join(name for name in names if isinstance(name, str)).lower()


def without_template(header: GgufHeader) -> str:
    """What helps where a model carries no chat template: the format of Vicuna only where it may be a Vicuna."""
    if may_be_vicuna(header):
        if "vicuna" in _stated_names(header) or "vicuna" in header.path.name.lower():
            return "say `--prompt-format vicuna` if it is a Vicuna v1.1 model"
        return (
            "say `--prompt-format vicuna` if it is a Vicuna v1.1 model, "
            "else use a GGUF of it with tokenizer.chat_template"
        )
    return "use a GGUF of it that has tokenizer.chat_template: newer conversions do, of models that are made to chat"


def _shows_each_once(roles: tuple[str, ...], numbers: list[str]) -> bool:
    """Whether the messages are there once and in order. The system message may stand in a later turn."""
    expected = [str(number) for number in range(len(roles))]
    if roles[0] != "system":
        return numbers == expected
    return numbers.count("0") == 1 and [number for number in numbers if number != "0"] == expected[1:]


# What templates wrote, with placeholders for the messages: the same for every row.
_outputs: dict[tuple[ChatTemplate, Call], str] = {}


class _Traits(NamedTuple):
    """What is known of a template from its output for a few conversations, by one process."""

    takes_system: bool
    shows_system_with_answer: bool  # not so where it stands in a last turn of the user, and nowhere else
    closing: str


@lru_cache(maxsize=64)
def _traits(template: ChatTemplate) -> _Traits:
    # Cached here too, since _outputs keeps no errors, and a refusal is an error.
    calls = [*map(Call, _WITH_SYSTEM), Call(("assistant", "user")), Call(_WITH_ANSWER, False), *_TURNS]
    *shown, as_assistant, answered, asked, not_asked, turn = run_calls(template, calls)
    return _Traits(
        takes_system=_shows_system(shown, as_assistant),
        shows_system_with_answer=isinstance(answered, str)
        and _shows_each_once(_WITH_ANSWER, _PLACEHOLDER.findall(answered)),
        closing=_closing(asked, not_asked, turn),
    )


def _shows_system(shown: Sequence[str | InputError], as_assistant: str | InputError) -> bool:
    """Whether these conversations show a system message, and not as an assistant's turn."""
    for roles, text in zip(_WITH_SYSTEM, shown, strict=True):
        if isinstance(text, InputError) or not _shows_each_once(roles, _PLACEHOLDER.findall(text)):
            return False
    # A refusal of the assistant's turn: this template requires that roles take turns.
    return shown[0] != as_assistant


def _closing(asked: str | InputError, not_asked: str | InputError, answered: str | InputError) -> str:
    """What the template's own assistant's turn begins with after the generation prompt, or the end of its thinking."""
    if isinstance(asked, InputError) or asked == not_asked:  # no generation prompt at all
        return ""
    begun = _PLACEHOLDER.split(asked)[-1]
    parts = [""] if isinstance(answered, InputError) else _PLACEHOLDER.split(answered)
    turn = parts[2] if parts[1::2] == ["0", "1"] else ""
    if turn.startswith(begun) and turn[len(begun) :].strip():
        return turn[len(begun) :]
    opened = _OPENED_THINKING.search(begun)
    if not opened:
        return ""
    end = (
        f"</{opened['name']}>" if opened["name"] else "[/THINK]" if opened["mistral"] else "<|END_THINKING|>"
    )
    return f"\n{end}\n\n" if "\n" in opened[3] else end


def _run(template: ChatTemplate, roles: tuple[str, ...], add_generation_prompt: bool) -> str:
    """The output of the template, with placeholders for the messages."""
    call = Call(roles, add_generation_prompt)
    if (template, call) in _outputs:
        return _outputs[template, call]
    (text,) = run_calls(template, [call])
    if isinstance(text, InputError):
        raise text
    return text


def run_calls(
    template: ChatTemplate, calls: Sequence[Call], more_characters: int = 0
) -> list[str | InputError]:
    """The output of the template for each call, with placeholders for the messages, or the error that it made.

    more_characters: that it may write beyond the limit of a template's own. Raises InputError where the template
    made its process fail.
    """
    request = {
        "source": template.source,
        "bos_token": template.bos_token,
        "eos_token": template.eos_token,
        "calls": [
            {
                "messages": [
                    {"role": role, "content": placeholder(number)} for number, role in enumerate(call.roles)
                ],
                "add_generation_prompt": call.add_generation_prompt,
                "program": call.program,
                "max_characters": MAX_OWN_CHARACTERS
                + len(call.roles) * MAX_OWN_CHARACTERS_PER_MESSAGE
                + more_characters,
            }
            for call in calls
        ],
        "sys_path": sys.path,
    }
    answers: list[dict[str, str]] = json.loads(_in_sandbox(json.dumps(request).encode()))
    if len(_outputs) > MAX_KEPT_OUTPUTS:
        _outputs.clear()
    _outputs.update(
        ((template, call), answer["text"])
        for call, answer in zip(calls, answers, strict=True)
        if "text" in answer
    )
    return [answer["text"] if "text" in answer else _failure(answer["error"]) for answer in answers]


def _in_sandbox(request: bytes) -> bytes:
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox.py"))]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _failure(f"it ran over {MAX_SECONDS} seconds") from error
    except OSError as error:
        raise SgLocalError(
            f"the chat template's process could not be started ({error.strerror}): close other programs, try again"
        ) from error
    if done.returncode > 0:
        raise RuntimeError(done.stderr.decode(errors="replace"))  # a bug here, not the template's fault
    if done.returncode < 0:
        over_time = done.returncode == -getattr(signal, "SIGXCPU", 0)
        raise _failure("it ran too long" if over_time else f"it crashed, signal {-done.returncode}")
    return done.stdout


def _failure(reason: str) -> InputError:
    return InputError(f"the GGUF's chat template failed ({reason}): use a GGUF with another template")
