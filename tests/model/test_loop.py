"""The whole loop on a real model, small: from a task file to proven GGUFs, killed on the way and resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sg_local.files import read_rows, sha256_file

SMALL = [
    "--preset=quick", "--n-inputs=70", "--epochs=1", "--max-test-rows=12", "--rank=8", "--n-parallel=8",
    "--batch-size=16",
]  # fmt: skip
TASK = "guest-feedback"

# Opening a socket raises in every Python process of the loop.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise RuntimeError("the loop opened a socket")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def sg_local(*arguments: object, home: Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "sg_local", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(home), text=True, capture_output=True, cwd=home, timeout=900, **options
    )


def environment(home: Path) -> dict[str, str]:
    (home / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(home), str(Path(__file__).parents[2])])
    return {**os.environ, "PYTHONPATH": path, "SG_LOCAL_HOME": str(home / "store")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(home: Path, smollm2: Path) -> Path:
    """A finished run."""
    pytest.importorskip("unsloth", reason="training needs the extra `train`")
    result = sg_local("run", TASK, "--model", smollm2, "--run", home / "run", *SMALL, home=home)
    assert result.returncode == 0, result.stderr
    assert "tuned_merged" in result.stdout
    assert str(home / "run" / "adapter.gguf") in result.stdout
    return home / "run"


def test_all_contenders_are_scored_on_the_test_rows(finished: Path) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert list(evaluation["contenders"]) == [
        "base_zero_shot",
        "base_few_shot",
        "base_label_scoring",
        "tuned_adapter",
        "tuned_merged",
    ]
    for name, scores in evaluation["contenders"].items():
        rows = read_rows(finished / f"predictions/{name}.jsonl")
        assert len(rows) == evaluation["n_rows"] == 12
        assert scores["exact_match"]["mean"] == pytest.approx(
            sum(row["exact_match"] for row in rows) / 12, abs=1e-4
        )
        low, high = scores["exact_match"]["interval_95"]
        assert low <= scores["exact_match"]["mean"] <= high
    served = evaluation["contenders"]["tuned_merged"]
    assert served["served_sha256"] == sha256_file(finished / "model.gguf")


def test_the_exported_adapter_is_the_trained_adapter(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    parity = manifest["stages"]["export"]["parity"]
    assert parity["max_logit_difference"] <= 0.1
    assert parity["adapter_effect"] > 1
    assert "/" not in str(
        json.loads((finished / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    )


def test_verify_agrees_and_notices_a_changed_file(finished: Path, home: Path) -> None:
    result = sg_local("verify", finished, home=home)
    assert result.returncode == 0, result.stderr
    assert "parity" in result.stdout
    modelfile = finished / "Modelfile"
    text = modelfile.read_text()
    modelfile.write_text(text + "# touched\n")
    try:
        result = sg_local("verify", finished, "--no-parity", home=home)
    finally:
        modelfile.write_text(text)
    assert result.returncode == 1
    assert "Modelfile is not what export wrote" in result.stderr


def test_a_finished_run_does_nothing(finished: Path, home: Path, smollm2: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    result = sg_local("run", TASK, "--model", smollm2, "--run", finished, *SMALL, home=home)
    assert result.returncode == 0
    assert "nothing to do" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_predict_gives_the_answers_of_the_evaluation(finished: Path, home: Path) -> None:
    scored = read_rows(finished / "predictions/tuned_merged.jsonl")
    file = home / "inputs.jsonl"
    file.write_text("".join(json.dumps({"input": row["input"]}) + "\n" for row in scored))
    result = sg_local("predict", "--model", finished / "model.gguf", "--n-parallel=8", file, home=home)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line)["output"] for line in result.stdout.splitlines()]
    assert answers == [row["prediction"] for row in scored]


def test_another_quantization_keeps_the_adapter(finished: Path, home: Path) -> None:
    copy = home / "quantized"
    shutil.copytree(finished, copy)
    settings = copy / "settings.toml"
    settings.write_text(settings.read_text().replace('quant = "auto"', 'quant = "Q4_K_M"'))
    result = sg_local("export", copy, "--redo", home=home)
    assert result.returncode == 0, result.stderr
    parity = json.loads((copy / "manifest.json").read_text())["stages"]["export"]["parity"]
    assert parity["mean_kl_nats"] < parity["base_mean_kl_nats"] / 2
    shown = json.loads(sg_local("models", "show", copy / "model.gguf", "--json", home=home).stdout)
    assert "Q4_K" in shown["tensor_types"]
    base = json.loads(sg_local("models", "show", finished / "model.gguf", "--json", home=home).stdout)
    assert "Q4_K" not in base["tensor_types"]


def test_a_planted_wrong_adapter_fails_the_export(finished: Path, home: Path) -> None:
    """The adapter's scale is doubled behind the export's back: llama.cpp and torch no longer agree."""
    script = home / "planted.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import sg_local.stages.export as export\n"
        "import sg_local.gguf_io.adapter as adapter\n"
        "true = adapter.float32_value\n"
        "adapter.float32_value = lambda number: true(2 * number)\n"
        "from sg_local.runs.directory import open_run\n"
        "run = open_run(Path(sys.argv[1]))\n"
        "export.run_export(run)\n"
    )
    copy = home / "planted"
    shutil.copytree(finished, copy)
    for name in ("adapter.gguf", "model.gguf", "Modelfile"):
        (copy / name).unlink()
    result = subprocess.run(
        [sys.executable, str(script), str(copy)],
        env=environment(home),
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert "differs from the trained adapter in torch by" in result.stderr
    assert not (copy / "adapter.gguf").exists()
    assert not (copy / "model.gguf").exists()


def test_killed_anywhere_and_resumed_it_ends_with_the_same_rows(
    home: Path, smollm2: Path, finished: Path
) -> None:
    run = home / "killed"
    command = [
        sys.executable,
        "-m",
        "sg_local",
        "run",
        TASK,
        "--model",
        str(smollm2),
        "--run",
        str(run),
        *SMALL,
    ]
    rng = random.Random(7)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command, "--until=curate"], env=environment(home), cwd=home, stderr=subprocess.PIPE, text=True
        )
        try:
            process.communicate(timeout=rng.uniform(1, 12))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            time.sleep(1.5)  # its stage ends by itself
    assert kills >= 2
    result = sg_local(*command[3:], "--until=curate", home=home)
    assert result.returncode == 0, result.stderr
    for name in ("inputs.jsonl", "outputs.jsonl", "train.jsonl"):
        assert sha256_file(run / name) == sha256_file(finished / name), name
