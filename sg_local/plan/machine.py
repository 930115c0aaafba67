"""What this machine has: its memory, its NVIDIA cards, and the one that is used.

nvidia_gpus()    ["NVIDIA GeForce RTX 3060, 12288 MiB"]
"""

import os
import shutil
import subprocess
from dataclasses import dataclass


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
    """Names and memory of the NVIDIA GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # the program is there, its driver or device is not
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def card_in_use() -> str:
    """Name and memory of the card that llama.cpp and torch should use; "" where there is none, or it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return ""
    return next(iter(nvidia_gpus()), "")
