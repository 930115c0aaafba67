"""A task: what to do, up to three demonstrations and, for classification, the labels to choose from.

    name = "support-or-undermine"
    instruction = "You will be given a claim and a perspective. Does it support or undermine the claim?"
    labels = ["support", "undermine"]            # absent for generation tasks
    test = "support-or-undermine.test.jsonl"     # optional, for scoring only: JSON lines of the same two keys
    licence = "CC BY-SA 4.0"                     # optional, of the texts

    [[examples]]
    input = "claim: Uniforms cost too much. perspective: They can be bought second-hand."
    output = "undermine"

Format: TOML 1.0 (https://toml.io). Also read here: the JSON of Super-NaturalInstructions v2
(https://github.com/allenai/natural-instructions), which `import_task` turns into the above.
"""

import difflib
import json
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, read_json, read_toml, scan_rows, toml_text

EXAMPLES_DIR = Path(__file__).parent / "tasks"
TASK_KEYS = ("name", "instruction", "labels", "test", "licence", "examples")
EXAMPLE_KEYS = ("input", "output")
MAX_CARRIED_TOKENS = 1 << 20
MAX_EXAMPLES = 3
MAX_IMPORT_BYTES = 256 << 20
# An imported task is classification if its outputs look like a small closed set.
MAX_IMPORTED_LABELS = 20
MAX_IMPORTED_LABEL_CHARS = 40
MAX_SHOWN_PATH = 500  # characters; a file can hold a path of a megabyte

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")  # C0 without tab and newline
# What a label may not hold either: line ends, C1, and what turns the direction of a line or hides in it.
_NOT_IN_A_LABEL = re.compile(r"[\n\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """One input with its right output."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """A checked task: texts are stripped; if there are labels, every example's output is one of them."""

    name: str
    instruction: str
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    test: Path | None = None  # absolute when it comes from load_task
    licence: str | None = None

    @property
    def is_classification(self) -> bool:
        return bool(self.labels)


@dataclass(frozen=True)
class CarriedTask:
    """The task that a tuned GGUF carries, and how it is to be asked."""

    task: Task
    max_new_tokens: int
    prompt_format: str  # "gguf" or "vicuna"


def example_names() -> list[str]:
    """The names of the tasks that ship with the package, sorted."""
    return sorted(path.stem for path in EXAMPLES_DIR.glob("*.toml"))


def load_task(source: str | Path | Task) -> Task:
    """The task in a .toml file, or the shipped example of that name; a Task is checked as one from a file is.

    Raises InputError with all faults at once, one a line.
    """
    if isinstance(source, Task):
        return _parse_task(_table(source), Path(f"task {source.name}"))
    names = example_names()
    if isinstance(source, str) and source in names:
        path = EXAMPLES_DIR / f"{source}.toml"
    elif Path(source).suffix in {".toml", ".json"} or os.sep in str(source) or os.path.isfile(source):
        path = Path(source)
    else:
        raise InputError(
            f"no example task is named {_show(str(source))}{_suggestion(str(source), names)}: "
            f"give the path of a .toml file, or one of {', '.join(names) or '(none are installed)'}"
        )
    if path.suffix == ".json":
        raise InputError(f"{path} is not a TOML file: turn it into one with `sg-local task import`")
    return _parse_task(read_toml(path), path)


def load_test_rows(source: Task | Path, labels: Sequence[str] = ()) -> list[Example]:
    """The rows of a task's test file, or of the given file, texts stripped; further keys are ignored.

    With `labels` (a task brings its own) an output must be one of them but for case and surrounding white
    space, and is returned in the labels' spelling. Raises InputError with the lines of the first ten faults
    and a count of the others, where there is no test file, and where it holds no rows.
    """
    if isinstance(source, Task):
        if source.test is None:
            raise InputError(f'task {source.name} has no test file: add `test = "FILE.jsonl"` to its file')
        labels = source.labels
        source = source.test
    spellings = {_normal(label): label for label in labels}
    rows = []
    faults = Faults()
    for line in scan_rows(source):
        texts = _Texts(faults, f"{source}, line {line.number}: ")
        if line.row is None:
            texts.add(line.fault)
            continue
        n_faults = faults.count
        text_in = texts.required(line.row, "input", check_controls=False)
        output = texts.required(line.row, "output", check_controls=False)
        if labels and output and _normal(output) not in spellings:
            texts.add(f"output {_show(output)} is not one of the labels ({_listing(labels)})")
        if faults.count == n_faults:
            rows.append(Example(text_in, spellings.get(_normal(output), output)))
    faults.raise_any()
    if not rows:
        raise InputError(f'{source} holds no rows: write one {{"input": …, "output": …}} a line')
    return rows


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
        "examples": [vars(example) for example in task.examples],
    }
    return {key: value for key, value in values.items() if value}


def import_task(path: Path, n_test_rows: int = 300, seed: int = 0) -> tuple[Task, list[Example]]:
    """A task and its test rows from a JSON file: at most `n_test_rows`, drawn with `seed`, no demonstrations.

    Two forms are read:
      Super-NaturalInstructions v2: "Definition", "Positive Examples", "Instances", "Instance License"; the
        name is the file's. It is classification if the instances have 2 to 20 different outputs, each of at
        most 40 characters and seen at least twice. Of several right outputs the first counts. Instances with
        an empty text are left out, and so are positive examples whose output is no label.
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
        raise InputError(f"{where}: not a table, but {_kind(table)}")
    faults = Faults(n_shown=50)
    texts = _Texts(faults, f"{where}: ")
    name = _parse_name(table, texts)
    instruction = texts.required(table, "instruction")
    labels = _parse_labels(table.get("labels"), texts, fewest=1)
    examples = _parse_examples(table.get("examples"), labels, texts, fewest=0)
    max_new_tokens, prompt_format = table.get("max_new_tokens"), table.get("prompt_format")
    if type(max_new_tokens) is not int or not 0 < max_new_tokens <= MAX_CARRIED_TOKENS:
        texts.add(f"max_new_tokens is {max_new_tokens!r:.40}, not an integer from 1 to {MAX_CARRIED_TOKENS}")
        max_new_tokens = 1
    if prompt_format not in ("gguf", "vicuna"):
        texts.add(f"prompt_format is {prompt_format!r:.40}, not 'gguf' or 'vicuna'")
    faults.raise_any()
    return CarriedTask(Task(name, instruction, examples, labels), max_new_tokens, str(prompt_format))


def _parse_name(table: Mapping[str, object], texts: "_Texts") -> str:
    name = texts.required(table, "name")
    if name and not _NAME.fullmatch(name):
        texts.add(f"name {_show(name)} must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit")
    return name


def _parse_task(table: Mapping[str, object], path: Path) -> Task:
    """The task in `table`, which was read from `path`. Raises InputError with all faults."""
    faults = Faults(n_shown=50)
    texts = _Texts(faults, f"{path}: ")
    texts.check_keys(table, TASK_KEYS)
    name = _parse_name(table, texts)
    instruction = texts.required(table, "instruction")
    labels = _parse_labels(table.get("labels", []), texts)
    test = texts.optional(table, "test")
    test_path = path.absolute().parent / test if test else None
    # os.path.isfile does not mind a path that is too long, or a directory that nobody may look into.
    if test_path is not None and not os.path.isfile(test_path):
        texts.add(f"test file {str(test_path)[:MAX_SHOWN_PATH]} is missing: correct `test`, or remove it")
    licence = texts.optional(table, "licence")
    examples = _parse_examples(table.get("examples", []), labels, texts)
    faults.raise_any()
    return Task(name, instruction, examples, labels, test_path, licence)


def _parse_labels(value: object, texts: "_Texts", fewest: int = 2) -> tuple[str, ...]:
    if not isinstance(value, list):
        texts.add(f"labels must be a list of texts, not {_kind(value)}")
        return ()
    labels: dict[str, str] = {}  # as scoring compares them -> as they are written
    for i, item in enumerate(value):
        label = texts.check(item, f"labels[{i}]")
        if hidden := _NOT_IN_A_LABEL.search(label):
            texts.add(
                f"labels[{i}] holds the character U+{ord(hidden[0]):04X}, which is not plain to see: remove it"
            )
        if _normal(label) in labels:
            texts.add(
                f"label {_show(label)} is a duplicate: scoring ignores case and surrounding white space"
            )
        elif label:
            labels[_normal(label)] = label
    if 0 < len(value) < fewest:
        texts.add("labels has one label, a classification task needs two: add the others, or remove `labels`")
    return tuple(labels.values())


def _parse_examples(
    value: object, labels: Sequence[str], texts: "_Texts", fewest: int = 1
) -> tuple[Example, ...]:
    if not isinstance(value, list):
        texts.add(f"examples must be tables headed [[examples]], not {_kind(value)}")
        return ()
    if len(value) < fewest:
        texts.add("there are no examples: add one to three tables headed [[examples]] with input and output")
    if len(value) > MAX_EXAMPLES:
        texts.add(
            f"there are {len(value)} examples, the limit is {MAX_EXAMPLES}: keep the most different ones"
        )
    examples = []
    for i, item in enumerate(value[:MAX_EXAMPLES]):
        if not isinstance(item, dict):
            texts.add(f"examples[{i}] must be a table with input and output, not {_kind(item)}")
            continue
        part = _Texts(texts.faults, f"{texts.prefix}examples[{i}]: ")
        part.check_keys(item, EXAMPLE_KEYS)
        example = Example(part.required(item, "input"), part.required(item, "output"))
        if labels and example.output and example.output not in labels:
            hint = _suggestion(example.output, labels)
            part.add(f"output {_show(example.output)} is not one of the labels ({_listing(labels)}){hint}")
        examples.append(example)
    return tuple(examples)


@dataclass(frozen=True)
class _Texts:
    """Reads texts out of a table and notes what is wrong with them; a faulty text is read as an empty one."""

    faults: Faults
    prefix: str  # which file, line or table

    def add(self, fault: str) -> None:
        self.faults.add(self.prefix + fault)

    def check_keys(self, table: Mapping[str, object], known: Sequence[str]) -> None:
        for key in [key for key in table if key not in known][: self.faults.n_shown]:
            self.add(f"unknown key {_show(key)}{_suggestion(key, known)}: the keys are {', '.join(known)}")

    def required(self, table: Mapping[str, object], key: str, check_controls: bool = True) -> str:
        if key not in table:
            self.add(f"{key} is missing")
            return ""
        return self.check(table[key], key, check_controls)

    def optional(self, table: Mapping[str, object], key: str) -> str | None:
        return self.check(table[key], key) or None if key in table else None

    def check(self, value: object, key: str, check_controls: bool = True) -> str:
        if not isinstance(value, str):
            self.add(f"{key} must be a text in quotes, not {_kind(value)}")
            return ""
        if check_controls and (control := _CONTROL.search(value)):
            self.add(f"{key} holds the control character U+{ord(control[0]):04X}: remove it")
            return ""
        if _SURROGATE.search(value):
            self.add(f"{key} holds half of a surrogate pair: remove it")
            return ""
        if not value.strip():
            self.add(f"{key} is empty")
        return value.strip()


def _from_super_natural_instructions(data: Mapping[str, object], path: Path) -> tuple[Task, list[Example]]:
    definition = data["Definition"]
    if isinstance(definition, list) and definition:  # a list of one, throughout the collection
        definition = definition[0]
    faults = Faults()
    instances = _pairs(data, "Instances", path, faults)
    demonstrations = _pairs(data, "Positive Examples", path, faults)
    faults.raise_any()

    spellings = _closed_set(row.output for row in instances)
    if spellings:
        instances = [Example(row.input, spellings[_normal(row.output)]) for row in instances]
        demonstrations = [
            Example(row.input, spellings[_normal(row.output)])
            for row in demonstrations
            if _normal(row.output) in spellings
        ]
    table: dict[str, object] = {
        "name": _slug(path.stem),
        "instruction": _newlines(definition) if isinstance(definition, str) else definition,
        "labels": sorted(spellings.values()),
        "examples": [{"input": row.input, "output": row.output} for row in demonstrations[:MAX_EXAMPLES]],
    }
    if licence := _joined(data.get("Instance License")):
        table["licence"] = licence
    return _parse_task(table, path), instances


def _from_task_object(data: Mapping[str, object], path: Path) -> tuple[Task, list[Example]]:
    table = {key: data[key] for key in TASK_KEYS if key in data and key != "test"}
    if licence := _joined(table.pop("licence", None)):
        table["licence"] = licence
    task = _parse_task(table, path)
    test = path.absolute().parent.parent / "test" / f"{task.name}.jsonl"
    return task, load_test_rows(test, task.labels) if os.path.isfile(test) else []


def _pairs(data: Mapping[str, object], key: str, path: Path, faults: Faults) -> list[Example]:
    """The inputs and first outputs under `key`, those with an empty text left out."""
    items = data.get(key)
    if not isinstance(items, list):
        faults.add(f"{path}: {key} must be a list, not {_kind(items)}")
        return []
    pairs = []
    for i, item in enumerate(items):
        match item:
            case {"input": str(text_in), "output": str(output) | [str(output), *_]}:
                pair = Example(_newlines(text_in).strip(), _newlines(output).strip())
                if pair.input and pair.output:
                    pairs.append(pair)
            case _:
                faults.add(f"{path}: {key}[{i}] needs a text as its input and a text or texts as its output")
    return pairs


def _closed_set(outputs: Iterable[str]) -> dict[str, str]:
    """Each label's commonest spelling by its normal form; empty if the outputs are no small closed set."""
    spellings: dict[str, Counter[str]] = {}
    for output in outputs:
        spellings.setdefault(_normal(output), Counter())[output] += 1
        if len(spellings) > MAX_IMPORTED_LABELS or len(output) > MAX_IMPORTED_LABEL_CHARS:
            return {}
    if len(spellings) < 2 or any(counts.total() < 2 for counts in spellings.values()):
        return {}
    return {normal: counts.most_common(1)[0][0] for normal, counts in spellings.items()}


def _normal(label: str) -> str:
    return label.strip().lower()


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _joined(value: object) -> object:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value


def _slug(stem: str) -> str:
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._-]+", "-", plain).strip("._-")[:64] or "task"


def _suggestion(word: str, known: Sequence[str]) -> str:
    """Looks past case."""
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.strip().lower(), by_lower, n=1)
    return f", did you mean {_show(by_lower[close[0]])}?" if close else ""


def _listing(labels: Sequence[str]) -> str:
    more = f", … {len(labels) - 10} more" if len(labels) > 10 else ""
    return ", ".join(_show(label) for label in labels[:10]) + more


def _show(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")


def _kind(value: object) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(
        type(value), "nothing" if value is None else "a table" if isinstance(value, dict) else "a date"
    )
