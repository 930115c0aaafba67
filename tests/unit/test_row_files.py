"""Files of rows that people bring: which forms are read, and what is said of those that are not.

The same module reads them for a task and for `predict`: that both read alike is looked at here, what `predict` makes of
it in test_predict_files.py.
"""

from pathlib import Path

import pytest
from messages import assert_says

from sg_local.errors import InputError
from sg_local.inputs import read_inputs
from sg_local.runs.given import TaskRows, check_task
from sg_local.task import Example, Task, load_task, task_to_toml
from sg_local.task_files.row_files import RowFile
from sg_local.task_files.rows import load_labelled

TASK = """name = "inbox"
instruction = "Which box?"
labels = ["refund", "log in"]
{more}

[[examples]]
input = "I want my money back."
output = "refund"
"""


def checked(place: Path, more: str, **files: str | bytes) -> tuple[Task, TaskRows]:
    """A task with these lines, beside files of these names, _ for the last dot."""
    for name, content in files.items():
        path = place / ".".join(name.rsplit("_", 1))
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (place / "inbox.toml").write_text(TASK.replace("{more}", more), "utf-8")
    return check_task(place / "inbox.toml")


def told(place: Path, more: str, **files: str | bytes) -> list[str]:
    with pytest.raises(InputError) as caught:
        checked(place, more, **files)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("more", "files"),
    [
        ('inputs = "a.txt"', {"a_txt": "\ufeffCafé, bar\r\n\n  Pay me.\n"}),
        ('inputs = {file = "a.txt", encoding = "cp1252"}', {"a_txt": "Café, bar\nPay me.".encode("cp1252")}),
        ('inputs = {file = "a.txt", encoding = "utf-16"}', {"a_txt": "Café, bar\nPay me.".encode("utf-16")}),
        ('inputs = "a.jsonl"', {"a_jsonl": '{"input": "Café, bar"}\n{"input": "Pay me.", "id": 3}\n'}),
        (
            'inputs = {file = "a.jsonl", column = "text"}',
            {"a_jsonl": '{"text": "Café, bar"}\n{"text": "Pay me."}'},
        ),
        (
            'inputs = {file = "a.csv", column = "text"}',
            {"a_csv": 'id,text\r\n1,"Café, bar"\r\n2,Pay me.\r\n'},
        ),
        ('inputs = {file = "A.CSV", column = "text"}', {"A_CSV": "\ufefftext;id\nCafé, bar;1\nPay me.;2\n"}),
        ('inputs = {file = "a.tsv", column = "text"}', {"a_tsv": "id\ttext\n1\tCafé, bar\n2\tPay me.\n"}),
        (
            'inputs = {file = "a.csv", column = "text", encoding = "latin-1"}',
            {"a_csv": 'text\n"Café, bar"\nPay me.\n'.encode("latin-1")},
        ),
    ],
)
def test_inputs_come_in_many_forms(tmp_path: Path, more: str, files: dict[str, str | bytes]) -> None:
    _, rows = checked(tmp_path, more, **files)
    assert rows.inputs == ["Café, bar", "Pay me."]


@pytest.mark.parametrize(
    ("name", "column", "data"),
    [
        ("a.ndjson", None, '{"input": "Pay, me"}\n\n{"input": "Bye."}'),
        ("a.json", None, '[{"input": "Pay, me"},\n {"input": " Bye. "}]'),
        ("a", None, '{"input": "Pay, me"}\n{"input": "Bye."}'),  # the content tells
        ("a.txt", None, "Pay, me\n \n Bye. \n"),
        ("a.log", "text", "id\ttext\n1\tPay, me\n2\tBye."),  # who names a column has a table
        ("a.csv", None, 'text\n"Pay, me"\nBye.\n'),  # its one column
        ("a.csv", None, '"a, b, c";input\n;Pay, me\n2;Bye.\n'),  # what stands in quotes divides nothing
        (
            "a.csv",
            None,
            "\n;\nid;input\n;Pay, me\n;\n2;Bye.\n;\n",
        ),  # rows of blank cells, as Excel leaves them
        ("a.tsv", "text,", "text,\tid,no\nPay, me\t1\nBye.\n"),
    ],
)
def test_a_task_and_predict_read_alike(tmp_path: Path, name: str, column: str | None, data: str) -> None:
    more = f'inputs = {{file = "{name}"' + (f', column = "{column}"' if column else "") + "}"
    (tmp_path / name).write_text(data)
    assert checked(tmp_path, more)[1].inputs == ["Pay, me", "Bye."]
    assert read_inputs(RowFile(tmp_path / name, column)).texts == ["Pay, me", "Bye."]


def test_columns_of_one_name_are_refused_where_they_are_needed(tmp_path: Path) -> None:
    """A task does not need other columns; with `predict` all of them pass through."""
    data = "note;text;note\na;Pay me.;b\n"
    assert checked(tmp_path, 'inputs = {file = "a.csv", column = "text"}', a_csv=data)[1].inputs == [
        "Pay me."
    ]
    with pytest.raises(InputError, match="two columns 'note'"):
        read_inputs(RowFile(tmp_path / "a.csv", "text"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", "id,text\n1,a\n"),
        ("a.csv", "input,input\na,b\n"),
        ("a.csv", 'id,"input\n'),
        ("a.csv", "input\na\na,b\nb,c,d\n"),
        ("a.csv", ""),
        ("a.json", "{"),
        ("a.json", '[{"input": 3}, [], {"text": "a"}]'),
        ("a.jsonl", '{"input": "a", "more": NaN}\n{"input": "\\ud800"}\n{"input": {}}\nx'),
        ("a.txt", b"caf\xe9"),
        ("a.jsonl", b'{"input": "caf\xe9"}'),
    ],
)
def test_a_task_and_predict_say_the_same_of_what_is_wrong(
    tmp_path: Path, name: str, data: str | bytes
) -> None:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(InputError) as caught:
        read_inputs(RowFile(tmp_path / name))
    assert told(tmp_path, f'inputs = "{name}"') == str(caught.value).splitlines()


def test_test_rows_and_labelled_rows_may_be_a_table_or_an_array(tmp_path: Path) -> None:
    more = 'test = "test.csv"\nlabelled = "gold.json"'
    _, rows = checked(
        tmp_path,
        more,
        test_csv="input;output;outputs\nPay me.;refund;x\n",
        gold_json='[{"input": "Let me in.", "output": "log in"}]',
    )
    assert (rows.test, rows.labelled) == ([Example("Pay me.", "refund")], [Example("Let me in.", "log in")])


def test_no_row_is_too_long_for_a_line_of_the_run(tmp_path: Path) -> None:
    long = "b" * 60_000
    row = f'{{"input": "{long}", "outputs": ["refund", "{long}"]}}'
    (line,) = told(tmp_path, 'labelled = "a.jsonl"', a_jsonl=row)
    assert_says(line, "a.jsonl, line 1", "over 100000 characters")
    assert len(checked(tmp_path, 'inputs = "a.jsonl"', a_jsonl=row)[1].inputs) == 1


def test_labelled_rows_of_a_csv_have_the_labels_spelling(tmp_path: Path) -> None:
    more = 'labelled = {file = "gold.csv", column = "text", output_column = "box"}'
    gold = 'box,text\nREFUND,"Pay\nme."\nlog in,Let me in.\n'
    _, rows = checked(tmp_path, more, gold_csv=gold)
    assert rows.labelled == [Example("Pay\nme.", "refund"), Example("Let me in.", "log in")]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    more = """inputs = {file = "a.csv", column = "text"}
labelled = {file = "gold.csv", output_column = "box"}
test = "test.jsonl"
shares = {refund = 0.3, "log in" = 0.3}"""
    lines = told(
        tmp_path,
        more,
        a_csv="id,message\n1,Pay me.\n",
        gold_csv="input,box\nPay me.,refund\nLet me in.,login\nHello.,none\n",
        test_jsonl='{"input": "a"}\n',
    )
    assert len(lines) == 5
    assert_says(lines[0], "inbox.toml", "shares", "0.6", "not to 1")
    assert_says(lines[1], "test.jsonl, line 1", "output is missing")
    assert_says(lines[2], "a.csv", "no column 'text'", "'id', 'message'", "column =")
    assert_says(lines[3], "gold.csv, line 3", "'login'", "'refund', 'log in'")
    assert_says(lines[4], "gold.csv, line 4", "'none'")


@pytest.mark.parametrize(
    ("more", "files", "expected"),
    [
        ('inputs = "a.txt"', {}, ["inputs file", "a.txt is missing", "`inputs`"]),
        (
            'inputs = "a.txt"',
            {"a_txt": b"caf\xe9"},
            ["a.txt is not UTF-8", "0xe9 at 3", 'encoding = "cp1252"'],
        ),
        ('inputs = "a.txt"', {"a_txt": "caf\xe9".encode("utf-16")}, ["is not UTF-8", 'encoding = "utf-16"']),
        (
            'labelled = "a.csv"',
            {"a_csv": "input,output\n" + "Pay me.,none\n" * 30},
            ["a.csv, line 2 and 29 more", "'none'", "'refund', 'log in'"],
        ),
        (
            'inputs = {file = "a.txt", encoding = "ascii"}',
            {"a_txt": b"caf\xe9"},
            ["not ASCII", "its own", "encoding"],
        ),
        ('inputs = {file = "a.txt", encoding = "utf-61"}', {"a_txt": "a"}, ["'utf-61'", "'cp1252'"]),
        ('inputs = {file = "a.txt", encoding = "hex"}', {"a_txt": "a"}, ["'hex' is no encoding"]),
        (
            'inputs = {file = "a.jsonl", encoding = "cp1252"}',
            {"a_jsonl": '{"input": "a"}'},
            ["JSON lines are UTF-8"],
        ),
        (
            'inputs = {file = "a.txt", colum = "a"}',
            {"a_txt": "a"},
            ["inputs: unknown key 'colum'", "'column'"],
        ),
        ("inputs = 3", {}, ["inputs: file must be a text"]),
        ('inputs = "a.txt"', {"a_txt": " \n\n"}, ["a.txt holds no inputs"]),
        (
            'inputs = "a.jsonl"',
            {"a_jsonl": '{"input": 3}'},
            ["a.jsonl, line 1", "input must be a text in quotes, not a number"],
        ),
        ('inputs = "a.jsonl"', {"a_jsonl": '{"text": "a"}'}, ["a.jsonl, line 1", "input is missing"]),
        ('inputs = "a.txt"', {"a_txt": "a\n" + "b" * 100_001}, ["a.txt, line 2", "over 100000 characters"]),
        (
            'inputs = "a.csv"',
            {"a_csv": "input\n" + "b" * 200_000},
            ["a.csv, line 2", "not CSV", "field limit"],
        ),
        ('inputs = "a.csv"', {"a_csv": 'input,b\n"a'}, ["a.csv, line 2", "not CSV"]),
        (
            'inputs = "a.csv"',
            {"a_csv": "input\na,b\n"},
            ["a.csv, line 2", "2 cells", "header of 1", "quotes"],
        ),
        ('inputs = "a.csv"', {"a_csv": ""}, ["a.csv has no column 'input'", "(none)"]),
        ('labelled = "a.txt"', {"a_txt": "a"}, ["a.txt has one text a line", ".csv"]),
        ('labelled = "a.csv"', {"a_csv": "input,output\n,refund\n"}, ["a.csv, line 2", "input is empty"]),
        ('labelled = "a.csv"', {"a_csv": "input,output\n"}, ["a.csv holds no rows"]),
        ("shares = 3", {}, ["shares: must be a table", "not a number"]),
        ("shares = {refund = 0.5}", {}, ["the label 'log in' has none"]),
        ('shares = {refund = 0.5, "log in" = 0}', {}, ["'log in' is 0, not a number over 0"]),
        ('shares = {refund = 0.5, "log in" = true}', {}, ["'log in' is True"]),
        ('shares = {refund = 50, "log in" = 50}', {}, ["add up to 100"]),
        (f'shares = {{refund = 1{"0" * 400}, "log in" = 0.5}}', {}, ["add up to inf"]),
        ('inputs = "."', {}, ["that is a directory: name one file"]),
        ('inputs = "a.xlsx"', {"a_xlsx": b"PK\x03\x04\x14\x00\x9c"}, ["a.xlsx is a spreadsheet", "as CSV"]),
        (
            'labelled = {file = "a.xls", encoding = "cp1252"}',
            {"a_xls": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"},
            ["a.xls is a spreadsheet", "as CSV"],
        ),
    ],
)
def test_each_fault_has_one_line(
    tmp_path: Path, more: str, files: dict[str, str | bytes], expected: list[str]
) -> None:
    (line,) = told(tmp_path, more, **files)
    assert_says(line, *expected)


def test_lines_may_end_as_on_an_old_macintosh(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\rthree\r")
    (tmp_path / "b.txt").write_bytes(b"one\rstill one\ntwo\r\n")
    found = [checked(tmp_path, f"inputs = '{name}'")[1].inputs for name in ("a.txt", "b.txt")]
    assert found == [["one", "two", "three"], ["one\rstill one", "two"]]


def test_labels_are_the_same_however_their_accents_are_written(tmp_path: Path) -> None:
    (tmp_path / "gold.csv").write_text("input,output\nA coffee.,CAFE\u0301\n")
    task = Task("a", "a", (), ("caf\u00e9", "tea"), labelled=RowFile(tmp_path / "gold.csv"))
    assert load_labelled(task) == [Example("A coffee.", "caf\u00e9")]


def test_shares_that_were_rounded_add_up(tmp_path: Path) -> None:
    task, _ = checked(tmp_path, 'shares = {"log in" = 0.66, refund = 0.33}')
    assert task.shares == pytest.approx((1 / 3, 2 / 3))


def test_a_task_with_all_of_it_comes_back_from_its_text(tmp_path: Path) -> None:
    more = """inputs = {file = "a.csv", column = "text", encoding = "latin-1"}
labelled = "gold.jsonl"
shares = {refund = 0.25, "log in" = 0.75}"""
    (tmp_path / "gold.jsonl").write_text('{"input": "Pay me.", "output": "refund"}')
    checked(tmp_path, more, a_csv="text\na\n")
    task = load_task(tmp_path / "inbox.toml")
    assert task.inputs == RowFile(tmp_path / "a.csv", "text", encoding="latin-1")
    (tmp_path / "again.toml").write_text(task_to_toml(task))
    assert load_task(tmp_path / "again.toml") == task
