"""Working copies of a base model's weights, made once for a file and shared by all its runs.

    ~/.cache/sg-local/weights/b179c9523d0e6a0f/
      hf/         16-bit safetensors and config.json, dequantized from the very GGUF that is served (for torch)
      f16.gguf    the same numbers as a GGUF (for comparing llama.cpp with torch)

They are derived files: deleting them costs the seconds that it takes to make them again.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sg_local.errors import SgLocalError
from sg_local.gguf_header import read_model_header
from sg_local.models import model_store
from sg_local.progress import say
from sg_local.run import Run


def torch_weights(run: Run) -> Path:
    """The directory of the base's dequantized weights, made if need be."""
    from sg_local.gguf_io.base_weights import write_base_weights

    directory = _place(run) / "hf"
    with _one_maker(run):
        if not directory.is_dir():
            _check_space(run, directory)
            say(f"dequantizing {run.model.path.name} for torch")
            write_base_weights(run.model.path, directory)
    return directory


def f16_gguf(run: Run) -> Path:
    """The base as a 16-bit GGUF, made if need be."""
    from sg_local.llama.quantize import requantize

    path = _place(run) / "f16.gguf"
    with _one_maker(run):
        if not path.is_file():
            _check_space(run, path)
            say(f"writing a 16-bit copy of {run.model.path.name} to compare with")
            requantize(run.model.path, path, "F16", run.settings.n_threads)
    return path


@contextmanager
def _one_maker(run: Run) -> Iterator[None]:
    """Another run of the same base waits until the copy is there."""
    from filelock import FileLock

    with FileLock(_place(run) / ".lock"):
        yield


def _place(run: Run) -> Path:
    place = model_store().parent / "weights" / run.model.sha256[:16]
    place.mkdir(parents=True, exist_ok=True)
    return place


def _check_space(run: Run, path: Path) -> None:
    n_values = 0
    for tensor in read_model_header(run.model.path).tensors:
        count = 1
        for length in tensor.shape:
            count *= length
        n_values += count
    needed = int(2.1 * n_values)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SgLocalError(
            f"{path} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "free some, or set SG_LOCAL_HOME to a directory on another disk"
        )
