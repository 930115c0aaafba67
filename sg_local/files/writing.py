"""Files and directories that are whole or absent: written aside in the same directory, then renamed.

    write_text(Path("runs/inbox/Modelfile"), "FROM ./model.gguf")
    with atomic_path(Path("model.gguf")) as temporary: ...      .model.gguf.1a2b3c4d.tmp.gguf until it is whole

Links are removed, never followed.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sg_local.errors import SgLocalError
from sg_local.escape import json_text

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.[^.]+)?", re.DOTALL)  # the names that atomic_path gives


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 text file, newlines as they are. Raises as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Writes a whole file of one JSON value. Raises as `write_bytes`, and ValueError for NaN."""
    write_text(path, json_text(value, indent=1) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file. Raises SgLocalError where that fails; an older file then stays as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def copy_file(source: Path, path: Path) -> None:
    """Copies a whole file, whatever its size. Raises SgLocalError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the body to write; put on the disk and renamed to `path` at its end.

    If the body raises, the temporary is removed and an older file at `path` stays. Raises SgLocalError in
    place of the OSError of a full disk or missing permission; an OSError about another file passes.
    """
    path = Path(path)
    # The suffix is kept for writers that look at it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in {"None", str(temporary), str(path)}:
            raise write_error(path, error) from error
        raise


def partial_directory(directory: Path) -> Path:
    """The name that a directory has until it is whole, beside its final one."""
    return directory.with_name(f".{directory.name}.partial")


def remove_leftovers(directory: Path) -> list[Path]:
    """Removes the temporaries that killed processes left under `directory`, and returns their paths.

    Only for a caller that holds the directory's lock: a living writer's temporaries look the same.
    """
    leftovers = find_leftovers(directory)
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def find_leftovers(directory: Path) -> list[Path]:
    """The temporaries under `directory`, of killed writers and of living ones; no link is followed."""
    return sorted(
        path
        for place, directories, names in os.walk(directory)
        for path in (Path(place, name) for name in (*directories, *names))
        if _LEFTOVER.fullmatch(path.name) and (path.is_symlink() or path.is_file())
    )


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it, or a file, as far as possible. Of a link, the link alone."""
    with suppress(OSError):  # not there, or not allowed: whoever needs the place will say so
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def own_directory(path: Path) -> None:
    """Makes a directory, unless it is there; a link or a file in its place is removed, and what it points to stays.

    So nothing is written or removed in a directory that is not ours. Raises SgLocalError where it cannot be made.
    """
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def place_directory(source: Path, path: Path) -> None:
    """Puts a directory that is finished in the place of `path`, on the disk with all its files when this returns.

    Raises SgLocalError where that fails.
    """
    try:
        sync_tree(source)
        remove_tree(path)
        os.replace(source, path)
        sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def sync_tree(directory: Path) -> None:
    """Waits until all files of a directory, and their names, are on the disk."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> SgLocalError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        remedy = "free some space on this disk"
    elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        remedy = "check the permissions, or choose another place"
    elif error.errno == errno.ENOENT:
        remedy = f"make the directory {path.parent} first"
    else:
        remedy = "check the path and the disk's free space and permissions"
    return SgLocalError(f"{path} could not be written: {error.strerror or error}: {remedy}")
