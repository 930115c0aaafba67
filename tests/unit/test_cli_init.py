"""`sg-local init`: questions in, a task file out that can be checked; nothing is written before it is right."""

from pathlib import Path

import pytest
from command_line import Call, one_line
from messages import assert_says

from sg_local.files import write_rows
from sg_local.task import Example, load_task
from sg_local.task_files.rows import load_inputs


def lines(*answers: str) -> str:
    return "".join(f"{answer}\n" for answer in answers)


def test_a_task_is_written_from_answers(sg: Call) -> None:
    Path("inputs.txt").write_text("were is my parcel\n")
    answers = lines(
        "inbox", "Which box?", "refund, log in", "Pay me.", "refund", "Let me in.", "log in", "", "inputs.txt"
    )
    result = sg("init", "tasks/inbox.toml", input=answers)
    assert result.exit_code == 2
    assert_says(result.stderr.splitlines()[-1], "no directory tasks")
    Path("tasks").mkdir()
    result = sg("init", "tasks/inbox.toml", input=answers)
    assert result.exit_code == 0, result.stderr
    assert_says(result.stdout, "wrote tasks/inbox.toml", "sg-local run tasks/inbox.toml")
    task = load_task(Path("tasks/inbox.toml"))
    assert (task.name, task.instruction, task.labels) == ("inbox", "Which box?", ("refund", "log in"))
    assert task.examples == (Example("Pay me.", "refund"), Example("Let me in.", "log in"))
    assert task.inputs
    assert task.inputs.path.resolve() == Path("inputs.txt").resolve()
    assert_says(sg("task", "check", "tasks/inbox.toml").stdout, "2 examples", "1 real input\n")


def test_a_wrong_answer_is_asked_for_again(sg: Call) -> None:
    result = sg(
        "init",
        input=lines(
            "My task", "my-task", "Say it.", "one", "", "Pay me.", "Could you pay me?", "", "no.txt", ""
        ),
    )
    assert result.exit_code == 0, result.stderr
    assert_says(result.stderr, "name 'My task' must be", "labels has one label", "no.txt is missing")
    assert load_task(Path("my-task.toml")).examples == (Example("Pay me.", "Could you pay me?"),)


def test_an_output_that_is_no_label_is_asked_for_again(sg: Call) -> None:
    result = sg("init", input=lines("", "Say it.", "a, b", "Pay me.", "c", "a", "", ""))
    assert result.exit_code == 0, result.stderr
    assert "output 'c' is not one of the labels ('a', 'b')" in result.stderr


@pytest.mark.parametrize(
    ("name", "data", "column"),
    [
        ("real.json", '[{"text": "Pay me."}]', "text"),
        ("real.ndjson", '{"text": "Pay me."}', "text"),
        ("real", '{"text": "Pay me."}', "text"),
        ("real.csv", "text\nPay me.\n", ""),
    ],
)
def test_real_inputs_that_are_no_plain_lines_have_a_column(
    sg: Call, name: str, data: str, column: str
) -> None:
    Path(name).write_text(data)
    result = sg("init", "a.toml", input=lines("", "Say it.", "", "Pay.", "Paid.", "", name, column))
    assert result.exit_code == 0, result.stderr
    task = load_task(Path("a.toml"))
    assert task.inputs
    assert (task.inputs.column or "", load_inputs(task)) == (column, ["Pay me."])


def test_labels_and_examples_come_from_labelled_rows(sg: Call) -> None:
    Path("gold.csv").write_text(
        "text;box\n" + "".join(f"Message {n}.;{['Refund', 'login'][n % 2]}\n" for n in range(20)), "cp1252"
    )
    gold = ["--labelled", "gold.csv", "--column", "text", "--output-column", "box", "--encoding", "cp1252"]
    result = sg("init", "inbox.toml", *gold, input=lines("", "Which box?", "y", ""))
    assert result.exit_code == 0, result.stderr
    assert_says(
        result.stderr, "outputs of the labelled rows: Refund, login", "2 were chosen among its labelled"
    )
    assert load_task(Path("inbox.toml")).labels == ("Refund", "login")
    told = sg("task", "check", "inbox.toml")
    assert_says(told.stdout, "2 examples", "18 labelled rows")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--labelled", "gold.csv"], ["gold.csv has no column 'output'"]),
        (["--labelled", "gold.csv", "--encoding", "utf-61"], ["'utf-61' is no encoding"]),
        (["there.toml"], ["there.toml exists"]),
    ],
)
def test_what_is_wrong_with_the_call_is_said(sg: Call, arguments: list[str], told: list[str]) -> None:
    Path("gold.csv").write_text("input\nPay me.\n")
    Path("there.toml").write_text("mine")
    result = sg("init", *arguments, input=lines("a", "Say it.", ""))
    assert result.exit_code == 2
    assert_says(result.stderr.splitlines()[-1], *told)
    assert Path("there.toml").read_text() == "mine"


def test_a_task_whose_labels_cannot_be_told_apart_is_not_written(sg: Call) -> None:
    result = sg("init", "a.toml", input=lines("", "Say it.", "C, C++", "Pay me.", "C", "", ""))
    assert result.exit_code == 2
    assert "same for scoring" in result.stderr
    assert not Path("a.toml").exists()


def test_a_file_of_inputs_that_cannot_be_read_so_is_asked_for_again(sg: Call) -> None:
    Path("real.csv").write_text("text,from\nPay me.,Ann\n")
    Path("old.csv").write_bytes(b"text\ncaf\xe9\n")
    answers = lines(
        "", "Say it.", "", "Pay.", "Paid.", "", "real.csv", "txt", "old.csv", "text", "real.csv", "text"
    )
    result = sg("init", "a.toml", input=answers)
    assert result.exit_code == 0, result.stderr
    assert_says(result.stderr, "has no column 'txt': its columns are 'text', 'from'", "old.csv is not UTF-8")
    assert load_inputs(load_task(Path("a.toml"))) == ["Pay me."]


def test_labels_that_are_not_those_of_the_labelled_rows_are_asked_for_again(sg: Call) -> None:
    write_rows(Path("gold.jsonl"), [{"input": f"Message {n}.", "output": "ab"[n % 2]} for n in range(8)])
    result = sg(
        "init", "a.toml", "--labelled", "gold.jsonl", input=lines("", "Which?", "n", "x, y", "A, B", "")
    )
    assert result.exit_code == 0, result.stderr
    assert_says(result.stderr, "output 'a' is not one of the labels ('x', 'y')")
    assert load_task(Path("a.toml")).labels == ("A", "B")


def test_an_input_of_an_example_that_cannot_be_one_is_asked_for_again(sg: Call) -> None:
    result = sg("init", "a.toml", input=lines("", "Say it.", "a, b", "Up\x1b[A", "Up", "a", "\x00", "", ""))
    assert result.exit_code == 0, result.stderr
    assert_says(result.stderr, "control character U+001B", "control character U+0000")
    assert load_task(Path("a.toml")).examples == (Example("Up", "a"),)


def test_what_is_typed_in_another_encoding_is_said(monkeypatch: pytest.MonkeyPatch, sg: Call) -> None:
    def prompt(*_arguments: object, **_options: object) -> str:
        return b"\xff".decode()

    monkeypatch.setattr("click.prompt", prompt)
    assert "what is typed is not UTF-8" in one_line(sg("init", "a.toml"), 2)


@pytest.mark.parametrize("name", ["a.json", "support-inbox"])
def test_a_name_that_run_would_not_find_is_refused(sg: Call, name: str) -> None:
    assert f"call it {Path(name).stem}.toml" in one_line(sg("init", name), 2)


def test_the_next_command_can_be_copied(sg: Call) -> None:
    result = sg("init", "my task.toml", input=lines("a", "Say it.", "", "Pay.", "Paid.", "", ""))
    assert "sg-local run 'my task.toml' --model" in result.stdout


def test_answers_that_end_early_write_nothing(sg: Call) -> None:
    write_rows(Path("gold.jsonl"), [{"input": "a", "output": "b"}])
    assert sg("init", "a.toml", input=lines("", "Say it.")).exit_code == 1
    assert not Path("a.toml").exists()
    assert "missing" in one_line(sg("task", "check", "a.toml"), 2)
