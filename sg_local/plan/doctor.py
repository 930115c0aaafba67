"""What this machine can do: packages, processor, memory, disk, GPU, models; each with the fix where one is missing.

    {"what": "llama.cpp", "ok": False, "needed": True, "found": "0.3.36, built for the CPU",
     "fix": "CMAKE_ARGS='-DGGML_CUDA=on ..."}

What is not needed is for some runs alone: the disk of a 7B model, a model by name.
Nothing heavy is imported but llama.cpp, which alone can say what it was built for.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sg_local import child_process
from sg_local.child_process import ChildDied
from sg_local.errors import InputError, signal_name
from sg_local.finetune.environment import NEEDED
from sg_local.models import find_present, list_models, list_pulled, model_store
from sg_local.plan.machine import card_in_use, nvidia_gpus, total_memory_bytes
from sg_local.report.checks import Finding
from sg_local.report.tables import counted

LLAMA_REQUIREMENT = "llama-cpp-python==0.3.36"  # as in pyproject.toml
NEEDED_BYTES = (
    19_000_000_000  # a run of a 7B model: a 16-bit copy, the adapter, the merged file (see memory.py)
)
INSTALL = "pip install sg-local, or `make install` in a source checkout"
INSTALL_TRAINING = "pip install 'sg-local[train]', or `make install` in a source checkout"
REINSTALL = f"pip install --force-reinstall --no-deps --no-cache-dir {LLAMA_REQUIREMENT}"
BUILD_WITH_CUDA = f"CMAKE_ARGS='-DGGML_CUDA=on -DLLAVA_BUILD=OFF' {REINSTALL}"
# Without what this processor alone has: AVX2 is the most that it uses then.
BUILD_PORTABLE = f"CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' {REINSTALL}"
BUILD_PORTABLE_WITH_CUDA = BUILD_PORTABLE.replace("-DGGML_NATIVE", "-DGGML_CUDA=on -DGGML_NATIVE")
TORCH_WITH_CUDA = (
    "pip install --force-reinstall 'torch>=2.6,<2.15' from PyPI; "
    "on Windows with the index of https://pytorch.org/get-started/locally"
)

TORCH_FOR_THE_DRIVER = (
    "update the NVIDIA driver, or install the torch that fits it: https://pytorch.org/get-started/locally"
)
COMPILER = "`apt install gcc python3-dev` on Debian and Ubuntu, `dnf install gcc python3-devel` on Fedora"

BITSANDBYTES_FOR_CUDA = (
    "pip install --upgrade bitsandbytes: it needs kernels for the CUDA of torch; "
    "`python -m bitsandbytes` says more"
)

TRY_TORCH = """
import sys
sys.path.append(sys.argv[1])
from sg_local.finetune.load import card_fault
if fault := card_fault():
    sys.exit(fault)
"""
# In a process of its own: a llama.cpp that was built for another processor, or by a compiler with a fault, ends it.
_TRY_PROGRAM = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from sg_local.llama.engine import BatchToken, open_engine
with open_engine(Path(sys.argv[2]), n_ctx=256, n_parallel=1) as engine:
    token = engine.tokenizer.beginning[0]
    engine.decode([BatchToken(token, position, [0], position == 63) for position in range(64)])
"""
_TRY_SECONDS = 120


def examine() -> list[Finding]:
    """All findings, in the order in which a user should mend them."""
    card = card_in_use()
    store = _store()
    return [
        _python(),
        *(_package(name, INSTALL) for name in ("gguf", "rapidfuzz", "rouge-score", "scipy")),
        *([store] if store else []),
        _llama(bool(card), has_store=store is None),
        _torch(bool(card)),
        *_compiler(bool(card)),
        *(_package(name, INSTALL_TRAINING) for name in NEEDED if name != "torch"),
        _machine(),
        _gpu(nvidia_gpus(), card),
        _disk(has_store=store is None),
        *([] if store else [_models()]),
    ]


def missing(findings: list[Finding]) -> list[str]:
    """What is needed and not there."""
    return [finding["what"] for finding in findings if finding["needed"] and not finding["ok"]]


def _finding(what: str, found: str, fix: str | None = None, *, needed: bool = True) -> Finding:
    return {"what": what, "ok": fix is None, "needed": needed, "found": found, "fix": fix}


def _python() -> Finding:
    told = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return _finding("python", told, None if sys.version_info >= (3, 11) else "install Python 3.11 or newer")


def _package(name: str, fix: str) -> Finding:
    found = _version(name)
    return _finding(name, found) if found else _finding(name, "not installed", fix)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _llama(has_gpu: bool, *, has_store: bool) -> Finding:
    found = _version("llama-cpp-python")
    if found is None:
        return _finding("llama.cpp", "llama-cpp-python is not installed", f"pip install {LLAMA_REQUIREMENT}")
    try:
        built_for_gpu, fault = child_process.result_from_child("llama.cpp", f"{__name__}.load_llama_cpp")
    except ChildDied as death:  # it was built for a processor with other instructions
        return _finding("llama.cpp", f"{found} cannot be loaded: {death.what}", BUILD_PORTABLE)
    if fault:
        return _finding("llama.cpp", f"{found} cannot be loaded: {fault}", REINSTALL)
    if has_store and (fault := _fault_at_work()):
        fix = BUILD_PORTABLE_WITH_CUDA if built_for_gpu else BUILD_PORTABLE
        return _finding("llama.cpp", f"{found}, but {fault}", fix)
    if built_for_gpu:
        return _finding("llama.cpp", f"{found}, built for a GPU")
    return _finding("llama.cpp", f"{found}, built for the CPU", BUILD_WITH_CUDA if has_gpu else None)


def load_llama_cpp() -> tuple[bool, str]:
    """Whether it was built for a GPU, and why it cannot be loaded: in a process that this may end."""
    try:
        from sg_local.llama.library import supports_gpu

        return supports_gpu(), ""
    except (ImportError, OSError, RuntimeError) as error:  # a library that it was linked with is gone
        return False, " ".join(str(error).split())[:200]


def _fault_at_work() -> str | None:
    """What ends llama.cpp when it evaluates a batch with the smallest model that is here; None if nothing does."""
    present = [(model.name, path) for model in list_models() if (path := find_present(model))]
    if not present:
        return None
    name, path = min(present, key=lambda item: item[1].stat().st_size)
    package_parent = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-P", "-c", _TRY_PROGRAM, package_parent, str(path)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TRY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"64 tokens of {name} take it more than {_TRY_SECONDS} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"it is ended by {signal_name(-done.returncode)} when it works on {name}"
    said = done.stderr.strip().splitlines()
    return f"it fails when it works on {name}: {said[-1][:200] if said else f'exit code {done.returncode}'}"


def _torch(has_gpu: bool) -> Finding:
    found = _version("torch")
    if found is None:
        return _finding("torch", "not installed", INSTALL_TRAINING)
    if has_gpu and "+cpu" in found:
        return _finding("torch", f"{found}, built for the CPU", TORCH_WITH_CUDA)
    if has_gpu and (fault := _torch_fault()):
        fix = BITSANDBYTES_FOR_CUDA if fault.startswith("bitsandbytes: ") else TORCH_FOR_THE_DRIVER
        return _finding("torch", f"{found}, but it cannot use the card: {fault}", fix)
    return _finding("torch", found)


def _torch_fault() -> str | None:
    """Why torch and bitsandbytes cannot compute on the card, in their own words; None where they can."""
    package_parent = str(Path(__file__).resolve().parents[2])
    try:  # the import takes seconds
        done = subprocess.run(
            [sys.executable, "-P", "-c", TRY_TORCH, package_parent], capture_output=True, text=True, errors="replace",
            timeout=_TRY_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer after {_TRY_SECONDS} seconds"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1][:200] if said else f"exit code {done.returncode}"


def _compiler(has_gpu: bool) -> list[Finding]:
    """Triton, through which torch and Unsloth make kernels for a card, compiles C with Python's headers."""
    if not has_gpu or os.name == "nt":
        return []
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [] if compiler else ["a C compiler"]
    missing += [] if header.is_file() else [f"Python's headers ({header})"]
    if missing:
        return [
            _finding(
                "compiler", f"{' and '.join(missing)} not found, which training on a card needs", COMPILER
            )
        ]
    return [_finding("compiler", f"{compiler}, and Python's headers")]


def _machine() -> Finding:
    processors = counted(os.cpu_count() or 1, "processor")
    total = total_memory_bytes()
    return _finding("machine", f"{processors}, {total / 1e9:.0f} GB of memory" if total else processors)


def _gpu(gpus: list[str], card: str) -> Finding:
    found = "; ".join(gpus) or "no NVIDIA GPU: models up to about 1B can be trained on the CPU"
    if gpus and not card:
        found += f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')} is none of them)"
    elif len(gpus) > 1:
        found += f" (used: {card}; CUDA_VISIBLE_DEVICES chooses another)"
    return _finding("GPU", found)


def _store() -> Finding | None:
    """Where there is no place for models and working copies; None where there is one."""
    try:
        model_store()
    except InputError as error:
        found, _, fix = str(error).partition(": ")
        return _finding("store", found, fix)
    return None


def _disk(*, has_store: bool) -> Finding:
    places = {"here": Path.cwd()}
    if has_store:
        places["for models and working copies"] = model_store()
    free = {
        name: shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
        for name, place in places.items()
    }
    told = ", ".join(f"{n_bytes / 1e9:.0f} GB free {name}" for name, n_bytes in free.items())
    if min(free.values()) >= NEEDED_BYTES:
        return _finding("disk", told, needed=False)
    needed = f"a run of a 7B model needs about {NEEDED_BYTES / 1e9:.0f} GB"
    fix = f"{needed}: free some, or set SG_LOCAL_HOME to another disk"
    return _finding("disk", told, fix, needed=False)


def _models() -> Finding:
    here = [model.name for model in [*list_models(), *list_pulled()] if find_present(model)]
    fix = None if here else "sg-local models pull smollm2-135m"
    return _finding("models", ", ".join(here) or "none", fix, needed=False)
