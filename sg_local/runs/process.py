"""A stage in a process of its own: how it is started, how it ends with its parent, and how it says what went wrong.

    in_child_process(run, "train")    0: finished; 1 or 2: it has said why; -11: SIGSEGV ended it

The child runs `child.py`, which calls the functions here. Its standard input is a pipe that nothing is written to: it
ends with the parent, and so does the child.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from sg_local.errors import GOES_ON, SgLocalError, outside_cause
from sg_local.files import read_text, write_text
from sg_local.progress import restore_terminal, say
from sg_local.runs.directory import Run, open_run
from sg_local.runs.stage import run_stage

StartStage: TypeAlias = Callable[[Run, str], int]  # runs a stage and returns its exit code, -N for signal N

REASON_FILE = ".reason"  # why the last stage of a `run` failed, beside what the user was shown
MAX_REASON_BYTES = 1 << 20

_CHILD_PROGRAM = Path(__file__).with_name("child.py")


def in_child_process(run: Run, stage: str) -> int:
    """Runs a stage in a process of its own and returns its exit code; an interruption ends it first."""
    # -P: nothing is imported from the directory that the user works in, which may hold a `datasets.py` of their own.
    command = [sys.executable, "-P", str(_CHILD_PROGRAM), str(run.path), stage]
    with _interrupt_ignored():  # the child inherits that, so that it holds from its first moment
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
    with process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.stdin.close()  # type: ignore[union-attr]  # it is a pipe; this ends the stage
            process.wait()
            raise
    if code < 0:
        restore_terminal()
    return code


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python sets no signals
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def end_with_parent() -> None:
    """Makes this process end when the one that started it ends, however that ended.

    Ctrl-C reaches both; the parent alone acts on it. Here it could strike inside a callback of a C library,
    where Python prints a KeyboardInterrupt and forgets it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_end() -> None:
        os.read(0, 1)
        restore_terminal()
        os._exit(1)  # at once, whatever the main thread is doing: a stage may be killed anywhere

    threading.Thread(target=wait_for_end, daemon=True).start()


def stage_exit_code(run_dir: Path, stage: str) -> int:
    """Runs a stage for the process that waits for it: an error is a line on stderr, a reason in the run, and a code."""
    try:
        run_stage(open_run(run_dir), stage)
    except SgLocalError as error:
        say(f"Error: {error}")
        with suppress(SgLocalError):  # the disk may be full
            write_text(run_dir / REASON_FILE, str(error))
        return error.exit_code
    except BrokenPipeError:  # nobody reads what it says any more
        return 1
    except (MemoryError, OSError) as error:
        if (cause := outside_cause(error)) is None:
            raise
        say(f"Error: {cause}{GOES_ON}")
        return 1
    return 0


def reason_of_failure(run: Run) -> str | None:
    """Why the last stage that was started failed, in its own words; None where it had none."""
    path = run.file(REASON_FILE)
    return read_text(path, MAX_REASON_BYTES) if path.exists() else None
