"""`sg-local task check` and `import`."""

import json
from pathlib import Path

from command_line import Call, one_line
from messages import assert_says

from sg_local.files import read_rows, write_rows


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
        assert_says(one_line(sg(*command), 2), "'refund'", "'refund!'", "same for scoring")
    assert not Path("runs").exists()


def test_a_test_file_with_a_broken_line(sg: Call, model: Path, task: Path) -> None:
    test = task.with_name("inbox.test.jsonl")
    test.write_text('{"input": "a", "output": "login"}\n{"input": "b", "output": "login"\n')
    for command in (["run", task, "--model", model], ["task", "check", task]):
        assert f"{test}, line 2: not JSON" in one_line(sg(*command), 2)


def test_a_task_that_is_not_there(sg: Call) -> None:
    assert_says(
        one_line(sg("task", "check", "support-inbx"), 2), "'support-inbx'", "did you mean 'support-inbox'?"
    )
    assert_says(one_line(sg("task", "check", "missing.toml"), 2), "missing.toml is missing", "path")


def test_a_checked_task_is_told(sg: Call, task: Path) -> None:
    result = sg("task", "check", task)
    assert result.exit_code == 0
    assert_says(
        result.stderr, "warning: no example has the label 'login'", "'refund', 'login'", "test rows (2)"
    )
    assert_says(
        result.stdout, "inbox: classification", "refund, login", "1 example;", "exact_match", "2 test rows"
    )
    facts = json.loads(sg("task", "check", task, "--json").stdout)
    assert [f"warning: {warning}" for warning in facts.pop("warnings")] == result.stderr.splitlines()
    assert facts == {
        "name": "inbox",
        "labels": ["refund", "login"],
        "metric": "exact_match",
        "n_examples": 1,
        "n_test_rows": 2,
        "n_inputs": 0,
        "n_labelled": 0,
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
    assert "1 example, 3 test rows" in result.stdout
    assert len(read_rows(tmp_path / "new/task1_polite.test.jsonl")) == 3
    assert "3 test rows" in sg("task", "check", tmp_path / "new/task1_polite.toml").stdout
    assert_says(one_line(sg(*arguments), 2), tmp_path / "new/task1_polite.toml", "exists", "--out")
    arguments[4] = tmp_path / "task1_polite.json" / "x"
    assert_says(one_line(sg(*arguments), 1), arguments[4], "--out")


def test_a_task_without_instances_says_so(sg: Call, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**SUPER_NI, "Instances": []}))
    result = sg("task", "import", tmp_path / "t.json", "--out", tmp_path / "new")
    assert "1 example, no test rows" in result.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.toml"]
