"""Working copies of a base model's weights, shared by all its runs. There is one at a time.

    ~/.cache/sg-local/weights/b179c9523d0e6a0f/
      f16.gguf    in 16 bits, as llama.cpp dequantizes it (for comparing llama.cpp with torch, and for faster data)
      hf/         the same numbers as safetensors and config.json, from which a training loads (gone when it has)
      speed.json  {"x86_64, 2 processors, ...": {"base": {"prompt": 180.0, "generated": 75.0}, "f16": ...}}
      base.json   {"name": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": "b179c9523d0e6a0f..."}

They are derived files: deleting them costs the seconds that it takes to make them again. A 7B model has 13 GB of each,
so making one removes the other. All writing is done by a holder of the directory's lock, who first clears away what
killed writers left: temporaries are as large as the copies.
"""

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sg_local.errors import InputError, SgLocalError
from sg_local.files import partial_directory, read_json, remove_leftovers, write_json
from sg_local.gguf_header import GgufHeader, read_model_header
from sg_local.models import make_store_directory, store_root
from sg_local.plan.machine import card_in_use, total_memory_bytes
from sg_local.plan.memory import MAX_COPY_SHARE_OF_MEMORY
from sg_local.plan.times import Speed
from sg_local.progress import say, working
from sg_local.runs.directory import BaseModel, Run
from sg_local.runs.process_facts import versions
from sg_local.settings import Settings

LEAST_GAIN = 1.2  # below that, noise of the clock would decide
TORCH_COPY, F16_COPY, SPEEDS, BASE = "hf", "f16.gguf", "speed.json", "base.json"


def place_of(base: BaseModel) -> Path:
    """The directory of a base's working copies."""
    return copies_root() / base.sha256[:16]


@contextmanager
def training_weights(run: Run) -> Iterator[Path]:
    """What is trained on: the base's dequantized weights, or those of --base-weights, which are checked first.

    They get the configuration that the GGUF stands for; their own is only compared with it. Leave the context when they
    are loaded: another run of this base waits for that, and the dequantized ones are removed.
    """
    if run.settings.base_weights:
        from sg_local.gguf_io.base_weights import link_base_weights

        check_given_weights(run)
        linked = run.file(".work") / "base_weights"
        link_base_weights(run.model.path, Path(run.settings.base_weights), linked)
        yield linked
        return

    from sg_local.gguf_io.base_weights import write_base_weights

    def make(path: Path) -> None:
        with working(f"dequantizing {run.model.path.name} for torch"):
            write_base_weights(run.model.path, path)

    with _working_copy(run.model, TORCH_COPY, make) as path:
        yield path
        with suppress(OSError):  # Windows keeps what is mapped; the next copy removes it
            remove_torch_copy(path)


def check_given_weights(run: Run) -> None:
    """Raises InputError where --base-weights are not the weights that the GGUF was made from."""
    from sg_local.gguf_io.check_weights import check_base_weights

    with working(f"comparing {run.settings.base_weights} with {run.model.path.name}, tensor by tensor"):
        check_base_weights(run.model.path, Path(run.settings.base_weights))


def f16_gguf(base: BaseModel, n_threads: int) -> Path:
    """The base as a 16-bit GGUF, made if need be."""
    from sg_local.llama.quantize import requantize

    def make(path: Path) -> None:
        with working(f"writing a 16-bit copy of {base.path.name}"):
            requantize(base.path, path, "F16", n_threads)

    with _working_copy(base, F16_COPY, make) as path:
        return path


def generating_model(run: Run) -> Path:
    """The file that makes and answers inputs: the base, or its 16-bit copy where that is clearly faster here.

    On a CPU some quantized types are several times slower than the same weights in 16 bits. Both are timed once for a
    machine. What is scored and served is the base's own file in any case.
    """
    from sg_local.llama.library import supports_gpu

    settings, header = run.settings, run.base_header
    on_gpu = supports_gpu() and settings.n_gpu_layers != 0
    quantized = {tensor.type_name for tensor in header.tensors} - {"F32", "F16", "BF16"}
    fits = 2 * _n_parameters(header) <= MAX_COPY_SHARE_OF_MEMORY * total_memory_bytes()
    if settings.working_copy == "never" or on_gpu or not quantized or not fits:
        return run.model.path
    copy = f16_gguf(run.model, settings.n_threads)
    speeds = speeds_here(run.model, settings, {"base": run.model.path, "f16": copy})
    ratio = gain_of_copy(speeds)
    if ratio < LEAST_GAIN:
        return run.model.path
    say(
        f"making data with its 16-bit copy, {ratio:.1f} times as fast here; what is scored is the file itself"
    )
    return copy


def gain_of_copy(speeds: Mapping[str, Speed]) -> float:
    """How many times as fast the 16-bit copy is as the base; 0 where it was not measured."""
    return speeds["base"].sample_seconds / speeds["f16"].sample_seconds if "f16" in speeds else 0.0


def speeds_here(base: BaseModel, settings: Settings, files: Mapping[str, Path]) -> dict[str, Speed]:
    """How fast the base and its copy run here; measured once for a machine and kept. files: "base", perhaps "f16"."""
    from sg_local.llama.speed import measure_speed

    known = known_speeds(base, settings)
    if missing := [name for name in files if name not in known]:
        for name in missing:
            with working(f"measuring how fast {files[name].name} runs here, once"):
                known[name] = measure_speed(
                    files[name],
                    n_threads=settings.n_threads,
                    n_gpu_layers=settings.n_gpu_layers if name == "base" else 0,
                )
        path = place_of(base) / SPEEDS
        make_store_directory(path.parent)
        measured = {name: speed._asdict() for name, speed in known.items()}
        with lock_copies(path.parent):
            write_json(path, _read_speeds(path) | {machine_key(settings): measured})
    return {name: known[name] for name in files}


def known_speeds(base: BaseModel, settings: Settings) -> dict[str, Speed]:
    """What was measured of this base and its copy on this machine."""
    found: dict[str, Speed] = {}
    entry = _read_speeds(place_of(base) / SPEEDS).get(machine_key(settings))
    for name, told in entry.items() if isinstance(entry, dict) else ():
        match told:
            case {"prompt": float(prompt), "generated": float(generated)} if min(prompt, generated) > 0:
                found[name] = Speed(prompt, generated)
    return found


def machine_key(settings: Settings) -> str:
    """What a speed depends on beside the file, as a text."""
    card = card_in_use() if settings.n_gpu_layers else ""
    return ", ".join(
        [
            f"{platform.machine()}, {os.cpu_count()} processors, {settings.n_threads} threads",
            *([f"{settings.n_gpu_layers} layers on {card}"] if card else []),
            f"llama-cpp-python {versions()['llama-cpp-python']}",
        ]
    )


def _read_speeds(path: Path) -> dict[str, object]:
    with suppress(InputError):  # missing or damaged: it is only measured again
        speeds = read_json(path, 1 << 20)
        return speeds if isinstance(speeds, dict) else {}
    return {}


def copies_root() -> Path:
    """The directory of all working copies, one directory in it for each base. It need not exist yet."""
    return store_root() / "weights"


@contextmanager
def lock_copies(place: Path, timeout_seconds: float = -1) -> Iterator[None]:
    """Holds the directory of a base's copies for one writer, and clears away what killed ones left in it.

    It waits for another writer, or raises filelock.Timeout after timeout_seconds.
    """
    from filelock import FileLock

    with FileLock(place / ".lock", timeout=timeout_seconds):
        remove_leftovers(place)
        partial = partial_directory(place / TORCH_COPY)
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        yield


@contextmanager
def _working_copy(base: BaseModel, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """The copy of that name; `make` writes it whole or not at all. Another run of this base waits meanwhile."""
    place = place_of(base).absolute()  # a training works in another directory
    make_store_directory(place)
    path = place / name
    with lock_copies(place):
        if not (place / BASE).exists():
            write_json(place / BASE, {"name": base.path.name, "sha256": base.sha256})
        if not path.exists():
            _remove_other_copy(path)
            _check_space(base, path)
            make(path)
        yield path


def remove_torch_copy(path: Path) -> None:
    """Removes it; for a holder of the lock. What a kill leaves of it passes for no copy, and is cleared away."""
    partial = partial_directory(path)
    os.replace(path, partial)
    shutil.rmtree(partial)


def _remove_other_copy(path: Path) -> None:
    """Makes room for this copy: there is one at a time. A link in the other's place is not ours."""
    other = path.with_name(F16_COPY if path.name == TORCH_COPY else TORCH_COPY)
    if other.is_symlink():
        return
    with suppress(OSError):  # Windows, where another process has it open
        if other.is_dir():
            remove_torch_copy(other)
        else:
            other.unlink(missing_ok=True)


def _check_space(base: BaseModel, path: Path) -> None:
    needed = int(2.1 * _n_parameters(read_model_header(base.path)))  # 16 bits each, and headers
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SgLocalError(
            f"{path} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "free some, as with `sg-local cache --unused`, or set SG_LOCAL_HOME to a directory on another disk"
        )


def _n_parameters(header: GgufHeader) -> int:
    return sum(math.prod(tensor.shape) for tensor in header.tensors)
