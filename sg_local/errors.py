"""Errors that a user can act on: one line that says what, which value, and what to do next.

    SgLocalError            it failed while working                    exit code 1
    ├── InputError          the call or a file is wrong                exit code 2
    └── WorseThanBase       the tuned model is significantly worse     exit code 3

Anything else that reaches the command line is a bug and shows its traceback.
"""

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


def signal_name(number: int) -> str:
    """What ended a process: "SIGSEGV" for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
