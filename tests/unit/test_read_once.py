"""A base may have gigabytes: one call reads its header once and hashes it once, for all runs and contenders."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import Result
from finished_run import ScriptedStages
from scripted_engine import ScriptedEngine

import sg_local.gguf_header as gguf_header
from sg_local.bench.ablation import parse_switches
from sg_local.bench.bench import run_bench
from sg_local.files import write_rows
from sg_local.runs.directory import Run
from sg_local.runs.stage import run_stage
from sg_local.settings import Settings

Call = Callable[..., Result]


class Readings:
    """How often each file was hashed, and its header read, but for what scripted stages do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed: Counter[str] = Counter()
        self.headers: Counter[str] = Counter()
        self.counts = True
        file_digest, read_header = hashlib.file_digest, gguf_header.read_header

        def counted_digest(file: IO[bytes], name: str) -> Any:
            self.hashed[Path(file.name).name] += self.counts
            return file_digest(file, name)  # type: ignore[arg-type]

        def counted_header(path: Path) -> gguf_header.GgufHeader:
            self.headers[path.name] += self.counts
            return read_header(path)

        monkeypatch.setattr(hashlib, "file_digest", counted_digest)
        monkeypatch.setattr(gguf_header, "read_header", counted_header)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    return Readings(monkeypatch)


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch, readings: Readings) -> None:
    """Stages in this process, whose readings are those of other processes."""
    scripted = ScriptedStages()

    def stage(run: Run, name: str) -> int:
        readings.counts = False
        try:
            return scripted(run, name)
        finally:
            readings.counts = True

    monkeypatch.setattr("sg_local.runs.process.in_child_process", stage)


def test_one_run_reads_its_base_once(sg: Call, task: Path, model: Path, readings: Readings) -> None:
    for calls in (1, 2):  # a new run; a finished one
        result = sg("run", task, "--model", model, "--run", "run")
        assert result.exit_code == 0, result.output
        assert (readings.hashed["tiny.gguf"], readings.headers["tiny.gguf"]) == (calls, calls)


def test_a_bench_reads_its_base_once_for_all_tasks_and_switches(
    task: Path, model: Path, readings: Readings
) -> None:
    (task.parent / "tasks").mkdir()
    for name in ("boxes", "crates", "bags"):
        (task.parent / f"tasks/{name}.toml").write_text(task.read_text().replace('"inbox"', f'"{name}"'))
    write_rows(task.parent / "tasks/inbox.test.jsonl", [{"input": "Pay me.", "output": "refund"}])
    switches = parse_switches(["rank=8", "n_ctx=2048", "prompt_format=vicuna"], Settings())
    results, failed = run_bench(task.parent / "tasks", str(model), Path("bench"), Settings(), (), switches)
    assert failed == []
    assert len(results["tasks"]) == 3
    assert len(results["ablations"]) == 9
    assert (readings.hashed["tiny.gguf"], readings.headers["tiny.gguf"]) == (1, 1)


def test_an_evaluation_hashes_each_served_file_once(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, readings: Readings
) -> None:
    ScriptedEngine(label_logprobs=lambda _prompt, _labels: [-1.0, -2.0]).replace_llama_cpp(monkeypatch)
    readings.hashed.clear()
    readings.headers.clear()
    assert run_stage(finished_run, "evaluate", redo=True)
    assert {name: readings.hashed[name] for name in ("tiny.gguf", "adapter.gguf", "model.gguf")} == {
        "tiny.gguf": 1,
        "adapter.gguf": 1,
        "model.gguf": 1,
    }
    assert readings.headers["tiny.gguf"] == 1
