"""TOML, read within bounds, and its one writer.

    toml_text({"name": "inbox", "labels": ["refund"]})      -> 'name = "inbox"\nlabels = ["refund"]\n'

Source: TOML 1.0 (https://toml.io/en/v1.0.0).
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sg_local.errors import InputError
from sg_local.files.reading import JsonObject, read_text

MAX_TOML_BYTES = 1 << 20
# tomllib's time grows with the square of a dotted key's parts: 40 kB of `a.a.a…` took 6 s.
_LONG_DOTTED_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""", re.ASCII
)


def read_toml(path: Path, max_bytes: int = MAX_TOML_BYTES) -> JsonObject:
    """A TOML file as nested dicts. Raises InputError as `read_text`, and with the line where it is broken."""
    text = read_text(path, max_bytes)
    if _LONG_DOTTED_KEY.search(text):
        raise InputError(f"{path}: invalid TOML: a dotted key has 64 parts or more")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InputError(f"{path}: invalid TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError is one; an integer of thousands of digits is another
        raise InputError(f"{path}: invalid TOML: {error}") from error


def toml_text(values: Mapping[str, Any]) -> str:
    """A TOML document that `read_toml` reads back.

    values: texts, numbers, true and false, lists of these; after them tables (dicts) and lists of tables. A text of
    several lines is written on several lines. Raises ValueError for NaN and infinities.
    """
    lines: list[str] = []
    for key, value in values.items():
        match value:
            case dict():
                lines += ["", f"[{key}]", *_toml_lines(value)]
            case [dict(), *_]:
                for table in value:
                    lines += ["", f"[[{key}]]", *_toml_lines(table)]
            case _:
                lines += _toml_lines({key: value})
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml_lines(table: Mapping[str, object]) -> list[str]:
    return [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items()]


def _toml_key(key: str) -> str:
    if re.fullmatch(r"[\w-]+", key, re.ASCII):
        return key
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_escape_controls(escaped, keep="")}"'


def _toml_value(value: object) -> str:
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, allow_nan=False)  # a number, true or false is written as in JSON


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\")
    if "\n" not in text:
        return '"' + _escape_controls(escaped.replace('"', '\\"'), keep="\t") + '"'
    # One or two quotes may stand as they are, before the closing ones too (TOML 1.0).
    escaped = re.sub(r'"{3,}', lambda quotes: '\\"' * len(quotes[0]), escaped)
    return '"""\n' + _escape_controls(escaped, keep="\t\n") + '"""'


def _escape_controls(text: str, keep: str) -> str:
    return re.sub(
        r"[\x00-\x1f\x7f]", lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04X}", text
    )
