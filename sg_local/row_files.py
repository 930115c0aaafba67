"""Rows of texts in files that people bring: plain text, JSON lines, CSV.

    scan_row_file(RowFile(Path("claims.txt")), ["input"])    FoundRow("line 1", {"input": "Uniforms cost too much."})
    scan_row_file(RowFile(Path("a.csv")), ["text", "box"])   FoundRow("line 2", {"text": "Pay me.", "box": "refund"})

By the end of the name: .jsonl is JSON lines, .csv and .tsv have a header, anything else has one input a line.
Format: RFC 4180 for CSV; the delimiter is whichever of comma, semicolon and tab the header has most of.
"""

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sg_local.errors import InputError
from sg_local.files import read_text, scan_rows

MAX_ROW_FILE_BYTES = 256 << 20
MAX_TEXT_CHARACTERS = (
    100_000  # of a line of plain text; more would not fit a line of the run's files, nor any model
)
_CSV = {".csv", ".tsv"}
_MAX_SHOWN_COLUMNS = 10


@dataclass(frozen=True)
class RowFile:
    """A file of rows, and how to read it."""

    path: Path
    column: str = "input"  # of CSV, or key of JSON lines
    output_column: str = "output"  # of labelled rows
    encoding: str = "utf-8"


class FoundRow(NamedTuple):
    """One row: `values` is None where `fault` says what is wrong with it."""

    place: str  # "line 3"
    values: Mapping[str, object] | None
    fault: str = ""


def encoding_fault(encoding: str) -> str:
    """What is wrong with the name of an encoding; "" where Python knows it."""
    try:
        b"a".decode(encoding, "ignore")
    except (LookupError, ValueError):
        return f"{encoding!r:.60} is no encoding of texts: write one such as 'utf-8', 'cp1252' or 'utf-16'"
    return ""


def scan_row_file(file: RowFile, columns: Sequence[str]) -> Iterator[FoundRow]:
    """The rows of a file, faulty ones included. columns: those that are needed; plain text has the first alone.

    Raises InputError where the file cannot be read, or has no such columns.
    """
    suffix = file.path.suffix.lower()
    if suffix == ".jsonl":
        if _is_other_than_utf8(file.encoding):
            raise InputError(f"{file.path}: JSON lines are UTF-8: save it so, and remove `encoding`")
        yield from (FoundRow(f"line {line.number}", line.row, line.fault) for line in scan_rows(file.path))
    elif suffix in _CSV:
        yield from _csv_rows(file, columns)
    elif len(columns) > 1:
        raise InputError(f"{file.path} has one text a line: give pairs as .jsonl or .csv")
    else:
        # Not splitlines(), which would also break an input at a form feed or U+2028.
        for number, line in enumerate(_text(file).split("\n"), 1):
            if len(line) > MAX_TEXT_CHARACTERS:
                fault = f"it has over {MAX_TEXT_CHARACTERS} characters: shorten it, or remove it"
                yield FoundRow(f"line {number}", None, fault)
            elif line.strip():
                yield FoundRow(f"line {number}", {columns[0]: line})


def _is_other_than_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name not in {"utf-8", "utf-8-sig"}


def _text(file: RowFile) -> str:
    if _is_other_than_utf8(file.encoding):
        remedy = 'say its own with encoding = "..."'
    else:
        remedy = 'save it as UTF-8, or say its own with encoding = "cp1252" or the like'
    return read_text(file.path, MAX_ROW_FILE_BYTES, encoding=file.encoding, remedy=remedy)


def _csv_rows(file: RowFile, columns: Sequence[str]) -> Iterator[FoundRow]:
    text = _text(file)
    header_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=header_line.count)  # of equals the comma
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or []]
    except csv.Error as error:
        raise InputError(f"{file.path}, line 1: not CSV: {error}") from error
    if missing := [column for column in columns if column not in header]:
        more = f", … {len(header) - _MAX_SHOWN_COLUMNS} more" if len(header) > _MAX_SHOWN_COLUMNS else ""
        known = ", ".join(f"{name!r:.60}" for name in header[:_MAX_SHOWN_COLUMNS])
        raise InputError(
            f"{file.path} has no column {' or '.join(f'{name!r:.60}' for name in missing)}: its columns are "
            f"{known or '(none)'}{more}; name yours with column = and output_column ="
        )
    reader.fieldnames = header
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield FoundRow(f"line {reader.reader.line_num}", None, f"not CSV: {error}")
            return
        if row is None:
            return
        place = f"line {reader.line_num}"
        if "" in row and "" not in header:
            yield FoundRow(
                place, None, "it has more fields than the header: put quotes around texts with the delimiter"
            )
        else:
            yield FoundRow(place, {column: row[column] or "" for column in columns})
