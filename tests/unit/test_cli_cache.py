"""`sg-local cache`: what lies in the store, of which model, for which runs; and only what is ours is freed."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import Call, one_line
from messages import assert_says

import sg_local.models as models_module
from sg_local.files import atomic_path, write_text
from sg_local.models import list_models, model_store
from sg_local.plan.store import free, list_store
from sg_local.proof.working_copies import copies_root, lock_copies
from sg_local.pull import lock_models
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.lock import lock_run
from sg_local.settings import Settings
from sg_local.task import load_task

OTHER = "0123456789abcdef"
Item = dict[str, Any]


@pytest.fixture
def run(task: Path, model: Path) -> Run:
    """A run under the directory of work."""
    run, _ = create_or_open_run(Path("runs/inbox"), load_task(task), model, Settings())
    return run


@pytest.fixture(autouse=True)
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of one small model, whose sum is not published."""
    path = tmp_path / "list" / "models.toml"
    path.parent.mkdir()
    path.write_text(
        '[small]\nsource = "hf:someone/small:small.gguf"\nsize_bytes = 100\nlicence = "MIT"\n'
        'architecture = "llama"\nprompt_format = "gguf"\ndescription = "small"\n'
    )
    monkeypatch.setattr(models_module, "_catalogue", lambda: path)
    assert [model.file_name for model in list_models()] == ["small.gguf"]


@pytest.fixture
def store(run: Run) -> Path:
    """A pulled model, copies of two bases, what killed processes left, and files that are not ours."""
    models = model_store()
    models.mkdir(parents=True)
    (models / ".lock").touch()
    (models / "small.gguf").write_bytes(bytes(100))
    (models / "small.gguf.sha256").write_text("ab" * 32 + "  small.gguf\n")
    (models / ".small.gguf.0123abcd.tmp.gguf").write_bytes(bytes(10))
    (models / ".pull-small").mkdir()
    (models / ".pull-small" / "half").write_bytes(bytes(20))
    (models / "mine.gguf").write_bytes(bytes(1000))
    for name, base_name in ((run.model.sha256[:16], run.model.path.name), (OTHER, "other.gguf")):
        place = copies_root() / name
        (place / "hf").mkdir(parents=True)
        (place / "hf" / "model.safetensors").write_bytes(bytes(300))
        (place / "f16.gguf").write_bytes(bytes(200))
        write_text(place / "speed.json", "{}")
        sha256 = run.model.sha256 if name != OTHER else OTHER * 4
        write_text(place / "base.json", json.dumps({"name": base_name, "sha256": sha256}))
        (place / ".lock").touch()
    (copies_root() / OTHER / ".f16.gguf.0123abcd.tmp.gguf").write_bytes(bytes(30))
    (copies_root() / OTHER / ".hf.partial").mkdir()
    (copies_root() / "notes.txt").write_text("mine")
    (copies_root() / "mine").mkdir()  # no base's
    (copies_root() / "mine" / "f16.gguf").write_text("mine")
    return models.parent


def items(result: Result) -> dict[str, Item]:
    """By the path within the store."""
    assert result.exit_code == 0, result.stderr
    return {item["path"].partition("/home/")[2]: item for item in json.loads(result.stdout)}


def files(store: Path) -> set[str]:
    return {
        path.relative_to(store).as_posix()
        for path in store.rglob("*")
        if (path.is_file() or path.is_symlink()) and path.name != ".lock"
    }


NOT_OURS = {"models/mine.gguf", "weights/notes.txt", "weights/mine/f16.gguf"}
SUM = "models/small.gguf.sha256"  # so that the next pull is checked against it


def test_the_list_says_what_lies_there_of_which_model_and_for_whom(sg: Call, store: Path, run: Run) -> None:
    os.utime(store / "models" / "small.gguf", (0, 0))
    listed = items(sg("cache", "--json"))
    here = f"weights/{run.model.sha256[:16]}"
    assert {path: item["what"] for path, item in listed.items()} == {
        "models/small.gguf": "model",
        "models/.small.gguf.0123abcd.tmp.gguf": "leftover",
        "models/.pull-small": "unfinished download",
        "models/mine.gguf": "not ours",
        f"{here}/hf": "working copy hf",
        f"{here}/f16.gguf": "working copy f16.gguf",
        f"weights/{OTHER}/hf": "working copy hf",
        f"weights/{OTHER}/f16.gguf": "working copy f16.gguf",
        f"weights/{OTHER}/.f16.gguf.0123abcd.tmp.gguf": "leftover",
        f"weights/{OTHER}/.hf.partial": "leftover",
        "weights/notes.txt": "not ours",
        "weights/mine": "not ours",
    }
    copy = listed[f"{here}/hf"]
    assert copy["model"] == run.model.path.name
    assert copy["sha256"] == run.model.sha256
    assert copy["size_bytes"] == 300
    assert copy["age_seconds"] < 3600
    assert copy["used_by"] == ["runs/inbox"]
    assert listed[f"weights/{OTHER}/hf"]["used_by"] == []
    pulled = listed["models/small.gguf"]
    assert (pulled["sha256"], pulled["used_by"]) == ("ab" * 32, [])
    assert pulled["age_seconds"] > 10**9
    shown = sg("cache").stdout
    assert_says(shown, run.model.path.name, run.model.sha256[:8], "runs/inbox", "other.gguf", "days", "MiB")
    assert len(shown.splitlines()) == 2 + len(listed)


def test_an_empty_store_is_no_error(sg: Call) -> None:
    assert items(sg("cache", "--json")) == {}
    assert_says(sg("cache").stdout, "nothing")
    assert sg("cache", "--all").exit_code == 0
    assert not model_store().exists()


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_nothing_is_freed_without_a_yes(sg: Call, store: Path, answer: str) -> None:
    before = files(store)
    result = sg("cache", "--all", input=answer)
    assert result.exit_code == 1
    assert_says(result.stderr, "Free this?", "nothing was freed")
    assert_says(result.stdout, "f16.gguf", "to free")
    assert "mine.gguf" not in result.stdout  # nor is it offered
    assert files(store) == before
    assert_says(one_line(sg("cache", "--all", "--json"), 2), "--yes")
    assert_says(one_line(sg("cache", "--all", "--unused"), 2), "--unused", "--all")
    assert files(store) == before


def test_unused_frees_what_no_run_here_has(sg: Call, store: Path, run: Run) -> None:
    result = sg("cache", "--unused", input="y\n")
    assert result.exit_code == 0, result.stderr
    here = f"weights/{run.model.sha256[:16]}"
    assert files(store) == NOT_OURS | {SUM} | {
        f"{here}/{name}" for name in ("hf/model.safetensors", "f16.gguf", "speed.json", "base.json")
    }
    assert not (copies_root() / OTHER / ".hf.partial").exists()
    assert_says(result.stderr, "freed 1 MiB")


def test_all_frees_what_is_ours_and_nothing_else(sg: Call, store: Path) -> None:
    freed = items(sg("cache", "--all", "--yes", "--json"))
    assert files(store) == NOT_OURS | {SUM}
    kept = {path for path, item in freed.items() if not item["is_freed"]}
    assert kept == {"models/mine.gguf", "weights/notes.txt", "weights/mine"}


def test_nothing_is_freed_through_a_link(sg: Call, store: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "hf").mkdir(parents=True)
    (theirs / "hf" / "archive").write_text("theirs")
    (theirs / "f16.gguf").write_text("theirs")
    (theirs / "small.gguf").write_bytes(bytes(100))
    before = files(theirs)
    (copies_root() / ("a" * 16)).symlink_to(theirs)
    place = copies_root() / ("b" * 16)
    place.mkdir()
    (place / "hf").symlink_to(theirs / "hf")
    (place / "f16.gguf").symlink_to(theirs / "f16.gguf")
    (place / ".hf.partial").symlink_to(theirs / "hf")
    (store / "models" / "small.gguf").unlink()
    (store / "models" / "small.gguf").symlink_to(theirs / "small.gguf")
    (store / "models" / ".pull-other").symlink_to(theirs)
    links = {path for path in store.rglob("*") if path.is_symlink()}
    listed = items(sg("cache", "--json"))
    assert {listed[path.relative_to(store).as_posix()]["what"] for path in links} == {"not ours"}
    assert sg("cache", "--all", "--yes").exit_code == 0
    assert files(theirs) == before
    assert {path for path in store.rglob("*") if path.is_symlink()} == links


def test_a_run_has_a_pulled_model_by_its_path_or_by_its_sum(sg: Call, store: Path) -> None:
    for name, path, sha256 in (
        ("by-path", store / "models" / "small.gguf", OTHER * 4),
        ("by-sum", "elsewhere.gguf", "ab" * 32),
    ):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "settings.toml").write_text(f'[model]\npath = "{path}"\nsha256 = "{sha256}"\n')
    assert items(sg("cache", "--json"))["models/small.gguf"]["used_by"] == ["runs/by-path", "runs/by-sum"]


def test_what_is_known_of_a_base_stays_with_its_last_copy(store: Path) -> None:
    here, place = Path.cwd(), copies_root() / OTHER
    listed = {item["path"]: item for item in list_store(here)}
    assert free(listed[str(place / "hf")], here) is None
    assert {path.name for path in place.iterdir()} >= {"f16.gguf", "speed.json", "base.json"}
    assert free(listed[str(place / "f16.gguf")], here) is None
    assert not {path.name for path in place.iterdir()} & {"f16.gguf", "speed.json", "base.json"}


def test_a_note_about_another_base_is_not_believed(sg: Call, store: Path) -> None:
    write_text(copies_root() / OTHER / "base.json", json.dumps({"name": "forged.gguf", "sha256": "f" * 64}))
    copy = items(sg("cache", "--json"))[f"weights/{OTHER}/hf"]
    assert (copy["model"], copy["sha256"]) == (None, OTHER)


def test_a_file_with_a_models_name_and_another_size_is_not_ours(sg: Call, store: Path) -> None:
    (store / "models" / "small.gguf").write_bytes(bytes(200))
    assert items(sg("cache", "--json"))["models/small.gguf"]["what"] == "not ours"


def test_what_was_listed_is_looked_at_again_before_it_is_freed(store: Path, tmp_path: Path) -> None:
    here = Path.cwd()
    listed = {Path(item["path"]).name: item for item in list_store(here)}
    assert free(listed["mine.gguf"], here) == "it is not ours"
    path = store / "models" / "small.gguf"
    path.rename(tmp_path / "theirs.gguf")
    path.symlink_to(tmp_path / "theirs.gguf")
    assert_says(str(free(listed["small.gguf"], here)), path, "is a link")
    assert path.is_symlink()


@pytest.mark.parametrize("which", ["models", "weights"])
def test_a_folder_of_the_store_that_is_a_link_is_left_alone(
    sg: Call, store: Path, tmp_path: Path, which: str
) -> None:
    (store / which).rename(tmp_path / "elsewhere")
    (store / which).symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    assert sg("cache", "--all", "--yes").exit_code == 0
    assert files(tmp_path / "elsewhere") == before


def held(hold: Callable[[threading.Event, threading.Event], None]) -> Callable[[], None]:
    """Lets another thread hold something; returns what lets it go."""
    holds, may_end = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(holds, may_end))
    thread.start()
    assert holds.wait(30)

    def end() -> None:
        may_end.set()
        thread.join(30)

    return end


def test_what_a_run_is_at_work_with_is_kept(sg: Call, store: Path, run: Run) -> None:
    def work(holds: threading.Event, may_end: threading.Event) -> None:
        with lock_run(run.path):
            holds.set()
            may_end.wait(30)

    end = held(work)
    result = sg("cache", "--all", "--yes")
    end()
    assert result.exit_code == 0
    assert_says(result.stderr, "kept", "runs/inbox")
    place = copies_root() / run.model.sha256[:16]
    assert (place / "hf" / "model.safetensors").exists()
    assert (place / "f16.gguf").exists()
    assert not (copies_root() / OTHER / "f16.gguf").exists()


def test_what_is_being_written_is_kept(sg: Call, store: Path) -> None:
    written: list[Path] = []

    def write(holds: threading.Event, may_end: threading.Event) -> None:
        place = copies_root() / OTHER
        with lock_copies(place), lock_models(), atomic_path(place / "f16.gguf") as temporary:
            temporary.write_bytes(b"half")
            written.append(temporary)
            holds.set()
            may_end.wait(30)

    end = held(write)
    result = sg("cache", "--all", "--yes")
    assert written[0].exists()
    end()
    assert_says(result.stderr, "kept", "it is being written", "models pull")
    assert (copies_root() / OTHER / "f16.gguf").read_bytes() == b"half"
    assert (store / "models" / "small.gguf").exists()


def test_runs_of_a_bench_and_of_an_ablation_count(sg: Call, store: Path, run: Run) -> None:
    for place in ("benches/a/inbox", "benches/a/ablations/rank=8/inbox"):
        Path(place).mkdir(parents=True)
        Path(place, "settings.toml").write_bytes((run.path / "settings.toml").read_bytes())
    Path("benches/a/damaged").mkdir()
    Path("benches/a/damaged/settings.toml").write_text("[")
    listed = items(sg("cache", "--json"))
    assert sorted(listed[f"weights/{run.model.sha256[:16]}/hf"]["used_by"]) == [
        "benches/a/ablations/rank=8/inbox",
        "benches/a/inbox",
        "runs/inbox",
    ]


def test_names_in_the_store_steer_no_terminal(sg: Call, store: Path) -> None:
    (copies_root() / "\x1b[31m").mkdir()
    (copies_root() / os.fsdecode(b"\xff")).mkdir()
    result = sg("cache")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert sg("cache", "--json").exit_code == 0
