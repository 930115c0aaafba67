"""Files, read within bounds and written so that nothing half-written ever has its final name.

    rows.py     read_rows, write_rows; growing files: append_rows, recover_rows, which cuts off a torn last line
    writing.py  whole files: write_text, write_json, atomic_path. Directories: own_directory, place_directory
    reading.py  read_text, read_json; decoded, parse_json, parse_row for who has bytes or a text, not a path
    toml.py     read_toml, toml_text
    hashes.py   sha256_file, canonical_json, row_seed
    faults.py   Faults: all that is wrong with a file, raised together

All of it is imported from here: `from sg_local.files import read_rows`.
"""

from sg_local.files.faults import Faults
from sg_local.files.hashes import SAMPLED_BYTES, canonical_json, row_seed, sample_sha256, sha256_file
from sg_local.files.reading import (
    JsonObject,
    as_row,
    decoded,
    parse_json,
    parse_row,
    read_bytes,
    read_json,
    read_text,
)
from sg_local.files.rows import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    Line,
    Row,
    append_rows,
    read_rows,
    recover_rows,
    scan_rows,
    write_rows,
)
from sg_local.files.toml import MAX_TOML_BYTES, read_toml, toml_text
from sg_local.files.writing import (
    atomic_path,
    copy_file,
    find_leftovers,
    own_directory,
    partial_directory,
    place_directory,
    remove_leftovers,
    remove_tree,
    sync_tree,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "Faults",
    "JsonObject",
    "Line",
    "MAX_FILE_BYTES",
    "MAX_LINE_BYTES",
    "MAX_TOML_BYTES",
    "Row",
    "SAMPLED_BYTES",
    "append_rows",
    "as_row",
    "atomic_path",
    "canonical_json",
    "copy_file",
    "decoded",
    "find_leftovers",
    "own_directory",
    "parse_json",
    "parse_row",
    "partial_directory",
    "place_directory",
    "read_bytes",
    "read_json",
    "read_rows",
    "read_text",
    "read_toml",
    "recover_rows",
    "remove_leftovers",
    "remove_tree",
    "row_seed",
    "sample_sha256",
    "scan_rows",
    "sha256_file",
    "sync_tree",
    "toml_text",
    "write_bytes",
    "write_json",
    "write_rows",
    "write_text",
]
