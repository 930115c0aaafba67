"""An Ollama Modelfile whose TEMPLATE is the prompt that the model was tuned on.

    FROM ./model.gguf
    SYSTEM "Sort this message."
    TEMPLATE \"\"\"<|im_start|>system
    {{ if .System }}{{ .System }}{{ else }}Sort this message.{{ end }}<|im_end|>
    <|im_start|>user
    {{ .Prompt }}<|im_end|>
    <|im_start|>assistant
    \"\"\"

The user types only `ollama run NAME "my parcel is lost"`. Ollama renders this template, or the chat template in
model.gguf where that can do more (tools, thinking). Both write the prompt that was trained, with SYSTEM and without it,
and a system message of the user takes the place of the instruction. In later turns, where Ollama gives no system text
to a template, the instruction stands again.
Sources: ollama's docs/modelfile.md and parser/parser.go. The parser has no escapes: a text in triple quotation marks
ends at the first line that ends with three, and characters that Go's strconv.IsPrint refuses are dropped. Templates are
Go's text/template.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sg_local.chat.template import ChatTemplate
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import Example

# Placeholders for the instruction, and for the user's text at the end of the last message.
_SYSTEM_PLACE, _PLACE = "\ue0f3", "\ue0f2"


def modelfile(
    template: ChatTemplate,
    instruction: str,
    demonstrations: Sequence[Example],
    *,
    stops: Sequence[str],
    licence: str,
    max_new_tokens: int | None = None,
    adds_bos: bool = False,
) -> str:
    """The text of a Modelfile. Raises InputError as `ChatTemplate.render` does.

    A stop text that Ollama cannot read is omitted, since the model's end token ends an answer anyway.
    adds_bos: whether the model's tokenizer adds BOS by itself, also in Ollama; if so, the template's BOS is omitted.
    (SmolLM2's tokenizer does not; its BOS is the text that begins every turn.) max_new_tokens: of an answer.
    """
    system = instruction.strip()
    messages = answer_messages(_SYSTEM_PLACE, _PLACE, demonstrations)
    pieces = template.render(messages, add_generation_prompt=True)
    texts = [piece.text for piece in pieces]
    if adds_bos and template.bos_token and not pieces[0].is_data:
        texts[0] = texts[0].removeprefix(template.bos_token)
    last = max(index for index, piece in enumerate(pieces) if piece.is_data)
    place = next(
        index for index, piece in enumerate(pieces) if piece.is_data and piece.text.startswith(_SYSTEM_PLACE)
    )
    first = "".join(texts[:place])
    between = "".join(texts[place : last + 1]).removeprefix(_SYSTEM_PLACE).removesuffix(_PLACE)
    after = "".join(texts[last + 1 :])
    stated = f"{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{_go_text(system)}{{{{ end }}}}"
    lines = [
        "FROM ./model.gguf",
        *([f"SYSTEM {_quoted(system)}"] if _is_quotable(system) else []),
        f'TEMPLATE """{_go_text(first)}{stated}{_go_text(between)}{{{{ .Prompt }}}}{_go_text(after)}"""',
        "PARAMETER temperature 0",  # greedy, as it was scored
        "PARAMETER repeat_penalty 1",  # Ollama's default of 1.1 penalizes words of the prompt
        *([] if max_new_tokens is None else [f"PARAMETER num_predict {max_new_tokens}"]),
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops if _is_quotable(stop)),
        f"LICENSE {_quoted(_as_quotable(licence))}",
    ]
    return "\n".join(lines) + "\n"


def beside_base(text: str, base: Path) -> str:
    """The same Modelfile for the base and its adapter, in the place of the merged model."""
    note = "# For Ollama before 0.34.1: newer ones make no models of adapters.\n"
    return note + of_base(text, base, "ADAPTER ./adapter.gguf\n")


def of_base(text: str, base: Path, and_then: str = "") -> str:
    """The same Modelfile for the base, in the place of the merged model. and_then: lines below its name."""
    path, note = str(base), ""
    if not all(map(_is_kept, path)) or re.search('["\r\n]', path):
        path, note = "./base.gguf", "# Copy the base to this name: Ollama cannot read the one that it has.\n"
    _merged, rest = text.split("\n", 1)
    return f'{note}FROM "{path}"\n{and_then}{rest}'


def _go_text(text: str) -> str:
    """Text as a Go template that renders to the same text.

    String constants are used for characters that Ollama drops, and for braces and quotation marks that are adjacent
    or at an end, where they would open an action or close the quotes.
    """
    parts = []
    position = 0
    for is_plain, run in groupby(text, lambda character: _is_kept(character) and character not in '{"'):
        part = "".join(run)
        stands_alone = part in ("{", '"') and 0 < position < len(text) - 1
        position += len(part)
        parts.append(part if is_plain or stands_alone else f'{{{{ "{_escaped(part)}" }}}}')
    return "".join(parts)


def _escaped(text: str) -> str:
    codes = [ord(character) for character in text]
    return "".join(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}" for code in codes)


def _is_kept(character: str) -> bool:
    """Whether Ollama keeps a character of a quoted text; "printable" means the same in Python and Go."""
    return character.isprintable() or character in "\t\n\r"


def _is_quotable(text: str) -> bool:
    """Whether Ollama reads a quoted text, other than a template, unchanged."""
    return text != "" and all(map(_is_kept, text)) and not re.search(r'"""\s*[\r\n]', text)


def _as_quotable(text: str) -> str:
    return "".join(character if _is_kept(character) else " " for character in text).replace('"""', "'''")


def _quoted(text: str) -> str:
    mark = '"""' if re.search('["\r\n]', text) else '"'
    return mark + text + mark
