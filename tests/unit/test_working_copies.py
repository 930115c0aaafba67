"""Which file makes the data: the base, or its 16-bit copy where that was measured to be faster."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_models import write_model

import sg_local.llama.library as library
import sg_local.llama.quantize as quantize
import sg_local.llama.speed as speed
import sg_local.proof.working_copies as weights
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.settings import Settings
from sg_local.task import load_task

Seconds = dict[str, float]


@pytest.fixture
def run(tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on a quantized model, and a copy that is made by writing a name."""
    monkeypatch.setenv("SG_LOCAL_HOME", str(tmp_path / "store"))
    monkeypatch.setattr(library, "supports_gpu", lambda: False)
    monkeypatch.setattr(
        quantize, "requantize", lambda _source, target, file_type, _n_threads: target.write_text(file_type)
    )
    model = write_model(tmp_path / "quantized.gguf")
    run, _ = create_or_open_run(
        tmp_path / "run", load_task(str(task)), model, Settings(prompt_format="vicuna")
    )
    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[str]]:
    """clock(base, copy) sets the seconds that both take, and returns the files that will be timed."""

    def set_to(base: float, copy: float) -> list[str]:
        timed: list[str] = []

        def measure(path: Path, *, n_threads: int) -> float:
            timed.append(path.name)
            return copy if path.name == "f16.gguf" else base

        monkeypatch.setattr(speed, "seconds_of_work", measure)
        return timed

    return set_to


def test_a_faster_copy_is_used_and_timed_once(
    run: Run, clock: Callable[[float, float], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    timed = clock(3.0, 2.0)
    assert weights.generating_model(run).name == "f16.gguf"
    assert "1.5 times as fast here; what is scored is the file itself" in capsys.readouterr().err
    assert weights.generating_model(run).name == "f16.gguf"
    assert timed == ["quantized.gguf", "f16.gguf"]


def test_a_copy_that_gains_little_is_not_used(run: Run, clock: Callable[[float, float], list[str]]) -> None:
    clock(2.2, 2.0)
    assert weights.generating_model(run) == run.model.path


def test_what_was_timed_on_another_machine_or_is_damaged_is_timed_again(
    run: Run, clock: Callable[[float, float], list[str]]
) -> None:
    timed = clock(3.0, 2.0)
    path = weights.generating_model(run).with_name("speed.json")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({"another machine": next(iter(told.values()))}))
    weights.generating_model(run)
    assert set(json.loads(path.read_text())) == {"another machine", *told}
    path.write_text("{")
    weights.generating_model(run)
    assert len(timed) == 6


@pytest.mark.parametrize("reason", ["never", "gpu", "16 bits", "memory"])
def test_where_no_copy_can_pay_none_is_made(
    run: Run, clock: Callable[[float, float], list[str]], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    timed = clock(3.0, 1.0)
    if reason == "never":
        run = replace(run, settings=replace(run.settings, working_copy="never"))
    elif reason == "gpu":
        monkeypatch.setattr(library, "supports_gpu", lambda: True)
    elif reason == "16 bits":
        header = run.base_header
        run = replace(run)  # a run reads its header once
        plain = tuple(tensor for tensor in header.tensors if tensor.type_name in ("F32", "F16", "BF16"))
        monkeypatch.setattr(Run, "base_header", replace(header, tensors=plain))
    else:
        monkeypatch.setattr(weights, "total_memory_bytes", lambda: 1000)
    assert weights.generating_model(run) == run.model.path
    assert not timed
