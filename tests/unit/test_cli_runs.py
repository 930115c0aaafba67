"""`sg-local runs [DIR]`: how far each run is, what it scored, and what is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Contents, one_line
from finished_run import write_stage
from messages import assert_says

from sg_local.files import write_text
from sg_local.runs.directory import Run
from sg_local.runs.lock import lock_run
from sg_local.runs.process import REASON_FILE


@pytest.fixture
def listed(sg: Call, new_run: Run) -> Any:
    def call() -> dict[str, Any]:
        result = sg("runs", new_run.path.parent, "--json")
        assert result.exit_code == 0, result.output
        [item] = json.loads(result.stdout)
        return dict(item)

    return call


def test_a_finished_run_has_its_score_size_and_age(
    sg: Call, listed: Any, finished_run: Run, contents: Contents
) -> None:
    before = contents(finished_run.path)
    item = listed()
    assert (item["run"], item["task"], item["model"]) == (str(finished_run.path), "inbox", "tiny.gguf")
    assert (item["state"], item["stage"], item["reason"]) == ("finished", None, None)
    assert (item["metric"], item["score"], item["verdict"]) == ("exact_match", 0.5, "better")
    assert item["size_bytes"] >= sum(map(len, before.values()))
    assert 0 <= item["age_seconds"] < 600
    result = sg("runs", finished_run.path.parent)
    assert_says(result.stdout, finished_run.path, "finished", "better", "0.500", "tiny")
    assert contents(finished_run.path) == before


def test_a_run_that_is_not_finished_says_which_stage_it_is_at(listed: Any, new_run: Run) -> None:
    assert (listed()["state"], listed()["stage"]) == ("stopped", "generate")
    write_stage(new_run, "generate")
    assert (listed()["state"], listed()["stage"], listed()["score"]) == ("stopped", "annotate", None)
    with lock_run(new_run.path):
        assert (listed()["state"], listed()["stage"]) == ("at work", "annotate")
    write_text(new_run.file(REASON_FILE), "memory ran out")
    item = listed()
    assert (item["state"], item["stage"], item["reason"]) == ("failed", "annotate", "memory ran out")


def test_a_changed_file_is_told(sg: Call, listed: Any, finished_run: Run) -> None:
    finished_run.file("evaluation.json").write_text("{}")
    item = listed()
    assert (item["state"], item["stage"], item["score"]) == ("stopped", "evaluate", None)
    assert "evaluation.json is not as it was written" in item["reason"]
    assert "evaluate to do" in sg("runs", finished_run.path.parent).stdout


def test_a_damaged_run_does_not_hide_the_others(sg: Call, finished_run: Run, tmp_path: Path) -> None:
    for name, file in (("settings", "settings.toml"), ("manifest", "manifest.json")):
        place = tmp_path / name
        place.mkdir()
        for path in finished_run.path.iterdir():
            if path.is_file():
                (place / path.name).write_bytes(path.read_bytes())
        text = (place / file).read_text()
        (place / file).write_text(
            text.replace("n_inputs = 7", "n_inputs = -7").replace('"stages"', '"stage"')
        )
    items = json.loads(sg("runs", tmp_path, "--json").stdout)
    states = {Path(item["run"]).name: item["state"] for item in items}
    assert states == {"run": "finished", "settings": "damaged", "manifest": "damaged"}
    assert all(item["reason"] for item in items if item["state"] == "damaged")


def test_a_lock_that_is_a_link_leaves_its_target_alone(
    listed: Any, finished_run: Run, tmp_path: Path
) -> None:
    (tmp_path / "letter").write_text("mine")
    finished_run.file(".lock").unlink(missing_ok=True)
    finished_run.file(".lock").symlink_to(tmp_path / "letter")
    assert listed()["state"] == "finished"
    assert (tmp_path / "letter").read_text() == "mine"


def test_no_runs_and_no_directory(sg: Call, tmp_path: Path) -> None:
    result = sg("runs")
    assert (result.exit_code, result.stdout) == (0, "no runs here\n")
    assert json.loads(sg("runs", "--json").stdout) == []
    assert_says(one_line(sg("runs", tmp_path / "gone"), 2), tmp_path / "gone", "is no directory")
