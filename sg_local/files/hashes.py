"""What names a file or a value: hashes of its bytes, and the seeds of rows.

sha256_file(Path("model.gguf"))     -> "b179c952..."
row_seed(0, "generate", 7)          -> 0 <= seed < 2**31, the same on every machine
"""

import hashlib
import json
import os
from pathlib import Path

from sg_local.files.reading import raise_unreadable

SAMPLED_BYTES = 4 << 20  # of a large file, in _N_SAMPLES places
_N_SAMPLES = 64


def canonical_json(obj: object) -> str:
    """One text for equal values, for hashing: sorted keys, no spaces, text unescaped. ValueError for NaN."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise_unreadable(Path(path), error)


def sample_sha256(path: Path) -> str:
    """A hash of a file's size, its beginning, its end and some places between: for files that take long to hash.

    The whole of a file of up to SAMPLED_BYTES is in it. Raises InputError where it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size_bytes).encode())
            block_bytes = SAMPLED_BYTES // _N_SAMPLES
            # From the first block to the last; a small file is read through.
            last_offset = max(size_bytes, SAMPLED_BYTES) - block_bytes
            for number in range(_N_SAMPLES):
                file.seek(last_offset * number // (_N_SAMPLES - 1))
                digest.update(file.read(block_bytes))
            return digest.hexdigest()
    except OSError as error:
        raise_unreadable(Path(path), error)


def row_seed(run_seed: int, stage: str, row_id: int | str) -> int:
    """The seed of one row, 0 <= seed < 2**31, the same wherever and in whatever order rows are computed.

    The first 31 bits of SHA-256 over the canonical JSON of `[run_seed, stage, row_id]`; 7 and "7" differ.
    31 bits, because llama.cpp takes 32 and reads 0xFFFFFFFF as "choose one at random".
    """
    digest = hashlib.sha256(canonical_json([run_seed, stage, row_id]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
