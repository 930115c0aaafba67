"""A run directory: made whole or not at all, one writer, and no stage taken for finished that is not."""

import json
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from command_line import Contents
from filelock import FileLock
from finished_run import finish_run
from messages import assert_says

import sg_local.runs.begin as begin
import sg_local.runs.lock as lock_module
import sg_local.stages.export as export
from sg_local.errors import InputError, SgLocalError
from sg_local.files import read_rows, write_rows
from sg_local.models import directory_name, list_models
from sg_local.proof.verify import verify_run
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.lock import lock_run
from sg_local.runs.stage import run_stage
from sg_local.settings import REMOVED, STAGES, Settings
from sg_local.task import load_task


def create(path: Path, task: Path, model: Path, **settings: Any) -> tuple[Run, bool]:
    return create_or_open_run(path, load_task(task), model, Settings(**settings))


def test_a_new_run_holds_task_test_rows_and_settings_and_is_opened_again(
    tmp_path: Path, task: Path, model: Path
) -> None:
    run, is_new = create(tmp_path / "runs" / "a", task, model, n_inputs=7, learning_rate=1e-5)
    assert is_new
    again, is_new = create(tmp_path / "runs" / "a", task, model, n_inputs=7, learning_rate=1e-5)
    assert not is_new
    assert again == run == open_run(tmp_path / "runs" / "a")
    assert (run.settings.n_inputs, run.settings.learning_rate) == (7, 1e-5)
    assert run.model.path == model.resolve()
    assert [row.output for row in run.test_rows] == ["login", "refund"]


def test_a_path_with_odd_characters_comes_back(tmp_path: Path, task: Path, model: Path) -> None:
    odd = model.rename(tmp_path / 'a "b\\c\x7f\té.gguf')
    run, _ = create(tmp_path / "run", task, odd)
    assert open_run(run.path).model.path == odd.resolve()


def hugging_face_cache(root: Path, model: Path) -> Path:
    """The model as a Hugging Face cache keeps it: a link to a blob, which is named by its hash."""
    blob = root / "blobs" / "b179c9523d0e6a0f"
    blob.parent.mkdir()
    model.rename(blob)
    snapshot = root / "models--someone--tiny-GGUF" / "snapshots" / "1f2e3d"
    snapshot.mkdir(parents=True)
    (snapshot / "Tiny.Q4_1.gguf").symlink_to(Path("../../../blobs") / blob.name)
    return snapshot / "Tiny.Q4_1.gguf"


def test_a_linked_model_keeps_the_name_of_the_link(
    tmp_path: Path, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = hugging_face_cache(tmp_path, model)
    (tmp_path / "models").symlink_to(link.parent)
    monkeypatch.chdir(tmp_path)
    run, _ = create(tmp_path / "run", task, Path("models") / link.name)
    assert open_run(run.path).model.path == link  # from wherever it is called again
    finish_run(run)
    assert export._metadata(run)["general.name"] == "Tiny.Q4_1 tuned for inbox"
    with pytest.raises(InputError) as caught:  # as the user knows it
        create(tmp_path / "run", task, model_of_another_name(link))
    assert_says(str(caught.value), str(link))


def model_of_another_name(link: Path) -> Path:
    other = link.with_name("Other.gguf")
    other.write_bytes(link.read_bytes() + b"more")
    return other


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("my-lora", "my-lora"),
        ("link", "link"),
        ("my-lora/.", "my-lora"),
        ("models--someone--polite-lora/snapshots/1f2e3d", "polite-lora"),
        ("snapshots/1f2e3d", "1f2e3d"),
        (".", "here"),
    ],
)
def test_a_directory_is_called_what_its_user_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    here = tmp_path / "here"
    (here / "my-lora").mkdir(parents=True)
    (here / "link").symlink_to("my-lora")
    monkeypatch.chdir(here)
    assert directory_name(Path(given)) == expected


def test_a_run_that_is_not_named_in_utf8_is_refused(tmp_path: Path, task: Path, model: Path) -> None:
    with pytest.raises(InputError, match="not named in UTF-8: rename"):
        create(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), task, model)


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path, task: Path, model: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    try:
        model.rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(InputError, match="not named in UTF-8: rename"):
        create(tmp_path / "run", task, odd)


@pytest.mark.parametrize("n_writes", [0, 1, 2])
def test_a_run_whose_making_was_interrupted_is_made_by_the_next_call(
    tmp_path: Path, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch, n_writes: int
) -> None:
    """The files are task.toml, test.jsonl and, as the last, settings.toml."""
    done = 0
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal done
        if done == n_writes:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path / "run", task, model)
    assert not (tmp_path / "run/settings.toml").exists()
    _, is_new = create(tmp_path / "run", task, model)
    assert is_new


def test_what_a_kill_left_is_cleared_away(tmp_path: Path, task: Path, model: Path) -> None:
    """A killed process cannot remove its temporary, nor its lock file."""
    directory = tmp_path / "run"
    directory.mkdir()
    for name in (".lock", "task.toml", "test.jsonl", ".settings.toml.0a1b2c3d.tmp.toml"):
        (directory / name).write_text("half")
    run, is_new = create(directory, task, model)
    assert is_new
    assert sorted(path.name for path in directory.iterdir()) == [
        ".lock",
        "settings.toml",
        "task.toml",
        "test.jsonl",
    ]
    assert run.task.name == "inbox"


def test_leftover_test_rows_do_not_join_a_task_without_any(tmp_path: Path, task: Path, model: Path) -> None:
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run/test.jsonl", [{"input": "a", "output": "login"}])
    task.write_text(task.read_text().replace('test = "inbox.test.jsonl"\n', ""))
    run, _ = create(tmp_path / "run", task, model)
    assert run.test_rows == []


def test_a_directory_with_other_files_is_left_alone(
    tmp_path: Path, task: Path, model: Path, contents: Contents
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"miaow")
    with pytest.raises(InputError, match=r"photos.* \(cat\.jpg\).*: choose another directory"):
        create(tmp_path / "photos", task, model)
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_a_file_in_the_place_of_the_run(tmp_path: Path, task: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a directory: choose another directory"):
        create(tmp_path / "file", task, model)
    with pytest.raises(SgLocalError, match=r"Not a directory.*: choose another directory"):
        create(tmp_path / "file" / "run", task, model)


def test_what_changed_is_named(tmp_path: Path, task: Path, model: Path) -> None:
    create(tmp_path / "run", task, model, n_inputs=7, calibrate=True)
    with pytest.raises(
        InputError,
        match=r"begun with --n-inputs 7 --calibrate, .*called with --n-inputs 8 --no-calibrate:",
    ):
        create(tmp_path / "run", task, model, n_inputs=8, calibrate=False)
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes() + bytes(32))
    with pytest.raises(InputError, match=r"the model .*tiny\.gguf, .*called with the model .*other\.gguf"):
        create(tmp_path / "run", task, other, n_inputs=7)
    with pytest.raises(InputError, match=r"prompt format gguf, .*called with .*prompt format vicuna"):
        create(tmp_path / "run", task, model, n_inputs=7, prompt_format="vicuna")
    write_rows(tmp_path / "inbox.test.jsonl", [{"input": "Pay me.", "output": "login"}])
    with pytest.raises(InputError, match=r"test rows of inbox, .*called with other test rows"):
        create(tmp_path / "run", task, model, n_inputs=7)
    task.write_text(task.read_text().replace("Which", "What").replace("money back", "dollars"))
    with pytest.raises(InputError, match=r"the task inbox, .*called with other instruction and examples"):
        create(tmp_path / "run", task, model, n_inputs=7)
    task.write_text(task.read_text().replace('"inbox"', '"outbox"'))
    with pytest.raises(InputError, match=r"the task inbox, .*called with the task outbox"):
        create(tmp_path / "run", task, model, n_inputs=7)


def test_a_model_file_with_new_bytes_is_another_model(tmp_path: Path, task: Path, model: Path) -> None:
    create(tmp_path / "run", task, model)
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(InputError, match=r"tiny\.gguf, .*called with other bytes"):
        create(tmp_path / "run", task, model)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[model\n", "invalid TOML"),
        ("[settings]\nn_inputs = 7\n", r"settings\.toml is damaged.* a new run"),
        (None, r"settings\.toml is damaged.* a new run"),  # size_bytes becomes a text
        ("n_inputs = 7 -> n_inptus = 7", r"settings\.toml: .*n_inptus.*did you mean n_inputs\?"),
        ("n_inputs = 7 -> n_inputs = -7", r"settings\.toml: n_inputs = -7 .*at least 1"),
        ("n_inputs = 7 -> n_inputs = true", r"settings\.toml: n_inputs = True .*whole number"),
    ],
)
def test_damaged_settings_are_told(new_run: Run, text: str | None, told: str) -> None:
    path = new_run.file("settings.toml")
    old = path.read_text()
    if text is None:
        path.write_text(old.replace("size_bytes = ", 'size_bytes = "1"  # '))
    elif " -> " in text:
        path.write_text(old.replace(*text.split(" -> ")))
    else:
        path.write_text(text)
    assert path.read_text() != old
    with pytest.raises(InputError, match=told):
        open_run(new_run.path)


def add_removed(run: Run, **values: Any) -> None:
    """Makes the run one of a version that had the settings in REMOVED, all unused but for the given ones."""
    recorded = {**REMOVED, **values}
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in recorded.items())
    path = run.file("settings.toml")
    path.write_text(path.read_text().replace("[settings]\n", f"[settings]\n{lines}"))
    manifest = run.manifest()
    for entry in manifest["stages"].values():
        entry["settings"] |= recorded
    run.file("manifest.json").write_text(json.dumps(manifest))


def test_a_run_with_settings_that_are_gone_goes_on_where_it_did_not_use_them(
    finished_run: Run, task: Path
) -> None:
    add_removed(finished_run)
    again, is_new = create(finished_run.path, task, finished_run.model.path, n_inputs=7)
    assert (again, is_new) == (finished_run, False)
    assert again.is_finished(STAGES[-1])
    passed = {check.what for check in verify_run(again, with_parity=False)}
    assert {"task.toml", "train.jsonl", "model.gguf", "evaluation.json"} - passed == {"task.toml"}


def test_verify_compares_a_stage_with_the_settings_that_it_could_read(finished_run: Run) -> None:
    """A run that took a stage over from another may differ from that in later settings."""
    manifest = finished_run.manifest()
    for stage in STAGES:
        manifest["stages"][stage]["settings"] |= {"rank": 99}
    finished_run.file("manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SgLocalError) as caught:
        list(verify_run(finished_run, with_parity=False))
    faults = str(caught.value).splitlines()
    assert ["settings.toml is not what" in fault for fault in faults] == [True] * 3
    assert [stage for stage in STAGES if f"is not what {stage} ran with" in str(caught.value)] == [
        "train",
        "export",
        "evaluate",
    ]


@pytest.mark.parametrize("used", [{"prior_weight": 0.5}, {"confidence_weights": True}])
def test_a_run_that_used_a_setting_that_is_gone_is_refused_in_one_line(
    finished_run: Run, used: dict[str, Any]
) -> None:
    add_removed(finished_run, **used)
    ((name, value),) = used.items()
    with pytest.raises(InputError) as caught:
        open_run(finished_run.path)
    assert str(caught.value) == (
        f"{finished_run.file('settings.toml')}: {name} = {value} is a setting that this version no longer has: "
        "go on with the version that began this, or begin anew elsewhere: run --run DIR, bench --out DIR"
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"stages": []}',
        '{"stages": {"generate": 1}}',
        '{"stages": {"generate": {"reads": {}}}}',
        '{"stages": {"generate": {"reads": {}, "writes": {"a": 1}}}}',
        '{"stages": {"generate": {"reads": {}, "writes": {"../a": "0"}}}}',
        '{"stages": {"generate": {"reads": {"/etc/passwd": "0"}, "writes": {}}}}',
    ],
)
def test_a_damaged_manifest_is_told(new_run: Run, text: str) -> None:
    new_run.file("manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest.json"):
        new_run.is_finished("generate")


def test_a_stage_is_finished_when_its_entry_is_written_and_that_is_last(new_run: Run) -> None:
    def fail() -> None:
        with new_run.stage("generate"):
            write_rows(new_run.file("inputs.jsonl"), [{"id": 0}])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not new_run.is_finished("generate")
    with new_run.stage("generate") as details:
        details["counts"] = {"kept": 1}
        assert not new_run.is_finished("generate")
    assert new_run.is_finished("generate")
    entry = json.loads(new_run.file("manifest.json").read_text())["stages"]["generate"]
    assert entry["counts"] == {"kept": 1}
    assert entry["settings"]["n_inputs"] == 7
    assert set(entry["reads"]) == {"task.toml"}
    assert len(entry["writes"]["inputs.jsonl"]) == 64


def test_a_stage_that_runs_again_takes_back_the_later_ones_first(finished_run: Run) -> None:
    with finished_run.stage("annotate"):
        assert [stage for stage in STAGES if finished_run.is_finished(stage)] == ["generate"]
        # What the killed call had written stays, what later stages made of it goes.
        assert read_rows(finished_run.file("outputs.jsonl"))
        assert not list(finished_run.path.glob("predictions/*"))
    assert [stage for stage in STAGES if finished_run.is_finished(stage)] == ["generate", "annotate"]


def test_an_edited_file_makes_the_stages_that_read_it_out_of_date(finished_run: Run) -> None:
    """A person may look through train.jsonl: training on what it was before would lose that."""
    assert finished_run.is_finished("evaluate")
    write_rows(
        finished_run.file("train.jsonl"), [{"id": 0, "input": "a", "output": "login", "drop": "by hand"}]
    )
    assert [stage for stage in STAGES if finished_run.is_finished(stage)] == [
        "generate",
        "annotate",
        "curate",
    ]
    with pytest.raises(
        InputError,
        match=r"train is out of date \(train\.jsonl .*\).*`sg-local train .*`",
    ):
        finished_run.is_due("export")


def test_a_removed_file_makes_its_stage_unfinished(finished_run: Run) -> None:
    finished_run.file("adapter.gguf").unlink()
    assert finished_run.is_finished("train")
    assert not finished_run.is_finished("evaluate")
    with pytest.raises(InputError, match=r"export is not finished \(adapter\.gguf .*\).*`sg-local export"):
        finished_run.is_due("evaluate")


def test_the_base_model_has_to_be_there_and_the_same(finished_run: Run) -> None:
    finished_run.model.path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="has 4 bytes, it had"):
        finished_run.check_model()
    finished_run.model.path.unlink()
    with pytest.raises(InputError, match=r"the base model .* is gone: put it back"):
        finished_run.check_model()


def test_one_writer_at_a_time(new_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "LOCK_SECONDS", 0)
    half_made = new_run.path.parent / "half-made"
    half_made.mkdir()
    with FileLock(new_run.path / ".lock"), FileLock(half_made / ".lock"):
        with pytest.raises(InputError, match=r"another sg-local is working on .*run: "):
            run_stage(new_run, "generate")
        with pytest.raises(InputError, match="another sg-local is working on"):
            create(half_made, task, new_run.model.path)
    with lock_run(new_run.path):
        pass


def test_the_lock_clears_away_temporaries(new_run: Run) -> None:
    leftover = new_run.file(".inputs.jsonl.0a1b2c3d.tmp.jsonl")
    leftover.write_text("half")
    with lock_run(new_run.path):
        assert not leftover.exists()


def test_redo_forgets_the_stage_and_those_after_it(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    import sg_local.stages.curate

    before = contents(finished_run.path)
    seen: list[Run] = []
    monkeypatch.setattr(sg_local.stages.curate, "run_curate", seen.append)
    assert not run_stage(finished_run, "curate")
    assert (seen, contents(finished_run.path)) == ([], before)
    assert run_stage(finished_run, "curate", redo=True)
    (given,) = seen
    assert given == replace(finished_run, settings=finished_run.settings.seen_by("curate"))
    with pytest.raises(AttributeError, match="has no rank: it is declared for train"):
        _ = given.settings.rank
    assert [stage for stage in STAGES if finished_run.is_finished(stage)] == ["generate", "annotate"]
    assert finished_run.file("outputs.jsonl").exists()


def test_redo_of_a_stage_whose_base_is_gone_forgets_nothing(finished_run: Run, contents: Contents) -> None:
    finished_run.model.path.unlink()
    before = contents(finished_run.path)
    with pytest.raises(InputError, match="is gone"):
        run_stage(finished_run, "generate", redo=True)
    assert contents(finished_run.path) == before


def test_a_run_that_another_process_made_meanwhile_is_opened(
    tmp_path: Path, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def lock_too_late(path: Path) -> Iterator[None]:
        monkeypatch.setattr(begin, "lock_run", lock_run)
        create(path, task, model, n_inputs=7)
        with lock_run(path):
            yield

    monkeypatch.setattr(begin, "lock_run", lock_too_late)
    run, is_new = create(tmp_path / "run", task, model, n_inputs=7)
    assert not is_new
    assert run.settings.n_inputs == 7


def test_a_run_keeps_the_licence_and_its_notice(
    tmp_path: Path, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vicuna = next(listed for listed in list_models() if listed.name == "vicuna-7b-v1.5")
    listed = replace(vicuna, prompt_format="gguf")
    monkeypatch.setattr("sg_local.runs.begin.find_by_path", lambda _path: listed)
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, Settings())
    assert run.model.licence.startswith("Llama 2 Community License. Llama 2 is licensed under")


def test_the_manifest_says_with_what_each_stage_ran(tmp_path: Path, task: Path, model: Path) -> None:
    settings = Settings(seed=7, n_inputs=5)
    run, _ = create_or_open_run(tmp_path / "seeded", load_task(task), model, settings)
    finish_run(run)
    stages = json.loads(run.file("manifest.json").read_text())["stages"]
    assert list(stages) == list(STAGES)
    for name, entry in stages.items():
        assert entry["seed"] == 7, name
        assert entry["settings"]["seed"] == 7, name
        assert entry["settings"]["n_inputs"] == 5, name
        versions = entry["versions"]
        assert versions["python"] == platform.python_version(), name
        for package in ("llama-cpp-python", "gguf"):  # which every installation has
            assert versions[package] == metadata.version(package), name
        for package in ("torch", "transformers", "trl", "peft", "unsloth"):
            installed = {item.name.lower() for item in metadata.distributions() if item.name}
            assert (package in versions) == (package in installed), (name, package)
        assert entry["writes"], name
        assert all(re.fullmatch("[0-9a-f]{64}", value) for value in entry["writes"].values()), name
    assert tomllib.loads(run.file("settings.toml").read_text())["model"]["licence"] == "unknown"
