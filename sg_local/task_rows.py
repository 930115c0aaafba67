"""What the files of a task hold: test rows, real inputs without answers, labelled rows.

    load_test_rows(task)    [Example("My parcel is late.", "delivery")]    or {"input": "...", "outputs": ["...", ...]}
    load_inputs(task)       ["My parcel is late.", "Log me in."]
    load_labelled(task)     [Example("Log me in.", "login")]

Texts are stripped, and control characters in them are data. Files: see row_files.py.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, scan_rows
from sg_local.row_files import FoundRow, RowFile, scan_row_file
from sg_local.task import Example, Task
from sg_local.task_texts import Texts, kind_of, listing, normal_label, show

MAX_OUTPUTS = 100  # right ones of one row


def load_test_rows(source: Task | Path, labels: Sequence[str] = ()) -> list[Example]:
    """The rows of a task's test file, or of the given file; further keys are ignored.

    With `labels` (a task brings its own) an output must be one of them but for case and surrounding white
    space, and is returned in the labels' spelling. Raises InputError with the lines of the first ten faults
    and a count of the others, where there is no test file, and where it holds no rows.
    """
    if isinstance(source, Task):
        if source.test is None:
            raise InputError(f'task {source.name} has no test file: add `test = "FILE.jsonl"` to its file')
        labels = source.labels
        source = source.test
    file = RowFile(source)
    # A test file is JSON lines whatever its name is.
    lines = (FoundRow(f"line {line.number}", line.row, line.fault) for line in scan_rows(source))
    rows = _pairs(file, lines, labels)
    if not rows:
        raise InputError(f'{source} holds no rows: write one {{"input": …, "output": …}} a line')
    return rows


def load_labelled(task: Task) -> list[Example]:
    """The rows of the file that `labelled` names, [] where it names none. Raises as `load_test_rows`."""
    file = task.labelled
    if file is None:
        return []
    rows = _pairs(file, scan_row_file(file, [file.column, file.output_column]), task.labels)
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
    for row in scan_row_file(file, [file.column]):
        if row.values is None:
            faults.add(f"{file.path}, {row.place}: {row.fault}")
        elif not isinstance(value := row.values.get(file.column), str):
            reason = f"must be a text, not {kind_of(value)}" if file.column in row.values else "is missing"
            faults.add(f"{file.path}, {row.place}: {file.column} {reason}")
        else:
            inputs.append(value.strip())
    faults.raise_any()
    if not inputs:
        raise InputError(f"{file.path} holds no inputs: remove `inputs`, or write one a line")
    return inputs


def _pairs(file: RowFile, rows: Iterable[FoundRow], labels: Sequence[str]) -> list[Example]:
    """The inputs with their right outputs. Raises InputError with the faults of the file."""
    spellings = {normal_label(label): label for label in labels}
    pairs = []
    faults = Faults()
    for row in rows:
        texts = Texts(faults, f"{file.path}, {row.place}: ")
        if row.values is None:
            texts.add(row.fault)
            continue
        n_faults = faults.count
        text_in = texts.required(row.values, file.column, check_controls=False)
        outputs = _outputs(row, file.output_column, texts)
        for output in outputs:
            if labels and output and normal_label(output) not in spellings:
                texts.add(f"{file.output_column} {show(output)} is not one of the labels ({listing(labels)})")
        if faults.count == n_faults:
            first, *others = dict.fromkeys(spellings.get(normal_label(output), output) for output in outputs)
            pairs.append(Example(text_in, first, tuple(others)))
    faults.raise_any()
    return pairs


def _outputs(row: FoundRow, key: str, texts: Texts) -> list[str]:
    """The right outputs of a row: one under `output`, or several under `outputs`."""
    values = row.values or {}
    several = values.get("outputs")
    if "outputs" not in values or key in values:
        return [texts.required(values, key, check_controls=False)]
    if not isinstance(several, list) or not 0 < len(several) <= MAX_OUTPUTS:
        texts.add(f"outputs must be a list of 1 to {MAX_OUTPUTS} texts")
        return []
    return [texts.check(item, f"outputs[{i}]", check_controls=False) for i, item in enumerate(several)]
