"""The inputs that `predict` reads, and the lines of their answers: what came as a table is answered as a table.

    My parcel is late.                        a plain line    -> {"input": "My parcel is late.", "output": "delivery"}
    {"id": 7, "input": "My parcel is late."}  a JSON line     -> {"id": 7, "input": "...", "output": "delivery"}
    id,text                                   a table         -> id,text,output,error
    7,My parcel is late.

Keys and columns pass through. Where a row has an "output" already, that is taken as right, and called "reference" from
then on. How the file is read: see task_files/row_files.py.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sg_local.errors import InputError
from sg_local.escape import json_text
from sg_local.files import Faults
from sg_local.task_files.row_files import (
    OUTPUT,
    RowFile,
    TableForm,
    check_distinct,
    encoding_fault,
    open_row_file,
)
from sg_local.task_files.texts import Texts

REFERENCE = "reference"
# What is added to a row beside its output; of an earlier call they are replaced.
PROBABILITY, PROBABILITIES, ERROR = "probability", "probabilities", "error"


class AskedRow(NamedTuple):
    """An input as it is asked, all keys or columns that it came with, and the right output where it is known."""

    input: str
    fields: Mapping[str, object]
    reference: str | None


@dataclass(frozen=True)
class InputFile:
    """The inputs of a file in their order; form is None where it is no table."""

    rows: list[AskedRow]
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


def read_inputs(file: RowFile) -> InputFile:
    """The inputs of a file, or of standard input for the path "-". Raises InputError with the lines that are wrong."""
    if fault := encoding_fault(file.encoding):
        raise InputError(fault)
    found = open_row_file(file, takes_stdin=True)
    if found.form is not None:  # all of them pass through
        check_distinct(found.name, found.form.columns)
    faults = Faults()
    rows: list[AskedRow] = []
    for place, fields, fault in found.rows:
        texts = Texts(faults, f"{place}: ")
        if fields is None:
            texts.add(fault)
        elif text := texts.required(fields, found.column, check_controls=False):
            rows.append(AskedRow(text, fields, _reference(fields)))
    faults.raise_any()
    if not rows:
        raise InputError(
            f'{found.name} holds no inputs: give JSON lines with "input", a table with that column, or one input a line'
        )
    return InputFile(rows, found.form)


@dataclass(frozen=True)
class AnswerLines:
    """The lines of answers: of a table where the inputs came in one, else of JSON, keys and columns in their order.

    is_scored: whether the answers have probabilities. labels: whose probabilities stand in each line.
    """

    form: TableForm | None
    is_scored: bool = False
    labels: Sequence[str] = ()

    @property
    def header(self) -> str | None:
        """The first line of a table."""
        if self.form is None:
            return None
        names = [OUTPUT, *([PROBABILITY] if self.is_scored else []), *map(_column_of, self.labels), ERROR]
        return self.form.begins_with + _cells(
            self.form, [*self._passed(dict.fromkeys(self.form.columns)), *names]
        )

    def line(self, row: AskedRow, answer: Answer) -> str:
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


def _reference(fields: Mapping[str, object]) -> str | None:
    value = fields.get(REFERENCE, fields.get(OUTPUT))
    return value.strip() or None if isinstance(value, str) else None
