"""A file of inputs as people have them, and the lines of its answers: plain lines, JSON lines, a table.

    My parcel is late.                        a plain line    -> {"input": "My parcel is late.", "output": "delivery"}
    {"id": 7, "input": "My parcel is late."}  a JSON line     -> {"id": 7, "input": "...", "output": "delivery"}
    id,text                                   a table, which is answered as a table: id,text,output,error
    7,My parcel is late.

Keys and columns pass through. Where a row has an "output" already, that is taken as right, and called "reference" from
then on. Formats: JSON Lines (https://jsonlines.org), also as one JSON array; CSV (RFC 4180), with commas, semicolons or
tabs. A file's name says which; where it does not, the content decides.
"""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sg_local.errors import InputError
from sg_local.escape import json_text
from sg_local.files import Faults, read_text

MAX_INPUT_BYTES = 256 << 20
INPUT, OUTPUT, REFERENCE = "input", "output", "reference"
# What is added to a row beside its output; of an earlier call they are replaced.
PROBABILITY, PROBABILITIES, ERROR = "probability", "probabilities", "error"
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
_BYTE_ORDER_MARK = "\ufeff"


class GivenRow(NamedTuple):
    """An input as it is asked, all keys or columns that it came with, and the right output where it is known."""

    input: str
    fields: Mapping[str, object]
    reference: str | None


@dataclass(frozen=True)
class TableForm:
    """How a table was written, so that its answers are written in the same way."""

    columns: tuple[str, ...]
    delimiter: str
    line_end: str
    begins_with: str  # a byte order mark, by which Excel knows UTF-8


@dataclass(frozen=True)
class InputFile:
    """The inputs of a file in their order; form is None where it is no table."""

    rows: list[GivenRow]
    form: TableForm | None = None

    @property
    def texts(self) -> list[str]:
        return [row.input for row in self.rows]

    @property
    def line_end(self) -> str:
        return self.form.line_end if self.form else "\n"


@dataclass(frozen=True)
class Answer:
    """What stands beside a row: an output, or why there is none.

    probabilities: of each label, where they were asked for; probability: of the one that the model answered with.
    """

    output: str | None
    error: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] | None = None


def read_inputs(file: Path, column: str | None = None) -> InputFile:
    """The inputs of a file, or of standard input for "-".

    column: of a table, or key of a JSON line, that holds the input; where none is named, it is "input", and of a table
    with one column that one. Raises InputError with the lines that are wrong.
    """
    name, text, begins_with = _read(file)
    kind = _kind(file, text, names_a_column=column is not None)
    if kind == "table":
        delimiters = _DELIMITERS.get(file.suffix.lower(), _DELIMITERS[".csv"])
        return _table(name, text, delimiters, column, begins_with)
    # Not splitlines(), which would also break an input at a form feed or U+2028.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise _no_inputs(name)
    if kind == "plain":
        return InputFile([GivenRow(line, {INPUT: line}, None) for _, line in lines])
    faults = Faults()
    rows: list[GivenRow] = []
    for number, line in _elements(name, text, faults) if kind == "array" else lines:
        try:
            rows.append(_json_row(json.loads(line) if isinstance(line, str) else line, column or INPUT))
        except (ValueError, RecursionError) as error:
            faults.add(f"{name}, {'element' if kind == 'array' else 'line'} {number}: {error}")
    faults.raise_any()
    if not rows:
        raise _no_inputs(name)
    return InputFile(rows)


def checked_text(value: object, fault: str = "there is no text") -> str:
    """An input without white space around it. Raises ValueError, with `fault` where there is none."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(fault)
    value.encode()  # fails where half of a surrogate pair stands alone
    return value.strip()


@dataclass(frozen=True)
class AnswerLines:
    """The lines of answers: of a table where the inputs came in one, else of JSON, keys and columns in their order.

    is_scored: whether the answers have probabilities. labels: whose probabilities stand in each line.
    """

    form: TableForm | None
    is_scored: bool = False
    labels: Sequence[str] = ()

    @property
    def head(self) -> str | None:
        """The first line of a table."""
        if self.form is None:
            return None
        names = [OUTPUT, *([PROBABILITY] if self.is_scored else []), *map(_column_of, self.labels), ERROR]
        return self.form.begins_with + _cells(
            self.form, [*self._passed(dict.fromkeys(self.form.columns)), *names]
        )

    def line(self, row: GivenRow, answer: Answer) -> str:
        """The line of a row and its answer."""
        passed = self._passed(row.fields)
        if self.form is not None:
            probabilities = [(answer.probabilities or {}).get(label) for label in self.labels]
            scores = [answer.probability, *probabilities] if self.is_scored else []
            return _cells(self.form, [*passed.values(), answer.output, *scores, answer.error])
        added: dict[str, object] = {OUTPUT: answer.output}
        if answer.probability is not None:
            added[PROBABILITY] = answer.probability
        if self.labels and answer.probabilities is not None:
            added[PROBABILITIES] = dict(answer.probabilities)
        if answer.error is not None:
            added[ERROR] = answer.error
        return json_text({**passed, **added})

    def _passed(self, fields: Mapping[str, object]) -> dict[str, object]:
        """What passes through: not what an earlier call added, and the given output under its new name."""
        added = {PROBABILITY, PROBABILITIES, ERROR, *map(_column_of, self.labels)}
        if REFERENCE in fields:
            added.add(OUTPUT)
        return {REFERENCE if key == OUTPUT else key: fields[key] for key in fields if key not in added}


def _column_of(label: str) -> str:
    """The column of a label's probability."""
    return f"p({label})"


def _cells(form: TableForm, values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, delimiter=form.delimiter, lineterminator=form.line_end).writerow(values)
    return line.getvalue().removesuffix(form.line_end)


def _kind(file: Path, text: str, *, names_a_column: bool) -> str:
    """What a file holds: by its name, or by its content where the name does not tell."""
    suffix = file.suffix.lower()
    if suffix in _DELIMITERS:
        return "table"
    begins = text.lstrip()[:1]
    if suffix in _JSON_SUFFIXES:
        return "array" if suffix == ".json" and begins == "[" else "lines"
    if begins == "{" and suffix != ".txt":
        return "lines"
    return "table" if names_a_column else "plain"


def _elements(name: str, text: str, faults: Faults) -> list[tuple[int, object]]:
    """The elements of a JSON array with their numbers, from 1."""
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        faults.add(f"{name}: not JSON: {error}")
        return []
    return [*enumerate(array, 1)]


def _json_row(row: object, key: str) -> GivenRow:
    """Raises ValueError where it holds no input, or what no JSON can hold."""
    fields = row if isinstance(row, dict) else {}
    text = checked_text(fields.get(key), f"there is no text under {json_text(key)}")
    json_text(fields)  # refuses NaN and infinities
    return GivenRow(text, fields, _reference(fields))


def _reference(fields: Mapping[str, object]) -> str | None:
    value = fields.get(REFERENCE, fields.get(OUTPUT))
    return value.strip() or None if isinstance(value, str) else None


def _table(name: str, text: str, delimiters: str, column: str | None, begins_with: str) -> InputFile:
    """The rows of a table with a head line. Raises InputError with the lines that are wrong."""
    head = text.partition("\n")[0]
    delimiter = max(delimiters, key=head.count)  # the first of equally frequent ones
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    faults = Faults()
    rows: list[GivenRow] = []
    columns: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                column = _input_column(name, columns, column)
                continue
            if len(cells) > len(columns):
                faults.add(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, the head has {len(columns)} columns"
                )
                continue
            fields = {**dict.fromkeys(columns, ""), **dict(zip(columns, cells, strict=False))}
            try:
                rows.append(
                    GivenRow(
                        checked_text(fields[str(column)], f"there is no text in the column {column!r:.60}"),
                        fields,
                        _reference(fields),
                    )
                )
            except ValueError as error:
                faults.add(f"{name}, line {reader.line_num}: {error}")
    except csv.Error as error:
        faults.add(f"{name}, line {reader.line_num}: not CSV: {error}")
    faults.raise_any()
    if not rows:
        raise _no_inputs(name)
    line_end = "\r\n" if head.endswith("\r") else "\n"
    return InputFile(rows, TableForm(tuple(columns), delimiter, line_end, begins_with))


def _input_column(name: str, columns: list[str], column: str | None) -> str:
    """The column that holds the input. Raises InputError where that is not known."""
    if len(set(columns)) < len(columns):
        twice = next(item for item in columns if columns.count(item) > 1)
        raise InputError(f"{name} has two columns {twice!r:.60}: give each a name of its own")
    if column is None and len(columns) == 1:
        return columns[0]
    if (column or INPUT) not in columns:
        listed = ", ".join(f"{item!r:.60}" for item in columns[:10])
        raise InputError(f"{name} has no column {column or INPUT!r:.60}: give one of {listed} with --column")
    return column or INPUT


def _no_inputs(name: str) -> InputError:
    return InputError(
        f'{name} holds no inputs: give JSON lines with "input", a table with that column, or one input a line'
    )


def _read(file: Path) -> tuple[str, str, str]:
    """What a file is called, its text, and the byte order mark before it, if there is one."""
    if str(file) != "-":
        text = read_text(file, MAX_INPUT_BYTES)
        with open(file, "rb") as opened:
            begins_with = _BYTE_ORDER_MARK if opened.read(3) == _BYTE_ORDER_MARK.encode() else ""
        return str(file), text, begins_with
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise InputError(f"standard input is over the limit of {MAX_INPUT_BYTES} bytes: split it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 ({error.reason} at byte {error.start})") from error
    return "standard input", text.removeprefix(_BYTE_ORDER_MARK), text[: text.startswith(_BYTE_ORDER_MARK)]
