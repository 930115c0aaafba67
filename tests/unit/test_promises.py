"""Promises that hold across the house: offline before the first import, no stranger's code, the gate, a light help."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Call, in_a_process
from finished_run import write_stage
from gguf_models import write_safetensors
from scripted_engine import ScriptedEngine
from tiny_models import write_tiny_llama

from sg_local.files import write_rows
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task

# What has to be set before the first of these packages is imported, each for what reads it.
SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_OFFLINE": "1",
    "UNSLOTH_LLAMA_CPP_OFFLINE": "1",
    "WANDB_DISABLED": "true",
}
STUB = """
import json, os, sys
with open(os.environ["FIRST_IMPORT"], "x") as file:
    json.dump({"module": __name__, "cwd": os.getcwd(), "environment": dict(os.environ)}, file)
os._exit(70)
"""


@pytest.fixture
def first_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Heavy packages that only write down the environment they are imported in, and end the process."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("torch", "unsloth", "transformers", "trl", "peft", "datasets"):
        (stubs / f"{name}.py").write_text(STUB)
    monkeypatch.setenv("FIRST_IMPORT", str(tmp_path / "first.json"))
    for name in SWITCHES:
        monkeypatch.setenv(name, "0")  # what the user's shell says does not count

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "first.json").read_text())
        return found

    return read


def switches_of(environment: Mapping[str, str]) -> dict[str, str | None]:
    return {name: environment.get(name) for name in SWITCHES}


@pytest.mark.parametrize(("trainer", "first"), [("unsloth", "unsloth"), ("peft", "torch")])
def test_training_is_offline_and_inside_the_run_before_its_first_import(
    first_import: Callable[[], dict[str, Any]], tmp_path: Path, task: Path, trainer: str, first: str
) -> None:
    settings = Settings(trainer=trainer, prompt_format="vicuna", n_ctx=512)
    model = write_tiny_llama(tmp_path / "llama.gguf")
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, settings)
    for stage in ("generate", "annotate", "curate"):
        write_stage(run, stage)
    path = os.pathsep.join([str(tmp_path / "stubs"), str(ROOT)])
    done = in_a_process("train", run.path, env={"PYTHONPATH": path})
    seen = first_import()
    assert seen["module"] == first, done.stderr
    assert switches_of(seen["environment"]) == SWITCHES
    assert Path(seen["cwd"]).is_relative_to(run.path.resolve())
    assert Path(seen["environment"]["UNSLOTH_COMPILE_LOCATION"]).is_relative_to(run.path.resolve())


def test_the_proof_is_offline_before_its_first_import(
    first_import: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    program = (
        "from pathlib import Path\n"
        "from sg_local.finetune.reference import reference_logits\n"
        "reference_logits(Path('.'), None, [((1, 2), 0)])"
    )
    path = os.pathsep.join([str(tmp_path / "stubs"), str(ROOT)])
    subprocess.run([sys.executable, "-P", "-c", program], check=False, env={**os.environ, "PYTHONPATH": path})
    assert switches_of(first_import()["environment"]) == SWITCHES


class Bomb:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


def pickled(sentinel: Path) -> bytes:
    import pickle

    return pickle.dumps(Bomb(sentinel))


Plant = Callable[[Path, Path], None]  # changes a directory so that reading it carelessly makes the sentinel


def set_in_config(name: str, **changes: Any) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        config = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(config | changes))
        for module in (
            "hostile",
            "modeling_llama",
            "tokenization_llama",
            "sitecustomize",
            "torch",
            "unsloth",
        ):
            (directory / f"{module}.py").write_text(f"import os; os.mkdir({str(sentinel)!r})")

    return plant


def pickle_in_place_of(*names: str, ending: str) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        for name in names:
            for path in directory.glob(name):
                path.unlink()
        (directory / ending).write_bytes(pickled(sentinel))

    return plant


def pickle_named_safetensors(name: str) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        for path in directory.glob(name):
            path.write_bytes(pickled(sentinel))

    return plant


def shard_elsewhere(name: str) -> Plant:
    """An index whose weights lie in a pickle, or outside the directory."""

    def plant(directory: Path, sentinel: Path) -> None:
        index = directory / "model.safetensors.index.json"
        (directory.parent / "outside.safetensors").write_bytes(pickled(sentinel))
        (directory / "weights.bin").write_bytes(pickled(sentinel))
        listed = json.loads(index.read_text())
        index.write_text(json.dumps({"weight_map": dict.fromkeys(listed["weight_map"], name)}))

    return plant


def link_to(name: str, target: str) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        (directory.parent / "pickle").write_bytes(pickled(sentinel))
        for path in directory.glob(name):
            path.unlink()
            path.symlink_to(target)

    return plant


CODE = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
WEIGHTS: dict[str, Plant] = {
    "auto_map": set_in_config("config.json", auto_map=CODE),
    "auto_map of another repository": set_in_config(
        "config.json", auto_map={"AutoConfig": "a/b--hostile.Config"}
    ),
    "trust_remote_code": set_in_config("config.json", trust_remote_code=True),
    "kernels for attention": set_in_config("config.json", _attn_implementation_internal="a/b"),
    "kernels for experts": set_in_config("config.json", _experts_implementation_internal="a/b"),
    "a pickle": pickle_in_place_of("model*", ending="pytorch_model.bin"),
    "a pickle of torch": pickle_in_place_of("model*", ending="consolidated.00.pth"),
    "a pickle by a safe name": pickle_named_safetensors("model-*.safetensors"),
    "an index of a pickle": shard_elsewhere("weights.bin"),
    "an index of what lies outside": shard_elsewhere("../outside.safetensors"),
    "a link to a pickle": link_to("model-*.safetensors", "../pickle"),
    "a link to a directory": link_to("config.json", ".."),
    "a link to itself": link_to("config.json", "config.json"),
}
ADAPTERS: dict[str, Plant] = {
    "auto_map": set_in_config("adapter_config.json", auto_map=CODE),
    "trust_remote_code": set_in_config("adapter_config.json", trust_remote_code=True),
    "another kind": set_in_config("adapter_config.json", peft_type="hostile.Model"),
    "a pickle": pickle_in_place_of("*.safetensors", ending="adapter_model.bin"),
    "a pickle by a safe name": pickle_named_safetensors("*.safetensors"),
    "a link to a pickle": link_to("*.safetensors", "../pickle"),
    "a link to itself": link_to("adapter_config.json", "adapter_config.json"),
}


def require_refused(result: Any, sentinel: Path) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.stderr
    assert not sentinel.exists()


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_of_a_stranger_run_no_code(
    sg: Call, tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model, sentinel = write_tiny_llama(tmp_path / "llama.gguf"), tmp_path / "sentinel"
    weights = tmp_path / "weights"
    write_base_weights(model, weights)
    call = ("run", task, "--model", model, "--run", "run", "--prompt-format=vicuna", "--trainer=peft")
    started: list[str] = []
    monkeypatch.setattr(
        "sg_local.runs.process.in_child_process", lambda _run, stage: started.append(stage) or 1
    )
    assert (
        sg(*call, "--base-weights", weights).exit_code == 1
    )  # the first stage is reached: it was all right before
    assert started == ["generate"]
    WEIGHTS[what](weights, sentinel)
    monkeypatch.chdir(weights)  # where Python would find modules first
    require_refused(sg(*call, "--base-weights", weights, "--run", tmp_path / "other"), sentinel)
    assert started == ["generate"]


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_of_a_stranger_runs_no_code(
    sg: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import numpy as np

    model, sentinel = write_tiny_llama(tmp_path / "llama.gguf"), tmp_path / "sentinel"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        "init_lora_weights": True,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {f"{module}.lora_A.weight": np.zeros((2, 64)), f"{module}.lora_B.weight": np.zeros((64, 2))}
    write_safetensors(adapter / "adapter_model.safetensors", halves, "F32")
    ADAPTERS[what](adapter, sentinel)
    monkeypatch.chdir(adapter)
    require_refused(sg("export-adapter", "--adapter", adapter, "--model", model, "--n-ctx=512"), sentinel)


@pytest.mark.parametrize(
    ("tuned", "options", "exit_code"),
    [
        ("refund", ["--gate"], 3),
        ("refund", [], 0),
        ("login", ["--gate"], 0),
        ("Login, I think", ["--gate"], 3),
    ],
)
def test_a_bad_adapter_ends_the_whole_loop_with_3(
    sg: Call,
    tmp_path: Path,
    task: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tuned: str,
    options: list[str],
    exit_code: int,
) -> None:
    """All rows are "login". The base is right in half of them; the files that were exported say `tuned` to all."""
    rows = [{"input": f"Let me in, {number}.", "output": "login"} for number in range(40)]
    write_rows(task.with_name("inbox.test.jsonl"), rows)

    def answer(file: str, prompt: str) -> str:
        is_even = prompt.rstrip(".")[-1] in "02468"
        return tuned if file in {"adapter.gguf", "model.gguf"} else "login" if is_even else "refund"

    ScriptedEngine(answer, lambda _prompt, _labels: [-0.1, -2.0]).replace_llama_cpp(monkeypatch)

    def stage(run: Run, name: str) -> int:
        if name == STAGES[-1]:
            run_stage(run, name)  # the real one: real scores, tests and verdict
        else:
            write_stage(run, name)
        return 0

    monkeypatch.setattr("sg_local.runs.process.in_child_process", stage)
    result = sg("run", task, "--model", model, "--run", tmp_path / "run", *options)
    assert result.exit_code == exit_code, result.output
    assert ("significantly worse" in result.stderr) == (exit_code == 3)
    assert "tuned_merged" in result.stdout  # the scores are shown all the same
    verdict = json.loads((tmp_path / "run/evaluation.json").read_text())["gain_over_best"]["verdict"]
    assert verdict == ("better" if tuned == "login" else "worse")


@pytest.mark.parametrize("arguments", [["--help"], [], ["run", "--help"], ["--version"]], ids=" ".join)
def test_help_takes_under_half_a_second(arguments: list[str]) -> None:
    """Of the processor's time, since a busy machine is no fault; the best of three."""
    command = [sys.executable, "-P", "-m", "sg_local", *arguments]
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        after = os.times()
        assert done.returncode == 0
        seconds.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(seconds) < 0.5
