"""What the files of a task hold: test rows, real inputs without answers, labelled rows.

    load_test_rows(task)    [Example("My parcel is late.", "delivery")]    or {"input": "...", "outputs": ["...", ...]}
    load_inputs(task)       ["My parcel is late.", "Log me in."]
    load_labelled(task)     [Example("Log me in.", "login")]

Texts are stripped, and control characters in them are data. Files: see row_files.py.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, scan_rows
from sg_local.task import Example, Task
from sg_local.task_files.row_files import INPUT, OUTPUT, FoundRow, RowFile, open_row_file
from sg_local.task_files.texts import Texts, listing, normal_label, show

MAX_OUTPUTS = 100  # right ones of one row
MAX_ROW_CHARACTERS = 100_000  # more would not fit a line of the run's files, nor any model
_SEVERAL = "outputs"  # the key of several right ones


def load_test_rows(source: Task | Path, labels: Sequence[str] = ()) -> list[Example]:
    """The rows of a task's test file, or of a run's own file at this path; further keys are ignored.

    With `labels` (a task brings its own) an output must be one of them but for case and surrounding white
    space, and is returned in the labels' spelling. Raises InputError with the lines of the first ten faults
    and a count of the others, where there is no test file, and where it holds no rows.
    """
    if isinstance(source, Task):
        if source.test is None:
            raise InputError(f'task {source.name} has no test file: add `test = "FILE.jsonl"` to its file')
        rows = _labelled_rows(RowFile(source.test), source.labels)
        source = source.test
    else:
        lines = (
            FoundRow(f"{source}, line {line.number}", line.row, line.fault) for line in scan_rows(source)
        )
        rows = _pairs(lines, INPUT, OUTPUT, labels)
    if not rows:
        raise InputError(f'{source} holds no rows: write one {{"input": …, "output": …}} a line')
    return rows


def load_labelled(task: Task) -> list[Example]:
    """The rows of the file that `labelled` names, [] where it names none. Raises as `load_test_rows`."""
    file = task.labelled
    if file is None:
        return []
    rows = _labelled_rows(file, task.labels)
    if not rows:
        raise InputError(f"{file.path} holds no rows: remove `labelled`, or write rows into it")
    return rows


def load_inputs(task: Task) -> list[str]:
    """The texts of the file that `inputs` names, empty ones too; [] where it names none.

    Raises InputError with the lines of the first ten faults and a count of the others, and where it holds no rows.
    """
    file = task.inputs
    if file is None:
        return []
    faults = Faults()
    inputs = []
    found = open_row_file(file)
    for place, fields, fault in _bounded(found.rows, [found.column]):
        texts = Texts(faults, f"{place}: ")
        if fields is None:
            texts.add(fault)
        elif _is_blank(fields.get(found.column)):
            inputs.append("")
        else:
            inputs.append(texts.required(fields, found.column, check_controls=False))
    faults.raise_any()
    if not inputs:
        raise InputError(f"{file.path} holds no inputs: remove `inputs`, or write one a line")
    return inputs


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def _bounded(rows: Iterable[FoundRow], columns: Sequence[str]) -> Iterator[FoundRow]:
    """The rows that somebody brings, those too long in these columns as faulty ones."""
    for row in rows:
        if row.fields is not None:
            n_characters = sum(_n_characters(row.fields.get(column)) for column in columns)
            if n_characters > MAX_ROW_CHARACTERS:
                fault = f"it has over {MAX_ROW_CHARACTERS} characters: shorten it, or remove it"
                row = FoundRow(row.place, None, fault)
        yield row


def _n_characters(value: object) -> int:
    """Of a text, or of the texts in a list."""
    texts = value if isinstance(value, list) else [value]
    return sum(len(text) for text in texts if isinstance(text, str))


def _labelled_rows(file: RowFile, labels: Sequence[str]) -> list[Example]:
    """The inputs of a file that somebody brings, with their right outputs."""
    found = open_row_file(file, is_labelled=True)
    rows = _bounded(found.rows, [found.column, file.output_column, _SEVERAL])
    return _pairs(rows, found.column, file.output_column, labels)


def _pairs(rows: Iterable[FoundRow], column: str, output_column: str, labels: Sequence[str]) -> list[Example]:
    """The inputs with their right outputs. Raises InputError with the faults of the file."""
    spellings = {normal_label(label): label for label in labels}
    pairs = []
    faults = Faults()
    rows = list(rows)
    said = (row.fields.get(output_column) for row in rows if row.fields is not None)
    n_rows = Counter(normal_label(output) for output in said if isinstance(output, str))
    told: set[str] = set()  # an output that is no label has one line, with how many rows it is in
    for place, fields, fault in rows:
        texts = Texts(faults, f"{place}: ")
        if fields is None:
            texts.add(fault)
            continue
        n_faults = faults.count
        text_in = texts.required(fields, column, check_controls=False)
        outputs = _outputs(fields, output_column, texts)
        wrong = [output for output in outputs if labels and output and normal_label(output) not in spellings]
        for output in wrong:
            name = normal_label(output)
            also = f" and {n_rows[name] - 1} more" if n_rows[name] > 1 else ""
            if name not in told:
                faults.add(
                    f"{place}{also}: {output_column} {show(output)} is not one of the labels ({listing(labels)})"
                )
            told.add(name)
        if faults.count == n_faults and not wrong:
            first, *others = dict.fromkeys(spellings.get(normal_label(output), output) for output in outputs)
            pairs.append(Example(text_in, first, tuple(others)))
    faults.raise_any()
    return pairs


def _outputs(fields: Mapping[str, object], key: str, texts: Texts) -> list[str]:
    """The right outputs of a row: one under `output`, or several under `outputs`."""
    several = fields.get(_SEVERAL)
    if _SEVERAL not in fields or key in fields:
        return [texts.required(fields, key, check_controls=False)]
    if not isinstance(several, list) or not 0 < len(several) <= MAX_OUTPUTS:
        texts.add(f"{_SEVERAL} must be a list of 1 to {MAX_OUTPUTS} texts")
        return []
    return [texts.check(item, f"{_SEVERAL}[{i}]", check_controls=False) for i, item in enumerate(several)]
