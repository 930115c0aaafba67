"""What lies in the store: pulled models, working copies, and what killed processes left; and how to be rid of it.

    list_store(Path.cwd())   -> [{"what": "working copy hf", "model": "SmolLM2-135M-Instruct.Q4_1.gguf", ...}]
    free(item)               -> None: it is gone; "a run is at work with it, runs/support-inbox"

Only what sg_local made is freed, and nothing through a link: a file that somebody put into the store is listed as not
ours, and stays.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sg_local.errors import InputError, SgLocalError
from sg_local.files import find_leftovers, partial_directory, read_json, read_toml
from sg_local.models import (
    facts_path,
    known_sha256,
    list_models,
    list_pulled,
    model_store,
    source_of,
)
from sg_local.proof.working_copies import (
    BASE,
    F16_COPY,
    SPEEDS,
    TORCH_COPY,
    copies_root,
    lock_copies,
    remove_torch_copy,
)
from sg_local.pull import WORK, lock_models, unfinished_downloads
from sg_local.report.store import StoreItem

NOT_OURS = "not ours"
MAX_DEPTH_OF_RUNS = 5  # benches/NAME/ablations/rank=8/inbox
_PLACE = re.compile(r"[0-9a-f]{16}")


class RunHere(NamedTuple):
    """A run, and the model that it has."""

    path: Path
    model_path: Path
    sha256: str


def list_store(directory: Path) -> list[StoreItem]:
    """All that lies in the store, each with those of the runs under a directory that use it."""
    runs = list(runs_under(directory))
    return [*_models(runs), *_copies(runs)]


def runs_under(directory: Path) -> Iterator[RunHere]:
    """The runs under a directory, some levels deep."""
    for place, names, files in os.walk(directory):
        path = Path(place)
        if "settings.toml" in files:
            names.clear()
            with suppress(InputError):  # a damaged one has no model
                match read_toml(path / "settings.toml"):
                    case {"model": {"path": str(model_path), "sha256": str(sha256)}}:
                        yield RunHere(path.relative_to(directory), Path(model_path), sha256)
        elif len(path.relative_to(directory).parts) >= MAX_DEPTH_OF_RUNS:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def free(item: StoreItem, directory: Path) -> str | None:
    """Removes an item of `list_store`; returns why it was kept, or None where it is gone.

    What a run under the directory is working with is kept, and what is being written.
    """
    from filelock import Timeout

    if item["what"] == NOT_OURS:
        return "it is not ours"
    for run in item["used_by"]:
        if is_at_work(directory / run):
            return f"a run is at work with it, {run}"
    path = Path(item["path"])
    try:
        if path.parent == model_store():
            with lock_models():
                _remove(path)
                if source_of(path.name):
                    facts_path(path.name).unlink(missing_ok=True)
        else:
            with lock_copies(path.parent, timeout_seconds=0):
                _remove(path)
                if not any((path.parent / copy).exists() for copy in (TORCH_COPY, F16_COPY)):
                    for name in (SPEEDS, BASE):
                        (path.parent / name).unlink(missing_ok=True)
    except Timeout:
        return "it is being written"
    except SgLocalError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _models(runs: list[RunHere]) -> Iterator[StoreItem]:
    store = model_store()
    if not store.is_dir():
        return
    pulled = list_pulled()
    known = {model.file_name: model for model in [*list_models(), *pulled]}
    sums = {f"{name}.sha256" for name in known}
    facts = {facts_path(model.file_name).name for model in pulled}
    downloads = unfinished_downloads()
    leftovers = find_leftovers(store)
    for path in sorted(store.iterdir()):
        model = known.get(path.name)
        is_ours = not (store.is_symlink() or path.is_symlink())
        if path.name == ".lock" or path.name in sums:
            continue
        if path.name in facts and path.with_suffix("").exists():
            continue
        if path in downloads and is_ours:
            yield _item("unfinished download", path, path.name.removeprefix(WORK))
        elif (path in leftovers or path.name in facts) and is_ours:
            yield _item("leftover", path)
        elif model is not None and is_ours and path.is_file() and model.has_size(path.stat().st_size):
            sha256 = known_sha256(model)
            users = [run for run in runs if run.sha256 == sha256 or run.model_path == path.resolve()]
            yield _item("model", path, path.name, sha256, users)
        else:
            yield _item(NOT_OURS, path)


def _copies(runs: list[RunHere]) -> Iterator[StoreItem]:
    root = copies_root()
    if not root.is_dir():
        return
    for place in sorted(root.iterdir()):
        if root.is_symlink() or place.is_symlink() or not _PLACE.fullmatch(place.name) or not place.is_dir():
            yield _item(NOT_OURS, place)
            continue
        users = [run for run in runs if run.sha256.startswith(place.name)]
        name, sha256 = _base_of(place, users)
        leftovers = [*find_leftovers(place), partial_directory(place / TORCH_COPY)]
        for path in sorted(place.iterdir()):
            if path.name in (".lock", SPEEDS, BASE):
                continue
            if path.is_symlink():
                yield _item(NOT_OURS, path)
            elif path.name in (TORCH_COPY, F16_COPY):
                yield _item(f"working copy {path.name}", path, name, sha256, users)
            elif path in leftovers:
                yield _item("leftover", path, name, sha256)
            else:
                yield _item(NOT_OURS, path)


def _base_of(place: Path, users: list[RunHere]) -> tuple[str | None, str]:
    """Name and sum of the model that a directory holds copies of."""
    with suppress(InputError):
        match read_json(place / BASE, 1 << 20):
            case {"name": str(name), "sha256": str(sha256)} if sha256.startswith(place.name):
                return name, sha256
    if users:  # an earlier version did not write it down
        return users[0].model_path.name, users[0].sha256
    return None, place.name


def _item(
    what: str,
    path: Path,
    model: str | None = None,
    sha256: str | None = None,
    users: list[RunHere] | None = None,
) -> StoreItem:
    size_bytes, age_seconds = size_and_age(path)
    return {
        "what": what,
        "path": str(path),
        "model": model,
        "sha256": sha256,
        "size_bytes": size_bytes,
        "age_seconds": age_seconds,
        "used_by": [str(run.path) for run in users or []],
    }


def size_and_age(path: Path) -> tuple[int, int]:
    """The bytes of a file or directory, and the seconds since something in it was written last."""
    size_bytes, written_at = 0, 0.0
    for part in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else [])]:
        with suppress(FileNotFoundError):  # a pull or a run is at work
            status = part.lstat()
            size_bytes += status.st_size if not part.is_dir() or part.is_symlink() else 0
            written_at = max(written_at, status.st_mtime)
    return size_bytes, max(0, int(time.time() - written_at))


def is_at_work(run: Path) -> bool:
    """Whether a process holds the lock of a run."""
    from filelock import FileLock, Timeout

    if not (run / ".lock").exists() or (run / ".lock").is_symlink():  # to open a link would empty its target
        return False
    try:
        with FileLock(run / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a disk that cannot be written
        return False


def _remove(path: Path) -> None:
    if path.is_symlink():  # it was no link when it was listed
        raise SgLocalError(f"{path} is a link")
    if path.name == TORCH_COPY:
        remove_torch_copy(path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
