"""Text that somebody else wrote, as it may stand in what we write: one function for each kind of output.

printable("a\\x1b[2J")            -> "a\\\\x1b[2J"            a terminal; lines stay lines
one_line("ok\\nError: x")         -> "ok\\\\nError: x"        a name or label, in the middle of a line
markdown("<b>[a](b)")            -> "&lt;b&gt;[a\\\\](b)"    a cell or a part of a line of Markdown
json_text({"label": "\\u202eok"}) -> '{"label": "\\\\u202eok"}'

Somebody else is a model, a chat template, the metadata of a GGUF, a task, a row, and an error that quotes one of them.
An HTML page escapes by its template engine.
"""

import json
import re

_MARKDOWN = re.compile(
    r"(?P<backslash>[\\`*|~$@]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # between letters it is no emphasis
    r"|\](?=[(\[:])"  # ends the text of a link
    r"|(?<=:)/(?=/)|(?<=www)\.)"  # of addresses, which become links by themselves
    r"|(?P<entity>[<>]|&(?=#?\w+;))",
    re.IGNORECASE,
)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def printable(text: str) -> str:
    """The text with everything as an escape that is not plain to see (`\\x1b`, `\\u202e`), but for line ends."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1]
        for character in text
    )


def one_line(text: str) -> str:
    """The same, where a line end would begin a line that looks like ours."""
    return printable(text).replace("\n", "\\n")


def markdown(text: str) -> str:
    """The text as it reads in Markdown: on one line, no HTML, no link, no emphasis, no end of a table's cell."""

    def escaped(found: re.Match[str]) -> str:
        return _ENTITIES[found[0]] if found["entity"] else f"\\{found[0]}"

    return _MARKDOWN.sub(escaped, one_line(text))


def json_text(value: object, indent: int | None = None) -> str:
    """The value as JSON that is safe to show: what is not plain to see stands as \\u escapes, half surrogates too.

    Raises ValueError for NaN and infinities.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    if text.replace("\n", "").isprintable():  # nearly always, and much faster
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]
        for character in text
    )
