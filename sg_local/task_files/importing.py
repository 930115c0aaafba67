"""Tasks that others wrote as JSON, turned into ours: Super-NaturalInstructions v2, and tasks as one object.

    {"Definition": ["Say it politely."], "Positive Examples": [...],
     "Instances": [{"input": "Give me tea.", "output": ["Could I have tea?", "May I have tea?"]}]}
    {"name": "sst2", "instruction": "...", "labels": ["positive", "negative"], "examples": [...]}

Format: https://github.com/allenai/natural-instructions.
"""

import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, read_json
from sg_local.task import FILE_KEYS, MAX_EXAMPLES, TASK_KEYS, Example, Task, parse_task
from sg_local.task_files.rows import MAX_OUTPUTS, load_test_rows
from sg_local.task_files.texts import kind_of, normal_label

MAX_IMPORT_BYTES = 256 << 20
# An imported task is classification if its outputs look like a small closed set.
MAX_IMPORTED_LABELS = 20
MAX_IMPORTED_LABEL_CHARS = 40


def import_task(path: Path, n_test_rows: int = 300, seed: int = 0) -> tuple[Task, list[Example]]:
    """A task and its test rows from a JSON file: at most `n_test_rows`, drawn with `seed`, no demonstrations.

    Two forms are read:
      Super-NaturalInstructions v2: "Definition", "Positive Examples", "Instances", "Instance License"; the
        name is the file's. It is classification if the instances have 2 to 20 different outputs, each of at
        most 40 characters and seen at least twice, of several right ones the first. A test row keeps all its
        right outputs that are texts, with labels those that are labels. Instances with an empty text are left
        out, and so are positive examples whose output is no label.
      a task as one object: "name", "instruction", "labels", "examples", "licence"; its test rows are those of
        ../test/NAME.jsonl, seen from the file, if that is there.

    The task's `test` is None: where the rows are written to is the caller's choice. Raises InputError with
    the faults of the file, and where it is over 256 MiB.
    """
    path = Path(path)
    data = read_json(path, MAX_IMPORT_BYTES)
    if isinstance(data, dict) and "Definition" in data:
        task, rows = _from_super_natural_instructions(data, path)
    elif isinstance(data, dict) and "instruction" in data:
        task, rows = _from_task_object(data, path)
    else:
        raise InputError(
            f'{path} is no task: expected a JSON object with the key "instruction", or "Definition" '
            "as in Super-NaturalInstructions"
        )
    example_inputs = {example.input for example in task.examples}
    eligible = [row for row in rows if row.input not in example_inputs]
    drawn = random.Random(seed).sample(range(len(eligible)), min(n_test_rows, len(eligible)))
    return task, [eligible[i] for i in sorted(drawn)]


def _from_super_natural_instructions(data: Mapping[str, object], path: Path) -> tuple[Task, list[Example]]:
    definition = data["Definition"]
    if isinstance(definition, list) and definition:  # a list of one, throughout the collection
        definition = definition[0]
    faults = Faults()
    instances = _pairs(data, "Instances", path, faults)
    demonstrations = _pairs(data, "Positive Examples", path, faults)
    faults.raise_any()

    spellings = labels_among(row.output for row in instances)
    if spellings:
        instances = [_labelled(row, spellings) for row in instances]
        demonstrations = [
            Example(row.input, spellings[normal_label(row.output)])
            for row in demonstrations
            if normal_label(row.output) in spellings
        ]
    table: dict[str, object] = {
        "name": _slug(path.stem),
        "instruction": _newlines(definition) if isinstance(definition, str) else definition,
        "labels": sorted(spellings.values()),
        "examples": [{"input": row.input, "output": row.output} for row in demonstrations[:MAX_EXAMPLES]],
    }
    if licence := _joined(data.get("Instance License")):
        table["licence"] = licence
    return parse_task(table, path), instances


def _labelled(row: Example, spellings: Mapping[str, str]) -> Example:
    """A row with those of its outputs that are labels, in the labels' spelling."""
    labels = [spellings[normal_label(output)] for output in row.outputs if normal_label(output) in spellings]
    first, *others = dict.fromkeys(labels)
    return Example(row.input, first, tuple(others))


def _from_task_object(data: Mapping[str, object], path: Path) -> tuple[Task, list[Example]]:
    table = {key: data[key] for key in TASK_KEYS if key in data and key not in FILE_KEYS}
    if licence := _joined(table.pop("licence", None)):
        table["licence"] = licence
    task = parse_task(table, path)
    test = path.absolute().parent.parent / "test" / f"{task.name}.jsonl"
    return task, load_test_rows(test, task.labels) if os.path.isfile(test) else []


def _pairs(data: Mapping[str, object], key: str, path: Path, faults: Faults) -> list[Example]:
    """The inputs and their right outputs under `key`, those with an empty first one left out."""
    items = data.get(key)
    if not isinstance(items, list):
        faults.add(f"{path}: {key} must be a list, not {kind_of(items)}")
        return []
    pairs = []
    for i, item in enumerate(items):
        match item:
            case {"input": str(text_in), "output": str() | [str(), *_] as output}:
                output, *others = [output] if isinstance(output, str) else output
                first = _newlines(output).strip()
                texts = [
                    _newlines(text).strip() for text in others[: MAX_OUTPUTS - 1] if isinstance(text, str)
                ]
                further = [text for text in dict.fromkeys(texts) if text and text != first]
                pair = Example(_newlines(text_in).strip(), first, tuple(further))
                if pair.input and pair.output:
                    pairs.append(pair)
            case _:
                faults.add(f"{path}: {key}[{i}] needs a text as its input and a text or texts as its output")
    return pairs


def labels_among(outputs: Iterable[str]) -> dict[str, str]:
    """Each label's commonest spelling by its normal form; empty if the outputs are no small closed set."""
    spellings: dict[str, Counter[str]] = {}
    for output in outputs:
        spellings.setdefault(normal_label(output), Counter())[output] += 1
        if len(spellings) > MAX_IMPORTED_LABELS or len(output) > MAX_IMPORTED_LABEL_CHARS:
            return {}
    if len(spellings) < 2 or any(counts.total() < 2 for counts in spellings.values()):
        return {}
    return {normal: counts.most_common(1)[0][0] for normal, counts in spellings.items()}


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _joined(value: object) -> object:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value


def _slug(stem: str) -> str:
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._-]+", "-", plain).strip("._-")[:64] or "task"
