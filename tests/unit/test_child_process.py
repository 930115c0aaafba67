"""A function in a process of its own: what comes back of it, and how it may end. No model that is worth the name."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, given, in_a_process, in_a_shell
from messages import assert_says
from tiny_models import write_tiny_llama

from sg_local.child_process import ChildDied, result_from_child, values_from_child
from sg_local.errors import InputError, SgLocalError
from sg_local.runs.directory import Run

pytestmark = pytest.mark.usefixtures("real_child")

# In the child alone; the rest is what it is to do.
PLANTED = """
import os, sys, time
if any(argument.endswith("child.py") for argument in sys.orig_argv):
    sys.modules["sg_local.planted"] = sys.modules[__name__]
"""
# A stage that works on rows when the card's memory runs out, as llama.cpp tells it.
CARD_IS_FULL = """
    import sg_local.runs.stage
    def run_stage(run, stage, *, redo=False):
        from sg_local.llama import library
        run.file(".in_flight.json").write_text('{"part": "generate", "rows": [3, 4], "crashes": {}}')
        library._keep_message(4, b"CUDA error: out of memory\\n", None)
        library._keep_message(4, b"  current device: 0, in function alloc at ggml-cuda.cu:552\\n", None)
        os.write(2, b"ggml-cuda.cu:104: CUDA error\\n")
        os.abort()
    sg_local.runs.stage.run_stage = run_stage
"""

Plant = Callable[[str], dict[str, str]]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Code that the child has as the module sg_local.planted; returns the environment for it."""

    def write(code: str) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(PLANTED + code)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
        return {"PYTHONPATH": os.environ["PYTHONPATH"]}

    return write


def planted(**arguments: Any) -> Generator[Any, Any, None]:
    return values_from_child("work", "sg_local.planted.work", **arguments)


def test_values_come_one_by_one_and_as_they_were(plant: Plant) -> None:
    plant("def work(**arguments):\n    yield arguments\n    time.sleep(60)\n")
    arguments = {"text": 'a\n"\u2028é\udcff', "many": ["x" * 300_000], "none": None, "rate": 0.5}
    started = time.monotonic()
    values = planted(**arguments)
    assert next(values) == arguments
    values.close()
    assert time.monotonic() - started < 30  # it was ended


def test_a_result_is_returned(plant: Plant) -> None:
    plant("def work(n):\n    print('for the user', n)\n    return [n]\n")
    assert result_from_child("work", "sg_local.planted.work", n=3) == [3]


def test_what_is_printed_goes_to_the_user_and_what_native_code_says_does_not(
    plant: Plant, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(
        "def work():\n    print('printed')\n    print('told', file=sys.stderr)\n    os.write(2, b'native')\n"
        "    os.system('echo of a program')\n    return 0\n"
    )
    assert list(planted()) == [0]
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.splitlines()) == ["of a program", "printed", "told"]


def test_what_the_users_encoding_lacks_is_told_as_an_escape(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(
        "def work():\n    for to in (sys.stdout, sys.stderr):\n"
        "        print('gr\\xf6\\xdfer', file=to, flush=True)\n    return 0\n"
    )
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert list(planted()) == [0]
    assert capfd.readouterr().err == "gr\\xf6\\xdfer\n" * 2


def test_only_functions_of_the_package_are_called() -> None:
    with pytest.raises(SgLocalError):
        list(values_from_child("work", "os.getcwd"))


@pytest.mark.parametrize(("name", "kind"), [("InputError", InputError), ("SgLocalError", SgLocalError)])
def test_an_error_is_raised_as_it_was(plant: Plant, name: str, kind: type[SgLocalError]) -> None:
    plant(
        f"def work():\n    from sg_local.errors import {name}\n    yield 1\n    raise {name}('no\\ngood: \\udcff')\n"
    )
    values = planted()
    assert next(values) == 1
    with pytest.raises(SgLocalError) as caught:
        next(values)
    assert type(caught.value) is kind
    assert str(caught.value) == "no\ngood: \udcff"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("MemoryError()", "memory ran out"),
        ("OSError(28, 'No space left on device', 'a.bin')", "a.bin: No space left on device: free some"),
    ],
)
def test_what_the_machine_refuses_says_what_to_do(plant: Plant, error: str, told: str) -> None:
    plant(f"def work():\n    raise {error}\n")
    with pytest.raises(SgLocalError, match=told):
        list(planted())


def test_a_bug_shows_its_traceback_and_what_native_code_had_said(
    plant: Plant, capfd: pytest.CaptureFixture[str]
) -> None:
    plant("def work():\n    os.write(2, b'gcc: no such header\\n')\n    return {}['a']\n")
    with pytest.raises(SgLocalError, match="work ended with an error of its own") as caught:
        list(planted())
    assert caught.value.exit_code == 1
    err = capfd.readouterr().err
    assert_says(err, "Traceback", "KeyError: 'a'", "gcc: no such header")


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGKILL]
)
def test_a_death_names_signal_files_and_last_words(plant: Plant, number: signal.Signals) -> None:
    plant(
        "def work(number):\n"
        "    from pathlib import Path\n"
        "    from sg_local.child_process import native_code_uses\n"
        "    with native_code_uses(Path('closed.gguf')):\n        pass\n"
        "    with native_code_uses(Path('base.gguf')), native_code_uses(Path('adapter.gguf')):\n"
        "        os.write(2, b'terminate called\\n  what():  unordered_map\\x1b::at\\n')\n"
        "        os.kill(os.getpid(), number)\n"
    )
    with pytest.raises(ChildDied) as caught:
        list(planted(number=int(number)))
    told = str(caught.value)
    assert_says(
        told, "work", number.name, "base.gguf with adapter.gguf", r"(unordered_map\x1b::at)", "doctor"
    )
    assert "closed.gguf" not in told
    assert (caught.value.signal, caught.value.exit_code) == (number, 1)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            b"[New LWP 7]\n/a/b/ggml.c:12: GGML_ASSERT(n > 0) failed\n#0 0x0 in main ()\n",
            "(GGML_ASSERT(n > 0) failed)",
        ),
        (b"Fatal Python error: Aborted\n\n", "(Fatal Python error: Aborted)"),
        (b"\xff\n", "(\ufffd)"),
        (b"x" * 100_000, "(" + "x" * 200 + ")"),
        (b"", "SIGABRT:"),
    ],
)
def test_the_last_words_are_the_line_that_tells(plant: Plant, said: bytes, words: str) -> None:
    plant(f"def work():\n    os.write(2, {said!r})\n    os.abort()\n")
    with pytest.raises(ChildDied) as caught:
        list(planted())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("level", "message", "is_memory"),
    [
        (4, b"CUDA error: out of memory", True),
        (4, b"ROCm error: out of memory", True),
        (4, b"CUDA error: CUBLAS_STATUS_ALLOC_FAILED", True),
        (3, b"CUDA error: out of memory", False),  # a warning: llama.cpp went on
        (4, b"CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_an_abort_for_lack_of_the_cards_memory_is_told_apart(
    plant: Plant, level: int, message: bytes, is_memory: bool
) -> None:
    plant(
        "def work():\n    from sg_local.llama.library import _keep_message\n"
        f"    _keep_message({level}, {message!r}, None)\n    os.abort()\n"
    )
    with pytest.raises(SgLocalError) as caught:
        list(planted())
    assert isinstance(caught.value, ChildDied) is not is_memory
    if is_memory:
        assert_says(str(caught.value), message.decode(), "--n-ctx", "--n-parallel", "other programs")


@pytest.mark.parametrize(
    "message",
    [
        b"CUDA error: no kernel image is available for execution on the device",
        b"CUDA error: the provided PTX was compiled with an unsupported toolchain.",
        b"ROCm error: invalid device function",
    ],
)
def test_a_llama_cpp_for_other_cards_is_the_fault_of_no_row(plant: Plant, message: bytes) -> None:
    plant(
        "def work():\n    from sg_local.llama.library import _keep_message\n"
        f"    _keep_message(4, {message!r}, None)\n    os.abort()\n"
    )
    with pytest.raises(SgLocalError) as caught:
        list(planted())
    assert not isinstance(caught.value, ChildDied)
    assert_says(str(caught.value), message.decode().rstrip("."), "sg-local doctor", "--n-gpu-layers 0")


@pytest.mark.parametrize(
    "message",
    [
        b"alloc_buffer: allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory",
        b"llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        b"ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 318767104",
    ],
)
@pytest.mark.parametrize("when", ["llama_model_load_from_file", "llama_init_from_model"])
def test_a_card_that_is_full_before_the_work_is_told_apart_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: bytes, when: str
) -> None:
    from sg_local.llama import engine, library

    def fail(*_arguments: object) -> None:
        library._keep_message(4, message, None)

    monkeypatch.setattr(f"llama_cpp.{when}", fail)
    with (
        pytest.raises(SgLocalError, match="the card's memory ran out") as caught,
        engine.open_engine(write_tiny_llama(tmp_path / "tiny.gguf"), n_ctx=256, n_parallel=1),
    ):
        pass
    assert caught.value.exit_code == 1


def test_a_full_card_counts_against_no_row(new_run: Run, task: Path, plant: Plant) -> None:
    environment = plant(CARD_IS_FULL)
    for arguments in (given(new_run, task), ["generate", new_run.path]):
        result = in_a_process(*arguments, env=environment)
        assert (result.returncode, result.stdout) == (1, "")
        (told,) = [line for line in result.stderr.splitlines() if "memory ran out" in line]
        assert_says(told, "Error: ", "the card's memory", "--n-ctx", "--n-parallel", "other programs")
        assert "in flight" not in result.stderr
        assert result.stderr.count("Error: ") == (2 if "run" in arguments else 1)
        in_flight = json.loads(new_run.file(".in_flight.json").read_text())
        assert in_flight["crashes"] == {}


def test_a_child_leaves_no_core_and_starts_no_debugger(plant: Plant) -> None:
    plant(
        "def work():\n    import resource\n"
        "    return [resource.getrlimit(resource.RLIMIT_CORE)[0], os.environ['GGML_NO_BACKTRACE']]\n"
    )
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        assert list(planted()) == [[0, "1"]]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (before, hard))


PARENT = """
import sys
from sg_local.child_process import values_from_child
for value in values_from_child("work", "sg_local.planted.work", place=sys.argv[1]):
    print(value, flush=True)
"""
WORK = """
def work(place):
    try:
        yield os.getpid()
        {body}
    finally:
        open(place, "w").close()
"""


@pytest.mark.parametrize("how", ["killed", "interrupted", "interrupted in native code"])
def test_a_child_ends_with_its_parent_and_clears_up(plant: Plant, tmp_path: Path, how: str) -> None:
    native = (
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)"  # minutes, and heeds no signal
    )
    plant(WORK.format(body=native if "native" in how else "time.sleep(60)"))
    place = tmp_path / "cleared"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        time.sleep(0.2)  # it is at work
        if how == "killed":
            parent.kill()
        else:
            os.killpg(parent.pid, signal.SIGINT)
        _, stderr = parent.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    assert place.exists() is ("native" not in how)
    if how != "killed":
        assert stderr.splitlines()[-1] == "KeyboardInterrupt"
        assert stderr.count("Traceback") == 1  # the parent's own


@pytest.mark.skipif(os.name == "nt", reason="a shell closes them")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_caller_may_close_the_standard_streams(plant: Plant, tmp_path: Path, closed: str) -> None:
    """As a service does."""
    environment = plant("def work(place):\n    print('printed')\n    yield 7\n    os.abort()\n")
    program = (
        "import sys\nfrom sg_local.child_process import ChildDied, values_from_child\n"
        "values = values_from_child('work', 'sg_local.planted.work', place='')\n"
        "assert next(values) == 7\n"
        "try:\n    next(values)\nexcept ChildDied:\n    open(sys.argv[1], 'w').close()\n"
    )
    place = tmp_path / "told"
    command = f'"{sys.executable}" -c "$PROGRAM" "{place}" {closed}'
    done = in_a_shell(command, **environment, PROGRAM=program)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == ("" if "2>" in closed else "printed\n")
    assert place.exists()


TALKS = """
    import sg_local.child_process as child_process
    def work(path):
        yield os.getpid()
        for value in child_process.received_values():
            if value == "fail":
                raise child_process.InputError("as asked")
            yield [value, value]
"""


def test_a_conversation_sends_a_value_for_each_that_comes(plant: Plant) -> None:
    plant(TALKS)
    values = planted(path="")
    child = next(values)
    assert values.send("Café\n") == ["Café\n", "Café\n"]
    assert values.send({"a": 1}) == [{"a": 1}, {"a": 1}]
    values.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    values = planted(path="")
    next(values)
    with pytest.raises(InputError, match="as asked"):
        values.send("fail")


@pytest.mark.parametrize(
    ("given_variables", "expected"),
    [
        ({}, ["1000", None, "1"]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", None, "1"]),
        ({"OMP_WAIT_POLICY": "active"}, [None, "active", "1"]),
        ({"OPENBLAS_NUM_THREADS": "4"}, ["1000", None, "4"]),
    ],
)
def test_threads_that_wait_hardly_spin_unless_the_user_says_so(
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    given_variables: dict[str, str],
    expected: list[str | None],
) -> None:
    plant("""
def work(names):
    assert not {"llama_cpp", "torch", "numpy"} & set(sys.modules)
    return [os.environ.get(name) for name in names]
""")
    names = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given_variables.items():
        monkeypatch.setenv(name, value)
    assert [*planted(names=names)] == [expected]
