"""Errors that a user can act on: one line that says what, which value, and what to do next.

    SgLocalError            it failed while working                    exit code 1
    ├── InputError          the call or a file is wrong                exit code 2
    └── WorseThanBase       the tuned model is significantly worse     exit code 3

Anything else that reaches the command line is a bug and shows its traceback.
"""

import errno
import re
import signal


class SgLocalError(Exception):
    """Work was begun and could not be finished; the message is shown to the user as it stands."""

    exit_code = 1


class InputError(SgLocalError):
    """The call, a setting or a file is wrong, and nothing was changed.

    Several faults of one file belong into one error: join them with newlines.
    """

    exit_code = 2


class WorseThanBase(SgLocalError):
    """`--gate` was given and the tuned model scores significantly below the base at its best."""

    exit_code = 3


# What commands add that go on where they stopped when they are called again.
GOES_ON = "; what is finished is kept, and the same command goes on from there"

_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What native writers say of it, who raise no OSError with a number: safetensors, torch.save (three ways), numpy.
_WRITE_FAILED = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|StorageFull|os error (?:27|28|122)\b"
    r"|unexpected pos \d+ vs \d+|PytorchStreamWriter failed|iostream error|\d+ requested and \d+ written"
)
_NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def outside_cause(error: BaseException) -> str | None:
    """What ended a command that did nothing wrong itself, and what to do about it; None where the error is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "memory ran out: take a smaller model, or lower --n-ctx or --batch-size"
    if isinstance(error, OSError) and error.errno in _NO_PATH:  # as it was given to us
        return f"{str(error.filename)[:200]}: {error.strerror}: correct the path"
    # Libraries touch files too. Other errors of the system are our bugs, and keep their traceback.
    if isinstance(error, OSError) and error.errno in _DISK_IS_FULL | _NOT_ALLOWED:
        remedy = "free some space" if error.errno in _DISK_IS_FULL else "check the permissions"
        return f"{error.filename or 'writing the output'}: {error.strerror}: {remedy}"
    is_told = isinstance(error, SgLocalError)  # its message may quote the system's
    if isinstance(error, Exception) and not is_told and says_write_failed(text := str(error)):
        return f"a file could not be written ({text.splitlines()[0]:.200}): free some space"
    return None


def says_write_failed(message: str) -> bool:
    """Whether a library says with this that a file did not fit."""
    return _WRITE_FAILED.search(message) is not None


def signal_name(number: int) -> str:
    """What ended a process: "SIGSEGV" for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def signal_in_words(number: int) -> str:
    """The same, with what it tells of the machine."""
    name = signal_name(number)
    return f"{name} (as the system does when memory runs out)" if name == "SIGKILL" else name
