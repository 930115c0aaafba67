"""A run of a bench on a node that shares nothing with the bench: what goes there, what comes back, what is refused.

The desk answers directly here, without Ray; a stage's process is replaced by what would have written its files.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Contents
from finished_run import ScriptedStages
from messages import assert_says

import sg_local.bench.node as node_module
from sg_local.bench.ablation import Ablation, begin_ablation
from sg_local.bench.desk import MAX_FILES, PIECE_BYTES, Desk, FileFacts, run_files
from sg_local.bench.node import Job, Needs, cluster_root, differences_of, look_at_node, rows_depend_on, work
from sg_local.errors import InputError, SgLocalError
from sg_local.files import read_json, sha256_file, write_text
from sg_local.proof.verify import checks
from sg_local.runs.begin import create_or_open_run, read_model
from sg_local.runs.directory import Run, open_run
from sg_local.runs.pipeline import run_pipeline
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task


class Place:
    """A bench with one run, and what is worked on elsewhere."""

    def __init__(self, bench: Path, run: Run) -> None:
        self.bench, self.run = bench, run
        self.desk = Desk(str(bench), str(run.model.path))
        (bench / ".probe").write_text("elsewhere")  # no node sees its own name in it
        self.needs = Needs(
            bench=str(bench),
            bench_id="5d1c",
            probe=".probe",
            model=str(run.model.path),
            model_sha256=run.model.sha256,
            model_bytes=run.model.size_bytes,
            trainer="peft",
            base_weights="",
            disk_bytes=1000,
            versions=rows_depend_on(),
            on_node_disk=False,
            keep_remote=False,
        )

    def work(self, place: str = "inbox", base: str = "", **changes: Any) -> dict[str, Any]:
        job = Job(replace(self.needs, **changes), place, base, n_threads=1, n_gpus=0)
        self.desk.expect(place, f"{place} 1")
        return work(self.desk, job, f"{place} 1", "9f2c", "10.0.0.7")

    @property
    def there(self) -> Path:
        return cluster_root() / "5d1c/inbox"


@pytest.fixture
def place(tmp_path: Path, task: Path, model: Path) -> Place:
    run, _ = create_or_open_run(tmp_path / "bench/inbox", load_task(task), model, Settings(n_inputs=7))
    return Place(tmp_path / "bench", run)


def stages_there(run: Run) -> list[str]:
    return list(open_run(run.path).manifest()["stages"])


def test_a_run_comes_back_as_it_would_be_here(
    place: Place, stages: ScriptedStages, contents: Contents, tmp_path: Path, task: Path, model: Path
) -> None:
    assert place.work() == {"error": None}
    here, _ = create_or_open_run(tmp_path / "alone/inbox", load_task(task), model, Settings(n_inputs=7))
    run_pipeline(here)
    came, made = contents(place.run.path), contents(here.path)
    assert came.keys() == made.keys()
    assert {name for name in made if came[name] != made[name]} <= {"manifest.json"}  # seconds
    ours, theirs = (open_run(run.path).manifest()["stages"] for run in (place.run, here))
    assert {stage: entry["writes"] for stage, entry in ours.items()} == {
        stage: entry["writes"] for stage, entry in theirs.items()
    }
    assert open_run(place.run.path).first_unfinished() is None
    assert not place.there.exists()
    assert [news.what for news in place.desk.news()] == ["began", *STAGES]


def test_what_is_finished_is_here_after_each_stage(place: Place, stages: ScriptedStages) -> None:
    """A node that dies takes no more than the stage with it."""
    known: list[list[str]] = []
    tell = place.desk.tell
    place.desk.tell = lambda *news: (known.append(stages_there(place.run)), tell(*news))[1]  # type: ignore[method-assign]
    place.work()
    assert known == [list(STAGES[:n]) for n in range(len(STAGES) + 1)]


def test_it_goes_on_where_another_node_stopped(place: Place, stages: ScriptedStages) -> None:
    run_pipeline(place.run, "curate")
    stages.ran.clear()
    assert place.work() == {"error": None}
    assert [stage for _, stage in stages.ran] == ["train", "export", "evaluate"]


def test_it_goes_on_with_pieces_of_an_earlier_try_on_the_same_node(
    place: Place, stages: ScriptedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def dies_in_train(run: Run, stage: str) -> int:
        if stage == "train":
            (run.path / "checkpoints/checkpoint-9").mkdir(parents=True)
            raise KeyboardInterrupt
        return stages(run, stage)

    def goes_on(run: Run, stage: str) -> int:
        seen.append(stage)
        assert (run.path / "checkpoints/checkpoint-9").is_dir()
        return stages(run, stage)

    monkeypatch.setattr("sg_local.runs.process.in_child_process", dies_in_train)
    with pytest.raises(KeyboardInterrupt):
        place.work()
    assert stages_there(place.run) == ["generate", "annotate", "curate"]
    monkeypatch.setattr("sg_local.runs.process.in_child_process", goes_on)
    assert place.work() == {"error": None}
    assert seen == ["train", "export", "evaluate"]


def test_a_run_that_was_begun_anew_takes_nothing_of_an_old_one(place: Place, stages: ScriptedStages) -> None:
    place.work(keep_remote=True)
    assert place.there.exists()
    shutil.rmtree(place.run.path)
    place.run, _ = create_or_open_run(
        place.run.path, place.run.task, place.run.model.path, Settings(n_inputs=8)
    )
    stages.ran.clear()
    place.work()
    assert [stage for _, stage in stages.ran] == list(STAGES)


def test_a_review_goes_with_the_run_and_stays_as_it_is_here(place: Place, stages: ScriptedStages) -> None:
    review = place.run.file("review.jsonl")
    review.write_text("{}\n")
    assert place.work(keep_remote=True) == {"error": None}
    assert (place.there / "review.jsonl").read_text() == review.read_text() == "{}\n"
    review.unlink()
    place.work(keep_remote=True)
    assert not (place.there / "review.jsonl").exists()


def test_what_no_stage_writes_is_not_taken_from_a_node(place: Place) -> None:
    place.desk.expect("inbox", "inbox 1")
    for name in ("test.jsonl", "review.jsonl"):
        with pytest.raises(InputError, match="no file of a run"):
            place.desk.take("inbox", "inbox 1", name, 0, b"x")
        with pytest.raises(InputError, match="no file of a run"):
            place.desk.keep("inbox", "inbox 1", [], [name], None, True)


def test_a_failed_run_brings_its_reason(place: Place, stages: ScriptedStages) -> None:
    stages.failing = {"inbox"}
    outcome = place.work()
    assert outcome["exit_code"] == 1
    assert_says(outcome["error"], "generate did not finish")
    assert stages_there(place.run) == []


def test_the_base_is_copied_once_and_named_as_it_lies_here(
    place: Place, stages: ScriptedStages, tmp_path: Path
) -> None:
    model = place.run.model.path
    elsewhere = str(tmp_path / "nowhere/tiny.gguf")
    calls = []
    read = place.desk.model_piece
    place.desk.model_piece = lambda offset: (calls.append(offset), read(offset))[1]  # type: ignore[method-assign]
    assert place.work(model=elsewhere) == {"error": None}
    (copy,) = (cluster_root() / "models").glob("*/tiny.gguf")
    assert copy.read_bytes() == model.read_bytes()
    place.run.file("manifest.json").unlink()
    place.work(model=elsewhere)
    assert calls.count(0) == 1
    assert f'FROM "{model}"' in place.run.file("Modelfile.adapter").read_text()
    entry = open_run(place.run.path).manifest()["stages"]["export"]
    assert entry["writes"]["Modelfile.adapter"] == sha256_file(place.run.file("Modelfile.adapter"))


def test_a_base_with_other_bytes_is_left_alone(place: Place, stages: ScriptedStages, tmp_path: Path) -> None:
    other = tmp_path / "other/tiny.gguf"
    other.parent.mkdir()
    data = place.run.model.path.read_bytes()
    other.write_bytes(data[:-1] + b"\1")
    assert look_at_node(replace(place.needs, model=str(other))).model == "other bytes"
    assert place.work(model=str(other)) == {"error": None}
    assert other.read_bytes() == data[:-1] + b"\1"


def test_a_base_that_changes_while_it_is_copied_is_not_worked_with(
    place: Place, stages: ScriptedStages, tmp_path: Path
) -> None:
    place.desk.model_piece = lambda offset: b"" if offset else b"GGUF of another day"  # type: ignore[method-assign]
    outcome = place.work(model=str(tmp_path / "nowhere/tiny.gguf"))
    assert_says(outcome["error"], "tiny.gguf", "did not arrive whole")
    assert stages.ran == []


def test_a_node_that_sees_the_bench_works_in_it(place: Place, stages: ScriptedStages) -> None:
    (place.bench / ".probe").write_text(".probe")
    place.desk.files = place.desk.take = None  # type: ignore[method-assign,assignment]  # nothing is copied
    assert place.work() == {"error": None}
    assert open_run(place.run.path).first_unfinished() is None
    assert not cluster_root().exists()


def test_weights_that_stay_on_their_node(place: Place, stages: ScriptedStages) -> None:
    assert place.work(keep_remote=True) == {"error": None}
    run = open_run(place.run.path)
    assert not [path for path in run.path.rglob("*") if path.suffix in (".gguf", ".safetensors")]
    assert run.first_unfinished() is None
    with pytest.raises(InputError) as caught:
        run.written_file("model.gguf")
    assert_says(str(caught.value), "10.0.0.7", place.there)
    assert (place.there / "model.gguf").is_file()
    with pytest.raises(SgLocalError) as fault:
        list(checks(str(run.path), with_parity=False))
    lines = str(fault.value).splitlines()
    assert [line.split(" was left on 10.0.0.7, in ")[0] for line in lines] == [
        str(run.file(name)) for name in ("adapter/adapter_model.safetensors", "adapter.gguf", "model.gguf")
    ]
    manifest = run.manifest()
    manifest["stages"]["export"]["writes"]["model.gguf"] = "0" * 64  # of a later export
    write_text(run.file("manifest.json"), json.dumps(manifest))
    unfinished = run.first_unfinished()
    assert unfinished
    assert unfinished.stage == "export"


def test_an_ablation_begins_with_what_the_bench_has(place: Place, stages: ScriptedStages) -> None:
    place.work()
    ablated = begin_ablation(Ablation("rank", 8), place.run, place.bench, read_model(place.run.model.path))
    assert ablated
    stages.ran.clear()
    assert place.work("ablations/rank=8/inbox", "inbox") == {"error": None}
    assert [stage for _, stage in stages.ran] == ["train", "export", "evaluate"]
    assert open_run(ablated.path).shares(place.run, ("generate", "annotate", "curate"))
    # the answers of the base that the first run had
    assert stages.baselines_there[stages.ran[-1][0]] is not None


# What a node is refused for, and what a desk is


def test_a_node_says_what_it_lacks(
    place: Place, without_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    first, second = look_at_node(place.needs).faults
    assert first == "it is without torch: `pip install 'sg-local[train]'` there"
    assert_says(second, "nothing of disk is free", cluster_root(), "SG_LOCAL_HOME")
    assert place.work()["unfit"] == f"{first}; {second}"
    assert not cluster_root().exists()


def test_a_node_with_another_version_does_not_begin(place: Place, stages: ScriptedStages) -> None:
    outcome = place.work(versions={**rows_depend_on(), "sg-local": "0123456789abcdef"})
    assert_says(outcome["unfit"], "sg-local", "here 0123456789abcdef")
    assert stages.ran == []
    assert (
        differences_of({"torch": "2.13.0"}, {"torch": "2.12.0", "trl": "1"}) == "torch 2.12.0 (here 2.13.0)"
    )
    assert differences_of({"torch": "2.13.0"}, {}) == ""


def test_a_try_that_was_given_up_changes_nothing(place: Place) -> None:
    place.desk.expect("inbox", "inbox 1")
    place.desk.take("inbox", "inbox 1", "train.jsonl", 0, b"old")
    place.desk.expect("inbox", "inbox 2")
    for call in (
        lambda: place.desk.take("inbox", "inbox 1", "train.jsonl", 0, b"old"),
        lambda: place.desk.keep("inbox", "inbox 1", [], ["train.jsonl"], None, True),
    ):
        with pytest.raises(InputError, match="elsewhere"):
            call()
    assert not place.run.file(".arriving").exists()


def test_a_file_that_did_not_arrive_whole_replaces_none(place: Place) -> None:
    write_text(place.run.file("train.jsonl"), "{}\n")
    place.desk.expect("inbox", "inbox 1")
    place.desk.take("inbox", "inbox 1", "train.jsonl", 0, b"half")
    with pytest.raises(SgLocalError, match="did not arrive whole"):
        place.desk.keep("inbox", "inbox 1", [FileFacts("train.jsonl", 8, "0" * 64)], [], None, True)
    assert place.run.file("train.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    "name", ["../bench.json", "/etc/passwd", "settings.toml", "a/train.jsonl", "report.html"]
)
def test_only_files_of_a_run_pass_the_desk(place: Place, name: str) -> None:
    place.desk.expect("inbox", "inbox 1")
    with pytest.raises(InputError, match="no file of a run"):
        place.desk.piece("inbox", name, 0)
    with pytest.raises(InputError, match="no file of a run"):
        place.desk.take("inbox", "inbox 1", name, 0, b"x")
    with pytest.raises(InputError, match="no file of a run"):
        place.desk.keep("inbox", "inbox 1", [], [name], None, True)


@pytest.mark.parametrize(
    "where", ["..", "../bench/inbox", "inbox/..", "a/b/c/d", "other", "", "/etc", "begun"]
)
def test_only_runs_of_the_bench_are_places(place: Place, where: str) -> None:
    """Nothing is read elsewhere, and no directory is made for a node."""
    where = where.replace("begun", str(place.run.path))
    deep = place.bench / "a/b/c/d"
    shutil.copytree(place.run.path, deep)
    before = sorted(place.bench.parent.rglob("*"))
    for call in (
        lambda: place.desk.expect(where, "1"),
        lambda: place.desk.files(where),
        lambda: place.desk.settings(where),
        lambda: place.desk.piece(where, "task.toml", 0),
        lambda: place.desk.take(where, "1", "train.jsonl", 0, b"x"),
    ):
        with pytest.raises(InputError, match="no run of the bench"):
            call()
    assert sorted(place.bench.parent.rglob("*")) == before


def test_a_run_has_no_more_files_than_a_run_can_have(place: Place) -> None:
    place.desk.expect("inbox", "inbox 1")
    empty = hashlib.sha256().hexdigest()

    def send(number: int) -> None:
        name = f"predictions/{number}.jsonl"
        place.desk.take("inbox", "inbox 1", name, 0, b"")
        place.desk.keep("inbox", "inbox 1", [FileFacts(name, 0, empty)], [], None, True)

    n_there = len(list(run_files(place.run.path)))
    for number in range(MAX_FILES - n_there):
        send(number)
    with pytest.raises(InputError, match=f"{MAX_FILES} files"):
        send(MAX_FILES)
    assert len(list(run_files(place.run.path))) == MAX_FILES
    place.desk.expect("inbox", "inbox 2")
    for number in range(MAX_FILES):
        place.desk.take("inbox", "inbox 2", f"predictions/{number}.jsonl", 0, b"")
    with pytest.raises(InputError, match=f"{MAX_FILES} files"):
        place.desk.take("inbox", "inbox 2", "train.jsonl", 0, b"")


def test_a_large_file_goes_in_pieces(place: Place, stages: ScriptedStages, tmp_path: Path) -> None:
    large = place.run.file("test.jsonl")
    large.write_bytes(large.read_bytes() + b"\n" * (2 * PIECE_BYTES))
    sizes: list[int] = []
    read = place.desk.piece

    def piece(where: str, name: str, offset: int) -> bytes:
        data = read(where, name, offset)
        sizes.append(len(data))
        return data

    place.desk.piece = piece  # type: ignore[method-assign]
    assert place.work() == {"error": None}
    assert max(sizes) == PIECE_BYTES
    assert sum(sizes) > 2 * PIECE_BYTES
    assert read_json(place.run.file("manifest.json"), 1 << 20)["stages"]["evaluate"]["reads"][
        "test.jsonl"
    ] == sha256_file(large)
