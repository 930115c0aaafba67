"""One writer: the directory of a run, or of a bench, is held by the process that writes to it.

with lock_run(Path("runs/support-inbox")):
    ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sg_local.errors import InputError, SgLocalError
from sg_local.files import remove_leftovers

LOCK_SECONDS = 5.0  # a stage whose `run` was killed ends within a second or two


def make_directory(path: Path) -> None:
    """Makes the directory of a run, or of many. Raises SgLocalError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SgLocalError(f"{path} cannot be made ({error.strerror}): choose another directory") from error


@contextmanager
def lock_run(path: Path) -> Iterator[None]:
    """Holds a run directory for one writer, and clears away the temporaries of killed ones.

    Raises InputError where another process holds it, and SgLocalError where the directory cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise InputError(f"another sg-local is working on {path}: wait for it, or end it") from None
    except OSError as error:
        raise SgLocalError(
            f"{path} cannot be written ({error.strerror or error}): choose another directory"
        ) from error
    try:
        remove_leftovers(path)
        yield
    finally:
        lock.release()
