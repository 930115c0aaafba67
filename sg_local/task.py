"""A task: what to do, up to three examples and, for classification, the labels to choose from.

    name = "support-or-undermine"
    instruction = "You will be given a claim and a perspective. Does it support or undermine the claim?"
    labels = ["support", "undermine"]            # absent where the answer is free text
    test = "support-or-undermine.test.jsonl"     # optional, for scoring only: rows with input and output(s)
    inputs = "claims.txt"                        # optional: real inputs without answers
    labelled = {file = "gold.csv", column = "text", output_column = "label"}    # optional: real pairs
    shares = {support = 0.3, undermine = 0.7}    # optional: how often the labels occur
    licence = "CC BY-SA 4.0"                     # optional, of the texts

    [[examples]]                                 # those after the third count as labelled
    input = "claim: Uniforms cost too much. perspective: They can be bought second-hand."
    output = "undermine"

Format: TOML 1.0 (https://toml.io). What the files hold is read by task_files/rows.py.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, read_toml, toml_text
from sg_local.task_files.row_files import RowFile, encoding_fault
from sg_local.task_files.texts import Texts, kind_of, listing, normal_label, show, suggestion

SHIPPED_DIR = Path(__file__).parent / "tasks"
TASK_KEYS = ("name", "instruction", "labels", "test", "inputs", "labelled", "shares", "licence", "examples")
FILE_KEYS = ("test", "inputs", "labelled")  # of which a run keeps copies
EXAMPLE_KEYS = ("input", "output")
ROW_FILE_KEYS = ("file", "column", "output_column", "encoding")
MAX_CARRIED_TOKENS = 1 << 20
MAX_EXAMPLES = 3
MAX_SHOWN_PATH = 500  # characters; a file can hold a path of a megabyte
SHARES_SLACK = 0.02  # shares that were rounded add up to a little more or less than 1

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# What a label may not hold: line ends, C1, and what turns the direction of a line or hides in it.
_NOT_IN_A_LABEL = re.compile(r"[\n\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Example:
    """One input with its right output; a test row may have several."""

    input: str
    output: str
    other_outputs: tuple[str, ...] = ()  # right as well

    @property
    def outputs(self) -> tuple[str, ...]:
        """All right outputs."""
        return (self.output, *self.other_outputs)

    def as_row(self) -> dict[str, object]:
        """As a line of a file has it."""
        if not self.other_outputs:
            return {"input": self.input, "output": self.output}
        return {"input": self.input, "outputs": list(self.outputs)}


@dataclass(frozen=True)
class Task:
    """A checked task: texts are stripped; if there are labels, every example's output is one of them."""

    name: str
    instruction: str
    examples: tuple[Example, ...]  # none where they are yet to be chosen among the labelled rows
    labels: tuple[str, ...] = ()
    test: Path | None = None  # absolute when it comes from load_task
    licence: str | None = None
    inputs: RowFile | None = None
    labelled: RowFile | None = None
    shares: tuple[float, ...] = ()  # of the labels, in their order; they add up to 1
    more_examples: tuple[Example, ...] = ()  # after the third: labelled rows

    @property
    def is_classification(self) -> bool:
        return bool(self.labels)


@dataclass(frozen=True)
class CarriedTask:
    """The task that a tuned GGUF carries, and how it is to be asked."""

    task: Task
    max_new_tokens: int
    prompt_format: str  # "gguf" or "vicuna"


def shipped_names() -> list[str]:
    """The names of the tasks that ship with the package, sorted."""
    return sorted(path.stem for path in SHIPPED_DIR.glob("*.toml"))


def load_task(source: str | Path | Task) -> Task:
    """The task in a .toml file, or the shipped one of that name; a Task is checked as one from a file is.

    Raises InputError with all faults at once, one a line.
    """
    task, faults = read_task(source)
    faults.raise_any()
    return task


def read_task(source: str | Path | Task) -> tuple[Task, Faults]:
    """The same, and its faults, for who adds those of its files; a faulty part is read as if it were not there.

    Raises InputError where there is no task file at all, or no TOML in it.
    """
    if isinstance(source, Task):
        return _parse(_table(source), Path(f"task {source.name}"))
    names = shipped_names()
    if isinstance(source, str) and source in names:
        path = SHIPPED_DIR / f"{source}.toml"
    elif Path(source).suffix in {".toml", ".json"} or os.sep in str(source) or os.path.isfile(source):
        path = Path(source)
    else:
        raise InputError(
            f"no shipped task is named {show(str(source))}{suggestion(str(source), names)}: "
            f"give the path of a .toml file, or one of {', '.join(names) or '(none are installed)'}"
        )
    if path.suffix == ".json":
        raise InputError(f"{path} is not a TOML file: turn it into one with `sg-local task import`")
    return _parse(read_toml(path), path)


def task_to_toml(task: Task) -> str:
    """The text of a task file from which `load_task` reads an equal task (`test` is written as it stands)."""
    return toml_text(_table(task))


def _table(task: Task) -> dict[str, object]:
    """A task as a task file has it."""
    values: dict[str, object] = {
        "name": task.name,
        "instruction": task.instruction,
        "labels": list(task.labels),
        "test": task.test and str(task.test),
        "licence": task.licence,
        "inputs": task.inputs and _file_table(task.inputs),
        "labelled": task.labelled and _file_table(task.labelled),
        "shares": dict(zip(task.labels, task.shares, strict=False)),
        "examples": [example.as_row() for example in (*task.examples, *task.more_examples)],
    }
    return {key: value for key, value in values.items() if value}


def _file_table(file: RowFile) -> dict[str, object]:
    """A file of rows as a task file has it, without what is as by default."""
    default = RowFile(file.path)
    keys = [key for key in ROW_FILE_KEYS if key != "file" and getattr(file, key) != getattr(default, key)]
    return {"file": str(file.path), **{key: getattr(file, key) for key in keys}}


def carried_task(text: str, source: Path) -> CarriedTask:
    """The task that a tuned GGUF carries in `sg_local.task`, checked like a task file: it may be a stranger's.

    {"name": "support-inbox", "instruction": "...", "labels": [...], "examples": [{"input": "...", "output": "..."}],
     "max_new_tokens": 128, "prompt_format": "gguf"}

    Raises InputError with all faults, one a line.
    """
    where = f"{source}, sg_local.task"
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where}: not JSON: {reason}") from error
    if not isinstance(table, dict):
        raise InputError(f"{where}: not a table, but {kind_of(table)}")
    faults = Faults(n_shown=50)
    texts = Texts(faults, f"{where}: ")
    name = _parse_name(table, texts)
    instruction = texts.required(table, "instruction")
    labels = _parse_labels(table.get("labels"), texts, fewest=1)
    examples = _parse_examples(table.get("examples"), labels, texts)
    if len(examples) > MAX_EXAMPLES:
        texts.add(f"there are {len(examples)} examples, the limit is {MAX_EXAMPLES}")
    max_new_tokens, prompt_format = table.get("max_new_tokens"), table.get("prompt_format")
    if type(max_new_tokens) is not int or not 0 < max_new_tokens <= MAX_CARRIED_TOKENS:
        texts.add(f"max_new_tokens is {max_new_tokens!r:.40}, not an integer from 1 to {MAX_CARRIED_TOKENS}")
        max_new_tokens = 1
    if prompt_format not in ("gguf", "vicuna"):
        texts.add(f"prompt_format is {prompt_format!r:.40}, not 'gguf' or 'vicuna'")
    faults.raise_any()
    return CarriedTask(Task(name, instruction, examples, labels), max_new_tokens, str(prompt_format))


def _parse_name(table: Mapping[str, object], texts: "Texts") -> str:
    name = texts.required(table, "name")
    if name and not _NAME.fullmatch(name):
        texts.add(f"name {show(name)} must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit")
    return name


def parse_task(table: Mapping[str, object], path: Path) -> Task:
    """The task in `table`, which was read from `path`. Raises InputError with all faults."""
    task, faults = _parse(table, path)
    faults.raise_any()
    return task


def _parse(table: Mapping[str, object], path: Path) -> tuple[Task, Faults]:
    faults = Faults(n_shown=50)
    texts = Texts(faults, f"{path}: ")
    texts.check_keys(table, TASK_KEYS)
    name = _parse_name(table, texts)
    instruction = texts.required(table, "instruction")
    labels = _parse_labels(table.get("labels", []), texts)
    test = texts.optional(table, "test")
    place = path.absolute().parent
    test_path = _existing(place / test, "test", texts) if test else None
    inputs = _parse_row_file(table, "inputs", place, texts)
    labelled = _parse_row_file(table, "labelled", place, texts)
    shares = _parse_shares(table["shares"], labels, texts) if "shares" in table else ()
    licence = texts.optional(table, "licence")
    examples = _parse_examples(table.get("examples", []), labels, texts)
    if not table.get("examples", []) and "labelled" not in table:
        texts.add(
            "there are no examples: add one to three tables headed [[examples]] with input and output, or "
            "`labelled` rows to choose them from"
        )
    task = Task(
        name,
        instruction,
        examples[:MAX_EXAMPLES],
        labels,
        test_path,
        licence,
        inputs,
        labelled,
        shares,
        examples[MAX_EXAMPLES:],
    )
    return task, faults


def _existing(path: Path, key: str, texts: Texts) -> Path | None:
    """The path of a file that is there; else None, with a fault."""
    # os.path.isfile does not mind a path that is too long, or a directory that nobody may look into.
    if os.path.isfile(path):
        return path
    texts.add(f"{key} file {str(path)[:MAX_SHOWN_PATH]} is missing: correct `{key}`, or remove it")
    return None


def _parse_row_file(table: Mapping[str, object], key: str, place: Path, texts: Texts) -> RowFile | None:
    """The file that `inputs` or `labelled` names, alone or in a table; None where there is none, or none to read."""
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        value = {"file": value}
    part = Texts(texts.faults, f"{texts.prefix}{key}: ")
    known = tuple(name for name in ROW_FILE_KEYS if name != "output_column" or key == "labelled")
    part.check_keys(value, known)
    n_faults = part.faults.count
    file = part.required(value, "file")
    named = {name: text for name in known[1:] if (text := part.optional(value, name))}
    if fault := encoding_fault(named.get("encoding", "utf-8")):
        part.add(fault)
    path = _existing(place / file, key, texts) if file else None
    return RowFile(path, **named) if path and part.faults.count == n_faults else None


def _parse_shares(value: object, labels: Sequence[str], texts: Texts) -> tuple[float, ...]:
    """How often each label occurs, in the order of the labels; () where something is wrong with it."""
    part = Texts(texts.faults, f"{texts.prefix}shares: ")
    n_faults = part.faults.count
    if not isinstance(value, dict):
        part.add(f"must be a table such as {{refund = 0.3, login = 0.7}}, not {kind_of(value)}")
        return ()
    if not labels:
        part.add("there are no labels that they could be of: add `labels`, or remove `shares`")
        return ()
    for label in value:
        if label not in labels:
            part.add(f"{show(label)} is not one of the labels ({listing(labels)}){suggestion(label, labels)}")
    for label in labels:
        share = value.get(label)
        if label not in value:
            part.add(f"the label {show(label)} has none: write how often it occurs, as in 0.2 for a fifth")
        elif isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
            part.add(f"that of {show(label)} is {share!r:.40}, not a number over 0")
    if part.faults.count > n_faults:
        return ()
    total = math.fsum(value.values())
    if abs(total - 1) > SHARES_SLACK:
        part.add(f"they add up to {total:.4g}, not to 1: write them as in 0.2 for a fifth")
        return ()
    return tuple(value[label] / total for label in labels)


def _parse_labels(value: object, texts: "Texts", fewest: int = 2) -> tuple[str, ...]:
    if not isinstance(value, list):
        texts.add(f"labels must be a list of texts, not {kind_of(value)}")
        return ()
    labels: dict[str, str] = {}  # as scoring compares them -> as they are written
    for i, item in enumerate(value):
        label = texts.check(item, f"labels[{i}]")
        if hidden := _NOT_IN_A_LABEL.search(label):
            texts.add(
                f"labels[{i}] holds the character U+{ord(hidden[0]):04X}, which is not plain to see: remove it"
            )
        if normal_label(label) in labels:
            texts.add(f"label {show(label)} is a duplicate: scoring ignores case and surrounding white space")
        elif label:
            labels[normal_label(label)] = label
    if 0 < len(value) < fewest:
        texts.add("labels has one label, a classification task needs two: add the others, or remove `labels`")
    return tuple(labels.values())


def _parse_examples(value: object, labels: Sequence[str], texts: Texts) -> tuple[Example, ...]:
    if not isinstance(value, list):
        texts.add(f"examples must be tables headed [[examples]], not {kind_of(value)}")
        return ()
    examples = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            texts.add(f"examples[{i}] must be a table with input and output, not {kind_of(item)}")
            continue
        part = Texts(texts.faults, f"{texts.prefix}examples[{i}]: ")
        part.check_keys(item, EXAMPLE_KEYS)
        example = Example(part.required(item, "input"), part.required(item, "output"))
        if labels and example.output and example.output not in labels:
            hint = suggestion(example.output, labels)
            part.add(f"output {show(example.output)} is not one of the labels ({listing(labels)}){hint}")
        examples.append(example)
    return tuple(examples)
