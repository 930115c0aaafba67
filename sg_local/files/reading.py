"""Files read within bounds: bytes, texts, JSON; and the same of bytes or a text that somebody has already.

    read_json(Path("config.json"), 1 << 20)         -> {"hidden_size": 576, ...}
    parse_row('{"id": 7, "input": "Pay me."}')      -> ({"id": 7, "input": "Pay me."}, "")
    parse_row('{"id": NaN}')                        -> (None, "not JSON: NaN is no JSON number")

JSON by RFC 8259: no NaN, no infinities.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from sg_local.errors import InputError

JsonObject: TypeAlias = dict[str, object]  # from outside: nobody has checked what its keys hold


def read_text(path: Path, max_bytes: int) -> str:
    """A text file. Raises InputError where it is missing, over `max_bytes`, unreadable or not UTF-8."""
    return decoded(read_bytes(path, max_bytes), path)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A whole file. Raises InputError where it is missing, over `max_bytes` or unreadable."""
    path = Path(path)
    check_file(path, max_bytes)
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise_unreadable(path, error)
    if len(data) > max_bytes:
        raise InputError(f"{path} is over the limit of {max_bytes} bytes: make it smaller")
    return data


def decoded(
    data: bytes, name: str | Path, *, encoding: str = "utf-8", remedy: str = "save it as UTF-8"
) -> str:
    """The text of a file of this name, without a byte order mark. Raises InputError where it is not in the encoding.

    remedy: what helps then.
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not {encoding.upper()} (byte {data[error.start]:#04x} at {error.start}): {remedy}"
        ) from error
    except UnicodeError as error:  # UTF-16 without its byte order mark, and the like
        raise InputError(f"{name} is not {encoding.upper()} ({error}): {remedy}") from error


def read_json(path: Path, max_bytes: int) -> Any:
    """A file that is one JSON value. Raises InputError as `read_text`, and with the line of a fault."""
    return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str, name: str | Path) -> Any:
    """The JSON value that the text of a file of this name is. Raises InputError with the line of a fault."""
    try:
        return _parse_json(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except ValueError as error:
        raise InputError(f"{name}: not JSON: {error}") from error


def parse_row(line: str) -> tuple[JsonObject | None, str]:
    """The JSON object in a line, and ""; or None, and what is wrong with the line."""
    try:
        value = _parse_json(line)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        return None, f"not JSON: {error}"
    return as_row(value)


def as_row(value: object) -> tuple[JsonObject | None, str]:
    """The same of a value that was read as JSON."""
    return (value, "") if isinstance(value, dict) else (None, "is not a JSON object: write it as {…}")


def _parse_json(text: str) -> Any:
    """Raises ValueError, also for what Python's parser lets through and no later writer could write again."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(
                value, ensure_ascii=False
            ).encode()  # fails where half of a surrogate pair stands alone
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def check_file(path: Path, max_bytes: int) -> None:
    try:
        if not path.is_file():
            if path.exists():
                raise InputError(f"{path} is not a file: give the path of a file")
            raise InputError(f"{path} is missing: check the path")
        size_bytes = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise_unreadable(path, error)
    if size_bytes > max_bytes:
        raise InputError(f"{path} has {size_bytes} bytes, over the limit of {max_bytes}: make it smaller")


def raise_unreadable(path: Path, error: OSError | ValueError) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    raise InputError(f"{str(path)!r} cannot be read: {reason}: check the path and its permissions") from error
