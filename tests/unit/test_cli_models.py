"""`sg-local models list` and `show`."""

import json
import re
from pathlib import Path

from command_line import Call
from finished_run import HEADER, TENSORS
from gguf_bytes import tiny_gguf

from sg_local.runs.directory import Run


def test_models_are_listed_for_people_and_programs(sg: Call) -> None:
    result = sg("models", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    rows = json.loads(sg("models", "list", "--json").stdout)
    assert [row["name"] for row in rows] == names
    assert "smollm2-135m" in names
    assert len(names) >= 12
    for row in rows:  # what it is, what it is good for, and its licence
        about = lines[next(n for n, line in enumerate(lines) if line.split()[0] == row["name"]) + 1]
        assert about == f"    {row['description']} ({row['licence']})"
    assert {row["name"]: row["is_present"] for row in rows}["vicuna-7b-v1.5"] is False


def test_a_model_shows_what_it_says_about_itself(sg: Call, finished_run: Run) -> None:
    result = sg("models", "show", finished_run.file("model.gguf"), "--json")
    facts = json.loads(result.stdout)
    assert facts["n_parameters"] == 64
    assert facts["tensor_types"] == {"F32": 1}
    assert (facts["kind"], facts["context_tokens"], facts["tuned_for"]) == ("model", 512, "inbox")
    assert "tuned_for          inbox" in sg("models", "show", finished_run.file("model.gguf")).stdout


def test_texts_from_files_steer_no_terminal(sg: Call, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    path = tmp_path / "evil.gguf"
    path.write_bytes(tiny_gguf({**HEADER, "general.name": evil, "general.license": evil}, TENSORS))
    result = sg("models", "show", path)
    assert result.exit_code == 0
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e" in result.stdout
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.output)
    result = sg("task", "check", f"no{evil}.toml")
    assert result.exit_code == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.output)
