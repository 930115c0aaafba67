"""Every command, called once: none opens a socket, and none lets a stranger's text do more than be read.

The stranger wrote the model, its template, the task's texts, the test rows and every answer. No model runs.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from command_line import Call
from finished_run import MODEL, TENSORS, ScriptedStages, write_stage
from gguf_bytes import tiny_gguf
from scripted_engine import ScriptedEngine

from sg_local.cli import cli
from sg_local.errors import SgLocalError
from sg_local.files import write_json, write_rows, write_text
from sg_local.proof.working_copies import copies_root
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.process import REASON_FILE, in_child_process
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task

# Colours, the terminal's title, C1, turned lines, a line that looks like ours, and HTML and links for Markdown.
HOSTILE = (
    "a\x1b[31m\x1b]0;t\x07\x9b2J\x85\u2028\u202egnp.exe\u2066\r<img src=x onerror=alert(1)>"
    "[b](javascript:c) https://evil.example `d` | e\nError: forged\nok   forged"
)
# C0 is refused in a task file.
HOSTILE_TASK = "".join(character for character in HOSTILE if character >= " " or character == "\n")

TASK = f"""name = "inbox"
instruction = {json.dumps(HOSTILE_TASK)}
labels = ["refund", {json.dumps("<b>login</b>|[x](y)")}]
test = "inbox.test.jsonl"
licence = {json.dumps(HOSTILE_TASK)}

[[examples]]
input = {json.dumps(HOSTILE_TASK)}
output = "refund"
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "tasks" / "inbox.toml"
    path.parent.mkdir()
    path.write_text(TASK)
    write_rows(path.with_name("inbox.test.jsonl"), [{"input": HOSTILE, "output": "refund"}])
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    carried = {
        "name": HOSTILE,
        "instruction": HOSTILE,
        "labels": [HOSTILE, "b"],
        "examples": [],
        "max_new_tokens": 9,
        "prompt_format": "gguf",
    }
    metadata = {
        **MODEL,
        "general.name": HOSTILE,
        "general.license": HOSTILE,
        "sg_local.task": json.dumps(carried),
        "sg_local.base_fingerprint": HOSTILE,
    }
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(metadata, TENSORS))
    return path


@pytest.fixture
def run(tmp_path: Path, task: Path, model: Path) -> Run:
    """A finished one."""
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, Settings(n_inputs=7))
    for stage in STAGES[:-1]:
        write_stage(run, stage, HOSTILE)
    write_stage(run, "evaluate", HOSTILE)
    return run


@pytest.fixture
def broken_adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": HOSTILE, HOSTILE: HOSTILE}))
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


Calls = dict[tuple[str, ...], list[list[object]]]


@pytest.fixture
def calls(
    run: Run,
    task: Path,
    model: Path,
    broken_adapter: Path,
    stages: ScriptedStages,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Calls:
    """Command -> calls of it that show as much as they can of what the stranger wrote."""
    ScriptedEngine(answer=lambda _file, _prompt: HOSTILE, label_logprobs=lambda _prompt, _labels: [-2.0, -1.0]
    ).replace_llama_cpp(monkeypatch)  # fmt: skip
    inputs = tmp_path / "inputs.jsonl"
    write_rows(inputs, [{"input": HOSTILE}])
    labelled = tmp_path / "labelled.jsonl"
    write_rows(labelled, [{"input": HOSTILE, "output": f"{n % 2} {HOSTILE_TASK}"[:30]} for n in range(9)])
    json_task = tmp_path / "json" / "tasks" / "boxes.json"
    json_task.parent.mkdir(parents=True)
    pairs = [{"input": HOSTILE_TASK, "output": "refund"}]
    json_task.write_text(
        json.dumps(
            {"name": "boxes", "instruction": HOSTILE_TASK, "labels": ["refund", "login"], "examples": pairs}
        )
    )
    (json_task.parent.parent / "test").mkdir()
    write_rows(json_task.parent.parent / "test" / "boxes.jsonl", pairs)

    strange = copies_root() / HOSTILE.replace("/", "")
    strange.mkdir(parents=True)
    (copies_root() / f"{0:016x}").mkdir()
    write_json(copies_root() / f"{0:016x}" / "base.json", {"name": HOSTILE, "sha256": "0" * 64})
    (copies_root() / f"{0:016x}" / "f16.gguf").touch()

    begun_by_a_stranger = tmp_path / HOSTILE.replace("/", "")[:60]
    changed = task.with_name("other.toml")
    changed.write_text(TASK.replace('"refund"', '"repay"').replace("inbox.test", "other.test"))
    write_rows(task.with_name("other.test.jsonl"), [{"input": HOSTILE[::-1], "output": "repay"}])
    other, _ = create_or_open_run(begun_by_a_stranger, load_task(changed), model, Settings(n_inputs=8))
    for stage in STAGES[:-1]:
        write_stage(other, stage, HOSTILE)
    write_text(other.file(REASON_FILE), HOSTILE)
    changed.unlink()

    def fails(run: Run, stage: str) -> int:
        if stage == "train":
            return in_child_process(run, stage)
        write_stage(run, stage, HOSTILE)
        return 0

    def broken(_run: Run) -> None:
        raise SgLocalError(HOSTILE)

    monkeypatch.setattr("sg_local.stages.train.run_train", broken)
    monkeypatch.setattr("sg_local.runs.process.in_child_process", fails)
    begun = ["run", task, "--model", model, "--run", run.path, "--n-inputs=7"]
    bench = ["bench", task.parent, "--model", model, "--preset=quick"]
    return {
        ("init",): [["init", "new.toml"], ["init", "new.toml", "--labelled", labelled]],
        ("run",): [
            begun,
            [*begun, "--json"],
            ["run", task, "--model", model],
            ["run", task, "--from", run.path, "--epochs=1"],
        ],
        ("plan",): [["plan", task, "--model", model], ["plan", task, "--model", model, "--json"]],
        **{(stage,): [[stage, run.path]] for stage in STAGES[:-1]},
        ("evaluate",): [["evaluate", run.path], ["evaluate", run.path, "--redo"]],
        ("explain",): [["explain", run.path, row] for row in ("0", "demonstration-1", HOSTILE)]
        + [["explain", run.path, "0", "--json"]],
        ("report",): [["report", run.path], ["report", run.path, "--out", tmp_path / "page.html"]],
        # Without it, a server on loopback: test_review_server.py
        ("review",): [["review", run.path, "--terminal"]],
        ("compare",): [
            ["compare", run.path, begun_by_a_stranger],
            ["compare", run.path, begun_by_a_stranger, "--json"],
        ],
        ("runs",): [["runs", tmp_path], ["runs", tmp_path, "--json"]],
        ("predict",): [
            ["predict", "--model", model, inputs],
            ["predict", "--model", model, "--task", task, inputs],
            ["predict", "--model", model, "--adapter", run.file("adapter.gguf"), inputs],
            ["predict", "--model", run.path, "--abstain-below", "0.5", "--probabilities", inputs],
        ],
        ("chat",): [["chat", run.path, "--compare"], ["chat", model]],
        ("verify",): [["verify", run.path, "--no-parity"], ["verify", run.path]],
        ("bench",): [bench, [*bench, "--json"]],
        ("export-adapter",): [["export-adapter", "--adapter", broken_adapter, "--model", model]],
        ("models", "list"): [["models", "list"], ["models", "list", "--json"]],
        ("models", "pull"): [["models", "pull", HOSTILE]],
        ("models", "show"): [["models", "show", model], ["models", "show", model, "--json"]],
        ("cache",): [["cache"], ["cache", "--json"], ["cache", "--all", "--yes"]],
        ("task", "check"): [["task", "check", task], ["task", "check", task, "--json"]],
        ("task", "import"): [["task", "import", json_task, "--out", tmp_path / "imported"]],
        ("doctor",): [["doctor"], ["doctor", "--json"]],
    }


def commands(group: click.Group, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """What is typed for each command."""
    for name in group.list_commands(click.Context(group)):
        _, command, _ = group.resolve_command(click.Context(group), [name])
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))
        else:
            yield (*names, name)


COMMANDS = list(commands(cli))


def require_end(result: Result) -> None:
    """No traceback: an exit code."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_strangers_text_is_shown_and_does_nothing(
    sg: Call, calls: Calls, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sg_local.plan.doctor.find_present", lambda _model: None
    )  # it would try it for seconds
    for arguments in calls[command]:
        result = sg(*arguments, input="Let me in.\n")
        require_end(result)
        for shown in (result.stdout, result.stderr):
            hidden = {character for character in shown if not character.isprintable()} - {"\n"}
            assert not hidden, shown
            if "--json" in arguments and shown == result.stdout:
                assert result.exit_code or json.loads(shown)
                continue
            assert not [
                line for line in shown.splitlines() if line.startswith(("Error: forged", "ok   forged"))
            ] or (
                command in {("bench",), ("run",)} and shown == result.stderr  # lines of an error of ours
            )
    for path in [*Path("benches").rglob("results.*"), *Path("benches").rglob("evaluation.json")]:
        written = path.read_text("utf-8")
        assert not {character for character in written if not character.isprintable()} - {"\n"}, path
        if path.suffix == ".md":
            assert "forged" in written
            assert not re.search(
                r"<img|(?<!\\)\]\(|://|^Error|(?<!\\)\| e|(?<!\\)`", written, re.MULTILINE
            ), written


SITECUSTOMIZE = """
import os
import socket

def refuse(*arguments, **_options):
    with open(os.environ["SOCKETS"], "a") as file:
        print(arguments, file=file)
    raise OSError("no network")

for name in ("connect", "connect_ex", "sendto", "sendmsg", "bind"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse)
"""


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was opened, or asked of a name server, in this process and in its children."""
    place = tmp_path / "customize"
    place.mkdir()
    (place / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("SOCKETS", str(tmp_path / "sockets"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))
    opened: dict[str, Any] = {name: getattr(socket, name) for name in ("getaddrinfo", "gethostbyname")}
    opened |= {"gethostbyname_ex": socket.gethostbyname_ex, "create_connection": socket.create_connection}
    for name, original in opened.items():
        monkeypatch.setattr(socket, name, original)  # to be put back after what is set now
    for name in ("connect", "connect_ex", "sendto", "sendmsg", "bind"):
        monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    exec(compile(SITECUSTOMIZE, "sitecustomize", "exec"), {})  # noqa: S102 (the text above)

    def read() -> str:
        path = tmp_path / "sockets"
        return path.read_text() if path.exists() else ""

    return read


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_opens_a_socket(
    sg: Call, calls: Calls, command: tuple[str, ...], sockets: Callable[[], str]
) -> None:
    for arguments in calls[command]:
        require_end(sg(*arguments, input="Let me in.\n"))
    assert sockets() == ""


def test_a_socket_is_noticed_here_and_in_a_child(sockets: Callable[[], str]) -> None:
    """That the test above can fail."""
    program = "import socket; socket.create_connection(('here.invalid', 1))"
    subprocess.run([sys.executable, "-P", "-c", program], check=False, capture_output=True)
    with pytest.raises(OSError, match="no network"):
        socket.getaddrinfo("there.invalid", 1)
    assert [line.split("'")[1] for line in sockets().splitlines()] == ["here.invalid", "there.invalid"]
