"""Files of JSON lines, read within bounds, checked against a kind of row, and written line by whole line.

    {"id": 7, "input": "claim: Uniforms cost too much.", "label": "undermine", "drop": null, "seed": 12}

Format: JSON Lines (https://jsonlines.org): UTF-8, one JSON object a line. A kind of row is a TypedDict
(selfguide/rows.py). Rows are checked against it as they are read, because a person may have edited the file:

    read_rows(path, PairRow)  -> "train.jsonl, line 3: the row has no copies"
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints, overload

from sg_local.errors import SgLocalError
from sg_local.files.faults import Faults
from sg_local.files.reading import JsonObject, check_file, parse_row, raise_unreadable
from sg_local.files.writing import copy_file, sync, write_bytes, write_error

MAX_LINE_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30

Row = TypeVar("Row", bound=Mapping[str, object])  # a TypedDict


class Line(NamedTuple):
    """One line of a file of JSON lines: `row` is None where `fault` says what is wrong with it."""

    number: int  # from 1
    offset: int  # of its first byte in the file
    complete: bool  # ends with a newline
    row: JsonObject | None
    fault: str


@overload
def read_rows(path: Path) -> list[dict[str, Any]]: ...
@overload
def read_rows(path: Path, kind: type[Row], *, is_growing: bool = ...) -> list[Row]: ...
def read_rows(path: Path, kind: type[Any] = dict, *, is_growing: bool = False) -> list[Any]:
    """The objects of a file of JSON lines, in order; blank lines are ignored.

    kind: the TypedDict that every row has to fit; further keys are allowed. is_growing: another process may be
    writing the last line, which is left out where it has no newline and is faulty.

    Raises InputError with path, line number and reason of broken lines (the first ten, then a count), and
    where the file is missing, is over 2 GiB or has a line over 1 MiB.
    """
    lines = scan_rows(path)
    if is_growing:
        lines = (line for line in lines if line.complete or not line.fault)
    return _checked_rows(path, lines, kind)


def scan_rows(path: Path) -> Iterator[Line]:
    """The lines of a file of JSON lines one by one, broken ones included and blank ones left out.

    A line over 1 MiB is a fault and ends the reading. Raises InputError where the file cannot be read.
    """
    path = Path(path)
    check_file(path, MAX_FILE_BYTES)
    try:
        with open(path, "rb") as file:
            number = offset = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                complete = data.endswith(b"\n")
                if len(data) > MAX_LINE_BYTES:
                    fault = f"is longer than {MAX_LINE_BYTES} bytes: shorten it"
                    yield Line(number, offset, complete, None, fault)
                    return
                # Some editors put a byte order mark first.
                text = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
                if text.strip():
                    row, fault = _parse_line(text)
                    yield Line(number, offset, complete, row, fault)
                offset += len(data)
    except OSError as error:
        raise_unreadable(path, error)


def recover_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The complete rows of a file that `append_rows` was writing; a line torn by a kill is cut off.

    A last line that has no newline or is not a JSON object is removed by truncating the file. A missing file
    holds no rows. kind: as in `read_rows`. Raises InputError for a broken line before the last or a line over
    1 MiB, and SgLocalError where the file cannot be truncated.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = list(scan_rows(path))
    torn = lines[-1] if lines and (lines[-1].row is None or not lines[-1].complete) else None
    # A longer line was not written by append_rows, and more lines may follow it.
    if torn is not None and path.stat().st_size - torn.offset > MAX_LINE_BYTES:
        torn = None
    if torn is not None:
        lines.pop()
    rows = _checked_rows(path, lines, kind)  # before the file is touched: it may be none of ours
    if path.is_symlink():  # what it points to is not ours: the rows are gone on with in a file of our own
        copy_file(path, path)
    if torn is not None:
        try:
            with open(path, "r+b") as file:
                file.truncate(torn.offset)
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(path, error) from error
    return rows


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Appends whole lines in one write and waits until they are on the disk; makes the file if it is missing.

    Call `recover_rows` once before the first append, so that no torn line is continued. Raises SgLocalError
    where the lines do not fit (the file is then as before) or one is over 1 MiB, ValueError for NaN.
    """
    data = _lines_of(path, rows)
    if not data:
        return
    path = Path(path)
    try:
        # Never through a link: Windows, which has no O_NOFOLLOW, gives links to administrators only.
        no_follow = getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | no_follow, 0o666)
        try:
            size_bytes = os.fstat(descriptor).st_size
            try:
                n_written = os.write(descriptor, data)
                if n_written < len(data):
                    raise OSError(errno.ENOSPC, f"only {n_written} of {len(data)} bytes fitted")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size_bytes)
                raise
        finally:
            os.close(descriptor)
        if size_bytes == 0:
            sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a whole file of JSON lines, keys in the rows' own order. Raises as `append_rows`."""
    write_bytes(path, _lines_of(path, rows))


def _lines_of(path: Path, rows: Iterable[Mapping[str, object]]) -> bytes:
    lines = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:  # read_rows would refuse it
            raise SgLocalError(
                f"{path}: row {row.get('id')!r} takes {len(line)} bytes, the limit is {MAX_LINE_BYTES}: "
                "shorten its texts"
            )
        lines.append(line)
    return b"".join(lines)


def _parse_line(data: bytes) -> tuple[JsonObject | None, str]:
    try:
        return parse_row(data.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {data[error.start]:#04x} at column {error.start + 1})"


def _checked_rows(path: Path, lines: Iterable[Line], kind: type[Row]) -> list[Row]:
    """The rows of these lines. Raises InputError where a line is broken, or its row is not of this kind."""
    # A TypedDict tells its keys; a plain dict has none, and any row fits it.
    types = get_type_hints(kind)
    required: Sequence[str] = sorted(getattr(kind, "__required_keys__", ()))
    rows: list[Any] = []
    faults = Faults()
    for line in lines:
        row_faults = [line.fault] if line.row is None else _row_faults(line.row, types, required)
        for fault in row_faults:
            faults.add(f"{path}, line {line.number}: {fault}")
        rows.append(line.row)
    faults.raise_any()
    return rows


def _row_faults(row: JsonObject, types: Mapping[str, Any], required: Sequence[str]) -> list[str]:
    """What a row lacks, and which of its values are of another type."""
    return [f"the row has no {key}" for key in required if key not in row] + [
        f"{key} is {row[key]!r:.40}, not {kind.__name__ if isinstance(kind, type) else kind}"
        for key, kind in types.items()
        if key in row and not _fits(row[key], kind)
    ]


def _fits(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type: str, int, float, bool, None, list[...], dict[str, ...] or a union."""
    if kind is float:  # JSON does not tell 1 from 1.0
        return type(value) in (float, int)
    if isinstance(kind, type):
        return type(value) is kind  # true is no int
    parts = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    return any(_fits(value, part) for part in parts)
