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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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

VICUNA_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Any other model was not trained on that format.
_VICUNA_ALONE = "; a Vicuna v1.1 model, and no other, takes --prompt-format vicuna"

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
        """Whether the template writes a system message, and not as an assistant's turn."""
        return _takes_system(self)

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> list[Piece]:
        """Renders messages into pieces whose texts, joined, are the prompt. The contents are stripped.

        If the template takes no system message, its text is put at the beginning of the user's first turn.

        Raises InputError if the template is broken, refuses these roles, exceeds a limit, or does not show each
        message once and in order.
        """
        if messages[0]["role"] == "system" and not self.takes_system:
            system, first, *others = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
        roles = tuple(message["role"] for message in messages)
        texts, numbers = self.split_at_messages(roles, add_generation_prompt=add_generation_prompt)
        if numbers != [str(number) for number in range(len(messages))] or re.search(
            "[\ue0f0\ue0f1]", "".join(texts)
        ):
            raise InputError(
                f"the chat template does not show each of {len(messages)} messages once, whole and in order: "
                f"use a GGUF with another template{_VICUNA_ALONE}"
            )
        pieces = [Piece(texts[0], is_data=False)]
        for message, text in zip(messages, texts[1:], strict=True):
            pieces.append(Piece(message["content"].strip(), is_data=True))
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
                f"use a GGUF with a smaller template{_VICUNA_ALONE}"
            )
        parts = _PLACEHOLDER.split(_run(self, roles, add_generation_prompt))
        return parts[::2], parts[1::2]


def require_template(source: str, n_ctx: int) -> None:
    """Checks before any work that a template renders one message, and leaves room for it in n_ctx tokens.

    Raises InputError as `ChatTemplate.render`, and where its own text is surely over the context.
    """
    pieces = ChatTemplate(source, "", "").render(
        [{"role": "user", "content": "x"}], add_generation_prompt=True
    )
    n_characters = sum(len(piece.text) for piece in pieces)
    if n_characters > n_ctx * MAX_CHARACTERS_PER_TOKEN:
        raise InputError(
            f"the chat template alone writes {n_characters} characters, which do not fit a context of {n_ctx} tokens: "
            "use --prompt-format vicuna, or a GGUF with a shorter template"
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


def without_template(header: GgufHeader) -> str:
    """What helps where a model carries no chat template: the format of Vicuna only where it may be a Vicuna."""
    names = [header.metadata.get(key) for key in ("general.name", "general.basename", "general.finetune")]
    stated = " ".join(name for name in names if isinstance(name, str)).lower()
    if header.architecture == "llama":
        if "vicuna" in stated or "vicuna" in header.path.name.lower():
            return "say `--prompt-format vicuna` if it is a Vicuna v1.1 model"
        if not stated or "llama" in stated:  # what conversions of Vicuna call it
            return (
                "say `--prompt-format vicuna` if it is a Vicuna v1.1 model, "
                "else use a GGUF of it with tokenizer.chat_template"
            )
    return "use a GGUF of it that has tokenizer.chat_template: newer conversions do, of models that are made to chat"


@lru_cache(maxsize=64)
def _takes_system(template: ChatTemplate) -> bool:
    # Cached here too, since the cache of `_run` keeps no errors, and a refusal is an error.
    try:
        texts, numbers = template.split_at_messages(("system", "user"), add_generation_prompt=True)
    except InputError:  # "System role not supported"
        return False
    if numbers != ["0", "1"]:
        return False
    try:
        return texts != template.split_at_messages(("assistant", "user"), add_generation_prompt=True)[0]
    except InputError:  # this template requires that roles take turns
        return True


@lru_cache(maxsize=64)
def _run(template: ChatTemplate, roles: tuple[str, ...], add_generation_prompt: bool) -> str:
    """The output of the template, with placeholders for the messages."""
    request = {
        "source": template.source,
        "bos_token": template.bos_token,
        "eos_token": template.eos_token,
        "messages": [{"role": role, "content": f"\ue0f0{number}\ue0f1"} for number, role in enumerate(roles)],
        "add_generation_prompt": add_generation_prompt,
        "max_characters": MAX_OWN_CHARACTERS + len(roles) * MAX_OWN_CHARACTERS_PER_MESSAGE,
        "sys_path": sys.path,
    }
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox.py"))]
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=MAX_SECONDS
        )
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
    answer: dict[str, str] = json.loads(done.stdout)
    if "error" in answer:
        raise _failure(answer["error"])
    return answer["text"]


def _failure(reason: str) -> InputError:
    return InputError(
        f"the GGUF's chat template failed ({reason}): use a GGUF with another template{_VICUNA_ALONE}"
    )
