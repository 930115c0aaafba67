"""A store of its own for every test, and a run with its files, made without any model being loaded.

finished_run/ task.toml test.jsonl settings.toml inputs.jsonl ... adapter.gguf model.gguf evaluation.json
"""

import json
import os
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from finished_run import MODEL, TENSORS, ScriptedStages, finish_run
from gguf_bytes import Write, tiny_gguf
from hypothesis import settings as hypothesis_settings
from local_hub import OFFLINE, Server

import sg_local.finetune.environment as environment
import sg_local.runs.directory as run_directory
from sg_local import child_process
from sg_local.cli import cli
from sg_local.errors import SgLocalError
from sg_local.files import write_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.process_facts import versions
from sg_local.settings import Settings
from sg_local.task import load_task

# A busy machine is no fault; tests that are about time say their own deadline.
hypothesis_settings.register_profile("no deadline", deadline=None)
hypothesis_settings.load_profile("no deadline")

VERSIONS = cache(versions)  # 30 ms for every stage that is written

TASK = """name = "inbox"
instruction = "Which box is this message for?"
labels = ["refund", "login"]
test = "inbox.test.jsonl"

[[examples]]
input = "I want my money back."
output = "refund"
"""
TEST_ROWS = [{"input": "My password is wrong.", "output": "login"}, {"input": "Pay me.", "output": "refund"}]


@pytest.fixture(autouse=True)
def own_place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store, an empty directory to work in, and nothing slow that no test here is about."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # no power is cut here
    monkeypatch.setattr(run_directory, "versions", VERSIONS)
    place = tmp_path_factory.mktemp("place")
    monkeypatch.setenv("SG_LOCAL_HOME", str(place / "home"))
    (place / "work").mkdir()
    monkeypatch.chdir(place / "work")


@pytest.fixture(autouse=True)
def no_child(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command computes in a child process it computes in this one, where a test replaces what it likes."""
    if "real_child" in request.fixturenames:
        return

    def call_here(_work: str, function: str, **arguments: Any) -> Generator[Any, Any, None]:
        for value in child_process.call(function, json.loads(json.dumps(arguments))):
            sent = yield json.loads(json.dumps(value))
            if sent is not None:
                child_process._received.put(json.loads(json.dumps(sent)))

    monkeypatch.setattr(child_process, "values_from_child", call_here)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No speed of this machine: the models here cannot be computed with."""

    def measure(**_arguments: object) -> None:
        raise SgLocalError("not measured in a test")

    monkeypatch.setattr("sg_local.runs.times.measure", measure)
    monkeypatch.setattr("sg_local.runs.times.measure_base", measure)


@pytest.fixture
def real_child() -> None:
    """The test is about the child process itself."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes bytes as file.gguf, again and again in one test."""

    def write_bytes(data: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(data)
        return path

    return write_bytes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that passes for a llama model as long as nobody computes with it."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(MODEL, TENSORS))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file with two test rows."""
    path = tmp_path / "inbox.toml"
    path.write_text(TASK)
    write_rows(tmp_path / "inbox.test.jsonl", TEST_ROWS)
    return path


@pytest.fixture
def sg() -> Callable[..., Result]:
    """Calls the command line in this process: sg("run", task, "--model", model).exit_code."""

    def call(*arguments: object, **options: Any) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)

    return call


@pytest.fixture
def new_run(tmp_path: Path, task: Path, model: Path) -> Run:
    """A run that was begun with --n-inputs 7, and no stage of it."""
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, Settings(n_inputs=7))
    return run


@pytest.fixture
def finished_run(new_run: Run) -> Run:
    """The same, every stage finished: tuned +0.5 over the base."""
    finish_run(new_run)
    return new_run


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for an `nvidia-smi`, the only program there is."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin" / "nvidia-smi"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "torch" else find_spec(name))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ScriptedStages:
    """In place of the processes of the stages, of any run."""
    scripted = ScriptedStages()
    monkeypatch.setattr("sg_local.runs.process.in_child_process", scripted)
    return scripted


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """contents(directory): every file in it and its bytes, but for the lock."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return read


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub and an index on loopback, instead of those of the internet."""
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    for name in (
        "PIP_CONFIG_FILE",
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_NO_INDEX",
        *OFFLINE,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    server.is_closing.set()
    server.http.shutdown()
    server.http.server_close()
