"""How a run begins: task, base and settings are checked, and written once; called again, they have to be the same.

runs/support-inbox/task.toml test.jsonl given.jsonl labelled.jsonl      copies of the task and of what its files hold
                   settings.toml                                        the last: with it, it is a run
"""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sg_local.chat.served import require_served
from sg_local.chat.template import (
    VICUNA_TEMPLATE,
    ChatTemplate,
    header_template,
    may_be_vicuna,
    require_template,
    without_template,
)
from sg_local.errors import InputError
from sg_local.escape import one_line
from sg_local.files import Faults, read_rows, sha256_file, toml_text, write_rows, write_text
from sg_local.gguf_header import GgufHeader, read_model_header, require_supported
from sg_local.models import Model, expand_user, find_by_path, full_path, resolve_model, store_root
from sg_local.progress import say
from sg_local.runs.directory import BaseModel, Run, open_run
from sg_local.runs.given import TaskRows, check_task
from sg_local.runs.lock import lock_run, make_directory
from sg_local.runs.prompt import demonstrations_of
from sg_local.runs.stage_files import BEGUN_WITH
from sg_local.settings import Settings, as_flag, unreached
from sg_local.task import FILE_KEYS, TASK_KEYS, Task, task_to_toml

# What a run that was killed while it was made may have left: these, and temporaries of the files.
_COPIES = {"test.jsonl": "test rows", "given.jsonl": "inputs", "labelled.jsonl": "labelled rows"}
_FIRST_FILES = (*BEGUN_WITH, "settings.toml")


_CONTROL = 3  # of tokenizer.ggml.token_type


@dataclass(frozen=True)
class ModelFile:
    """A GGUF of a supported architecture, as one call read it."""

    path: Path
    header: GgufHeader

    @cached_property
    def sha256(self) -> str:
        """Minutes of hashing for a large file, once."""
        return sha256_file(self.path)

    def prompt_format(self, settings: Settings) -> str:
        """ "gguf" or "vicuna", also where the settings leave it to the list of models."""
        if settings.prompt_format != "auto":
            return settings.prompt_format
        listed = find_by_path(self.path)
        return listed.prompt_format if listed else "gguf"


def begin_run(
    task_source: str | Path | Task,
    model_source: str | Path,
    run_dir: str | Path | None,
    settings: Settings,
    other_than: Run | None = None,
) -> tuple[Run, bool]:
    """The run of this task, model and settings, made if there is none; True when it is new.

    other_than: a run that a new one has to differ from. Raises InputError where one of them is wrong, or is not what
    the run was begun with; then there is no new run.
    """
    task, rows = check_task(task_source)
    base = read_model(resolve_model(str(model_source)))
    settings = with_full_paths(settings)
    path = Path(run_dir) if run_dir else Path("runs") / task.name
    if not _is_begun(path):
        if other_than and not _changes(other_than, task, rows, describe_base(base, settings), settings)[0]:
            raise InputError(
                f"nothing differs from {other_than.path}: give another value of a setting, such as --epochs"
            )
        if settings.base_weights:
            from sg_local.gguf_io.check_weights import match_base_weights

            match_base_weights(base.path, Path(settings.base_weights))
    called_with = str(task_source) if isinstance(task_source, str | Path) else ""
    run, is_new = create_or_open_run(path, task, base, settings, rows, called_with)
    if is_new:
        for note in rows.notes:
            say(f"{task.name}: {note}")
    say_about_export(base, settings, [task])
    return run, is_new


def with_full_paths(settings: Settings) -> Settings:
    """The settings as a run keeps them, which goes on from any directory."""
    if not settings.base_weights:
        return settings
    return replace(settings, base_weights=str(expand_user(settings.base_weights).resolve()))


def read_model(path: Path) -> ModelFile:
    """Reads a model file for one call. Raises InputError when it is no model that can be finetuned here."""
    require_utf8(full_path(path))
    store_root()  # sooner or later its working copies go there
    header = read_model_header(path)
    require_supported(header)
    return ModelFile(path, header)


def require_base(model: ModelFile, settings: Settings) -> None:
    """Raises InputError with all that the header says against a whole run with these settings, before it begins."""
    from sg_local.gguf_io import check_base

    check_base.require_base(model.header, settings)


def require_chat_base(model: ModelFile, settings: Settings, tasks: Iterable[Task]) -> None:
    """The same, for runs of these tasks: the model answers in a chat format, and has room to do so."""
    faults = Faults()
    try:
        require_base(model, settings)
    except InputError as error:
        for line in str(error).splitlines():
            faults.add(line)
    for fault in _template_faults(model, settings, tasks := list(tasks)):
        faults.add(fault)
    room_faults = [fault for task in tasks for fault in _room_faults(model.header, settings, task)]
    for fault in dict.fromkeys(room_faults):
        faults.add(f"{model.path} {fault}")
    faults.raise_any()


def say_about_export(model: ModelFile, settings: Settings, tasks: Iterable[Task]) -> None:
    """Says beforehand what a user may not expect of the exported file."""
    from sg_local.gguf_io.check_base import about_merging

    if note := about_merging(model.header, settings):
        say(note)
    for task in tasks:
        if found := _control_tokens_in(model.header, task, settings):
            say(
                f"the task {task.name} holds {', '.join(map(one_line, found[:3]))}: here that is plain text, but other "
                "programs take it for the model's control token, and will not show model.gguf the trained prompt"
            )


def _control_tokens_in(header: GgufHeader, task: Task, settings: Settings) -> list[str]:
    """The control tokens whose texts are in what the task writes into every prompt."""
    tokens, kinds = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return []
    shown = demonstrations_of(task, settings)
    written = "\0".join([task.instruction, *(text for pair in shown for text in (pair.input, pair.output))])
    return [
        str(token)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind == _CONTROL and str(token) in written
    ]


def _template_faults(model: ModelFile, settings: Settings, tasks: Iterable[Task]) -> Iterator[str]:
    """What is wrong with the chat template of the runs.

    There is none, it fails, it fills the context, or none can be made of it that shows the trained prompts elsewhere.
    """
    if model.prompt_format(settings) == "vicuna":
        template: ChatTemplate | None = ChatTemplate(VICUNA_TEMPLATE, "", "")
    else:
        template = header_template(model.header)
    if not template:
        yield f"{model.path} carries no chat template: {without_template(model.header)}"
        return
    trained_for = model.header.metadata.get(f"{model.header.architecture}.context_length")
    n_ctx = min(settings.n_ctx, trained_for) if isinstance(trained_for, int) else settings.n_ctx
    try:
        require_template(template, max(1, n_ctx))
        for task in tasks:
            require_served(template, task.instruction, demonstrations_of(task, settings))
    except InputError as error:
        own = model.prompt_format(settings) == "gguf"
        also = (
            "; a Vicuna v1.1 model takes --prompt-format vicuna"
            if own and may_be_vicuna(model.header)
            else ""
        )
        yield f"{model.path}: {error}{also}"


def _room_faults(header: GgufHeader, settings: Settings, task: Task) -> Iterator[str]:
    """Which texts the model's own context leaves no room for, even after a prompt of one token."""
    context_length = header.metadata.get(f"{header.architecture}.context_length")
    if not isinstance(context_length, int):
        return  # a fault that is told already
    longest = {"max_input_tokens": settings.max_input_tokens}  # 0: as the examples need it
    if not task.labels:
        longest["max_new_tokens"] = settings.max_new_tokens
    for name, n_tokens in longest.items():
        if n_tokens >= context_length > 1:
            yield (
                f"has a context of {context_length} tokens, which leaves {n_tokens} new ones no room for a prompt: "
                f"take a {as_flag(name, context_length // 2)} or less, or another model"
            )


def require_utf8(path: Path) -> None:
    """Raises InputError for a path that settings.toml could not hold, nor torch's libraries open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path} is not named in UTF-8: rename the file or its directory") from error


def describe_base(model: ModelFile, settings: Settings) -> BaseModel:
    """The facts of a model file that was found fit; the file is hashed."""
    listed: Model | None = find_by_path(model.path)
    licence = str(model.header.metadata.get("general.license", "unknown"))
    if listed:  # with the notice that some licences want to be passed on
        licence = ". ".join(part for part in (listed.licence, listed.notice) if part)
    return BaseModel(
        full_path(model.path), model.sha256, model.header.size_bytes, licence, model.prompt_format(settings)
    )


def create_or_open_run(
    path: Path,
    task: Task,
    model: ModelFile | Path,
    settings: Settings,
    rows: TaskRows | None = None,
    called_with: str = "",
) -> tuple[Run, bool]:
    """The run at `path`, made if there is none; True when it is new. rows: as `check_task` found them with the task.

    model: as it was read for the runs of this call, or its path. called_with: the task as `run` was called with it, for
    a command that an error proposes. Raises InputError that names what changed when the
    directory belongs to another task, model or settings, and SgLocalError where it cannot be made.
    """
    if isinstance(model, Path):
        model = read_model(model)
    if rows is None:
        task, rows = check_task(task)
    require_chat_base(model, settings, [task])
    base = describe_base(model, settings)
    require_utf8(path.absolute())
    if _is_begun(path):
        return _open_same_run(path, task, rows, base, settings, called_with), False
    make_directory(path)
    with lock_run(path):
        if _is_begun(path):  # by another process, a moment ago
            return _open_same_run(path, task, rows, base, settings, called_with), False
        write_text(path / "task.toml", _task_text(task))
        for name, copy in _copies(rows).items():
            (path / name).unlink(missing_ok=True)
            if copy:
                write_rows(path / name, copy)
        begun_with = {"model": {**asdict(base), "path": str(base.path)}, "settings": settings.as_dict()}
        write_text(path / "settings.toml", toml_text(begun_with))  # last: with this file it is a run
    return open_run(path), True


def _is_begun(path: Path) -> bool:
    """Whether `path` is a run. Raises InputError where something else is there that a run must not mix with."""
    if (path / "settings.toml").exists():
        return True
    if path.is_dir():
        ours = (".lock", *_FIRST_FILES, *(f".{name}." for name in _FIRST_FILES))
        if strange := [item.name for item in path.iterdir() if not item.name.startswith(ours)]:
            raise InputError(
                f"{path} holds other files ({min(strange)}) and is no run: choose another directory"
            )
    elif path.exists():
        raise InputError(f"{path} is not a directory: choose another directory")
    return False


def _open_same_run(
    path: Path, task: Task, rows: TaskRows, base: BaseModel, settings: Settings, called_with: str
) -> Run:
    old = open_run(path)
    before, now = _changes(old, task, rows, base, settings)
    if before:
        advice = "call it as it was begun, or begin anew elsewhere: run --run DIR, bench --out DIR"
        if now == [as_flag("quant", settings.quant)]:  # the one setting that a finished training may change
            command = shlex.join(["sg-local", "export", str(path), "--quant", settings.quant])
            advice = f"`{command}` exports its training so, else {advice}"
        elif called_with and len(before) == 1 and (kept := _kept_in_second_try(old, settings)):
            flags = [
                word for name in kept.changed for word in as_flag(name, getattr(settings, name)).split(" ", 1)
            ]
            command = shlex.join(["sg-local", "run", called_with, "--from", str(path), *flags])
            advice = f"`{command}` begins a new run that keeps {', '.join(kept.stages)}, else {advice}"
        raise InputError(
            f"{path} was begun with {', '.join(before)}, and is called with {', '.join(now)}: {advice}"
        )
    return old


class _Kept(NamedTuple):
    changed: list[str]
    stages: list[str]


def _kept_in_second_try(old: Run, settings: Settings) -> _Kept | None:
    """Which settings changed, and which stages of a run they do not reach; None where there are no such ones."""
    changed = changed_settings(old.settings, settings)
    finished = old.manifest()["stages"]
    stages = [stage for stage in unreached(changed) if stage in finished]
    return _Kept(changed, stages) if changed and stages else None


def changed_settings(old: Settings, new: Settings) -> list[str]:
    """The names of the settings whose values differ, in the order of declaration."""
    values = new.as_dict()
    return [name for name, value in old.as_dict().items() if value != values[name]]


def _changes(
    old: Run, task: Task, rows: TaskRows, base: BaseModel, settings: Settings
) -> tuple[list[str], list[str]]:
    """What a run was begun with and what a call has instead, as it is said to the user; two empty lists if nothing."""
    before, now = differences(old.model, old.settings, base, settings)
    if task.name != old.task.name:
        before.append(f"the task {old.task.name}")
        now.append(f"the task {task.name}")
    elif _task_text(task) != _task_text(old.task):
        keys = [
            key for key in TASK_KEYS if key not in FILE_KEYS and getattr(task, key) != getattr(old.task, key)
        ]
        before.append(f"the task {task.name}")
        now.append(f"other {' and '.join(keys)} in it")
    else:
        for name, copy in _copies(rows).items():
            if copy != _rows_of(old.file(name)):
                before.append(f"{_COPIES[name]} of {task.name}")
                now.append(f"other {_COPIES[name]}")
    return before, now


def differences(
    old_model: BaseModel, old: Settings, model: BaseModel, settings: Settings
) -> tuple[list[str], list[str]]:
    """What something was begun with and is called with, where they differ, as it is said to the user."""
    changed = changed_settings(old, settings)
    # As on the command line, to be copied from there.
    before, now = (
        [" ".join(as_flag(name, getattr(values, name)) for name in changed)] if changed else []
        for values in (old, settings)
    )
    if model.sha256 != old_model.sha256:
        before.append(f"the model {old_model.path}")
        now.append("other bytes in that file" if model.path == old_model.path else f"the model {model.path}")
    elif model.prompt_format != old_model.prompt_format:
        before.append(f"the prompt format {old_model.prompt_format}")
        now.append(f"the prompt format {model.prompt_format}")
    return before, now


def _rows_of(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []


def _task_text(task: Task) -> str:
    """The task as a run keeps it, which has its own copies of what the files hold."""
    return task_to_toml(replace(task, test=None, inputs=None, labelled=None))


def _copies(rows: TaskRows) -> dict[str, list[dict[str, Any]]]:
    """What a run's copies of the task's files hold."""
    return {
        "test.jsonl": [row.as_row() for row in rows.test],
        "given.jsonl": [{"input": text} for text in rows.inputs],
        "labelled.jsonl": [row.as_row() for row in rows.labelled],
    }
