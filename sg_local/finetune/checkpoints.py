"""Checkpoints that can be trusted: a checkpoint counts if it has a mark, and every file has the hash in the mark.

    checkpoints/checkpoint-40/adapter_model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json
    checkpoints/checkpoint-40/complete.json    {"key": "5d1c...", "sha256": {"optimizer.pt": "a3f0...", ...}}

The mark is written last. Its key is a hash of rows, settings and base, so that a checkpoint of another training is not
used.
"""

import hashlib
from pathlib import Path
from typing import Any

from sg_local.errors import InputError
from sg_local.files import canonical_json, read_json, remove_tree, sha256_file, sync_tree, write_json

MARK = "complete.json"
MAX_MARK_BYTES = 1 << 20


def training_key(parts: Any) -> str:
    """A hash of all that a training depends on; parts is JSON data."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def mark_complete(checkpoint: Path, key: str) -> None:
    """Writes the mark, when everything else is on the disk."""
    sync_tree(checkpoint)
    write_json(checkpoint / MARK, {"key": key, "sha256": _hashes(checkpoint)})


def last_complete(directory: Path, key: str) -> Path | None:
    """The newest complete checkpoint of this training; None if there is none."""
    checkpoints = [
        path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    for path in sorted(
        checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True
    ):
        try:
            mark = read_json(path / MARK, MAX_MARK_BYTES)
        except InputError:  # no mark, or half of one: it was being written
            continue
        if mark == {"key": key, "sha256": _hashes(path)}:
            return path
    return None


def remove_incomplete(directory: Path) -> None:
    """Removes the checkpoints without a mark: half-written, as by a kill or on a full disk."""
    for path in directory.glob("checkpoint-*"):
        if not (path / MARK).exists():
            remove_tree(path)


def _hashes(checkpoint: Path) -> dict[str, str]:
    return {
        str(path.relative_to(checkpoint)): sha256_file(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MARK
    }
