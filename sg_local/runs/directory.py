"""A run directory: what it is made of, and which stages are finished.

    runs/support-inbox/
      task.toml  settings.toml                 copied and resolved once, never rewritten
      test.jsonl  given.jsonl  labelled.jsonl  what the task's files hold, as far as it has them
      inputs.jsonl  outputs.jsonl  train.jsonl  adapter/  adapter.gguf  model.gguf  chat_template.jinja  Modelfile
      evaluation.json  predictions/
      manifest.json     {"stages": {"generate": {"reads": {"task.toml": sha256}, "writes": {...}, "seconds": 41.2}}}

A stage is finished when its manifest entry is written, and that is the last thing it does; and as long as what it wrote
is as it was written, but for what a person may edit. What a stage reads and writes is declared in stage_files.py.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from sg_local.errors import InputError
from sg_local.files import (
    SAMPLED_BYTES,
    copy_file,
    own_directory,
    read_json,
    read_rows,
    read_toml,
    remove_tree,
    sample_sha256,
    sha256_file,
    write_json,
)
from sg_local.gguf_header import GgufHeader, read_model_header
from sg_local.runs.process_facts import peak_memory_bytes, versions
from sg_local.runs.stage_files import BEGUN_WITH, REVIEW, STAGE_FILES, StageFiles
from sg_local.settings import STAGES, Settings, resolve_settings, without_removed
from sg_local.task import Example, Task, load_task
from sg_local.task_files.rows import load_test_rows

MAX_MANIFEST_BYTES = 16 << 20

# What a stage read of these is left to `verify`: to hash them takes minutes. Who wrote them looks at samples.
_WEIGHTS = {".gguf", ".safetensors"}

NOT_FINISHED = "is not finished"

# Weights that `bench --keep-remote` left on the node that made them:
# {"node": "10.0.0.7", "directory": "/home/me/.cache/sg-local/cluster/5d1c…/sst2", "files": {"model.gguf": sha256}}
KEPT_REMOTE = ".kept_remote.json"


@dataclass(frozen=True)
class BaseModel:
    """The GGUF that a run tunes, as it was when the run began."""

    path: Path
    sha256: str
    size_bytes: int
    licence: str
    prompt_format: str  # "gguf" or "vicuna"


class GivenRow(TypedDict):
    """A row of given.jsonl: {"input": "were is my parcel"}"""

    input: str


class Unfinished(NamedTuple):
    """A stage that has something to do, and why: "train", "is out of date (train.jsonl was changed since)"."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Run:
    """One run directory with its task, base model and settings: in a stage, those that it may read."""

    path: Path
    task: Task
    model: BaseModel
    settings: Settings
    given: tuple[str, ...] = ()  # the settings that are this call's alone, in place of those of settings.toml

    def file(self, name: str) -> Path:
        """The path of one of the run's files."""
        return self.path / name

    def with_given(self, settings: Mapping[str, Any]) -> "Run":
        """The run with settings that this call gives, for the stage that it runs; the manifest entry will name them."""
        if not settings:
            return self
        return replace(self, settings=replace(self.settings, **settings), given=tuple(settings))

    @cached_property
    def base_header(self) -> GgufHeader:
        """The header of the base, read once. Raises InputError where it cannot be read any more."""
        return read_model_header(self.model.path)

    @property
    def test_rows(self) -> list[Example]:
        """The task's own test rows, at most max_test_rows; [] where the task has none."""
        if not self.file("test.jsonl").exists():
            return []
        rows = load_test_rows(self.file("test.jsonl"), self.task.labels)
        return rows[: self.settings.max_test_rows]

    @property
    def given_inputs(self) -> list[str]:
        """The real inputs without answers, none of them a test row; [] where the task has none."""
        path = self.file("given.jsonl")
        return [row["input"] for row in read_rows(path, GivenRow)] if path.exists() else []

    @property
    def labelled_rows(self) -> list[Example]:
        """The labelled rows, none of them a test row; [] where the task has none."""
        path = self.file("labelled.jsonl")
        return load_test_rows(path, self.task.labels) if path.exists() else []

    def manifest(self) -> dict[str, Any]:
        """What the finished stages recorded. Raises InputError where the file is damaged."""
        path = self.file("manifest.json")
        if not path.exists():
            return {"stages": {}}
        manifest = read_json(path, MAX_MANIFEST_BYTES)
        match manifest:
            case {"stages": dict(entries)} if all(_is_entry(entry) for entry in entries.values()):
                return dict(manifest)
        raise InputError(f"{path} is damaged: restore it, or delete the run and start anew")

    def first_unfinished(
        self, until: str = STAGES[-1], *, but_for: Collection[str] = ()
    ) -> Unfinished | None:
        """The first stage that has something to do, of those up to `until`; None where all are finished.

        A stage is finished when its manifest entry is there, and all that it wrote and read is as it was. but_for:
        files that may have changed since they were read.
        """
        entries = self.manifest()["stages"]

        @cache
        def sha256_of(name: str) -> str | None:
            return sha256_file(self.file(name)) if self.file(name).exists() else None

        for stage in STAGES[: STAGES.index(until) + 1]:
            if stage not in entries:
                return Unfinished(stage, NOT_FINISHED)
            entry = entries[stage]
            for name in entry["writes"]:
                if fault := self._fault_of_written(stage, entry, name):
                    return Unfinished(stage, f"{NOT_FINISHED} ({name} {fault})")
            for name, sha256 in entry["reads"].items():
                if name in but_for or Path(name).suffix in _WEIGHTS:
                    continue
                if sha256_of(name) != sha256:
                    return Unfinished(stage, f"is out of date ({name} was changed since)")
            if names := self.changed_settings(stage, entry):
                change = "was" if len(names) == 1 else "were"
                return Unfinished(
                    stage, f"is out of date ({', '.join(names)} in settings.toml {change} changed since)"
                )
            if entry.get("base", self._base_entry()) != self._base_entry():
                return Unfinished(stage, "is out of date (the base in settings.toml was changed since)")
            # An earlier version did not look for what came later, so it was not there.
            later = dict.fromkeys({*STAGE_FILES[stage].looks_for} - {*BEGUN_WITH}, False)
            for name, was_there in (later | entry.get("looks_for", {})).items():
                if name not in but_for and self.file(name).exists() != was_there:
                    change = "was removed" if was_there else "was added"
                    return Unfinished(stage, f"is out of date ({name} {change} since)")
        return None

    def written_file(self, name: str) -> Path:
        """The path of a file that a stage wrote, to be shown or decided by.

        Raises InputError where the stage is not finished, or the file is not as it was written.
        """
        stage = next(
            stage for stage in STAGES if any(Path(name).match(item) for item in STAGE_FILES[stage].writes)
        )
        entry = self.manifest()["stages"].get(stage)
        remedy = f"`sg-local {stage} {self.path}` makes it"
        if entry is None or name not in entry["writes"]:
            fault = f"is of {stage}, which is not finished" if self.file(name).exists() else "is missing"
            raise InputError(f"{self.file(name)} {fault}: {remedy}")
        if fault := self._fault_of_written(stage, entry, name):
            raise InputError(f"{self.file(name)} {fault}: {remedy}")
        if not self.file(name).is_file():
            raise InputError(f"{self.file(name)} {self.left_on_node(name, entry['writes'][name])}")
        return self.file(name)

    def left_on_node(self, name: str, sha256: str) -> str:
        """Where a file of this content was left on another machine; "" where none was."""
        if not self.file(KEPT_REMOTE).exists():
            return ""
        match read_json(self.file(KEPT_REMOTE), MAX_MANIFEST_BYTES):
            case {"node": str(node), "directory": str(directory), "files": dict(files)}:
                if files.get(name) == sha256:
                    return f"was left on {node}, in {directory}: copy it from there"
        return ""

    def _fault_of_written(self, stage: str, entry: dict[str, Any], name: str) -> str:
        """What is wrong with a file that a stage wrote: "is gone"; "" where nothing is."""
        path, sha256 = self.file(name), entry["writes"][name]
        if not path.is_file():
            return "" if self.left_on_node(name, sha256) else "is gone"
        size_bytes = path.stat().st_size
        if name in STAGE_FILES[stage].editable:
            return "is empty" if size_bytes == 0 and sha256_file(path) != sha256 else ""
        if sample := entry.get("samples", {}).get(name):
            is_as_written = sample_sha256(path) == sample
        else:  # a large file without a sample is of an earlier version: `verify` hashes it
            is_as_written = size_bytes > SAMPLED_BYTES or sha256_file(path) == sha256
        return "" if is_as_written else "is not as it was written"

    def _base_entry(self) -> dict[str, str]:
        return {"sha256": self.model.sha256, "prompt_format": self.model.prompt_format}

    def changed_settings(self, stage: str, entry: dict[str, Any]) -> list[str]:
        """Names of the settings that a stage may read, and that are not what its manifest entry says it ran with."""
        defaults = Settings().as_dict()
        recorded = entry.get("settings")
        if recorded is None:
            return []
        # What the stage was given for itself stands, unless this call gives another value.
        its_own = set(entry.get("given", ())) - set(self.given)
        # A setting that is not recorded came later: the stage ran with what is its default now.
        return [
            name
            for name, value in self.settings.seen_by(stage).as_dict().items()
            if name not in its_own and recorded.get(name, defaults[name]) != value
        ]

    def is_finished(self, stage: str) -> bool:
        """Whether a stage and all before it are finished."""
        return self.first_unfinished(stage) is None

    def is_due(self, stage: str) -> bool:
        """Whether a stage has something to do. Raises InputError where one before it has."""
        first = self.first_unfinished(stage)
        if first is not None and first.stage != stage:
            raise InputError(f"{first.stage} {first.reason}: run `sg-local {first.stage} {self.path}` first")
        return first is not None

    def check_model(self) -> None:
        """Raises InputError when the base model is gone or is no longer the same file."""
        path = self.model.path
        if not path.is_file():
            raise InputError(f"the base model {path} is gone: put it back, or start a new run with --run DIR")
        if path.stat().st_size != self.model.size_bytes:
            raise InputError(
                f"the base model {path} has {path.stat().st_size} bytes, it had {self.model.size_bytes} when the "
                "run began: put the old file back, or start a new run with --run DIR"
            )

    def forget_from(self, stage: str, *, keep_partial: bool) -> None:
        """Takes back a stage and those after it: their manifest entries, and what they wrote piece by piece.

        keep_partial leaves the stage's own pieces, so that it goes on where it stopped. For a holder of the
        run's lock.
        """
        manifest = self.manifest()
        forgotten = STAGES[STAGES.index(stage) :]
        if any(later in manifest["stages"] for later in forgotten):
            for later in forgotten:
                manifest["stages"].pop(later, None)
            self._write_manifest(manifest)
        for later in forgotten:
            if not (keep_partial and later == stage):
                for pattern in STAGE_FILES[later].pieces:
                    for path in self.path.glob(pattern):
                        if path.parent == self.path or not path.parent.is_symlink():
                            remove_tree(path)

    def note_told(self, stage: str, seconds: float) -> float:
        """Notes beside what a finished stage took what was told of it before; returns what it took, in seconds.

        For a holder of the run's lock.
        """
        manifest = self.manifest()
        entry = manifest["stages"][stage]
        entry["told_seconds"] = seconds
        self._write_manifest(manifest)
        return float(entry["seconds"])

    def take_over(self, other: "Run", stages: Sequence[str]) -> None:
        """Copies what finished stages of another run wrote, with their manifest entries, into this one.

        And what a person said of its rows, which holds for the same inputs. The entries say from where. For runs of
        the same task and model whose settings differ in what later stages read. For a holder of both locks.
        """
        manifest, theirs = self.manifest(), other.manifest()["stages"]
        if other.file(REVIEW).exists():
            copy_file(other.file(REVIEW), self.file(REVIEW))
        for stage in stages:
            self.copy_files(other, dict.fromkeys([*theirs[stage]["writes"], *other.pieces(stage)]))
            manifest["stages"][stage] = {**theirs[stage], "from_run": str(other.path.resolve())}
        self._write_manifest(manifest)

    def pieces(self, stage: str) -> list[str]:
        """What a stage wrote piece by piece, with notes of what it was made from; no checkpoints."""
        return [
            path.relative_to(self.path).as_posix()
            for pattern in STAGE_FILES[stage].pieces
            for path in self.path.glob(pattern)
            if path.is_file()
        ]

    def copy_files(self, other: "Run", names: Iterable[str]) -> None:
        """Copies files of another run into this one. For a holder of both locks."""
        for name in names:
            own_directory(self.file(name).parent)
            copy_file(other.file(name), self.file(name))

    def shares(self, other: "Run", stages: Sequence[str]) -> bool:
        """Whether these stages are finished in both runs, and wrote the same."""
        ours, theirs = self.manifest()["stages"], other.manifest()["stages"]
        return all(
            stage in ours and stage in theirs and ours[stage]["writes"] == theirs[stage]["writes"]
            for stage in stages
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Runs the body as a stage: the later ones are taken back first, the manifest entry is written last.

        The body gets the entry in the making: the hashes of what it reads are in it under "reads", and it may add
        numbers of its own (`counts`, `tokens`). For a holder of the run's lock.
        """
        self.forget_from(name, keep_partial=True)
        started = time.monotonic()
        files = STAGE_FILES[name]
        entry: dict[str, Any] = {
            # Before the work: what is edited meanwhile was not read.
            "reads": {
                item: sha256_file(self.file(item))
                for item in files.reads
                if item not in files.looks_for or self.file(item).exists()
            },
            "looks_for": {item: self.file(item).exists() for item in files.looks_for},
        }
        yield entry
        written = self._written(files)
        entry |= {
            "writes": {item: sha256_file(self.file(item)) for item in written},
            # What is looked at when the run is called again: to hash a model takes minutes.
            "samples": {
                item: sample_sha256(self.file(item)) for item in written if Path(item).suffix in _WEIGHTS
            },
            "base": self._base_entry(),
            "settings": self.settings.as_dict(),
            **({"given": list(self.given)} if self.given else {}),
            "seed": self.settings.seed,
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        manifest = self.manifest()
        manifest["stages"][name] = entry
        self._write_manifest(manifest)

    def _written(self, files: StageFiles) -> list[str]:
        """The names of what a stage wrote; patterns stand for what is there."""
        names: list[str] = []
        for item in files.writes:
            matches = sorted(self.path.glob(item)) if "*" in item else [self.file(item)]
            names += [path.relative_to(self.path).as_posix() for path in matches]
        return names

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_json(self.file("manifest.json"), manifest)


def open_run(path: Path) -> Run:
    """Opens an existing run directory. Raises InputError when it is none, or one of its files is damaged."""
    settings_path = path / "settings.toml"
    if not settings_path.is_file():
        raise InputError(
            f"{path} is no run directory (no settings.toml): begin one with `sg-local run TASK --run {path}`"
        )
    match read_toml(settings_path):
        case {
            "model": {
                "path": str(model_path),
                "sha256": str(sha256),
                "size_bytes": int(size_bytes),
                "licence": str(licence),
                "prompt_format": str(prompt_format),
            },
            "settings": dict(values),
        }:
            base = BaseModel(Path(model_path), sha256, size_bytes, licence, prompt_format)
        case _:
            raise InputError(f"{settings_path} is damaged: restore it, or start a new run with --run DIR")
    values = without_removed(values, settings_path)
    try:
        settings = resolve_settings("default", values)
    except InputError as error:
        faults = "\n".join(f"{settings_path}: {fault}" for fault in str(error).splitlines())
        raise InputError(f"{faults}\nrestore the file, or start a new run with --run DIR") from error
    return Run(path, load_task(path / "task.toml"), base, settings)


def _is_entry(entry: Any) -> bool:
    """Whether a manifest entry has the form that `Run.stage` gives it; an earlier version recorded less."""
    return (
        isinstance(entry, dict)
        and _is_map_to(str, entry.get("reads"))
        and _is_map_to(str, entry.get("writes"))
        and _is_map_to(bool, entry.get("looks_for", {}))
        and _is_map_to(str, entry.get("samples", {}))
        and isinstance(entry.get("settings", {}), dict)
        and isinstance(entry.get("given", []), list)
    )


def _is_map_to(kind: type, value: Any) -> bool:
    """Whether a manifest's value is a map from names of the run's own files to values of this kind."""
    return isinstance(value, dict) and all(
        isinstance(item, kind) and _is_inside(name) for name, item in value.items()
    )


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in the run: a stranger's manifest may name any file of the machine."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
