"""The environment of a training process: required packages, and variables to set before the heavy imports.

    prepare_process(run.file(".work"))        then, and only then: import unsloth, torch, trl

By default, Unsloth writes compiled code into the working directory and imports it, sends statistics, and may use the
network. Here it works in the run's directory, offline, and sends nothing.
"""

import getpass
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from sg_local.errors import InputError
from sg_local.plan.machine import use_one_card

OFFLINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_OFFLINE": "1",
    "UNSLOTH_LLAMA_CPP_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
    # sg_local shows the progress itself.
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "unsloth")


def require_trainer(trainer: str) -> None:
    """`require_training_packages` for a trainer. If only unsloth is missing, the error says that PEFT works without."""
    require_training_packages(tuple(name for name in NEEDED if name != "unsloth"))
    if trainer == "unsloth" and find_spec("unsloth") is None:
        raise InputError(
            "--trainer unsloth needs unsloth, not installed here: `pip install 'sg-local[train]'`, "
            "or `make install` in a source checkout; or start a run with --trainer peft, which does without it"
        )


def missing_packages(packages: Iterable[str]) -> list[str]:
    """Those that are not installed here."""
    return [name for name in packages if find_spec(name) is None]


def require_training_packages(packages: tuple[str, ...]) -> None:
    """Raises InputError with the missing packages and the command that installs them."""
    if missing := missing_packages(packages):
        raise InputError(
            f"training needs {', '.join(missing)}, not installed here: `pip install 'sg-local[train]'`, "
            "or `make install` in a source checkout; then run the same command again"
        )


def go_offline() -> None:
    """Sets OFFLINE_ENVIRONMENT. Call it before the heavy imports, which read the variables once."""
    loaded = [name for name in ("unsloth", "transformers", "trl") if name in sys.modules]
    if loaded and not OFFLINE_ENVIRONMENT.items() <= os.environ.items():
        raise RuntimeError(f"the offline environment was set after the import of {', '.join(loaded)}")
    os.environ.update(OFFLINE_ENVIRONMENT)
    _name_a_home()
    # bitsandbytes advises to download faster kernels from a hub; nothing is downloaded here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _name_a_home() -> None:
    """torch and Triton ask for the user's name and home, and end where a container's user has neither."""
    try:
        Path.home()
        getpass.getuser()
    except (KeyError, OSError, RuntimeError):  # OSError in place of KeyError from Python 3.13 on
        os.environ["HOME"] = tempfile.gettempdir()
        os.environ["USER"] = os.environ["LOGNAME"] = "sg-local"


def prepare_process(work_dir: Path, *, on_gpu: bool = False) -> None:
    """Goes offline and changes to work_dir, which is made if it is missing. Call it before the heavy imports.

    on_gpu: this machine has a card, so Unsloth must not train on the CPU instead.
    """
    go_offline()
    if on_gpu:
        os.environ["UNSLOTH_DISABLE_CPU_FALLBACK"] = "1"
    work_dir.mkdir(parents=True, exist_ok=True)
    use_one_card()
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(work_dir.resolve() / "unsloth_compiled_cache")
    os.chdir(work_dir)
