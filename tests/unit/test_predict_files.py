"""Files as people have them, through `sg-local predict`: tables, keys that pass through, sure and unsure answers."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Call, one_line
from finished_run import rewrite
from messages import assert_says
from scripted_engine import ScriptedEngine

from sg_local.errors import SgLocalError
from sg_local.llama import serving
from sg_local.runs.directory import Run


@pytest.fixture
def tuned(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers with the input's last word; it is sure of "refund" where the input has an exclamation mark."""
    scripted = ScriptedEngine(
        lambda _file, prompt: prompt.split()[-1].strip("!"),
        lambda prompt, _labels: [-0.1, -2.4] if "!" in prompt else [-0.7, -0.69],
    )
    scripted.replace_llama_cpp(monkeypatch)
    return finished_run.file("model.gguf")


def table(text: str, delimiter: str = ",") -> list[list[str]]:
    return [*csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)]


def test_a_table_comes_back_as_a_table(sg: Call, tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "inbox.CSV"
    file.write_bytes('\ufeffid;text;note\r\n7;"My money;\nrefund";"a ""b"""\r\n\r\n8;login\r\n'.encode())
    result = sg("predict", "--model", tuned, "--column", "text", file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout_bytes.startswith("\ufeffid;text;note;output;error\r\n7;".encode())
    assert table(result.stdout.removeprefix("\ufeff"), ";")[1:] == [
        ["7", "My money;\nrefund", 'a "b"', "refund", ""],
        ["8", "login", "", "login", ""],
    ]


def test_a_table_with_one_column_needs_no_name_for_it(sg: Call, tuned: Path) -> None:
    Path("a.tsv").write_text("message\nMy refund\n")
    assert table(sg("predict", "--model", tuned, "a.tsv").stdout, "\t")[1] == ["My refund", "refund", ""]


def test_a_table_on_standard_input_is_known_by_the_column(sg: Call, tuned: Path) -> None:
    result = sg("predict", "--model", tuned, "--column", "text", "-", input="id,text\n1,My refund\n")
    assert result.stdout == "id,text,output,error\n1,My refund,refund,\n"


def test_keys_pass_through_and_a_given_output_is_the_reference(sg: Call, tuned: Path) -> None:
    rows = [{"id": 3, "input": "My refund", "output": "refund", "tags": [1, None]}, {"input": "a login"}]
    for name in ("a.jsonl", "a.NDJSON", "a.json", "a"):
        Path(name).write_text("\n".join(map(json.dumps, rows)))
        result = sg("predict", "--model", tuned, name)
        assert result.exit_code == 0, result.stderr
        assert [json.loads(line) for line in result.stdout.splitlines()] == [
            {"id": 3, "input": "My refund", "reference": "refund", "tags": [1, None], "output": "refund"},
            {"input": "a login", "output": "login"},
        ]
        assert_says(result.stderr, "2 of 2 rows answered", "Exact Match 1.000 of the 1")
    # What an earlier call answered is no reference.
    first = result.stdout.splitlines(keepends=True)[0]
    Path("a.jsonl").write_text(first.replace('"output": "refund"', '"output": "other", "error": "x"'))
    assert sg("predict", "--model", tuned, "a.jsonl").stdout == first


def test_an_array_and_another_key(sg: Call, tuned: Path) -> None:
    Path("a.json").write_text(json.dumps([{"text": "My refund"}], indent=1))
    line = sg("predict", "--model", tuned, "--column", "text", "a.json").stdout
    assert json.loads(line) == {"text": "My refund", "output": "refund"}


@pytest.mark.parametrize(
    ("encoding", "mark"), [("cp1252", ""), ("utf-16", "\ufeff"), ("utf-8-sig", "\ufeff")]
)
def test_another_encoding_is_named_and_answered_in_utf_8(
    sg: Call, tuned: Path, encoding: str, mark: str
) -> None:
    data = "id;input\r\n7;Café refund\r\n".encode(encoding)
    Path("a.csv").write_bytes(data)
    for file in ("a.csv", "-"):
        columns = [] if file == "a.csv" else ["--column", "input"]
        result = sg("predict", "--model", tuned, "--encoding", encoding, *columns, file, input=data)
        assert result.exit_code == 0, result.stderr
        assert result.stdout_bytes.decode() == f"{mark}id;input;output;error\r\n7;Café refund;refund;\r\n"
    refused = sg("predict", "--model", tuned, "--encoding", "utf-61", "a.csv")
    assert_says(one_line(refused, 2), "'utf-61' is no encoding")


def test_plain_lines_that_look_like_json_are_plain_in_a_text_file(sg: Call, tuned: Path) -> None:
    Path("a.txt").write_text('{"a": 1} refund\n')
    assert json.loads(sg("predict", "--model", tuned, "a.txt").stdout)["input"] == '{"a": 1} refund'


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.csv", "id,text\n1,a\n", ["no column 'input'", "'id', 'text'", "--column"]),
        ("a.csv", "input,input\na,b\n", ["two columns 'input'"]),
        ("a.csv", "id,input\n1,a\n2, \n", ["a.csv, line 3", "input is empty"]),
        ("a.csv", "id,input\n1,a,b\n", ["line 2", "3 cells", "header of 2"]),
        ("a.csv", 'id,input\n1,"a\n', ["line 2", "not CSV"]),
        ("a.csv", "id,input\n", ["no inputs"]),
        ("a.json", "[1]", ["element 1", "not a JSON object"]),
        ("a.json", "[" * 100_000, ["a.json", "not JSON"]),
        ("a.json", "[]", ["no inputs"]),
        ("a.jsonl", '{"input": "a", "x": NaN}', ["line 1", "JSON"]),
    ],
)
def test_files_that_are_none(sg: Call, tuned: Path, name: str, data: str, told: list[str]) -> None:
    Path(name).write_text(data)
    assert_says(one_line(sg("predict", "--model", tuned, name), 2), *told)


def test_probabilities_and_what_is_left_to_a_person(sg: Call, tuned: Path) -> None:
    Path("a.csv").write_text("input,output\nrefund!,refund\nlogin,refund\n")
    result = sg("predict", "--model", tuned, "--probabilities", "--abstain-below", "0.6", "a.csv")
    assert result.exit_code == 0, result.stderr
    head, sure, unsure = table(result.stdout)
    assert head == ["input", "reference", "output", "probability", "p(refund)", "p(login)", "error"]
    assert sure == ["refund!", "refund", "refund", "0.90888", "0.90888", "0.09112", ""]
    assert unsure[:4] == ["login", "refund", "", "0.5025"]
    assert_says(unsure[-1], "unsure", "login", "0.502")
    assert_says(result.stderr, "1 of 2 rows answered (50.0%)", "Exact Match 1.000 of the 1")
    Path("a.jsonl").write_text('{"input": "refund!"}')
    line = json.loads(sg("predict", "--model", tuned, "--abstain-below", "0.6", "a.jsonl").stdout)
    assert line == {"input": "refund!", "output": "refund", "probability": 0.90888}


def test_a_task_without_labels_has_no_probabilities(sg: Call, tuned: Path, task: Path) -> None:
    task.write_text(task.read_text().replace('labels = ["refund", "login"]', ""))
    call = ("predict", "--model", tuned, "--task", task, "--probabilities", "-")
    assert_says(one_line(sg(*call, input="a\n"), 2), "inbox", "no labels")


def test_a_run_stands_for_its_model_at_the_temperature_that_was_measured(
    sg: Call, tuned: Path, finished_run: Run
) -> None:
    call = ("--probabilities", "-")

    def probability(source: Path) -> float:
        result = sg("predict", "--model", source, *call, input="refund!\n")
        assert result.exit_code == 0, result.stderr
        value: float = json.loads(result.stdout)["probability"]
        return value

    assert probability(finished_run.path) == probability(tuned) == 0.90888
    evaluation = json.loads(finished_run.file("evaluation.json").read_text())
    evaluation["contenders"]["tuned_merged"]["calibration"] = {
        "calibration_error": 0.1,
        "temperature": 2.0,
        "calibration_error_at_temperature": 0.0,
        "risk_coverage": [],
    }
    rewrite(finished_run, "evaluation.json", json.dumps(evaluation))
    assert probability(finished_run.path) == pytest.approx(0.7595, abs=1e-4)
    # Agreement with its own answers says nothing of how right it is.
    rewrite(finished_run, "evaluation.json", json.dumps({**evaluation, "rows_from": "held out"}))
    assert probability(finished_run.path) == 0.90888


def test_a_run_that_is_not_finished_is_no_model(sg: Call, new_run: Run) -> None:
    line = one_line(sg("predict", "--model", new_run.path, "-", input="a\n"), 2)
    assert_says(line, "model.gguf", f"`sg-local export {new_run.path}`")


def test_answers_are_written_as_they_come_and_all_of_them_when_it_ends_early(
    sg: Call, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows 3, 0, 1 are answered, in this order; then it fails."""

    def some(_texts: list[str], **_options: Any) -> Iterator[tuple[int, str, None]]:
        for index in (3, 0, 1):
            yield index, f"answer {index}", None
        raise SgLocalError("the card is on fire")

    monkeypatch.setattr(serving, "answers_of_engine", lambda texts, **options: some(texts, **options))
    result = sg("predict", "--model", tuned, "-", input="a\nb\nc\nd\n")
    assert result.exit_code == 1
    assert [json.loads(line)["input"] for line in result.stdout.splitlines()] == ["a", "b", "d"]


INTERRUPTED = """
import os, signal, sys, time
import sg_local.child_process as child_process
from sg_local.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
def values(*_arguments, **_options):
    for index in range(1, 31):
        yield [index, f"Café {index}", None]
    os.kill(os.getpid(), 2)
    time.sleep(30)
child_process.values_from_child = values
sys.argv[1:] = ["predict", "--model", os.environ["MODEL"], "-"]
main()
"""


def test_ctrl_c_leaves_what_was_answered_in_utf_8_whatever_the_locale(finished_run: Run) -> None:
    """30 rows are answered, and none of them can be written in its order yet: the first row is still missing."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED],
        input="".join(f"row {number}\n" for number in range(200)).encode(),
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MODEL": str(finished_run.file("model.gguf")),
            "PYTHONIOENCODING": "latin-1",
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    rows = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]
    assert [row["output"] for row in rows] == [f"Café {number}" for number in range(1, 31)]
    assert "Café" in done.stdout.decode("utf-8")
    assert b"interrupted" in done.stderr
