"""The chat template that a tuned model carries: for a user's message alone it writes the prompt that was trained.

    {%- set enable_thinking = false -%}
    {%- if ... the system message is empty -%}{%- set messages = messages[1:] -%}{%- endif -%}
    {%- if messages[0]['role'] != 'system' and messages[0]['role'] != 'developer' -%}
    {%- set messages = [{'role': 'system', 'content': 'Sort this message.'}] + messages -%}
    {%- endif -%}{{- '' }}{%- for message in messages %}...          the base's own template, as it is
    ...{% if add_generation_prompt %}{{ '</think>' }}{% endif %}     where the base begins to think

A system message of the user takes the place of the instruction, but for an empty one: programs send that where a field
is left empty. Earlier turns pass as they are. What is written here is the part of Jinja that transformers and
llama-cpp-python (jinja2), llama.cpp (common/jinja) and minja, which was its engine before, have in common: no blocks,
macros or slices without a beginning, and of the filters `trim` alone.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from sg_local.chat.sandbox import DATE, DATE_TEXTS, PROGRAMS
from sg_local.chat.template import Call, ChatTemplate, Message, placeholder, run_calls, without_system
from sg_local.errors import InputError
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import Example

# What a template asks for today's date with.
_STRFTIME = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"\\]*)(?P=quote)\s*\)""")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NO_SYSTEM = "messages[0]['role'] != 'system' and messages[0]['role'] != 'developer'"
# Where the base's template can take parts of a message, llama.cpp makes a part of each text.
_WITHOUT_EMPTY_SYSTEM = (
    f"{{%- if messages[1:] and not ({_NO_SYSTEM}) -%}}{{%- set sg_system = messages[0]['content'] -%}}"
    "{%- if sg_system and sg_system is not string -%}{%- set sg_system = sg_system[0]['text'] -%}{%- endif -%}"
    "{%- if not sg_system or (sg_system | trim) == '' -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- endif -%}"
)
# Conversations that other programs may send: the user's message alone, a system message of the user, earlier turns.
_SENT = (("user",), ("system", "user"), ("user", "assistant", "user"))


def served_template(
    template: ChatTemplate,
    instruction: str,
    demonstrations: Sequence[Example] = (),
    *,
    writes_bos: bool = False,
) -> str:
    """The Jinja source of a template for other programs, which has the instruction and the demonstrations in it.

    writes_bos: for a tokenizer that adds BOS and a base's template that does not write it. Programs that tokenize what
    a template writes would leave it out.
    """
    system, *shown = answer_messages(instruction, "", demonstrations)[:-1]
    inserted = _with_system(system, shown) if template.takes_system else _in_first_turn(system, shown)
    bos = "{{- bos_token -}}" if writes_bos else ""
    source = _STRFTIME.sub(lambda found: _text(DATE.strftime(found["format"])), template.source)
    end = ""
    if template.closing:
        source = source.removesuffix("\n")  # Jinja drops it at the end of a template only
        end = f"{{% if add_generation_prompt %}}{{{{ {_text(template.closing)} }}}}{{% endif %}}"
    # The last tag is an expression: after a block, Jinja would drop a newline of the base's template.
    fixed = "{%- set enable_thinking = false -%}" + "".join(
        f"{{%- set {name} = {_text(DATE.strftime(form))} -%}}"
        for name, form in DATE_TEXTS.items()
        if name in template.source
    )
    return f"{bos}{fixed}{_WITHOUT_EMPTY_SYSTEM}{inserted}{{{{- '' }}}}{source}{end}"


def _with_system(system: Message, shown: Sequence[Message]) -> str:
    """Jinja that makes `messages` begin with a system message, and the demonstrations after it."""
    turns = ", ".join(map(_literal, shown))
    given = f"{{%- else -%}}{{%- set messages = [messages[0], {turns}] + messages[1:] -%}}" if shown else ""
    return (
        f"{{%- if {_NO_SYSTEM} -%}}"
        f"{{%- set messages = [{', '.join(map(_literal, [system, *shown]))}] + messages -%}}"
        f"{given}{{%- endif -%}}"
    )


def _in_first_turn(system: Message, shown: Sequence[Message]) -> str:
    """Jinja that puts the instruction, or the system message of the user, at the beginning of the first turn."""
    if shown:
        begun = _text("\n\n" + shown[0]["content"].rstrip())
        first = f"{{'role': 'user', 'content': sg_instruction + {begun}}}"
        turns, rest = ", ".join([first, *map(_literal, shown[1:])]), "messages"
    else:
        turns = "{'role': messages[0]['role'], 'content': sg_instruction + '\\n\\n' + messages[0]['content']}"
        rest = "messages[1:]"
    return (
        f"{{%- set sg_instruction = {_text(system['content'].lstrip())} -%}}"
        f"{{%- if not ({_NO_SYSTEM}) -%}}"
        "{%- set sg_instruction = messages[0]['content'] -%}{%- set messages = messages[1:] -%}"
        "{%- endif -%}"
        f"{{%- set messages = [{turns}] + {rest} -%}}"
    )


@lru_cache(maxsize=64)
def require_served(
    template: ChatTemplate,
    instruction: str,
    demonstrations: tuple[Example, ...] = (),
    *,
    writes_bos: bool = False,
) -> str:
    """`served_template`, tried as other programs call it.

    Raises InputError where it would not show them the trained prompt, and as `ChatTemplate.render`.
    """
    source = served_template(template, instruction, demonstrations, writes_bos=writes_bos)
    bos = template.bos_token if writes_bos else ""
    expected = _expected(template, instruction, demonstrations)
    served = ChatTemplate(source, template.bos_token, template.eos_token)
    try:
        source.encode()
        calls = [Call(roles, True, program) for program in PROGRAMS for roles in _SENT]
        written = run_calls(served, calls, more_characters=4 * (len(source) - len(template.source)))
    except UnicodeEncodeError as error:
        raise _not_served("the task holds half of a surrogate pair") from error
    for call, text in zip(calls, written, strict=True):
        wanted = expected[_SENT.index(call.roles)]
        if wanted is None:  # the base's template refuses this conversation
            continue
        if isinstance(text, InputError):
            raise _not_served(f"it fails as {call.program} calls it ({str(text).partition(': use ')[0]})")
        if text != bos + wanted:
            raise _not_served(
                f"as {call.program} calls it, it writes {_first_difference(text, bos + wanted)}"
            )
    return source


def _expected(
    template: ChatTemplate, instruction: str, demonstrations: tuple[Example, ...]
) -> list[str | None]:
    """The prompts of what is sent; None for one other than the user's message that the template refuses."""
    conversations = [_conversation(roles, instruction, demonstrations) for roles in _SENT]
    if not template.takes_system:
        conversations = [without_system(messages) for messages in conversations]
    # By one process. Those that failed are tried once more below, for their errors.
    run_calls(template, [Call(tuple(message["role"] for message in messages)) for messages in conversations])
    prompts: list[str | None] = []
    for roles, messages in zip(_SENT, conversations, strict=True):
        try:
            pieces = template.render(messages, add_generation_prompt=True)
            prompts.append("".join(piece.text for piece in pieces))
        except InputError:
            if roles == ("user",):
                raise
            prompts.append(None)
    return prompts


def _conversation(
    roles: tuple[str, ...], instruction: str, demonstrations: tuple[Example, ...]
) -> list[Message]:
    sent = [{"role": role, "content": placeholder(number)} for number, role in enumerate(roles)]
    system, *shown = answer_messages(instruction, "", demonstrations)[:-1]
    return [sent[0], *shown, *sent[1:]] if roles[0] == "system" else [system, *shown, *sent]


def _not_served(reason: str) -> InputError:
    return InputError(
        f"from the GGUF's chat template none can be made that shows the trained prompt in other programs: {reason}; "
        "use a GGUF with another template"
    )


def _first_difference(text: str, wanted: str) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), min(len(text), len(wanted))
    )
    start = max(0, place - 20)
    return f"{text[start : place + 40]!r:.100} in the place of {wanted[start : place + 40]!r:.100}"


def _literal(message: Message) -> str:
    return f"{{'role': {_text(message['role'])}, 'content': {_text(message['content'].strip())}}}"


def _text(text: str) -> str:
    """A text as a Jinja string."""
    return "'" + "".join(_ESCAPES.get(character, character) for character in text) + "'"
