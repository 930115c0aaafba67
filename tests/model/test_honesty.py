"""Where the gain comes from: not from the test rows, and not from the way of scoring.

- What is trained on, and all that training leaves, is the same whatever the test rows are.
- With the made data's labels shuffled the gain is gone: it comes from what the base knows.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sg_local.files import read_rows, write_rows
from sg_local.selfguide.statistics import paired_test
from sg_local.task import load_task, task_to_toml
from sg_local.task_files.rows import load_test_rows

TASK = "support-inbox"
CANARY = "zq-canary-7f3a91"
N_TEST_ROWS = 60
SMALL = [
    "--n-inputs=96", "--epochs=3", "--input-prompt=turns", "--n-layouts=2", "--n-parallel=16", "--rank=8",
]  # fmt: skip


def sg_local(*arguments: object, place: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SG_LOCAL_HOME": str(place / "store"),
    }
    command = [sys.executable, "-m", "sg_local", *map(str, arguments)]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=place, timeout=900)
    assert result.returncode == 0, result.stderr


def write_task(path: Path, test_rows: list[dict[str, str]]) -> Path:
    """The shipped task with other test rows."""
    rows = path.with_suffix(".jsonl")
    write_rows(rows, test_rows)
    path.write_text(task_to_toml(replace(load_task(TASK), test=rows)))
    assert len(load_test_rows(load_task(path))) == len(test_rows)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("unsloth", reason="training needs the extra `train`")
    return tmp_path_factory.mktemp("honesty")


@pytest.fixture(scope="module")
def finished(place: Path, smollm2: Path) -> Path:
    """A finished run, one of whose test rows holds the canary."""
    rows = [row.as_row() for row in load_test_rows(load_task(TASK))][: N_TEST_ROWS - 1]
    rows.append({"input": f"My parcel {CANARY} is late.", "output": "delivery"})
    task = write_task(place / "canary.toml", rows)
    sg_local("run", task, "--model", smollm2, "--run", place / "run", *SMALL, place=place)
    return place / "run"


def files_with(text: str, directory: Path) -> set[str]:
    """Files whose bytes hold a text, in UTF-8 or UTF-16."""
    forms = [text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")]
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and any(form in path.read_bytes() for form in forms)
    }


def test_a_string_of_the_test_rows_is_in_nothing_that_training_used_or_left(finished: Path) -> None:
    found = files_with(CANARY, finished)
    answers = {str(path.relative_to(finished)) for path in (finished / "predictions").glob("*.jsonl")}
    # The search can find it: in the rows, and in what is made after the training, answers and the page that shows them.
    assert found == {"test.jsonl", "report.html", *answers}
    assert len(answers) == 5
    names = {path.relative_to(finished).parts[0] for path in finished.rglob("*") if path.is_file()}
    assert {"train.jsonl", "adapter", "adapter.gguf", "model.gguf", "Modelfile", "manifest.json"} <= names


def test_other_test_rows_make_the_same_training_data(finished: Path, place: Path, smollm2: Path) -> None:
    task = write_task(place / "other.toml", [{"input": "Give me my money back.", "output": "refund"}])
    run = place / "other"
    sg_local("run", task, "--model", smollm2, "--run", run, "--until=curate", *SMALL, place=place)
    for name in ("inputs.jsonl", "outputs.jsonl", "train.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def scores(run: Path) -> list[float]:
    return [row["exact_match"] for row in read_rows(run / "predictions/tuned_merged.jsonl")]


def gain(run: Path, over: str = "gain") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())[over]
    return found


def test_shuffled_labels_bring_no_gain(finished: Path, place: Path) -> None:
    run = place / "shuffled"
    shutil.copytree(finished, run)
    rows = read_rows(run / "outputs.jsonl")
    judged = [row["label_logprobs"] for row in rows]
    random.Random(0).shuffle(
        judged
    )  # then they agree with what inputs were made for by chance, which counts nothing
    write_rows(
        run / "outputs.jsonl", [row | {"label_logprobs": own} for row, own in zip(rows, judged, strict=True)]
    )
    for stage in ("curate", "train", "export", "evaluate"):
        sg_local(stage, run, place=place)
    assert gain(finished)["verdict"] == gain(finished, "gain_over_best")["verdict"] == "better"
    assert gain(run)["verdict"] != "better"
    # Over few-shot prompting (0.33 of 60 rows) what is left is that every answer is a label. Scoring the labels gives
    # that without any training (0.48); training on shuffled ones gives no more.
    assert gain(run, "gain_over_best")["mean"] <= 0.05
    honest, shuffled = scores(finished), scores(run)
    assert sum(honest) > sum(shuffled)
    assert paired_test(honest, shuffled) < 0.05
