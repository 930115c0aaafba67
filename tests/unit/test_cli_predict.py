"""`sg-local predict`: plain and JSON lines, and models and inputs that are none. No model runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from command_line import Call, one_line
from finished_run import HEADER, TENSORS
from gguf_bytes import TinyTensor, tiny_gguf
from messages import assert_says
from scripted_engine import ScriptedEngine

import sg_local.task_files.row_files as row_files
from sg_local.files import write_rows
from sg_local.runs.directory import Run


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """Answers with the prompt's last word."""
    scripted = ScriptedEngine()
    scripted.replace_llama_cpp(monkeypatch)
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
    assert_says(json.loads(result.stdout.splitlines()[-1])["error"], "context", "--n-ctx")
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
    assert_says(line, model, "tuned for", "--task")
    assert answers(sg("predict", "--model", model, "--task", task, "-", input="one a\n")) == [("one a", "a")]
    assert "'nothing'" in one_line(
        sg("predict", "--model", model, "--task", "nothing", "-", input="one a\n"), 2
    )


def test_predict_for_another_task_than_tuned_for_is_told(
    sg: Call, engine: ScriptedEngine, finished_run: Run
) -> None:
    result = sg(
        "predict", "--model", finished_run.file("model.gguf"), "--task", "support-inbox", "-", input="one a\n"
    )
    assert result.exit_code == 0
    assert_says(result.stderr, "tuned for inbox,", "asked for support-inbox")


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
        json.dumps({**RIGHT, "prompt_format": ["gguf"]}),
        json.dumps({**RIGHT, "max_new_tokens": True}),
        json.dumps({**RIGHT, "max_new_tokens": 10**30}),
        json.dumps({**RIGHT, "name": "\ud800"}),
        json.dumps({**RIGHT, "name": "\x1b[2J"}),
        json.dumps({**RIGHT, "instruction": "a\udfff"}),
        json.dumps({**RIGHT, "instruction": "\x00"}),
        json.dumps({**RIGHT, "instruction": " "}),
        json.dumps({**RIGHT, "labels": ["c", "\ud800"]}),
        json.dumps({**RIGHT, "labels": ["c", "C"]}),
        json.dumps({**RIGHT, "labels": ["c", ""]}),
        json.dumps({**RIGHT, "labels": None}),
        json.dumps({**RIGHT, "examples": [{"input": "\ud800", "output": "c"}]}),
        json.dumps({**RIGHT, "examples": [{"input": "d", "output": "no label"}]}),
        json.dumps({**RIGHT, "examples": [{"input": "d", "output": "c"}] * 9}),
        json.dumps({**RIGHT, "examples": None}),
        "1" * 5000,
    ],
)
def test_a_model_that_says_nonsense_about_its_task(
    sg: Call, engine: ScriptedEngine, tmp_path: Path, told: str
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_gguf({**HEADER, "sg_local.task": json.dumps(RIGHT)}, TENSORS))
    assert sg("predict", "--model", path, "-", input="one a\n").exit_code == 0
    path.write_bytes(tiny_gguf({**HEADER, "sg_local.task": told}, TENSORS))
    assert "--task" in one_line(sg("predict", "--model", path, "-", input="one a\n"), 2)
    shown = sg("models", "show", path)
    assert shown.exit_code == 0
    shown.stdout.encode()
    ask = ("predict", "--model", path)
    given = sg(*ask, "--task", "support-inbox", "--prompt-format", "vicuna", "-", input="one a\n")
    assert given.exit_code == 0


def test_all_faults_of_a_carried_task_are_told_at_once(
    sg: Call, engine: ScriptedEngine, tmp_path: Path
) -> None:
    path = tmp_path / "odd.gguf"
    wrong = {
        **RIGHT,
        "name": "A B",
        "instruction": "\ud800",
        "max_new_tokens": 0,
        "examples": [{"input": "d"}],
    }
    path.write_bytes(tiny_gguf({**HEADER, "sg_local.task": json.dumps(wrong)}, TENSORS))
    line = one_line(sg("predict", "--model", path, "-", input="one a\n"), 2)
    assert_says(line, path, "name 'A B'", "surrogate", "max_new_tokens is 0", "examples[0]: output", "--task")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'{"input": "a"}\n{"text": "b"}\n', ["a.jsonl, line 2", "input is missing"]),
        ("a.jsonl", b'{"input": "a"}\n{"input": " "}\n', ["a.jsonl, line 2", "input is empty"]),
        ("a.jsonl", b'{"input": "a"}\n[1]\n', ["a.jsonl, line 2", "not a JSON object"]),
        ("a.jsonl", b'{"input": "a"}\n{"input": "b"\n', ["a.jsonl, line 2", "Expecting"]),
        ("a.jsonl", b'{"input": "\\ud800"}\n', ["a.jsonl, line 1"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1"]),
        ("a.txt", b"\n  \n", ["a.txt", "no inputs", "JSON lines"]),
        ("a.txt", b"caf\xe9\n", ["a.txt", "UTF-8"]),
        ("a.txt", None, ["a.txt is missing", "path"]),
        ("-", b'{"text": "b"}\n', ["standard input, line 1", "input is missing"]),
        ("-", b"caf\xe9\n", ["standard input", "UTF-8"]),
        ("-", b"", ["standard input", "no inputs"]),
    ],
)
def test_inputs_that_are_none(
    sg: Call, engine: ScriptedEngine, finished_run: Run, name: str, data: bytes | None, told: list[str]
) -> None:
    if data is not None and name != "-":
        Path(name).write_bytes(data)
    line = one_line(sg("predict", "--model", finished_run.file("model.gguf"), name, input=data), 2)
    assert_says(line, *told)
    assert engine.asked == []


def test_too_many_inputs_are_refused_and_not_cut(
    sg: Call, engine: ScriptedEngine, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "MAX_ROW_FILE_BYTES", 10)
    (tmp_path / "a.txt").write_text("one a\ntwo b\n")
    for file in (tmp_path / "a.txt", "-"):
        line = one_line(
            sg("predict", "--model", finished_run.file("model.gguf"), file, input="one a\ntwo b\n"), 2
        )
        assert "limit of 10" in line


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
    assert_says(line, f"{adapter} is a LoRA adapter, not a model", "--model", "--adapter")
    line = one_line(sg("predict", "--model", base, "--adapter", tuned, "-", input="one a\n"), 2)
    assert_says(line, f"{tuned} is a model, not a LoRA adapter", "--model")


def test_an_adapter_of_another_base(
    sg: Call, engine: ScriptedEngine, finished_run: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf(HEADER, [TinyTensor("token_embd.weight", (32, 2), data=b"\x01" * 256)]))
    adapter = finished_run.file("adapter.gguf")
    line = one_line(sg("predict", "--model", other, "--adapter", adapter, "-", input="one a\n"), 2)
    assert_says(line, adapter, other, "another base")
    line = one_line(sg("predict", "--model", other, "--adapter", "no.gguf", "-", input="one a\n"), 2)
    assert_says(line, "no.gguf does not exist", "path")


def test_an_input_over_the_context_is_told_without_making_its_tokens(
    sg: Call, engine: ScriptedEngine, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    encode = engine.tokenizer.encode_prompt

    def counted(template: str, messages: Sequence[dict[str, str]]) -> list[int]:
        made.append(sum(len(message["content"]) for message in messages))
        return encode(template, messages)

    monkeypatch.setattr(engine.tokenizer, "encode_prompt", counted)
    result = sg("predict", "--model", finished_run.file("model.gguf"), "-", input=f"{'x' * 10**6}\none a\n")
    assert answers(result) == [("x" * 10**6, None), ("one a", "a")]
    assert max(made) < 200


def test_a_prompt_without_room_for_any_input_costs_one_try(
    sg: Call, engine: ScriptedEngine, model: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.write_text(task.read_text().replace("Which box", "Which box " * 19))
    made = []
    monkeypatch.setattr(engine.tokenizer, "encode_prompt", lambda *_arguments: made.append(1) or [0] * 999)
    result = sg("predict", "--model", model, "--task", task, "-", input="one a\ntwo b\n")
    assert answers(result) == [("one a", None), ("two b", None)]
    assert len(made) <= 1
