"""Only what we made is removed or written over: never a stranger's file, and nothing through a link."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from scripted_engine import ScriptedEngine
from stand_ins import GOOD, replace_export, replace_training

import sg_local.files.writing as writing
from sg_local.errors import InputError, SgLocalError
from sg_local.files import append_rows, own_directory, recover_rows, remove_leftovers, remove_tree, write_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.lock import lock_run
from sg_local.runs.stage import run_stage
from sg_local.selfguide.rows import InputRow
from sg_local.settings import STAGES, Settings
from sg_local.stages.export import export_adapter
from sg_local.task import load_task

Call = Callable[..., Result]
Contents = Callable[[Path], dict[str, bytes]]

DIRECTORIES = (".work", "checkpoints", "adapter", "predictions")
# What our own names may be in somebody else's directory.
THEIRS = (
    "photo.jpg",
    "adapter/adapter_config.json",
    "export/thesis.txt",
    "checkpoint-7/optimizer.pt",
    "base_few_shot.jsonl",
    ".base_few_shot.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    ".a.0a1b2c3d.tmp.jsonl",
)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Somebody else's directory."""
    place = tmp_path / "theirs"
    for name in THEIRS:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"their {name}")
    return place


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    ScriptedEngine(label_logprobs=lambda _prompt, labels: [-1.0] * len(labels)).replace_llama_cpp(monkeypatch)
    replace_training(monkeypatch)
    replace_export(monkeypatch)


def link(run: Run, name: str, target: Path) -> None:
    """A link in the place of one of the run's own directories."""
    remove_tree(run.file(name))
    run.file(name).symlink_to(target, target_is_directory=True)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (stage, name)
        for stage in STAGES[3:]
        for name in DIRECTORIES
        if (stage, name) != ("evaluate", "adapter")
    ],
)
def test_a_linked_directory_of_a_run_is_left_as_it_is(
    finished_run: Run, theirs: Path, contents: Contents, stage: str, name: str
) -> None:
    before = contents(theirs)
    if (name, stage) == ("adapter", "export"):  # what training wrote, moved to another disk
        finished_run.file(name).rename(theirs / "moved")
        before = contents(theirs)
        link(finished_run, name, theirs / "moved")
    else:
        link(finished_run, name, theirs)
    assert run_stage(finished_run, stage, redo=True)
    assert contents(theirs) == before
    assert finished_run.is_finished(stage)
    assert not finished_run.file(".work").is_symlink() or stage == "evaluate"


@pytest.mark.parametrize("name", DIRECTORIES)
def test_taking_back_a_stage_follows_no_link(
    finished_run: Run, theirs: Path, contents: Contents, name: str
) -> None:
    before = contents(theirs)
    link(finished_run, name, theirs)
    finished_run.forget_from("generate", keep_partial=False)
    assert contents(theirs) == before


def test_what_an_ablation_takes_over_is_not_written_through_a_link(
    finished_run: Run, theirs: Path, contents: Contents, tmp_path: Path, task: Path
) -> None:
    before = contents(theirs)
    other, _ = create_or_open_run(tmp_path / "other", load_task(task), finished_run.model.path, Settings())
    link(other, "adapter", theirs)
    other.take_over(finished_run, STAGES[:4])
    assert contents(theirs) == before
    assert contents(other.file("adapter")) == contents(finished_run.file("adapter"))


def test_the_lock_empties_no_file_that_it_is_linked_to(
    new_run: Run, theirs: Path, contents: Contents
) -> None:
    before = contents(theirs)
    new_run.file(".lock").unlink()
    new_run.file(".lock").symlink_to(theirs / "photo.jpg")
    with lock_run(new_run.path):
        pass
    assert contents(theirs) == before


def test_leftovers_are_files_of_the_run_itself(new_run: Run, theirs: Path, contents: Contents) -> None:
    before = contents(theirs)
    new_run.file("linked").symlink_to(theirs)
    new_run.file(".b.0a1b2c3d.tmp").symlink_to(theirs / "photo.jpg")
    new_run.file(".c.0a1b2c3d.tmp").mkdir()
    assert remove_leftovers(new_run.path) == [new_run.file(".b.0a1b2c3d.tmp")]
    assert contents(theirs) == before
    assert new_run.file(".c.0a1b2c3d.tmp").is_dir()


def test_rows_are_recovered_and_appended_beside_the_file_that_is_linked(tmp_path: Path) -> None:
    row: InputRow = {"id": 0, "input": "a", "label": None, "prompt": "list", "drop": None, "seed": 1}
    theirs, ours = tmp_path / "theirs.jsonl", tmp_path / "ours.jsonl"
    write_rows(theirs, [row])
    before = theirs.read_bytes() + b'{"torn'
    theirs.write_bytes(before)
    ours.symlink_to(theirs)
    with pytest.raises(SgLocalError):
        append_rows(ours, [row])
    assert recover_rows(ours, InputRow) == [row]
    append_rows(ours, [{**row, "id": 1}])
    assert recover_rows(ours, InputRow) == [row, {**row, "id": 1}]
    assert theirs.read_bytes() == before


def test_recovery_touches_nothing_where_the_rows_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a list"}\nmy notes, in one line')
    with pytest.raises(InputError):
        recover_rows(path, InputRow)
    assert path.read_text().endswith("my notes, in one line")


def test_a_link_to_a_link_and_a_file_in_the_place_of_a_directory(
    tmp_path: Path, theirs: Path, contents: Contents
) -> None:
    before = contents(theirs)
    (tmp_path / "first").symlink_to(theirs)
    (tmp_path / "second").symlink_to(tmp_path / "first")
    own_directory(tmp_path / "second")
    assert list((tmp_path / "second").iterdir()) == []
    own_directory(tmp_path / "second")  # as it is
    (tmp_path / "file").write_text("in the way")
    own_directory(tmp_path / "file")
    assert (tmp_path / "file").is_dir()
    remove_tree(tmp_path / "first")
    remove_tree(tmp_path / "missing")
    assert contents(theirs) == before


@pytest.mark.usefixtures("stand_ins")
def test_an_export_from_elsewhere_removes_nothing_that_it_did_not_make(
    finished_run: Run, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "out"
    (out / ".work/mine").mkdir(parents=True)
    (out / ".work/mine/notes.txt").write_text("mine")
    (out / ".work/adapter.gguf").write_text("mine")
    before = contents(out)
    export_adapter(finished_run.file("adapter"), str(finished_run.model.path), out, finished_run.settings)
    after = contents(out)
    assert set(after) - set(before) == {"adapter.gguf", "model.gguf", "parity.json"}
    assert {name: after[name] for name in before} == before


@pytest.mark.usefixtures("stand_ins")
def test_an_export_from_elsewhere_clears_away_what_a_kill_left_and_no_more(
    finished_run: Run, tmp_path: Path, contents: Contents, theirs: Path
) -> None:
    out = tmp_path / "out"
    call = (finished_run.file("adapter"), str(finished_run.model.path), out, finished_run.settings)
    work = out / ".sg-local-export"
    work.mkdir(parents=True)
    for name in ("adapter.gguf", "base.gguf", ".model.gguf.0a1b2c3d.tmp.gguf"):
        (work / name).write_text("half")
    (work / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(InputError, match="not ours alone: move it away"):
        export_adapter(*call)
    assert contents(out) == before
    (work / "notes.txt").unlink()
    export_adapter(*call)
    assert set(contents(out)) == {"adapter.gguf", "model.gguf", "parity.json"}
    for name in contents(out):
        (out / name).unlink()
    before = contents(theirs)
    work.symlink_to(theirs)
    with pytest.raises(InputError, match="not ours alone: move it away"):
        export_adapter(*call)
    assert contents(theirs) == before


@pytest.mark.usefixtures("stand_ins")
def test_an_export_from_elsewhere_writes_over_no_dangling_link(finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.gguf").symlink_to(tmp_path / "unplugged")
    with pytest.raises(InputError, match="exists already"):
        export_adapter(
            finished_run.file("adapter"),
            str(finished_run.model.path),
            tmp_path / "out",
            finished_run.settings,
        )


def test_a_failed_export_leaves_no_work(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    replace_export(monkeypatch, replace(GOOD, max_logit_difference=9.0))
    before = set(contents(finished_run.path)) - {"evaluation.json"}
    with pytest.raises(SgLocalError, match=r"9\.000 logits"):
        run_stage(finished_run, "export", redo=True)
    assert not finished_run.file(".work").exists()
    assert before - set(contents(finished_run.path)) == {
        name for name in before if name.startswith("predictions/")
    }


def test_a_failed_training_leaves_no_work(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_training(monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sg_local.stages.train.train_adapter", fail)
    here = Path.cwd()
    with pytest.raises(ZeroDivisionError):
        run_stage(finished_run, "train", redo=True)
    assert Path.cwd() == here
    assert not finished_run.file(".work").exists()
    assert finished_run.file("adapter/adapter_config.json").exists()  # of the training before


@pytest.mark.usefixtures("stand_ins")
def test_the_adapter_is_on_the_disk_before_the_manifest_says_so(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(writing, "sync", lambda path: synced.append(Path(path).name))
    run_stage(finished_run, "train", redo=True)
    manifest = next(
        place
        for place, name in enumerate(synced)
        if name.startswith(".manifest") and "adapter" in synced[:place]
    )
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter"} <= set(synced[:manifest])
