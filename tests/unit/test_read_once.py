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
from sg_local.bench.ablation import parse_ablations
from sg_local.bench.bench import run_bench
from sg_local.files import write_rows
from sg_local.report.bench import Results
from sg_local.runs.directory import Run, Unfinished
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES, Settings

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


@pytest.fixture
def bench(task: Path, model: Path) -> Callable[[], Results]:
    """bench(): a bench of three tasks, each with three ablations."""
    (task.parent / "tasks").mkdir()
    for name in ("boxes", "crates", "bags"):
        (task.parent / f"tasks/{name}.toml").write_text(task.read_text().replace('"inbox"', f'"{name}"'))
    write_rows(task.parent / "tasks/inbox.test.jsonl", [{"input": "Pay me.", "output": "refund"}])
    ablations = parse_ablations(["rank=8", "n_ctx=2048", "prompt_format=vicuna"], Settings())

    def call() -> Results:
        results, failed = run_bench(
            task.parent / "tasks", str(model), Path("bench"), Settings(), (), ablations
        )
        assert failed == []
        assert (len(results["tasks"]), len(results["ablations"])) == (3, 9)
        return results

    return call


def test_a_bench_reads_its_base_once_for_all_tasks_and_switches(
    bench: Callable[[], Results], readings: Readings
) -> None:
    bench()
    assert (readings.hashed["tiny.gguf"], readings.headers["tiny.gguf"]) == (1, 1)


def test_a_bench_checks_each_of_its_runs_a_few_times(
    bench: Callable[[], Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each time that another one is finished."""
    checked: Counter[str] = Counter()
    first_unfinished = Run.first_unfinished

    def counted(run: Run, until: str = STAGES[-1]) -> Unfinished | None:
        checked[str(run.path)] += 1
        return first_unfinished(run, until)

    monkeypatch.setattr(Run, "first_unfinished", counted)
    results = bench()
    assert len(checked) == 12
    # Is it there, is what it shares there, what is left of it in two halves, and for the table, twice.
    assert max(checked.values()) <= 6
    checked.clear()
    assert bench() == results
    assert max(checked.values()) <= 3


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
