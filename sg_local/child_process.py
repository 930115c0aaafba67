"""A function of this package in a process of its own, so that native code can end that process, not the command.

    for values in values_from_child("predict", "sg_local.llama.serving.answers_of_engine", texts=["one a"], ...):
    result_from_child("generate", "sg_local.runs.process.work_on_stage", run_dir="runs/a", stage="generate", ...)

Arguments and values are JSON. An error of the function is raised here with its own text and exit code; a process that
a signal ended is a ChildDied, which says what llama.cpp had open and its last words.

The child runs `child.py`. Its standard input carries the arguments, one line of JSON, and stays open: it ends with the
parent, and so does the child. Its standard output carries lines of JSON:

    {"value": "..."}                           what the function yields or returns
    {"error": "...", "exit_code": 2}           why it failed
    {"files": ["base.gguf", "adapter.gguf"]}   what native code works on from now on
    {"native_error": "CUDA error: out of memory"}

A conversation sends more values to a function that reads them from `received_values`, one for each that it yields:

    values = values_from_child("chat", ...); next(values); values.send("My parcel is late.")    "delivery"

What the function prints goes to the user's stderr. What native code writes to stderr itself is kept from the user (a
trace of a debugger, "terminate called after..."), and gives the last words.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from sg_local.errors import InputError, SgLocalError, WorseThanBase, outside_cause, signal_in_words
from sg_local.escape import printable
from sg_local.progress import restore_terminal, say

_PROGRAM = Path(__file__).with_name("child.py")
_MAX_NATIVE_ERRORS = 4
_MAX_TAIL_BYTES = 8192
_MAX_WORDS = 200  # characters
_TELLING = re.compile(r"GGML_ASSERT\(|what\(\):|error", re.IGNORECASE)
_BEFORE_THE_WORDS = re.compile(r"^.*?(?=GGML_ASSERT\()|^.*what\(\):\s*")
_CARD_MEMORY = re.compile(
    r"\b(CUDA|cudaMalloc|ROCm|HIP|MUSA|SYCL|Vulkan|Metal|vk)\b.*out of memory|OutOfDeviceMemory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|(unable|failed) to allocate (CUDA|ROCm|MUSA|SYCL|Vulkan|Metal)\d* buffer",
    re.IGNORECASE,
)
# What CUDA and HIP say where the kernels are not for this card, or newer than its driver.
_OTHER_CARD = re.compile(
    r"no kernel image is available|device kernel image is invalid|invalid device function"
    r"|PTX was compiled with an unsupported toolchain",
    re.IGNORECASE,
)
SECONDS_TO_END = 2.0  # for a child to remove its temporaries, before it is ended wherever it is


class ChildDied(SgLocalError):
    """A signal ended the child: native code crashed, or somebody killed it."""

    def __init__(self, work: str, number: int, files: list[str], words: str) -> None:
        self.signal = number
        self.what = f"{work} was ended by {signal_in_words(number)}"
        if files:
            self.what += f" while llama.cpp used {' with '.join(files)}"
        if words:
            self.what += f" ({words})"
        advice = "get another copy of that file, or " if files else ""
        if number == getattr(signal, "SIGKILL", None):
            advice = "free some memory, or "
        super().__init__(
            f"{self.what}: {advice}ask `sg-local doctor`, which tries whether llama.cpp works here at all"
        )


def result_from_child(work: str, function: str, **arguments: Any) -> Any:
    """What the function returns, as `values_from_child`."""
    (result,) = values_from_child(work, function, **arguments)
    return result


def values_from_child(work: str, function: str, **arguments: Any) -> Generator[Any, Any, None]:
    """Yields what a function of the package yields in a process of its own, or the one value that it returns.

    What the caller sends is one of the function's `received_values`. work: what the user calls it. Where the caller
    stops reading or is interrupted, the child is ended first.
    Raises SgLocalError, InputError or WorseThanBase as the function does, and ChildDied where a signal ended it.
    """
    with _native_output() as native_output:
        process = _start(function, native_output)
        messages = _Messages()
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it ended early: its exit code says how
                    process.stdin.write(_line(arguments))
                    process.stdin.flush()
                for line in process.stdout:
                    message = json.loads(line)
                    if "value" in message:
                        sent = yield message["value"]
                        if sent is not None:
                            with suppress(BrokenPipeError):
                                process.stdin.write(_line({"value": sent}))
                                process.stdin.flush()
                    else:
                        messages.keep(message)
            finally:
                with suppress(BrokenPipeError):
                    process.stdin.close()  # this ends the child, if it still works
                process.wait()
        _raise_fault(work, process.returncode, messages, native_output)


class _Messages:
    """What the child told beside its values."""

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self.files: list[str] = []
        self.native_errors: deque[str] = deque(maxlen=_MAX_NATIVE_ERRORS)

    def keep(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self.error = message
        elif "files" in message:
            self.files = message["files"]
        else:
            self.native_errors.append(message["native_error"])


@contextmanager
def _native_output() -> Iterator[IO[bytes]]:
    """A file without a name for what native code writes; nothing is kept of it where no file can be made."""
    with ExitStack() as stack:
        try:
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
        except OSError:
            file = stack.enter_context(open(os.devnull, "r+b"))
        yield file


def _start(function: str, native_output: IO[bytes]) -> "subprocess.Popen[bytes]":
    descriptor = -1  # Windows hands over standard streams alone
    if os.name == "posix":
        import fcntl

        # Not one of the standard three, where the caller closed those.
        descriptor = fcntl.fcntl(native_output.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    # -P: nothing is imported from the directory that the user works in, which may hold a `datasets.py` of their own.
    command = [sys.executable, "-P", str(_PROGRAM), function, str(descriptor)]
    try:
        with _interrupt_ignored():  # the child inherits that, so that it holds from its first moment
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[descriptor] if descriptor >= 0 else [],
            )
    finally:
        if descriptor >= 0:
            os.close(descriptor)


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


def _raise_fault(work: str, code: int, messages: _Messages, native_output: IO[bytes]) -> None:
    """Raises what ended the child, unless it did its work."""
    if messages.error is not None:
        kinds = {kind.exit_code: kind for kind in (SgLocalError, InputError, WorseThanBase)}
        raise kinds[messages.error["exit_code"]](messages.error["error"])
    if code == 0:
        return
    lines = [*messages.native_errors, *_tail(native_output)]
    if code < 0:
        restore_terminal()
        if code == -signal.SIGABRT and (memory := [*filter(no_card_memory, lines)]):
            raise card_is_full(memory[-1])
        if code == -signal.SIGABRT and (other := [*filter(_OTHER_CARD.search, lines)]):
            raise SgLocalError(
                f"this llama.cpp was built for other cards, or for a newer driver ({other[-1].strip()[:_MAX_WORDS]}): "
                "build it here, as `sg-local doctor` says, or take --n-gpu-layers 0"
            )
        raise ChildDied(work, -code, messages.files, _last_words(lines))
    for line in lines:  # beside the traceback that the child has shown
        say(line)
    raise SgLocalError(f"{work} ended with an error of its own (see above): please report it")


def no_card_memory(message: str) -> bool:
    """Whether llama.cpp says with this that a card's memory did not suffice."""
    return _CARD_MEMORY.search(message) is not None


def card_is_full(message: str) -> SgLocalError:
    """The error for that."""
    return SgLocalError(
        f"the card's memory ran out ({message.strip()[:_MAX_WORDS]}): "
        "lower --n-ctx or --n-parallel, or close other programs"
    )


def _tail(native_output: IO[bytes]) -> list[str]:
    size_bytes = native_output.seek(0, os.SEEK_END)
    native_output.seek(max(0, size_bytes - _MAX_TAIL_BYTES))
    text = native_output.read(_MAX_TAIL_BYTES).decode("utf-8", "replace")
    return [printable(line) for line in text.splitlines() if line.strip()]


def _last_words(lines: list[str]) -> str:
    """The last line that says what went wrong: "unordered_map::at", "GGML_ASSERT(n > 0) failed"."""
    if not lines:
        return ""
    telling = [line for line in lines if _TELLING.search(line)] or lines
    return _BEFORE_THE_WORDS.sub("", telling[-1]).strip()[:_MAX_WORDS]


# From here on: in the child.

_tells = threading.Lock()
_parent: int | None = None  # descriptor of what the parent reads; None in a process that is no child
_files: list[str] = []
_received: "queue.SimpleQueue[Any]" = queue.SimpleQueue()


def received_values() -> Iterator[Any]:
    """What the parent sends, as it comes; the process ends with what sends it."""
    while True:
        yield _received.get()


def serve(function: str, native_output: int) -> int:
    """The child's work: calls the function, tells the parent what comes of it, and returns the exit code."""
    global _parent
    request = sys.stdin.buffer.readline()
    if not request.endswith(b"\n"):  # the parent is gone already
        return 1
    if sys.stderr is None:  # the caller closed it
        os.open(os.devnull, os.O_WRONLY)  # takes the lowest number that is free: 2
    _parent = os.dup(1)
    _keep_streams_apart(native_output)
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # ggml starts a debugger at an abort
    # OpenMP's threads, of llama.cpp and torch alike, spin while they wait for one another, 300,000 times by default:
    # beside other work that is the very time that the others need. Not at all ("passive") costs a fifth of the training
    # on an idle machine. Measured: tests/benchmarks/threads.py. libgomp reads it when it is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # numpy's own threads spin too: a merge takes four times as long with them. What is worth several threads here has
    # its own (gguf_io), or is llama.cpp's or torch's.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _leave_no_core()
    try:
        _end_with_parent()
        for value in call(function, json.loads(request)):
            _tell({"value": value})
    except SgLocalError as error:
        _tell({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    except (BrokenPipeError, KeyboardInterrupt):  # nobody reads what it says any more, or the parent ends
        return 1
    return 0


def call(function: str, arguments: dict[str, Any]) -> Iterator[Any]:
    """What the child computes. Raises SgLocalError for whatever a user can do something about."""
    module, _, name = function.rpartition(".")
    assert module.startswith("sg_local."), function
    try:
        result = getattr(import_module(module), name)(**arguments)
        if isinstance(result, Iterator):
            yield from result
        else:
            yield result
    except Exception as error:
        if (cause := outside_cause(error)) is None:
            raise
        raise SgLocalError(cause) from error


@contextmanager
def native_code_uses(path: Path) -> Iterator[None]:
    """Lets the parent know the file that native code works on, should that end this process."""
    _files.append(str(path))
    _tell({"files": _files})
    try:
        yield
    finally:
        _files.remove(str(path))
        with suppress(BrokenPipeError):
            _tell({"files": _files})


def tell_native_error(message: str) -> None:
    """Lets the parent know what native code calls an error; it may end this process as its next act."""
    with suppress(OSError):  # this is called by native code, which takes no exception
        _tell({"native_error": message[:_MAX_WORDS]})


def _tell(message: dict[str, Any]) -> None:
    if _parent is None:
        return
    data = _line(message)
    with _tells:
        while data:
            data = data[os.write(_parent, data) :]


def _line(value: dict[str, Any]) -> bytes:
    # A path may hold what is no UTF-8; json.loads reads it back as it was.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _keep_streams_apart(native_output: int) -> None:
    """Python's stderr stays the user's, and what is printed goes there; native code's stderr is kept for the parent."""
    user = os.dup(2)
    os.dup2(user, 1)
    if isinstance(sys.stdout, TextIOWrapper):  # a library's emoji are no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    if native_output < 0:
        return
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    stream = os.fdopen(user, "w", buffering=1, encoding=encoding, errors="backslashreplace")
    sys.stderr = sys.__stderr__ = stream  # type: ignore[misc]  # Final, for those who replace no descriptors
    os.dup2(native_output, 2)
    os.close(native_output)


def _leave_no_core() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _end_with_parent() -> None:
    """Makes this process end when the one that started it ends, however that ended.

    Ctrl-C reaches both; the parent alone acts on it. Here it could strike inside a callback of a C library,
    where Python prints a KeyboardInterrupt and forgets it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    has_signals = hasattr(signal, "pthread_kill")  # not on Windows
    if has_signals:
        signal.signal(signal.SIGUSR1, signal.default_int_handler)

    def wait_for_end() -> None:
        pending = b""
        while data := os.read(
            0, 1 << 16
        ):  # not through sys.stdin, whose lock this thread would keep at the end
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _received.put(json.loads(line)["value"])
        if has_signals:  # what it was writing is removed on the way out, unless native code keeps it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            time.sleep(SECONDS_TO_END)
        restore_terminal()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
