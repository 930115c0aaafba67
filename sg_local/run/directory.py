"""A run directory: what it is made of, and which stages are finished.

    runs/support-inbox/
      task.toml  test.jsonl  settings.toml     copied and resolved once, never rewritten
      inputs.jsonl  outputs.jsonl  train.jsonl  adapter/  adapter.gguf  model.gguf  Modelfile
      evaluation.json  predictions/
      manifest.json     {"stages": {"generate": {"reads": {"task.toml": sha256}, "writes": {...}, "seconds": 41.2}}}

A stage is finished when its manifest entry is written, and that is the last thing it does.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sg_local.errors import InputError
from sg_local.files import copy_file, read_json, read_toml, sha256_file, write_text
from sg_local.gguf_header import GgufHeader, read_model_header
from sg_local.settings import STAGES, Settings, resolve_settings, without_removed
from sg_local.task import Example, Task, load_task, load_test_rows

MAX_MANIFEST_BYTES = 16 << 20

# Files that a stage writes piece by piece and goes on with when it is called again.
_PIECES = {
    "generate": ("inputs.jsonl", ".probe.jsonl"),
    "annotate": ("outputs.jsonl",),
    "train": ("checkpoints/*/*",),
    "evaluate": ("predictions/*.jsonl",),
}
# Where a person may have edited what a stage had read. Weights are left to `verify`: hashing them takes minutes.
_EDITABLE = {".jsonl", ".toml"}


@dataclass(frozen=True)
class BaseModel:
    """The GGUF that a run tunes, as it was when the run began."""

    path: Path
    sha256: str
    size_bytes: int
    licence: str
    prompt_format: str  # "gguf" or "vicuna"


@dataclass(frozen=True)
class Run:
    """One run directory with its task, base model and settings."""

    path: Path
    task: Task
    model: BaseModel
    settings: Settings

    def file(self, name: str) -> Path:
        """The path of one of the run's files."""
        return self.path / name

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

    def is_finished(self, stage: str) -> bool:
        """Whether a stage and all before it ended, their files are there, and what they read is as it was."""
        return self._unfinished(STAGES[: STAGES.index(stage) + 1]) is None

    def require(self, stage: str) -> None:
        """Raises InputError unless the stages before this one are finished, and the base model is there."""
        found = self._unfinished(STAGES[: STAGES.index(stage)])
        if found is not None:
            earlier, reason = found
            raise InputError(f"{earlier} {reason}: run `sg-local {earlier} {self.path}` first")
        self.check_model()

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
                for pattern in _PIECES.get(later, ()):
                    for path in self.path.glob(pattern):
                        path.unlink()

    def take_over(self, other: "Run", stages: Sequence[str]) -> None:
        """Copies what finished stages of another run wrote, with their manifest entries, into this one.

        For runs of the same task and model whose settings differ in what later stages read. For a holder of both
        locks.
        """
        manifest, theirs = self.manifest(), other.manifest()["stages"]
        for stage in stages:
            for name in theirs[stage]["writes"]:
                copy_file(other.file(name), self.file(name))
            manifest["stages"][stage] = theirs[stage]
        self._write_manifest(manifest)

    def shares(self, other: "Run", stages: Sequence[str]) -> bool:
        """Whether these stages are finished in both runs, and wrote the same."""
        ours, theirs = self.manifest()["stages"], other.manifest()["stages"]
        return all(
            stage in ours and stage in theirs and ours[stage]["writes"] == theirs[stage]["writes"]
            for stage in stages
        )

    @contextmanager
    def stage(self, name: str, reads: list[str], writes: list[str]) -> Iterator[dict[str, Any]]:
        """Runs the body as a stage: the later ones are taken back first, the manifest entry is written last.

        The body may put numbers (`counts`, `tokens`) into the dict that it gets. For a holder of the run's lock.
        """
        self.forget_from(name, keep_partial=True)
        started = time.monotonic()
        details: dict[str, Any] = {}
        yield details
        manifest = self.manifest()
        manifest["stages"][name] = {
            "reads": {item: sha256_file(self.file(item)) for item in reads},
            "writes": {item: sha256_file(self.file(item)) for item in writes},
            **details,
            "settings": self.settings.as_dict(),
            "seed": self.settings.seed,
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._write_manifest(manifest)

    def _unfinished(self, stages: tuple[str, ...]) -> tuple[str, str] | None:
        """The first of these stages that has something to do, and why; None where there is none."""
        entries = self.manifest()["stages"]
        for stage in stages:
            if stage not in entries:
                return stage, "is not finished"
            entry = entries[stage]
            for name in entry["writes"]:
                if not self.file(name).exists():
                    return stage, f"is not finished ({name} is gone)"
            for name, sha256 in entry["reads"].items():
                path = self.file(name)
                if path.suffix in _EDITABLE and (not path.exists() or sha256_file(path) != sha256):
                    return stage, f"is out of date ({name} was changed since)"
        return None

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_text(self.file("manifest.json"), json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of what this process could have used, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (
        "sg-local",
        "llama-cpp-python",
        "gguf",
        "torch",
        "transformers",
        "trl",
        "peft",
        "unsloth",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    """Whether a manifest entry has the form that `Run.stage` gives it."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), dict)
        and all(isinstance(item, str) for pair in entry[key].items() for item in pair)
        for key in ("reads", "writes")
    )
