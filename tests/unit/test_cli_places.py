"""Paths and output as odd machines have them: no home, paths that are too long or no UTF-8, other encodings."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from command_line import ROOT, Call, given, in_a_process, one_line
from gguf_models import write_model
from messages import assert_says

import sg_local.finetune.environment as environment
from sg_local.errors import InputError
from sg_local.llama.library import load_model
from sg_local.models import expand_user
from sg_local.runs.directory import Run

LONG = "a" * 5000


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user: no HOME, no entry in /etc/passwd, no name."""

    def unknown(user: object) -> None:
        raise KeyError(f"no entry for {user}")

    for name in ("HOME", "SG_LOCAL_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    "call",
    [
        ["models", "list"],
        ["models", "pull", "vicuna-7b-v1.5"],
        ["run", "TASK", "--model", "MODEL"],
        ["run", "TASK"],
        ["plan", "TASK", "--model", "FULL", "--prompt-format", "vicuna"],
        ["bench", "DIR", "--model", "MODEL"],
        ["predict", "--model", "vicuna-7b-v1.5", "-"],
    ],
    ids=" ".join,
)
def test_without_a_home_one_line_says_what_to_set(
    sg: Call, task: Path, model: Path, call: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = write_model(tmp_path / "full.gguf")
    places = {"TASK": str(task), "MODEL": str(model), "FULL": str(full), "DIR": str(tmp_path)}
    arguments = [places.get(word, word) for word in call]
    assert_says(one_line(sg(*arguments, input="one\n"), 2), "home", "SG_LOCAL_HOME")
    if call[:2] == ["models", "list"]:
        monkeypatch.setenv("SG_LOCAL_HOME", str(tmp_path / "store"))
        assert sg(*arguments).exit_code == 0


@pytest.mark.usefixtures("homeless")
def test_what_needs_no_store_does_without_a_home(sg: Call, task: Path, model: Path) -> None:
    assert sg("models", "show", model).exit_code == 0
    assert sg("task", "check", task).exit_code == 0


@pytest.mark.usefixtures("homeless")
def test_doctor_says_that_there_is_no_home(sg: Call) -> None:
    result = sg("doctor", "--json")
    (finding,) = [item for item in json.loads(result.stdout) if item["what"] == "store"]
    assert not finding["ok"]
    assert_says(finding["fix"], "SG_LOCAL_HOME")
    assert result.exit_code == 1


@pytest.mark.usefixtures("homeless")
def test_libraries_that_ask_for_a_home_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass

    for name in ("HOME", "USER", "LOGNAME"):  # to be put back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.OFFLINE_ENVIRONMENT.items():  # as where they are imported already
        monkeypatch.setenv(name, value)
    environment.go_offline()
    assert Path.home().is_dir()
    assert getpass.getuser()


def test_a_user_that_is_not_known_is_one_line(sg: Call, task: Path) -> None:
    with pytest.raises(InputError, match="home directory is not known"):
        expand_user("~nobody-of-that-name/a.gguf")
    line = one_line(sg("run", task, "--model", "~nobody-of-that-name/a.gguf"), 2)
    assert_says(line, "~nobody-of-that-name/a.gguf")


@pytest.mark.parametrize(
    "call",
    [
        ["task", "check", "TASK"],
        ["task", "check", f"{LONG}.toml"],
        ["task", "check", LONG],
        ["task", "import", f"{LONG}.json"],
        ["task", "import", "TASK", "--out", LONG],
        ["models", "show", f"{LONG}.gguf"],
        ["models", "show", LONG],
        ["run", "GOOD", "--model", "MODEL", "--run", LONG],
        ["run", "GOOD", "--model", f"{LONG}.gguf"],
        ["run", "GOOD", "--model", "MODEL", "--base-weights", LONG],
        ["plan", "GOOD", "--model", "FULL", "--prompt-format", "vicuna", "--run", LONG],
        ["bench", LONG, "--model", "MODEL"],
        ["bench", "DIR", "--model", "MODEL", "--out", LONG],
        ["predict", "--model", "MODEL", "--task", "GOOD", f"{LONG}.txt"],
        ["predict", "--model", "MODEL", "--adapter", LONG, "INPUTS"],
        ["explain", LONG, "1"],
        ["train", LONG],
        ["verify", LONG],
    ],
    ids=lambda call: " ".join(word[:12] for word in call),
)
def test_a_path_that_is_too_long_is_one_line(
    sg: Call, task: Path, model: Path, tmp_path: Path, call: list[str]
) -> None:
    other = tmp_path / "long.toml"
    other.write_text(task.read_text().replace('"inbox.test.jsonl"', f'"{LONG}"'))
    (tmp_path / "inputs.txt").write_text("one\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "inbox.toml").write_text(
        task.read_text().replace('test = "inbox.test.jsonl"\n', "")
    )
    places = {
        "TASK": other,
        "GOOD": task,
        "MODEL": model,
        "FULL": write_model(tmp_path / "full.gguf"),
        "DIR": tmp_path / "tasks",
        "INPUTS": tmp_path / "inputs.txt",
    }
    result = sg(*(places.get(word, word) for word in call))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    if call[:2] == ["models", "show"]:
        assert result.exit_code == 2  # the call is wrong, nothing failed
    if call[-1] == "TASK":
        assert result.exit_code == 2
        assert len(line) < 1000


def test_a_path_that_is_not_utf8_is_given_to_llama_cpp_as_it_is(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Path(os.fsdecode(os.fsencode(model.parent) + b"/\xff.gguf"))
    model.rename(odd)
    asked = []
    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", lambda path, _params: asked.append(path))
    with pytest.raises(InputError, match="could not be loaded"), load_model(odd):
        pass
    assert asked == [os.fsencode(odd)]


ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_is_shown_in_any_encoding(task: Path, encoding: str) -> None:
    task.write_text(task.read_text().replace('"login"', '"größer 😀 login"'), "utf-8")
    (task.parent / "inbox.test.jsonl").write_text('{"input": "a", "output": "refund"}\n')
    result = in_a_process("task", "check", task, env={"PYTHONIOENCODING": encoding}, text=False)
    assert result.returncode == 0, result.stderr
    assert b"classification" in result.stdout.replace(b"\0", b"")
    if encoding == "latin-1":
        assert "größer \\ud83d\\ude00 login".encode("latin-1") in result.stdout


@pytest.mark.parametrize("encoding", ENCODINGS[:4])
def test_json_is_the_same_in_any_encoding(encoding: str) -> None:
    """As in `sg-local predict ... > answers.jsonl`: whoever reads it takes it for UTF-8."""
    code = (
        "from sg_local.cli.output import echo_json, escape_what_stdout_lacks\n"
        "escape_what_stdout_lacks()\n"
        'echo_json(\'{"input": "Caf\\u00e9 \\U0001f600 \\u20ac"}\')'
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout.decode("utf-8")) == {"input": "Café 😀 €"}


def test_a_finished_run_shows_its_scores_as_json_in_any_encoding(finished_run: Run, task: Path) -> None:
    path = finished_run.file("evaluation.json")
    before = json.loads(path.read_text())
    result = in_a_process(*given(finished_run, task), "--json", env={"PYTHONIOENCODING": "cp1252"})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == before
