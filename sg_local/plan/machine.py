"""What this machine has: its memory, its NVIDIA cards, and the one that is used.

nvidia_gpus()    ["NVIDIA GeForce RTX 3060, 12288 MiB"]
card_in_use()    "NVIDIA GeForce RTX 3060, 12288 MiB"

Which card that is, CUDA reads from the environment: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER (CUDA Programming Guide,
"CUDA Environment Variables").
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Where Windows puts it for Linux beside it; PATH lacks that in a service, in cron and under sudo.
_NVIDIA_SMI_OF_WSL = "/usr/lib/wsl/lib/nvidia-smi"
_MEMORY = re.compile(r"(?:.*, )?(\d+) MiB")


@dataclass(frozen=True)
class Machine:
    """What there is, in bytes; 0 for memory that the system does not tell, gpu_bytes 0 without a GPU."""

    gpu: str
    gpu_bytes: int
    host_bytes: int
    run_disk_bytes: int  # free where the run's directory will be
    store_disk_bytes: int  # free where models and working copies are
    is_one_disk: bool


def total_memory_bytes() -> int:
    """The machine's memory; 0 where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def nvidia_gpus() -> list[str]:
    """Names and memory of the NVIDIA GPUs, in the order of their places in the machine."""
    return _ask_nvidia("name,memory.total")


def memory_bytes(line: str) -> int:
    """The memory in a line of `nvidia_gpus`; 0 where it does not say, as of a chip that shares the processor's."""
    match = _MEMORY.fullmatch(line)
    return int(match[1]) * 1024**2 if match else 0


def _ask_nvidia(what: str, card: str = "") -> list[str]:
    """What nvidia-smi says of all cards, or of one, by its index or UUID: a line for each."""
    program = shutil.which("nvidia-smi") or shutil.which(_NVIDIA_SMI_OF_WSL)
    if program is None:
        return []
    query = [program, f"--query-gpu={what}", "--format=csv,noheader", *(["-i", card] if card else [])]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # the program is there, its driver or device is not
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def may_have_another_card() -> bool:
    """Whether there is something to compute on that nvidia-smi does not know: of Apple, or of AMD on Linux."""
    return sys.platform == "darwin" or Path("/dev/kfd").exists()


def card_in_use() -> str:
    """Name and memory of the card that llama.cpp and torch should use; "" where there is none, or it is hidden."""
    card = _chosen_card()
    return next(iter(_ask_nvidia("name,memory.total", card)), "") if card else ""


def card_bytes_in_use() -> int:
    """What programs hold now of the memory of that card; 0 where there is none, or nothing is told."""
    card = _chosen_card()
    return memory_bytes(next(iter(_ask_nvidia("memory.used", card)), "")) if card else 0


def use_one_card() -> None:
    """Shows CUDA one card, the one of `card_in_use`, from now on and in every child process.

    Call it before llama.cpp or torch starts CUDA, which reads the variables once for both. With two cards in sight, a
    trainer would spread a batch or the model over them, and what `plan` told is of one.
    """
    # By default CUDA counts the fastest card first, nvidia-smi goes by the places in the machine.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ["CUDA_VISIBLE_DEVICES"] = _chosen_card() or "-1"  # Windows has no variables that are empty


def _chosen_card() -> str:
    """Index or UUID of the card that counts; "" where all are hidden.

    That is the first which the user shows to CUDA, or else the one with the most memory.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        sizes = [memory_bytes(line) for line in nvidia_gpus()]
        return str(sizes.index(max(sizes))) if sizes else "0"
    first = shown.split(",")[0].strip()
    # CUDA takes what is no card as the end of the list: "-1", and Slurm's "NoDevFiles".
    return first if first.isdecimal() or first.startswith(("GPU-", "MIG-")) else ""
