"""The command line as a user types it: exit code, stdout, stderr, and what is left on the disk.

Nothing is computed with a model here; tests/model does that.
"""

import builtins
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import Result
from gguf_bytes import TinyTensor, tiny_gguf
from gguf_models import write_model
from known_sizes import LLAMA_2_7B

import sg_local.finetune.process as process
import sg_local.llama.asking as common_module
import sg_local.predict as predict_module
import sg_local.progress as progress_module
from sg_local.cli import COMMANDS, cli
from sg_local.cli.options import SettingsCommand
from sg_local.files import read_rows, write_rows
from sg_local.llama.engine import Counters
from sg_local.llama.generation import Completion
from sg_local.run.directory import Run
from sg_local.settings import STAGES, Settings

ROOT = Path(__file__).parents[2]

Call = Callable[..., Result]
Contents = Callable[[Path], dict[str, bytes]]


def in_a_process(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """`python -m sg_local ...`, where this process is not enough: its children, its signals, its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-P", "-m", "sg_local", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, env=environment, timeout=60, check=False, **streams)


def one_line(result: Result, exit_code: int) -> str:
    """The error that a call ended with: one line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def given(run: Run, task: Path) -> list[object]:
    """The arguments that `new_run` was begun with."""
    return ["run", task, "--model", run.model.path, "--run", run.path, "--n-inputs=7"]


# Help


def commands(
    group: click.Group, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with what is typed for it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])
        assert command is not None
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))


ALL = dict(commands(cli))


@pytest.mark.parametrize("names", [(), *ALL], ids=" ".join)
def test_help_starts_with_an_example_that_is_right(sg: Call, names: tuple[str, ...]) -> None:
    result = sg(*names, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    usage, first, *_ = re.split(r"\n\n", result.stdout)
    assert usage.startswith("Usage:")
    examples = [line.strip() for line in first.splitlines()]
    assert examples[0].startswith(" ".join(("sg-local", *names)))
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])[1:]
        command: click.Command = cli
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(click.Context(command), words)
            assert found is not None
            command = found
        command.make_context(name, words)  # raises where an option of the example does not exist


TAKE_SETTINGS = [name for (name, *_), command in ALL.items() if isinstance(command, SettingsCommand)]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", TAKE_SETTINGS)
def test_help_shows_the_everyday_options_and_help_all_every_one(sg: Call, name: str) -> None:
    everyday, all_options = (sg(name, flag).stdout for flag in ("--help", "--help-all"))
    taken = {option.name for option in ALL[name,].params}
    settings = {item.name.replace("_", "-"): item for item in fields(Settings) if item.name in taken}
    rare = {flag for flag, item in settings.items() if not item.metadata["everyday"]}
    assert rare
    assert options_in(all_options) == options_in(everyday) | rare
    assert options_in(everyday) & settings.keys() == settings.keys() - rare
    assert {"help", "help-all"} <= options_in(everyday)


def test_the_help_of_run_can_be_read_at_once() -> None:
    lines = in_a_process("run", "--help", env={"COLUMNS": "100"}).stdout.splitlines()
    assert len(lines) <= 60
    headings = [line.removesuffix(":") for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    numbers = dict(zip(STAGES, range(1, 7), strict=True))
    stages = [f"Stage {numbers[stage]}, {stage}" for stage in STAGES if stage != "curate"]  # all rare
    assert headings == ["Options", "Every stage", *stages]


def test_a_bare_call_lists_the_commands_in_the_order_of_the_work(sg: Call) -> None:
    result = sg()
    assert (result.exit_code, result.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z-]+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(COMMANDS)
    assert sg("models").stdout.startswith("Usage: cli models")


def test_the_listed_commands_are_the_ones_that_run() -> None:
    for (name, *rest), command in ALL.items():
        if not rest:
            assert command.name == name


def test_a_mistyped_command_or_option_is_told_with_what_was_meant(sg: Call) -> None:
    result = sg("exprot", "runs/a")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'export'" in result.stderr
    result = sg("run", "a.toml", "--n-input", "7")
    assert result.exit_code == 2
    assert "--n-inputs" in result.stderr


def test_version_works_without_an_installation(sg: Call) -> None:
    result = sg("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("sg-local")


# plan


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for an `nvidia-smi`, the only program there is."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin" / "nvidia-smi"


def test_plan_says_what_a_run_needs_and_writes_nothing(
    sg: Call, task: Path, nvidia: Path, tmp_path: Path, contents: Contents
) -> None:
    model = write_model(tmp_path / "model.gguf")
    before = contents(tmp_path)
    result = sg("plan", task, "--model", model, "--n-inputs", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    title, _, head, *rows = result.stdout.partition("\n\nhost memory")[0].splitlines()
    assert title == "inbox with model.gguf on the CPU: estimated, not measured"
    assert head.split() == ["GPU", "memory", "host", "memory", "disk", "tokens"]
    assert [row.split()[0] for row in rows] == [
        *(set_of_steps := ["generate", "annotate", "train", "export", "evaluate"]),
        "this",
    ]
    assert re.search(r"train: process 0\.5 GiB, .*gradients", result.stdout)
    assert contents(tmp_path) == before
    assert os.listdir() == []
    result = sg("plan", task, "--model", model, "--n-inputs", 7, "--json")
    facts = json.loads(result.stdout)
    assert [step["step"] for step in facts["steps"]] == set_of_steps
    assert (facts["fits"], facts["faults"], facts["machine"]["gpu_bytes"]) == (True, [], 0)
    for step in facts["steps"]:
        assert step["gpu"] == {}
        assert step["host_bytes"] == sum(step["host"].values())
        assert step["disk_bytes"] == sum(step["disk"].values())


def test_plan_refuses_with_numbers_and_what_to_change(
    sg: Call, task: Path, nvidia: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_local.plan.plan.model_sizes", lambda _header: LLAMA_2_7B)
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**12))
    result = sg("plan", task, "--model", model, "--gpu-memory", 6)
    assert result.exit_code == 1
    assert re.search(
        r"^this machine +6\.0 GiB +64\.0 GiB", result.stdout, re.MULTILINE
    )  # the table all the same
    makes, trains = result.stderr.removeprefix("Error: ").splitlines()
    assert makes == (
        "generate, annotate, export, evaluate: 6.4 GiB of GPU memory needed, 5.5 GiB of 6.0 GiB can be used: "
        "add --n-ctx 2048"
    )
    assert trains.endswith("can be used: add --load-in-4bit")
    result = sg("plan", task, "--model", model, "--gpu-memory", 6, "--n-ctx", 2048, "--load-in-4bit")
    assert (result.exit_code, result.stderr) == (0, "")
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: 16 << 30)
    result = sg("plan", task, "--model", model, "--gpu-memory", 8, "--load-in-4bit", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["faults"] == result.stderr.removeprefix("Error: ").splitlines()
    assert "no setting makes it fit: take a smaller model" in result.stderr
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**9))
    assert "of disk, and 0.9 GiB are free" in sg("plan", task, "--model", model).stderr


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_plan_is_for_the_gpu_that_is_here(sg: Call, task: Path, nvidia: Path, tmp_path: Path) -> None:
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288 MiB'\necho 'NVIDIA A2, 1 MiB'\n")
    nvidia.chmod(0o755)
    model = write_model(tmp_path / "model.gguf")
    result = sg("plan", task, "--model", model)
    assert "on NVIDIA GeForce RTX 3060: estimated" in result.stdout
    assert re.search(r"^this machine +12\.0 GiB", result.stdout, re.MULTILINE)
    assert "on the CPU" in sg("plan", task, "--model", model, "--gpu-memory", 0).stdout


def test_plan_checks_task_and_model(sg: Call, task: Path, model: Path) -> None:
    assert "llama.block_count is 0" in sg("plan", task, "--model", model).stderr
    assert sg("plan", task, "--model", model).exit_code == 2
    assert "missing.gguf" in one_line(sg("plan", task, "--model", "missing.gguf"), 2)
    assert "mising" in one_line(sg("plan", "mising"), 2)


# run


def test_a_finished_run_says_so_and_shows_its_result(
    sg: Call, finished_run: Run, task: Path, contents: Contents
) -> None:
    before = contents(finished_run.path)
    result = sg(*given(finished_run, task))
    assert result.exit_code == 0
    assert "is finished, nothing to do" in result.stderr
    assert "tuned_merged" in result.stdout
    assert "+0.500" in result.stdout
    for name in ("adapter.gguf", "model.gguf", "Modelfile"):
        assert str(finished_run.file(name)) in result.stdout
    assert contents(finished_run.path) == before


def test_the_result_as_json(sg: Call, finished_run: Run, task: Path) -> None:
    result = sg(*given(finished_run, task), "--json")
    assert json.loads(result.stdout)["gain"]["verdict"] == "better"


def test_a_finished_part_says_so(sg: Call, finished_run: Run, task: Path) -> None:
    result = sg(*given(finished_run, task), "--until=curate")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "is finished until curate, nothing to do" in result.stderr


@pytest.mark.parametrize(
    ("interval", "verdict", "exit_code"),
    [
        ([-0.8, -0.2], "worse", 3),
        ([-0.8, -0.2], "no difference shown", 0),  # the test decides
        ([-0.2, 0.1], "no difference shown", 0),
        ([0.2, 0.8], "better", 0),
    ],
)
def test_the_gate(
    sg: Call, finished_run: Run, task: Path, interval: list[float], verdict: str, exit_code: int
) -> None:
    path = finished_run.file("evaluation.json")
    evaluation = json.loads(path.read_text())
    evaluation["gain_over_best"] |= {"interval_95": interval, "verdict": verdict}
    path.write_text(json.dumps(evaluation))
    assert sg(*given(finished_run, task)).exit_code == 0
    result = sg(*given(finished_run, task), "--gate")
    assert result.exit_code == exit_code
    assert "tuned_merged" in result.stdout
    assert ("significantly worse" in result.stderr) == (exit_code == 3)


def test_a_gate_before_there_are_scores(sg: Call, finished_run: Run, task: Path) -> None:
    line = one_line(sg(*given(finished_run, task), "--gate", "--until=train"), 2)
    assert "--until train stops before them" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--n-inputs=8"],
            "was begun with --n-inputs 7, and is called with --n-inputs 8: call it as it was begun",
        ),
        (["--preset=quick"], "--max-new-tokens 128"),
        (["--load-in-4bit"], "was begun with --no-load-in-4bit, and is called with --load-in-4bit"),
        (["--prompt-format=vicuna"], "the prompt format gguf"),
    ],
)
def test_a_changed_setting_is_named(
    sg: Call, finished_run: Run, task: Path, contents: Contents, arguments: list[str], told: str
) -> None:
    before = contents(finished_run.path)
    line = one_line(sg(*given(finished_run, task), *arguments), 2)
    assert told in line
    assert "--run DIR" in line
    assert contents(finished_run.path) == before


def test_the_run_of_another_task_or_model(sg: Call, finished_run: Run, task: Path, tmp_path: Path) -> None:
    line = one_line(sg(*given(finished_run, Path("support-inbox"))), 2)
    assert "was begun with the task inbox, and is called with the task support-inbox" in line
    other = tmp_path / "other.gguf"
    other.write_bytes(finished_run.model.path.read_bytes() + bytes(32))
    line = one_line(sg(*given(finished_run, task), "--model", other), 2)
    assert f"and is called with the model {other}" in line


def test_new_test_rows_are_noticed(sg: Call, finished_run: Run, task: Path) -> None:
    write_rows(task.with_name("inbox.test.jsonl"), [{"input": "New.", "output": "login"}])
    assert "is called with other test rows" in one_line(sg(*given(finished_run, task)), 2)


def test_a_directory_that_cannot_be_a_run(sg: Call, model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    line = one_line(sg("run", task, "--model", model, "--run", tmp_path / "photos"), 2)
    assert "holds other files (cat.jpg) and is no run: choose another directory" in line
    line = one_line(sg("run", task, "--model", model, "--run", model / "run"), 1)
    assert "cannot be made (Not a directory): choose another directory" in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(sg: Call, model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "choose another directory" in one_line(
        sg("run", task, "--model", model, "--run", tmp_path / "locked/run"), 1
    )
    assert "choose another directory" in one_line(
        sg("run", task, "--model", model, "--run", tmp_path / "locked"), 1
    )


def test_a_full_disk_is_told_and_the_second_call_goes_on(
    sg: Call, model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["run", task, "--model", model, "--run", tmp_path / "run", "--until=generate"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = one_line(sg(*arguments), 1)
    assert "could not be written: No space left on device: free some space on this disk" in line
    assert not (tmp_path / "run/settings.toml").exists()
    monkeypatch.setattr("sg_local.run.pipeline._in_own_process", lambda _run, _stage: 0)
    result = sg(*arguments)
    assert result.exit_code == 0
    assert "new run" in result.stderr


def test_a_task_file_tells_all_its_faults_at_once(sg: Call, model: Path, task: Path) -> None:
    task.write_text('name = "In Box"\ninstruction = ""\nlabels = ["a"]\ncolour = 1\n')
    for command in (["run", task, "--model", model], ["task", "check", task]):
        result = sg(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert isinstance(result.exception, SystemExit)
        for fault in (
            "name 'In Box'",
            "instruction is empty",
            "labels has one label",
            "unknown key 'colour'",
        ):
            assert fault in result.stderr
    assert not Path("runs").exists()


def test_labels_that_scoring_cannot_tell_apart(sg: Call, model: Path, task: Path) -> None:
    task.write_text(task.read_text().replace('"login"', '"refund!"'))
    write_rows(task.with_name("inbox.test.jsonl"), [{"input": "Pay me.", "output": "refund"}])
    for command in (["run", task, "--model", model], ["task", "check", task]):
        assert "labels 'refund' and 'refund!' are the same for scoring" in one_line(sg(*command), 2)
    assert not Path("runs").exists()


def test_a_test_file_with_a_broken_line(sg: Call, model: Path, task: Path) -> None:
    test = task.with_name("inbox.test.jsonl")
    test.write_text('{"input": "a", "output": "login"}\n{"input": "b", "output": "login"\n')
    for command in (["run", task, "--model", model], ["task", "check", task]):
        assert f"{test}, line 2: not JSON" in one_line(sg(*command), 2)


def test_a_task_that_is_not_there(sg: Call) -> None:
    assert "no example task is named 'support-inbx', did you mean 'support-inbox'?" in one_line(
        sg("task", "check", "support-inbx"), 2
    )
    assert "missing.toml is missing: check the path" in one_line(sg("task", "check", "missing.toml"), 2)


BASE = {"general.architecture": "llama", "llama.context_length": 128}
TENSORS = [TinyTensor("token_embd.weight", (32, 2))]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "is missing: give the path of a GGUF file"),
        (b"", "is empty; download it again"),
        (b"<!doctype html>", "is not a GGUF file"),
        (tiny_gguf(BASE, TENSORS)[:-9], "truncated"),
        (
            tiny_gguf({**BASE, "general.type": "adapter"}, TENSORS),
            "is a LoRA adapter, not a model; give the base",
        ),
        (tiny_gguf({**BASE, "general.architecture": "mamba"}, TENSORS), "has the architecture 'mamba'"),
        (tiny_gguf(BASE), "holds a vocabulary only, no tensors"),
        (tiny_gguf(BASE, TENSORS), "carries no chat template: say `--prompt-format vicuna` if"),
    ],
    ids=["missing", "empty", "not a GGUF", "truncated", "adapter", "architecture", "vocabulary", "template"],
)
def test_a_model_that_is_none(sg: Call, task: Path, tmp_path: Path, data: bytes | None, told: str) -> None:
    path = tmp_path / "bad.gguf"
    if data is not None:
        path.write_bytes(data)
    line = one_line(sg("run", task, "--model", path), 2)
    assert str(path) in line
    assert told in line
    assert not Path("runs").exists()


def test_a_model_that_was_not_pulled(sg: Call, task: Path) -> None:
    line = one_line(sg("run", task, "--model", "vicuna-7b-v1.5"), 2)
    assert "run `sg-local models pull vicuna-7b-v1.5`" in line


def test_settings_out_of_bounds_are_told_at_once(sg: Call, task: Path, model: Path) -> None:
    result = sg("run", task, "--model", model, "--n-inputs=0", "--rank=9999", "--learning-rate=nan")
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    for fault in (
        "n_inputs = 0 should be at least 1",
        "rank = 9999 should be at most 512",
        "learning_rate = nan",
    ):
        assert fault in result.stderr


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = process.find_spec
    monkeypatch.setattr(process, "find_spec", lambda name: None if name == "torch" else find_spec(name))


@pytest.mark.usefixtures("without_torch")
def test_without_torch_nothing_is_begun_that_cannot_be_finished(
    sg: Call, new_run: Run, task: Path, contents: Contents
) -> None:
    """Not after the hours that making the data takes."""
    before = contents(new_run.path)
    result = sg(*given(new_run, task))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "training needs torch" in result.stderr
    assert "pip install 'sg-local[train]'" in result.stderr
    assert "generate" not in result.stderr
    assert contents(new_run.path) == before


@pytest.mark.usefixtures("without_torch")
def test_train_without_torch_leaves_the_run_as_it_was(
    sg: Call, finished_run: Run, contents: Contents
) -> None:
    write_rows(finished_run.file("train.jsonl"), [{"id": 0, "input": "a", "output": "login", "drop": None}])
    before = contents(finished_run.path)
    assert "training needs torch" in one_line(sg("train", finished_run.path), 2)
    assert contents(finished_run.path) == before
    # a finished run needs no torch
    assert sg("curate", finished_run.path).exit_code == 0


@pytest.mark.usefixtures("without_torch")
def test_verify_without_torch_says_how_to_do_without(sg: Call, finished_run: Run) -> None:
    assert "--no-parity" in one_line(sg("verify", finished_run.path), 2)


def test_a_stage_that_fails_is_told_once_and_the_run_is_kept(
    new_run: Run, task: Path, contents: Contents
) -> None:
    """llama.cpp refuses the model, whose header alone is right; that happens in the stage's own process."""
    before = contents(new_run.path)
    result = in_a_process(*given(new_run, task), "--until=generate")
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2
    assert str(new_run.model.path) in errors[0]
    assert (
        "generate did not finish (see above): the run is kept; `sg-local run` with the same arguments"
        in errors[1]
    )
    after = contents(new_run.path)
    assert {name: after[name] for name in before} == before


def test_a_stage_imports_nothing_from_the_directory_it_is_called_in(new_run: Run, task: Path) -> None:
    for name in ("click", "numpy", "llama_cpp", "filelock", "jinja2"):
        Path(f"{name}.py").write_text("open('imported', 'w').close()\n")
    result = in_a_process(*given(new_run, task), "--until=generate")
    assert "generate did not finish" in result.stderr
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (-9, "annotate was ended by SIGKILL (as the system does when memory runs out): the run is kept"),
        (-11, "annotate was ended by SIGSEGV: the run is kept"),
        (-4, "`sg-local doctor` tries whether llama.cpp works here at all"),
        (1, "annotate did not finish (see above): the run is kept"),
    ],
)
def test_a_stage_that_dies_is_told(
    sg: Call, finished_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    finished_run.file("outputs.jsonl").unlink()
    monkeypatch.setattr("sg_local.run.pipeline._in_own_process", lambda _run, _stage: code)
    result = sg(*given(finished_run, task))
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr
    assert "`sg-local run` with the same arguments goes on with annotate" in result.stderr


def test_an_interruption_is_one_line(
    sg: Call, new_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sg_local.run.pipeline._in_own_process", interrupt)
    result = sg(*given(new_run, task), "--until=generate")
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last == "Error: interrupted; what is finished is kept, and the same command goes on from there"
    monkeypatch.setattr("sg_local.plan.doctor.examine", interrupt)
    assert one_line(sg("doctor"), 1) == "Error: interrupted"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            "a.bin: No space left on device: free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.bin"),
            "a.bin: Permission denied: check the permissions",
        ),
        (MemoryError(), "memory ran out: take a smaller model, or lower --n-ctx"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    sg: Call, new_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def refuse(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr("sg_local.stages.curate.run_curate", refuse)
    monkeypatch.setattr(Run, "require", lambda _run, _stage: None)
    line = one_line(sg("curate", new_run.path), 1)
    assert told in line
    assert "the same command goes on from there" in line


def test_a_bug_keeps_its_traceback(sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    monkeypatch.setattr("sg_local.plan.doctor.examine", wrong)
    result = sg("doctor")
    assert isinstance(result.exception, FileNotFoundError)


def test_a_reader_that_leaves_is_no_bug() -> None:
    """As in `sg-local models list | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = in_a_process("models", "list", "--json", stdout=write_end)
    finally:
        os.close(write_end)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_stage_whose_reader_leaves_does_not_pass_for_done(
    sg: Call, new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sg-local run ... 2>&1 | head -3`: the next stage must not begin."""

    def say(*_arguments: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sg_local.stages.generate.run_generate", say)
    result = sg("generate", new_run.path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)


# One stage


def test_a_stage_of_no_run(sg: Call, tmp_path: Path) -> None:
    line = one_line(sg("annotate", tmp_path), 2)
    assert f"begin one with `sg-local run TASK --run {tmp_path}`" in line


def test_a_stage_before_its_turn(sg: Call, new_run: Run, contents: Contents) -> None:
    before = contents(new_run.path)
    line = one_line(sg("annotate", new_run.path), 2)
    assert f"generate is not finished: run `sg-local generate {new_run.path}` first" in line
    assert contents(new_run.path) == before


def test_a_finished_stage_says_so(sg: Call, finished_run: Run, contents: Contents) -> None:
    before = contents(finished_run.path)
    result = sg("train", finished_run.path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "is finished, nothing to do (--redo runs it again)" in result.stderr
    result = sg("evaluate", finished_run.path)
    assert "tuned_merged" in result.stdout
    assert contents(finished_run.path) == before


# verify


def test_verify_lists_what_is_as_it_was(sg: Call, finished_run: Run) -> None:
    result = sg("verify", finished_run.path, "--no-parity")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for name in ("inputs.jsonl", "adapter.gguf", "model.gguf", "Modelfile", "evaluation.json", "tiny.gguf"):
        assert any(line.split()[1] == name for line in lines), name


def test_verify_tells_everything_that_is_wrong(sg: Call, finished_run: Run) -> None:
    finished_run.file("Modelfile").write_text("FROM elsewhere\n")
    finished_run.file("outputs.jsonl").unlink()
    finished_run.file("task.toml").write_text(finished_run.file("task.toml").read_text() + "\n")
    settings = finished_run.file("settings.toml")
    settings.write_text(settings.read_text().replace("n_inputs = 7", "n_inputs = 8"))
    data = bytearray(finished_run.model.path.read_bytes())
    data[-1] ^= 1
    finished_run.model.path.write_bytes(data)
    result = sg("verify", finished_run.path, "--no-parity")
    assert result.exit_code == 1
    for told in (
        "Modelfile is not what export wrote",
        "outputs.jsonl is gone: `sg-local annotate",
        "task.toml is not what generate read",
        "settings.toml is not what train ran with",
        "tiny.gguf is no longer the file that the run began with",
    ):
        assert told in result.stderr
    assert "Modelfile" not in result.stdout


def test_verify_of_an_export_for_another_base(sg: Call, finished_run: Run) -> None:
    with finished_run.stage("export", reads=[], writes=["adapter.gguf", "model.gguf"]):
        finished_run.file("model.gguf").write_bytes(
            tiny_gguf({**BASE, "sg_local.base_fingerprint": "\x1b[31m0000"}, TENSORS)
        )
    with finished_run.stage("evaluate", reads=[], writes=[]):
        pass
    result = sg("verify", finished_run.path, "--no-parity")
    assert result.exit_code == 1
    assert r"model.gguf was made for another base (fingerprint \x1b[31m0000" in result.stderr
    assert "\x1b" not in result.output


# predict


class ScriptedEngine:
    """Stands for llama.cpp: answers with the prompt's last word, and has room for 40 characters."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            chat_template=lambda source: source,
            encode_prompt=lambda _template, messages: list(
                "\n\n".join(message["content"] for message in messages).encode()
            ),
            encode_plain=lambda text: list(text.encode()),
        )
        self.asked: list[str] = []
        self.counters = Counters()

    def __enter__(self) -> "ScriptedEngine":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def fits(self, n_prompt_tokens: int, _max_new_tokens: int) -> bool:
        return n_prompt_tokens < 100

    def generate(self, requests: list[Any], _on_finished: object) -> list[Completion]:
        self.asked += [bytes(request.prompt).decode() for request in requests]
        return [Completion(asked.split()[-1], (1,), "end") for asked in self.asked[-len(requests) :]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    scripted = ScriptedEngine()
    monkeypatch.setattr(predict_module, "open_with", lambda *_arguments: scripted)
    monkeypatch.setattr(common_module, "generate", ScriptedEngine.generate)
    return scripted


def answers(result: Result) -> list[tuple[str, str | None]]:
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return [(row["input"], row["output"]) for row in rows]


def test_predict_answers_plain_lines_in_their_order(
    sg: Call, engine: ScriptedEngine, finished_run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "messages.txt"
    file.write_bytes("\ufeffone a\r\n\n  two b  \r\nform\x0cfeed c\nlong ".encode() + b"x" * 200)
    result = sg("predict", "--model", finished_run.file("model.gguf"), file)
    assert answers(result) == [
        ("one a", "a"),
        ("two b", "b"),
        ("form\x0cfeed c", "c"),
        ("long " + "x" * 200, None),
    ]
    assert "do not fit the context: raise --n-ctx" in result.stdout.splitlines()[-1]
    assert finished_run.task.instruction in engine.asked[0]


@pytest.mark.parametrize("source", ["file", "-"])
def test_predict_reads_json_lines(
    sg: Call, engine: ScriptedEngine, finished_run: Run, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "messages.jsonl"
    write_rows(file, [{"id": 3, "input": "two\nlines a"}, {"input": "b"}])
    arguments = ["predict", "--model", finished_run.file("model.gguf")]
    result = sg(*arguments, file) if source == "file" else sg(*arguments, "-", input=file.read_bytes())
    assert answers(result) == [("two\nlines a", "a"), ("b", "b")]


def test_predict_reads_plain_standard_input(sg: Call, engine: ScriptedEngine, finished_run: Run) -> None:
    result = sg("predict", "--model", finished_run.file("model.gguf"), "-", input="one a\ntwo b\n")
    assert answers(result) == [("one a", "a"), ("two b", "b")]


def test_what_predict_prints_stays_one_line_and_steers_no_terminal(
    sg: Call, engine: ScriptedEngine, finished_run: Run
) -> None:
    text = "a\x1b[31m\x9b31m\x85\u2028\x7f"
    result = sg(
        "predict", "--model", finished_run.file("model.gguf"), "-", input=json.dumps({"input": "a " + text})
    )
    assert answers(result) == [("a " + text, text.split()[-1])]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", result.stdout)


def test_predict_by_a_base_needs_a_task(sg: Call, engine: ScriptedEngine, model: Path, task: Path) -> None:
    line = one_line(sg("predict", "--model", model, "-", input="one a\n"), 2)
    assert f"{model} does not say what it was tuned for: give the task with --task" in line
    assert answers(sg("predict", "--model", model, "--task", task, "-", input="one a\n")) == [("one a", "a")]
    assert "no example task is named 'nothing'" in one_line(
        sg("predict", "--model", model, "--task", "nothing", "-", input="one a\n"), 2
    )


def test_predict_for_another_task_than_tuned_for_is_told(
    sg: Call, engine: ScriptedEngine, finished_run: Run
) -> None:
    result = sg(
        "predict", "--model", finished_run.file("model.gguf"), "--task", "support-inbox", "-", input="one a\n"
    )
    assert result.exit_code == 0
    assert "was tuned for inbox, and is asked for support-inbox" in result.stderr


RIGHT = {
    "name": "a",
    "instruction": "b",
    "labels": ["c"],
    "examples": [{"input": "d", "output": "c"}],
    "max_new_tokens": 9,
    "prompt_format": "vicuna",
}


@pytest.mark.parametrize(
    "told",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        json.dumps({"name": "a"}),
        json.dumps({**RIGHT, "instruction": 1}),
        json.dumps({**RIGHT, "labels": "ab"}),
        json.dumps({**RIGHT, "labels": [1]}),
        json.dumps({**RIGHT, "examples": [{}]}),
        json.dumps({**RIGHT, "examples": ["d"]}),
        json.dumps({**RIGHT, "max_new_tokens": -9}),
        json.dumps({**RIGHT, "prompt_format": "{{ 1 }}"}),
    ],
)
def test_a_model_that_says_nonsense_about_its_task(
    sg: Call, engine: ScriptedEngine, tmp_path: Path, told: str
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_gguf({**BASE, "sg_local.task": json.dumps(RIGHT)}, TENSORS))
    assert sg("predict", "--model", path, "-", input="one a\n").exit_code == 0
    path.write_bytes(tiny_gguf({**BASE, "sg_local.task": told}, TENSORS))
    assert "give the task with --task" in one_line(sg("predict", "--model", path, "-", input="one a\n"), 2)
    assert sg("models", "show", path).exit_code == 0


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'{"input": "a"}\n{"text": "b"}\n', 'a.jsonl, line 2: there is no text under "input"'),
        ("a.jsonl", b'{"input": "a"}\n{"input": " "}\n', 'a.jsonl, line 2: there is no text under "input"'),
        ("a.jsonl", b'{"input": "a"}\n[1]\n', "a.jsonl, line 2"),
        ("a.jsonl", b'{"input": "a"}\n{"input": "b"\n', "a.jsonl, line 2: Expecting"),
        ("a.jsonl", b'{"input": "\\ud800"}\n', "a.jsonl, line 1: "),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: "),
        ("a.txt", b"\n  \n", "a.txt holds no inputs: give JSON lines with"),
        ("a.txt", b"caf\xe9\n", "a.txt is not UTF-8"),
        ("a.txt", None, "a.txt is missing: check the path"),
        ("-", b'{"text": "b"}\n', 'standard input, line 1: there is no text under "input"'),
        ("-", b"caf\xe9\n", "standard input is not UTF-8"),
        ("-", b"", "standard input holds no inputs"),
    ],
)
def test_inputs_that_are_none(
    sg: Call, engine: ScriptedEngine, finished_run: Run, name: str, data: bytes | None, told: str
) -> None:
    if data is not None and name != "-":
        Path(name).write_bytes(data)
    line = one_line(sg("predict", "--model", finished_run.file("model.gguf"), name, input=data), 2)
    assert told in line
    assert engine.asked == []


def test_too_many_inputs_are_refused_and_not_cut(
    sg: Call, engine: ScriptedEngine, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "MAX_INPUT_BYTES", 10)
    (tmp_path / "a.txt").write_text("one a\ntwo b\n")
    for file in (tmp_path / "a.txt", "-"):
        line = one_line(
            sg("predict", "--model", finished_run.file("model.gguf"), file, input="one a\ntwo b\n"), 2
        )
        assert "over the limit of 10" in line


def test_a_model_and_an_adapter_in_each_others_place(
    sg: Call, engine: ScriptedEngine, finished_run: Run
) -> None:
    base, adapter, tuned = (
        finished_run.model.path,
        finished_run.file("adapter.gguf"),
        finished_run.file("model.gguf"),
    )
    assert answers(sg("predict", "--model", base, "--adapter", adapter, "-", input="one a\n")) == [
        ("one a", "a")
    ]
    line = one_line(sg("predict", "--model", adapter, "-", input="one a\n"), 2)
    assert (
        "is a LoRA adapter, not a model; give the base model with --model and this file with --adapter"
        in line
    )
    line = one_line(sg("predict", "--model", base, "--adapter", tuned, "-", input="one a\n"), 2)
    assert f"{tuned} is a model, not a LoRA adapter: give it with --model" in line


def test_an_adapter_of_another_base(
    sg: Call, engine: ScriptedEngine, finished_run: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf(BASE, [TinyTensor("token_embd.weight", (32, 2), data=b"\x01" * 256)]))
    adapter = finished_run.file("adapter.gguf")
    line = one_line(sg("predict", "--model", other, "--adapter", adapter, "-", input="one a\n"), 2)
    assert f"{adapter} was made for another base than {other}: give the one it was tuned on" in line
    line = one_line(sg("predict", "--model", other, "--adapter", "no.gguf", "-", input="one a\n"), 2)
    assert "no.gguf does not exist: check the path" in line


# models, task, doctor


def test_models_are_listed_for_people_and_programs(sg: Call) -> None:
    result = sg("models", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    names = [line.split()[0] for line in result.stdout.splitlines()]
    rows = json.loads(sg("models", "list", "--json").stdout)
    assert [row["name"] for row in rows] == names
    assert "smollm2-135m" in names
    assert {row["name"]: row["is_present"] for row in rows}["vicuna-7b-v1.5"] is False


def test_a_model_shows_what_it_says_about_itself(sg: Call, finished_run: Run) -> None:
    result = sg("models", "show", finished_run.file("model.gguf"), "--json")
    facts = json.loads(result.stdout)
    assert facts["n_parameters"] == 64
    assert facts["tensor_types"] == {"F32": 1}
    assert (facts["kind"], facts["context_tokens"], facts["tuned_for"]) == ("model", 128, "inbox")
    assert "tuned_for          inbox" in sg("models", "show", finished_run.file("model.gguf")).stdout


def test_texts_from_files_steer_no_terminal(sg: Call, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    path = tmp_path / "evil.gguf"
    path.write_bytes(tiny_gguf({**BASE, "general.name": evil, "general.license": evil}, TENSORS))
    result = sg("models", "show", path)
    assert result.exit_code == 0
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e" in result.stdout
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.output)
    result = sg("task", "check", f"no{evil}.toml")
    assert result.exit_code == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.output)


def test_a_checked_task_is_told(sg: Call, task: Path) -> None:
    result = sg("task", "check", task)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "inbox: classification, labels refund, login; 1 examples; scored by exact_match" in result.stdout
    assert "2 test rows" in result.stdout
    assert json.loads(sg("task", "check", task, "--json").stdout) == {
        "name": "inbox",
        "labels": ["refund", "login"],
        "metric": "exact_match",
        "n_examples": 1,
        "n_test_rows": 2,
    }


SUPER_NI = {
    "Definition": ["Say it politely."],
    "Positive Examples": [{"input": "Give me tea.", "output": "Could I have some tea?"}],
    "Instances": [{"input": f"Give me {n}.", "output": [f"Could I have {n}?"]} for n in range(5)],
    "Instance License": ["CC0"],
}


def test_an_imported_task_is_one_that_can_be_checked(sg: Call, tmp_path: Path) -> None:
    (tmp_path / "task1_polite.json").write_text(json.dumps(SUPER_NI))
    arguments = [
        "task",
        "import",
        tmp_path / "task1_polite.json",
        "--out",
        tmp_path / "new",
        "--n-test-rows=3",
    ]
    result = sg(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "1 examples, 3 test rows" in result.stdout
    assert len(read_rows(tmp_path / "new/task1_polite.test.jsonl")) == 3
    assert "3 test rows" in sg("task", "check", tmp_path / "new/task1_polite.toml").stdout
    assert "exists: move it away, or give another directory with --out" in one_line(sg(*arguments), 2)
    arguments[4] = tmp_path / "task1_polite.json" / "x"
    assert "give another with --out" in one_line(sg(*arguments), 1)


def test_a_task_without_instances_says_so(sg: Call, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**SUPER_NI, "Instances": []}))
    result = sg("task", "import", tmp_path / "t.json", "--out", tmp_path / "new")
    assert "1 examples, no test rows" in result.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.toml"]


def findings(sg: Call, *missing: str) -> dict[str, dict[str, Any]]:
    """What doctor finds; its exit code and its error say what is missing."""
    result = sg("doctor", "--json")
    error = f"Error: missing: {', '.join(missing)}; what to do is said beside each\n" if missing else ""
    assert (result.exit_code, result.stderr) == (1 if missing else 0, error)
    return {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_doctor_on_a_machine_without_a_gpu(sg: Call, nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_local.llama.library.supports_gpu", lambda: False)
    found = findings(sg)
    assert found["GPU"] == {
        "what": "GPU",
        "ok": True,
        "needed": True,
        "found": "no NVIDIA GPU: models up to about 1B can be trained on the CPU",
        "fix": None,
    }
    assert found["llama.cpp"]["found"].endswith("built for the CPU")
    assert found["llama.cpp"]["ok"]
    text = sg("doctor").stdout
    assert re.search(r"^ok      python +3\.", text, re.MULTILINE)
    assert len([line for line in text.splitlines() if not line.startswith(" ")]) == len(found)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_doctor_where_a_gpu_lies_idle(sg: Call, nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288 MiB'\n")
    nvidia.chmod(0o755)
    monkeypatch.setattr("sg_local.llama.library.supports_gpu", lambda: False)
    monkeypatch.setattr("sg_local.plan.doctor.version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr("sg_local.plan.doctor.find_present", lambda _model: None)
    found = findings(sg, "llama.cpp", "torch")
    assert found["GPU"]["found"] == "NVIDIA GeForce RTX 3060, 12288 MiB"
    assert "-DGGML_CUDA=on" in found["llama.cpp"]["fix"]
    assert "--force-reinstall" in found["torch"]["fix"]
    result = sg("doctor")
    assert result.exit_code == 1
    assert "missing torch" in result.stdout
    assert "advice  models" in result.stdout  # the machine lacks nothing for that
    nvidia.write_text("#!/bin/sh\nexit 9\n")  # as it ends where the driver is not loaded
    assert findings(sg)["GPU"]["found"].startswith("no NVIDIA GPU")
    assert sg("doctor").exit_code == 0


def test_doctor_says_how_to_install_what_is_missing(sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sg_local.plan.doctor.version", nothing)
    packages = ("gguf", "rapidfuzz", "rouge-score", "scipy", "llama.cpp", *process.NEEDED)
    found = findings(sg, *packages)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirement = next(item for item in pyproject["dependencies"] if item.startswith("llama-cpp-python"))
    assert found["llama.cpp"]["fix"] == f"pip install {requirement}"
    for name in process.NEEDED:
        assert not found[name]["ok"]
        assert "sg-local[train]" in found[name]["fix"]


def test_doctor_where_llama_cpp_cannot_be_loaded(sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "sg_local.llama.library":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    finding = findings(sg, "llama.cpp")["llama.cpp"]
    assert "cannot be loaded: libcudart.so.12" in finding["found"]
    assert "--force-reinstall" in finding["fix"]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "it is ended by SIGILL when it works on"),
        ("raise SystemExit('no such type')", "no such type"),
        ("raise SystemExit(7)", "exit code 7"),
        ("import time; time.sleep(60)", "more than 1 seconds"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such signals")
def test_doctor_where_llama_cpp_ends_its_process(
    sg: Call, new_run: Run, monkeypatch: pytest.MonkeyPatch, program: str, told: str
) -> None:
    """As one does that was built for a processor with other instructions."""
    monkeypatch.setattr("sg_local.plan.doctor.find_present", lambda _model: new_run.model.path)
    monkeypatch.setattr("sg_local.plan.doctor._TRY_PROGRAM", program)
    monkeypatch.setattr("sg_local.plan.doctor._TRY_SECONDS", 1)
    finding = findings(sg, "llama.cpp")["llama.cpp"]
    assert told in finding["found"]
    assert "-DGGML_NATIVE=OFF" in finding["fix"]


def test_doctor_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sg_local.cli import cli\n"
        "assert CliRunner().invoke(cli, ['doctor']).exit_code == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "scipy"} & set(
        done.stdout.split()
    )


# Progress


def test_progress_is_plain_lines_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 4.0, 20.0])
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with progress_module.progress("annotate", 100, "inputs", 20, lambda: "95 tok/s") as advance:
        advance(10)  # after 4 s: too early for a line
        advance(30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "annotate: 80 inputs",
        "annotate: 60/100 inputs, 2.0 inputs/s, 20 s left (95 tok/s)",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_bar_leaves_stdout_alone() -> None:
    """As in `sg-local predict ... > answers.jsonl`, called from a terminal."""
    terminal, stderr = os.openpty()
    code = (
        "from sg_local.progress import progress, restore_terminal\n"
        "with progress('predict', 2, 'inputs') as advance:\n"
        "    advance(1)\n"
        "    print('an answer')\n"
        "    restore_terminal()\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            check=True,
        )
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(stderr)
        os.close(terminal)
    assert done.stdout == "an answer\n"
    assert "predict" in shown
    assert "1/2" in shown
    assert "an answer" not in shown
    assert "\x1b[?25h\r\n" in shown  # the cursor is back, and a line is begun
