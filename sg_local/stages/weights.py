"""Working copies of a base model's weights, made once for a file and shared by all its runs.

    ~/.cache/sg-local/weights/b179c9523d0e6a0f/
      hf/         16-bit safetensors and config.json, dequantized from the very GGUF that is served (for torch)
      f16.gguf    the same numbers as a GGUF (for comparing llama.cpp with torch)

They are derived files: deleting them costs the seconds that it takes to make them again.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from sg_local.errors import SgLocalError
from sg_local.gguf_header import read_model_header
from sg_local.models import model_store
from sg_local.progress import say
from sg_local.run import Run


def torch_weights(run: Run) -> Path:
    """The directory of the base's dequantized weights, made if need be."""
    from sg_local.gguf_io.base_weights import write_base_weights

    def make(path: Path) -> None:
        say(f"dequantizing {run.model.path.name} for torch")
        write_base_weights(run.model.path, path)

    return _working_copy(run, "hf", make)


def f16_gguf(run: Run) -> Path:
    """The base as a 16-bit GGUF, made if need be."""
    from sg_local.llama.quantize import requantize

    def make(path: Path) -> None:
        say(f"writing a 16-bit copy of {run.model.path.name} to compare with")
        requantize(run.model.path, path, "F16", run.settings.n_threads)

    return _working_copy(run, "f16.gguf", make)


def _working_copy(run: Run, name: str, make: Callable[[Path], None]) -> Path:
    """The copy of that name; `make` writes it whole or not at all. Another run of this base waits meanwhile."""
    from filelock import FileLock

    place = model_store().parent / "weights" / run.model.sha256[:16]
    place.mkdir(parents=True, exist_ok=True)
    path = place / name
    with FileLock(place / ".lock"):
        if not path.exists():
            _check_space(run, path)
            make(path)
    return path


def _check_space(run: Run, path: Path) -> None:
    n_parameters = sum(math.prod(tensor.shape) for tensor in read_model_header(run.model.path).tensors)
    needed = int(2.1 * n_parameters)  # 16 bits each, and headers
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SgLocalError(
            f"{path} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "free some, or set SG_LOCAL_HOME to a directory on another disk"
        )
