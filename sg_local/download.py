"""A download in a process of its own, bounded while it comes: its size, its memory, and how long nothing may come.

    download(["hf", "someone/big-GGUF", "q4/big.Q4_K_M.gguf"], work, max_file_bytes=1_050_000, on_bytes=advance)
    -> None: it is there; Failure("more than 1,050,000 bytes came", may_go_on=False)

Whatever the hub says about a file, what counts is what arrives on this disk. The process is download_child.py.
"""

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from sg_local.download_child import REFUSED
from sg_local.errors import says_write_failed

STALL_SECONDS = 60.0
STALL_BYTES = 1 << 17  # at least so much in STALL_SECONDS: 2 kB/s
POLL_SECONDS = 0.2
MAX_MEMORY_BYTES = (
    1 << 30
)  # of addresses: pip took 151 MiB for a wheel of 93 MB, huggingface_hub 251 for 300 MB
MAX_REASON_CHARACTERS = 300

_CHILD_PROGRAM = Path(__file__).with_name("download_child.py")
_MAX_SAID_BYTES = 1 << 16


class Failure(NamedTuple):
    """Why a download was not finished."""

    reason: str
    may_go_on: bool  # what has arrived can be continued
    remedy: str = "check the network"


def download(
    arguments: Sequence[str],
    work: Path,
    *,
    max_file_bytes: int,
    on_bytes: Callable[[int], None],
    find_fault: Callable[[], str | None] = lambda: None,
) -> Failure | None:
    """Downloads into the directory `work`, and says why where that failed.

    arguments: ["hf", REPOSITORY, PATH], ["hf-facts", REPOSITORY, PATH], either with a REVISION or without, or
    ["pypi", REQUIREMENT]. on_bytes is told how many bytes came since its last call; find_fault is asked after it why
    the rest is not wanted. An interruption ends the download.
    """
    temporary = work / ".tmp"  # pip downloads to there
    temporary.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        # Over plain HTTP alone: Xet keeps a cache of its own, elsewhere.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [
        sys.executable,
        "-P",
        str(_CHILD_PROGRAM),
        *arguments,
        str(work),
        *map(str, (max_file_bytes, MAX_MEMORY_BYTES)),
    ]
    with (
        tempfile.TemporaryFile() as said,
        # Nothing is written to the pipe: it ends with this process, and so does the download.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=environment
        ) as process,
    ):
        try:
            failure = _watch(process, work, max_file_bytes, on_bytes, find_fault)
        finally:
            process.kill()
        process.wait()
        if failure is None and process.returncode != 0:
            return _own_failure(said, process.returncode, max_file_bytes)
    return failure


def _watch(
    process: "subprocess.Popen[bytes]",
    work: Path,
    max_file_bytes: int,
    on_bytes: Callable[[int], None],
    find_fault: Callable[[], str | None],
) -> Failure | None:
    """Waits for the end of the download; says why where it has to be ended."""
    # What was lost and comes again does not count, or a hub that cuts every answer off would never be left.
    most_bytes, largest_bytes = _sizes(work)
    counted_bytes, counted_at = most_bytes, time.monotonic()
    while True:
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        else:
            return None
        total_bytes, largest_bytes = _sizes(work)
        if largest_bytes >= max_file_bytes or total_bytes > 2 * max_file_bytes:  # pip makes a copy
            return _too_large(max_file_bytes)
        if total_bytes > most_bytes:
            on_bytes(total_bytes - most_bytes)
            most_bytes = total_bytes
        if fault := find_fault():
            return Failure(fault, may_go_on=False)
        if most_bytes - counted_bytes >= STALL_BYTES:
            counted_bytes, counted_at = most_bytes, time.monotonic()
        elif time.monotonic() - counted_at > STALL_SECONDS:
            came_bytes = most_bytes - counted_bytes
            return Failure(f"only {came_bytes:,} bytes came in {STALL_SECONDS:.0f} s", may_go_on=True)


def _sizes(directory: Path) -> tuple[int, int]:
    """Bytes of all files in a directory, and of the largest."""
    sizes = [0]
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                sizes.append(os.lstat(os.path.join(place, name)).st_size)
            except FileNotFoundError:  # renamed a moment ago
                continue
    return sum(sizes), max(sizes)


def _own_failure(said: IO[bytes], exit_code: int, max_file_bytes: int) -> Failure:
    """Why the process says that it failed."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - _MAX_SAID_BYTES))
    lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    if any(os.strerror(errno.EFBIG) in line for line in lines):
        return _too_large(max_file_bytes)
    if any(line.startswith("MemoryError") for line in lines):
        return Failure("what came takes too much memory", may_go_on=False)
    # pip says why in such a line, and may give advice after it; after an error of its own there is a traceback.
    reasons = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    reason = [f"exit code {exit_code}", *lines[-1:], *reasons[-1:]][-1]
    if exit_code == REFUSED:
        return Failure(reason[:MAX_REASON_CHARACTERS], may_go_on=False)
    remedy = "free some space" if says_write_failed(reason) else "check the network"
    return Failure(reason[:MAX_REASON_CHARACTERS], may_go_on=True, remedy=remedy)


def _too_large(max_file_bytes: int) -> Failure:
    return Failure(f"more than {max_file_bytes:,} bytes came", may_go_on=False)
