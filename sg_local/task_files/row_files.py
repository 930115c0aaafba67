"""The files of rows that people bring, read in one way: those that a task file names, and the input of `predict`.

    open_row_file(RowFile(Path("claims.txt"))).rows
    -> FoundRow("claims.txt, line 1", {"input": "Uniforms cost too much."})
    open_row_file(RowFile(Path("a.csv"), column="text")).rows
    -> FoundRow("a.csv, line 2", {"id": "7", "text": "Pay me."})

Formats: plain lines; JSON Lines (https://jsonlines.org), also as one JSON array; tables, which are CSV (RFC 4180) with
commas, semicolons or tabs under a header. A file's name says which; where it does not, the content decides.
"""

import codecs
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from sg_local.errors import InputError
from sg_local.files import as_row, decoded, parse_json, parse_row, read_bytes

MAX_ROW_FILE_BYTES = 256 << 20
INPUT, OUTPUT = "input", "output"

Format: TypeAlias = Literal["plain lines", "JSON lines", "JSON array", "table"]

_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # of tables, by the end of the name
# Of .xlsx, .ods and .zip; of .xls; of .gz; of .pdf.
_NO_TEXTS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1", b"\x1f\x8b\x08", b"%PDF-")
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAX_SHOWN_COLUMNS = 10


@dataclass(frozen=True)
class RowFile:
    """A file of rows, and how to read it. A column of a table is a key of JSON lines."""

    path: Path
    column: str | None = None  # of the inputs; None is "input", and of a table with one column that one
    output_column: str = OUTPUT  # of labelled rows
    encoding: str = "utf-8"


class FoundRow(NamedTuple):
    """One row with all its keys or columns: `fields` is None where `fault` says what is wrong with it."""

    place: str  # "claims.csv, line 3"
    fields: Mapping[str, object] | None
    fault: str = ""


@dataclass(frozen=True)
class TableForm:
    """How a table was written, so that what is made of it can be written in the same way."""

    columns: tuple[str, ...]
    delimiter: str
    line_end: str
    begins_with: str  # a byte order mark, by which Excel knows UTF-8


@dataclass(frozen=True)
class OpenRowFile:
    """What a file holds: its rows come one by one, and once."""

    name: str  # "claims.csv", "standard input"
    column: str  # of the inputs
    rows: Iterator[FoundRow]
    form: TableForm | None = None  # None where it is no table


def encoding_fault(encoding: str) -> str:
    """What is wrong with the name of an encoding; "" where Python knows it."""
    try:
        b"a".decode(encoding, "ignore")
    except (LookupError, ValueError):
        return f"{encoding!r:.60} is no encoding of texts: write one such as 'utf-8', 'cp1252' or 'utf-16'"
    return ""


def holds_plain_lines(path: Path) -> bool:
    """Whether a file has one input a line, and no columns to name. Raises InputError where it cannot be read."""
    text = read_bytes(path, MAX_ROW_FILE_BYTES).decode("utf-8", "replace")
    return _format(RowFile(path), text) == "plain lines"


def open_row_file(file: RowFile, *, is_labelled: bool = False, takes_stdin: bool = False) -> OpenRowFile:
    """The rows of a file, faulty ones included.

    is_labelled: whether inputs come with outputs. takes_stdin: whether the path "-" stands for standard input.
    Raises InputError where the file cannot be read, or lacks one of the columns.
    """
    if takes_stdin and str(file.path) == "-":
        name, data = "standard input", sys.stdin.buffer.read(MAX_ROW_FILE_BYTES + 1)
        if len(data) > MAX_ROW_FILE_BYTES:
            raise InputError(f"{name} is over the limit of {MAX_ROW_FILE_BYTES} bytes: make it smaller")
    else:
        name, data = str(file.path), read_bytes(file.path, MAX_ROW_FILE_BYTES)
    if data.startswith(_NO_TEXTS):
        raise InputError(
            f"{name} is a spreadsheet, an archive or a PDF, and no text: export it as CSV or plain text"
        )
    text = decoded(data, name, encoding=file.encoding, remedy=_encoding_remedy(file, data))
    found = _format(file, text, is_labelled=is_labelled)
    if found == "table":
        return _open_table(name, text, file, is_labelled, data.startswith(_BYTE_ORDER_MARKS))
    if found == "plain lines":
        if is_labelled and text.strip():
            raise InputError(f"{name} has one text a line: give pairs as .jsonl or .csv")
        return OpenRowFile(name, INPUT, _plain_rows(name, text))
    if _is_other_than_utf8(file.encoding):
        raise InputError(f"{name}: JSON lines are UTF-8: save it so, and name no encoding")
    rows = _elements(name, text) if found == "JSON array" else _json_rows(name, text)
    return OpenRowFile(name, file.column or INPUT, rows)


def _format(file: RowFile, text: str, *, is_labelled: bool = False) -> Format:
    """By the end of a file's name, or by its content where the name does not tell."""
    suffix = file.path.suffix.lower()
    begins = text.lstrip()[:1]
    if suffix in _DELIMITERS:
        return "table"
    if suffix in _JSON_SUFFIXES:
        return "JSON array" if suffix == ".json" and begins == "[" else "JSON lines"
    if begins == "{" and (suffix != ".txt" or is_labelled):
        return "JSON lines"
    names_columns = file.column is not None or file.output_column != OUTPUT
    return "table" if names_columns else "plain lines"


def _is_other_than_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name not in {"utf-8", "utf-8-sig"}


def _encoding_remedy(file: RowFile, data: bytes) -> str:
    if file.path.suffix.lower() in _JSON_SUFFIXES:
        return "save it as UTF-8"
    if _is_other_than_utf8(file.encoding):
        return "name its own encoding"
    name = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "cp1252"
    return f'save it as UTF-8, or name its own with --encoding {name}, in a task file encoding = "{name}"'


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, from 1."""
    # Not splitlines(), which would also break an input at a form feed or U+2028.
    line_end = "\n" if "\n" in text else "\r"  # as some programs end lines for an old Macintosh
    return ((number, line) for number, line in enumerate(text.split(line_end), 1) if line.strip())


def _plain_rows(name: str, text: str) -> Iterator[FoundRow]:
    for number, line in _numbered_lines(text):
        yield FoundRow(f"{name}, line {number}", {INPUT: line.strip()})


def _json_rows(name: str, text: str) -> Iterator[FoundRow]:
    for number, line in _numbered_lines(text):
        yield FoundRow(f"{name}, line {number}", *parse_row(line))


def _elements(name: str, text: str) -> Iterator[FoundRow]:
    for number, value in enumerate(parse_json(text, name), 1):
        yield FoundRow(f"{name}, element {number}", *as_row(value))


def _open_table(name: str, text: str, file: RowFile, is_labelled: bool, is_marked: bool) -> OpenRowFile:
    lines = io.StringIO(text, newline="")
    first_line = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    delimiter = _delimiter(first_line, _DELIMITERS.get(file.path.suffix.lower(), _DELIMITERS[".csv"]))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        cells: Sequence[str] = next((row for row in reader if _has_text(row)), [])
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: not CSV: {error}") from error
    columns = tuple(cell.strip() for cell in cells)
    column = file.column
    if column is None:
        column = columns[0] if len(columns) == 1 and not is_labelled else INPUT
    _check_columns(name, columns, [column, file.output_column] if is_labelled else [column])
    line_end = "\r\n" if first_line.endswith("\r\n") else "\n"
    form = TableForm(columns, delimiter, line_end, "\ufeff" if is_marked else "")
    return OpenRowFile(name, column, _table_rows(name, reader, columns), form)


def _delimiter(line: str, delimiters: str) -> str:
    """The one that makes most columns of a header; of equals the first. What stands in quotes does not count."""

    def n_columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader([line], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(delimiters, key=n_columns)


def _has_text(cells: Sequence[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _check_columns(name: str, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raises InputError where a table lacks a column that is needed, or has it twice."""
    if missing := [column for column in needed if column not in columns]:
        n_more = len(columns) - _MAX_SHOWN_COLUMNS
        more = f", … {n_more} more" if n_more > 0 else ""
        known = ", ".join(f"{column!r:.60}" for column in columns[:_MAX_SHOWN_COLUMNS])
        raise InputError(
            f"{name} has no column {' or '.join(f'{column!r:.60}' for column in missing)}: its columns are "
            f"{known or '(none)'}{more}; name yours with --column, in a task file with column = and output_column ="
        )
    check_distinct(name, [column for column in columns if column in needed])


def check_distinct(name: str, columns: Sequence[str]) -> None:
    """Raises InputError where two of these columns of a table have one name."""
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise InputError(f"{name} has two columns {twice!r:.60}: give each a name of its own")


def _table_rows(name: str, reader: Any, columns: Sequence[str]) -> Iterator[FoundRow]:
    """The rows under the header; cells that are missing at the end of one are empty."""
    try:
        for cells in filter(_has_text, reader):
            place = f"{name}, line {reader.line_num}"
            if len(cells) > len(columns):
                fault = f"{len(cells)} cells under a header of {len(columns)}"
                yield FoundRow(place, None, f"{fault}: put quotes around texts with the delimiter")
            else:
                values = dict(zip(columns, cells, strict=False))
                yield FoundRow(place, {column: values.get(column, "") for column in columns})
    except csv.Error as error:
        yield FoundRow(f"{name}, line {reader.line_num}", None, f"not CSV: {error}")
