"""`bench` and `models pull` killed at every place where they change the disk, or out of room from there on.

What a stage writes itself is tried in test_kills.py; here a stage is another process, which ends well. There are 62 +
86 places for a kill in the two benches and 10 + 12 + 10 + 21 in the pulls, and after each the next call ends as if
nothing had broken.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
from click.testing import Result
from command_line import Call
from disk import Disk, files_in, put_back, without_chance
from finished_run import write_stage
from local_hub import METADATA, WEIGHTS, Server, hub_path, put_wheel, write_catalogue
from messages import assert_says

import sg_local.models as models
import sg_local.pull as pull_module
import sg_local.runs.directory as run_directory
from sg_local.download import Failure, download
from sg_local.files import find_leftovers
from sg_local.models import model_store
from sg_local.runs.directory import Run

Bench: TypeAlias = Callable[..., Result]
Pull: TypeAlias = Callable[[], Result]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# bench


@pytest.fixture
def bench(sg: Call, task: Path, model: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Calls a bench of two tasks, or of one with an ablation; its stages are processes that end well."""
    directory = task.parent / "tasks"
    directory.mkdir()
    for name in ("inbox.toml", "inbox.test.jsonl"):
        task.with_name(name).rename(directory / name)
    text = (directory / "inbox.toml").read_text()
    (directory / "crates.toml").write_text(text.replace('"inbox"', '"crates"'))

    def in_child_process(run: Run, stage: str) -> int:
        with disk.of_another():
            write_stage(run, stage)
        return 0

    monkeypatch.setattr("sg_local.runs.process.in_child_process", in_child_process)
    monkeypatch.setattr(run_directory, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(run_directory, "peak_memory_bytes", lambda: 1)
    return lambda *arguments: sg("bench", directory, "--model", model, "--out", "out", *arguments)


TWO_TASKS: tuple[str, ...] = ()
AN_ABLATION = ("--tasks=inbox", "--ablate=rank=8")


@pytest.mark.parametrize("arguments", [TWO_TASKS, AN_ABLATION])
def test_a_bench_that_was_killed_anywhere_ends_as_if_unbroken(
    bench: Bench, disk: Disk, arguments: tuple[str, ...]
) -> None:
    with disk.killed_at(None):
        assert bench(*arguments).exit_code == 0
    unbroken, n_changes = files_in(Path("out")), disk.count
    seen = []
    for number in range(1, n_changes + 1):
        shutil.rmtree("out", ignore_errors=True)
        with disk.killed_at(number):
            bench(*arguments)
        if (left := without_chance(files_in(Path("out")))) in seen:
            continue  # what was left once goes on as it did then
        seen.append(left)
        assert bench(*arguments).exit_code == 0
        assert files_in(Path("out")) == unbroken, f"killed at change {number} of {n_changes}"


def test_a_bench_without_room_says_so_and_goes_on_when_there_is(bench: Bench, disk: Disk) -> None:
    with disk.full_from(None):
        assert bench(*AN_ABLATION).exit_code == 0
    unbroken, n_writes = files_in(Path("out")), disk.count
    for number in range(1, n_writes + 1):
        shutil.rmtree("out", ignore_errors=True)
        with disk.full_from(number):
            result = bench(*AN_ABLATION)
        where = f"no room from write {number} of {n_writes} on"
        assert result.exit_code == 1, where
        assert_says(result.stderr.splitlines()[-1], "Error: ", "No space left on device")
        assert find_leftovers(Path("out")) == [], where
        assert bench(*AN_ABLATION).exit_code == 0
        assert files_in(Path("out")) == unbroken, where


# models pull


@pytest.fixture(params=["big", "big, of an unknown sum", "tiny", "hf:someone/big-GGUF:a.gguf"])
def pull(
    request: pytest.FixtureRequest,
    sg: Call,
    tmp_path: Path,
    server: Server,
    disk: Disk,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Pull:
    """Pulls a model from the hub, or from an index; in the download's place comes what a real one has left."""
    name, _, is_unknown = request.param.partition(",")
    catalogue = write_catalogue(tmp_path / "models.toml")
    if is_unknown:
        lines = catalogue.read_text().splitlines(keepends=True)
        catalogue.write_text("".join(line for line in lines if not line.startswith("sha256")))
    monkeypatch.setattr(models, "_catalogue", lambda: catalogue)
    server.bodies[hub_path()] = WEIGHTS
    server.bodies[hub_path("a.gguf")] = model.read_bytes()
    put_wheel(server, tmp_path, METADATA)
    came = tmp_path / "came"

    def first_download(arguments: list[str], work: Path, **options: Any) -> Failure | None:
        failure = download(arguments, work, **options)
        shutil.copytree(work, came / arguments[0])
        return failure

    def later_download(arguments: list[str], work: Path, **_options: Any) -> Failure | None:
        """One half, a moment for a kill, and the rest."""
        files = sorted(files_in(came / arguments[0]).items())
        for part in (files[: len(files) // 2], files[len(files) // 2 :]):
            with disk.of_another():
                work.mkdir(parents=True, exist_ok=True)
                put_back(work, files_in(work) | dict(part))
            try:
                disk.point()
            except OSError as error:
                return Failure(str(error), may_go_on=True, remedy="free some space")
        return None

    monkeypatch.setattr(pull_module, "download", first_download)
    assert sg("models", "pull", name).exit_code == 0
    monkeypatch.setattr(pull_module, "download", later_download)
    shutil.rmtree(model_store().parent)
    return lambda: sg("models", "pull", name)


def test_a_pull_that_was_killed_anywhere_ends_as_if_unbroken(pull: Pull, disk: Disk) -> None:
    with disk.killed_at(None):
        assert pull().exit_code == 0
    unbroken, n_changes = files_in(model_store()), disk.count
    for number in range(1, n_changes + 1):
        for kills in ((number,), (number, 2)):
            shutil.rmtree(model_store().parent, ignore_errors=True)
            for kill_at in kills:
                with disk.killed_at(kill_at):
                    pull()
            assert pull().exit_code == 0
            assert files_in(model_store()) == unbroken, f"killed at {kills} of {n_changes}"


def test_a_pull_without_room_says_so_and_goes_on_when_there_is(pull: Pull, disk: Disk) -> None:
    with disk.full_from(None):
        assert pull().exit_code == 0
    unbroken, n_writes = files_in(model_store()), disk.count
    for number in range(1, n_writes + 1):
        shutil.rmtree(model_store().parent, ignore_errors=True)
        with disk.full_from(number):
            result = pull()
        where = f"no room from write {number} of {n_writes} on"
        assert result.exit_code == 1, where
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
        assert_says(line, "No space left on device")
        assert "free some space" in line or "set SG_LOCAL_HOME" in line, line
        assert find_leftovers(model_store()) == [], where
        assert pull().exit_code == 0
        assert files_in(model_store()) == unbroken, where
