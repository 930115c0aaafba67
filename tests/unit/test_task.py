"""Task files: what is read, everything that is refused, and what import makes of other people's JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import assert_says

from sg_local import task as task_module
from sg_local.errors import InputError
from sg_local.task import Example, Task, load_task, shipped_names, task_to_toml
from sg_local.task_files.importing import import_task
from sg_local.task_files.rows import load_test_rows

GOOD = '''
name = "support-or-undermine"
instruction = """
Does the perspective support
\tor undermine the claim?  """
labels = ["support", "undermine"]
test = "rows.jsonl"
licence = "CC BY-SA 4.0"

[[examples]]
input = "  claim: Uniforms cost too much. "
output = "undermine"

[[examples]]
input = 'claim: "Tea" is fine \\o/'
output = " support "
'''


def write_good(directory: Path, **replaced: str) -> Path:
    """GOOD with lines replaced: the key's whole line becomes the given text."""
    text = GOOD
    for key, line in replaced.items():
        text, n = re.subn(rf"^{key} = .*$", line.replace("\\", r"\\"), text, count=1, flags=re.MULTILINE)
        assert n == 1
    path = directory / "a.toml"
    path.write_text(text, "utf-8")
    (directory / "rows.jsonl").write_text('{"input": "claim: a", "output": "Support"}\n', "utf-8")
    return path


def faults(path: Path | str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_task(path)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_a_task_file_is_read_stripped_and_with_an_absolute_test_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good(tmp_path)
    monkeypatch.chdir(tmp_path)
    for source in ("a.toml", Path("a.toml"), tmp_path / "a.toml", str(tmp_path / "a.toml")):
        assert load_task(source) == Task(
            name="support-or-undermine",
            instruction="Does the perspective support\n\tor undermine the claim?",
            examples=(
                Example("claim: Uniforms cost too much.", "undermine"),
                Example('claim: "Tea" is fine \\o/', "support"),
            ),
            labels=("support", "undermine"),
            test=tmp_path / "rows.jsonl",
            licence="CC BY-SA 4.0",
        )


def test_a_task_without_labels_is_no_classification(tmp_path: Path) -> None:
    assert load_task(write_good(tmp_path)).is_classification
    generation = load_task(write_good(tmp_path, labels="", test="", licence=""))
    assert not generation.is_classification
    assert (generation.labels, generation.test, generation.licence) == ((), None, None)


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({"name": ""}, "name is missing"),
        ({"name": 'name = "Support?"'}, "name 'Support?' must be 1 to 64 of"),
        ({"name": 'name = "-a"'}, "name '-a' must be"),
        ({"name": f'name = "{"a" * 65}"'}, "must be 1 to 64 of"),
        ({"name": 'name = "../a"'}, "name '../a' must be"),
        (
            {"licence": "license = 'MIT'"},
            "unknown key 'license', did you mean 'licence'?: the keys are name,",
        ),
        ({"licence": "licence = 3"}, "licence must be a text in quotes, not a number"),
        ({"licence": "licence = 2024-01-01"}, "licence must be a text in quotes, not a date"),
        ({"labels": "labels = 'a'"}, "labels must be a list of texts, not a text"),
        (
            {"labels": "labels = ['support', 'undermine', 3]"},
            "labels[2] must be a text in quotes, not a number",
        ),
        ({"labels": "labels = ['support', 'undermine', ' ']"}, "labels[2] is empty"),
        ({"labels": "labels = ['support', 'undermine', ' Support']"}, "label 'Support' is a duplicate"),
        (
            {"labels": r'labels = ["support", "undermine", "a\u009B31m"]'},
            "labels[2] holds the character U+009B",
        ),
        (
            {"labels": r'labels = ["support", "undermine", "\u202Eko"]'},
            "labels[2] holds the character U+202E",
        ),
        ({"labels": r'labels = ["support", "undermine", "a\u2069"]'}, "labels[2] holds the character U+2069"),
        ({"labels": r'labels = ["support", "undermine", "a\nok"]'}, "labels[2] holds the character U+000A"),
        ({"test": "test = 'nowhere.jsonl'"}, "is missing: correct `test`, or remove it"),
        ({"test": "test = '.'"}, "is missing: correct `test`, or remove it"),
        ({"input": "input = ' '"}, "examples[0]: input is empty"),
        ({"input": ""}, "examples[0]: input is missing"),
        (
            {"input": "input = 'a'\nlabel = 'b'"},
            "examples[0]: unknown key 'label': the keys are input, output",
        ),
        ({"output": "output = []"}, "examples[0]: output must be a text in quotes, not a list"),
        (
            {"output": "output = 'Undermines'"},
            "examples[0]: output 'Undermines' is not one of the labels ('support', 'undermine'), "
            "did you mean 'undermine'?",
        ),
        ({"output": r'output = "under\u0000mine"'}, "examples[0]: output holds the control character U+0000"),
        ({"licence": r'licence = "\u001B[31m"'}, "licence holds the control character U+001B"),
        ({"licence": r'licence = "a\rb"'}, "licence holds the control character U+000D"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, replaced: dict[str, str], expected: str) -> None:
    found = faults(write_good(tmp_path, **replaced))
    assert len(found) == 1
    assert expected in found[0]


def test_one_label_is_refused(tmp_path: Path) -> None:
    found = faults(write_good(tmp_path, labels="labels = ['support']"))
    assert found[0].startswith("labels has one label")


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        """name = "A"
        labels = ["x"]
        example = 1
        test = "nowhere"
        [[examples]]
        input = ""
        [[examples]]
        input = 1
        output = "y"
        [[examples]]
        [[examples]]
        """
    )
    text = "\n".join(faults(path))
    for part in (
        "unknown key 'example', did you mean 'examples'?",
        "name 'A'",
        "instruction is missing",
        "one label",
        "nowhere is missing",
        "examples[0]: input is empty",
        "examples[0]: output is missing",
        "examples[1]: input must be",
        "examples[1]: output 'y' is not",
        "examples[2]: input is missing",
        "examples[2]: output is missing",
        "examples[3]: input is missing",
        "examples[3]: output is missing",
    ):
        assert part in text
    assert len(text.splitlines()) == 13


def test_a_task_needs_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    for examples in ("", "examples = []"):
        path.write_text(f"name = 'a'\ninstruction = 'b'\n{examples}")
        [fault] = faults(path)
        assert_says(fault, "no examples", "[[examples]]", "input", "output")
    path.write_text("name = 'a'\ninstruction = 'b'\nexamples = 'c'")
    [fault] = faults(path)
    assert_says(fault, "examples must be tables", "[[examples]]", "not a text")
    path.write_text("name = 'a'\ninstruction = 'b'\nexamples = ['c']")
    [fault] = faults(path)
    assert_says(fault, "examples[0] must be a table", "input", "output", "not a text")


def test_broken_large_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("name = 'a'\ninstruction = \n")
    assert "invalid TOML" in faults(path)[0]
    assert "line 2" in faults(path)[0]
    path.write_text("# " + "a" * (1 << 20))
    assert "over the limit of 1048576" in faults(path)[0]
    path.write_bytes(b"name = '\xff'")
    assert "is not UTF-8" in faults(path)[0]
    assert "is missing" in faults(tmp_path / "b.toml")[0]
    assert "sg-local task import" in faults(tmp_path / "task.json")[0]


def test_a_file_full_of_faults_is_refused_quickly_and_briefly(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("".join(f"instructio{i} = 1\n" for i in range(40_000)))
    assert len(faults(path)) == 51
    path.write_text("labels = [" + "1," * 400_000 + "]")
    assert re.fullmatch(r"… and \d+ more", faults(path)[-1])


def test_shipped_examples_all_load_with_their_test_rows() -> None:
    assert shipped_names() == sorted(shipped_names())
    for name in shipped_names():
        task = load_task(name)
        assert task.name == name
        if task.test is not None:
            rows = load_test_rows(task)
            assert not {row.input for row in rows} & {example.input for example in task.examples}


def test_a_shipped_example_is_found_by_name_and_a_wrong_name_gets_suggestions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good(tmp_path).rename(tmp_path / "support-inbox.toml")
    (tmp_path / "polite.toml").write_text("")
    monkeypatch.setattr(task_module, "SHIPPED_DIR", tmp_path)
    assert shipped_names() == ["polite", "support-inbox"]
    assert load_task("support-inbox").name == "support-or-undermine"
    with pytest.raises(InputError) as caught:
        load_task("suport-inbox")
    assert_says(
        str(caught.value), "'suport-inbox'", "did you mean 'support-inbox'?", ".toml", "polite, support-inbox"
    )


def test_test_rows_come_in_the_labels_spelling_and_other_keys_are_ignored(tmp_path: Path) -> None:
    task = load_task(write_good(tmp_path))
    (tmp_path / "rows.jsonl").write_text(
        '{"input": " a\\u0007 ", "output": " SUPPORT", "id": 3}\n\n{"input": "b", "output": "undermine"}\n'
    )
    assert load_test_rows(task) == [Example("a\a", "support"), Example("b", "undermine")]
    assert load_test_rows(tmp_path / "rows.jsonl") == [Example("a\a", "SUPPORT"), Example("b", "undermine")]


def test_faults_of_test_rows_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    task = load_task(write_good(tmp_path))
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"input": "a", "output": "supports"}\n{"input": "a"}\n{"input": 3, "output": "support"}\nx\n'
        + '{"input": "", "output": "support"}\n'
        + "[]\n" * 20
    )
    with pytest.raises(InputError) as caught:
        load_test_rows(task)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}, line 1: output 'supports' ")
    assert lines[0].endswith("('support', 'undermine')")
    assert lines[1] == f"{path}, line 2: output is missing"
    assert lines[2].startswith(f"{path}, line 3: input ")
    assert lines[2].endswith(" not a number")
    assert lines[3].startswith(f"{path}, line 4: not JSON")
    assert lines[4] == f"{path}, line 5: input is empty"
    assert lines[10:] == ["… and 15 more"]


def test_a_test_row_may_have_several_right_outputs(tmp_path: Path) -> None:
    task = load_task(write_good(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"input": "a", "outputs": ["Support", "undermine", "support"]}\n'
        '{"input": "b", "output": "undermine", "outputs": 3}\n'
    )
    several, one = load_test_rows(task)
    assert several == Example("a", "support", ("undermine",))
    assert several.as_row() == {"input": "a", "outputs": ["support", "undermine"]}
    assert one.as_row() == {"input": "b", "output": "undermine"}
    rows.write_text(
        '{"input": "a", "outputs": []}\n{"input": "a", "outputs": "x"}\n{"input": "a", "outputs": ["support", 1]}\n'
        '{"input": "a", "outputs": ["support", "both"]}\n{"input": "a"}\n'
    )
    with pytest.raises(InputError) as caught:
        load_test_rows(task)
    told = str(caught.value).splitlines()
    assert len(told) == 5
    for line, word in zip(
        told, ("1 to 100 texts", "1 to 100 texts", "outputs[1]", "'both'", "missing"), strict=True
    ):
        assert word in line


def test_no_test_rows_is_an_error(tmp_path: Path) -> None:
    task = load_task(write_good(tmp_path))
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no rows"):
        load_test_rows(task)
    with pytest.raises(InputError, match="has no test file"):
        load_test_rows(dataclasses.replace(task, test=None))


# Line ends, C1, and what turns the direction of a line.
HIDDEN_IN_A_LABEL = "[\n\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
texts = (
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\"\\'\n\t#{}"))
    .map(lambda text: re.sub(r"[\x00-\x08\x0b-\x1f]", "", text).strip())
    .filter(bool)
)
labels = texts.filter(lambda text: not re.search(HIDDEN_IN_A_LABEL, text.strip()))


@given(
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True),
    instruction=texts,
    examples=st.lists(st.builds(Example, texts, texts), min_size=1, max_size=3),
    labels=st.lists(labels, min_size=2, max_size=5, unique_by=lambda label: label.strip().lower())
    | st.just([]),
    licence=st.none() | texts,
    has_test=st.booleans(),
)
def test_any_task_survives_its_own_file(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    instruction: str,
    examples: list[Example],
    labels: list[str],
    licence: str | None,
    has_test: bool,
) -> None:
    path = tmp_path_factory.mktemp("task") / "task.toml"
    test = path.with_name('"rows" \\.jsonl') if has_test else None
    if test:
        test.touch()
    if labels:
        examples = [Example(example.input, labels[-1]) for example in examples]
    task = Task(name, instruction, tuple(examples), tuple(labels), test, licence)
    path.write_bytes(task_to_toml(task).encode())
    assert load_task(path) == task


def test_a_written_task_keeps_its_lines_readable() -> None:
    task = Task("a", 'Say "yes"\nor """no""""', (Example("C:\\x", '"""'),), ("1", "2"), Path("a.jsonl"))
    assert task_to_toml(task) == (
        'name = "a"\ninstruction = """\nSay "yes"\nor \\"\\"\\"no\\"\\"\\"\\""""\nlabels = ["1", "2"]\n'
        'test = "a.jsonl"\n\n[[examples]]\ninput = "C:\\\\x"\noutput = "\\"\\"\\""\n'
    )


def super_natural(
    instances: list[tuple[str, Any]], positives: list[tuple[str, str]], **more: Any
) -> dict[str, Any]:
    return {
        "Contributors": ["x"],
        "Definition": ["Is it spring?\r\nSay yes or no."],
        "Positive Examples": [{"input": i, "output": o, "explanation": "…"} for i, o in positives],
        "Negative Examples": [],
        "Instances": [{"id": f"t-{n}", "input": i, "output": o} for n, (i, o) in enumerate(instances)],
        "Instance License": ["Apache 2.0", "MIT"],
        **more,
    }


def save(directory: Path, data: Any, name: str = "task 738_Périlleux?.json") -> Path:
    path = directory / name
    path.write_text(json.dumps(data), "utf-8")
    return path


def test_import_of_a_classification_task(tmp_path: Path) -> None:
    instances = [(f"row {i}", ["Yes" if i % 2 else "no", "ignored"]) for i in range(20)]
    instances += [("row x", ["yes"]), ("shown", ["no"]), ("", ["no"]), ("row y", [" "])]
    positives = [("off", "perhaps"), ("shown", "NO"), ("b", "yes"), ("c", "Yes"), ("d", "no")]
    path = save(tmp_path, super_natural(instances, positives))
    task, rows = import_task(path)
    assert task == Task(
        name="task-738_perilleux",
        instruction="Is it spring?\nSay yes or no.",
        examples=(Example("shown", "no"), Example("b", "Yes"), Example("c", "Yes")),
        labels=("Yes", "no"),
        licence="Apache 2.0, MIT",
    )
    expected = [Example(f"row {i}", "Yes" if i % 2 else "no") for i in range(20)] + [Example("row x", "Yes")]
    assert rows == expected
    (tmp_path / "task.toml").write_text(task_to_toml(task), "utf-8")
    assert load_task(tmp_path / "task.toml") == task


def test_imported_test_rows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = save(
        tmp_path, super_natural([(f"row {i}", "yes" if i % 2 else "no") for i in range(500)], [("a", "no")])
    )
    _, all_rows = import_task(path, n_test_rows=1000)
    assert len(all_rows) == 500
    _, rows = import_task(path)
    assert len(set(rows)) == 300
    assert set(rows) < set(all_rows)
    _, again = import_task(path, seed=0)
    assert again == rows
    _, other = import_task(path, seed=1)
    assert other != rows  # equal by chance: under 1 in 10^140
    assert import_task(path, n_test_rows=0)[1] == []


@pytest.mark.parametrize(
    "outputs",
    [
        [f"label {i}" for i in range(21)] * 2,  # too many
        ["a" * 41, "b"] * 2,  # too long
        ["a", "a", "b"],  # one seen once
        ["a", "a"],  # only one
    ],
)
def test_import_of_a_generation_task(tmp_path: Path, outputs: list[str]) -> None:
    instances = [(f"row {i}", [output]) for i, output in enumerate(outputs)]
    task, rows = import_task(save(tmp_path, super_natural(instances, [("a", "Free text")], Definition="Do.")))
    assert (task.labels, task.is_classification, task.instruction) == ((), False, "Do.")
    assert task.examples == (Example("a", "Free text"),)
    assert [row.output for row in rows] == outputs


def test_import_keeps_all_right_outputs(tmp_path: Path) -> None:
    instances = [("a", ["One two.", "Two\r\none.", "One two.", 3, " "]), ("b", ["Three."]), ("c", "Four.")]
    _, rows = import_task(save(tmp_path, super_natural(instances, [("d", "Free text")], Definition="Do.")))
    assert rows == [Example("a", "One two.", ("Two\none.",)), Example("b", "Three."), Example("c", "Four.")]
    labelled = [("a", ["yes", "No"]), ("b", ["no", "perhaps"]), ("c", ["yes"]), ("d", ["no"])]
    _, rows = import_task(save(tmp_path, super_natural(labelled, [("e", "yes")])))
    assert rows[:2] == [Example("a", "yes", ("no",)), Example("b", "no")]


def test_import_at_the_bounds_of_classification(tmp_path: Path) -> None:
    outputs = [f"{i:040d}" for i in range(20)] * 2
    instances = [(f"row {i}", output) for i, output in enumerate(outputs)]
    task, _ = import_task(save(tmp_path, super_natural(instances, [("a", outputs[0])])))
    assert task.labels == tuple(sorted(set(outputs)))


def test_import_of_a_task_object_with_its_test_rows(tmp_path: Path) -> None:
    data = {
        "name": "sst2",
        "source": "somewhere",
        "licence": ["research use", "b"],
        "kind": "classification",
        "instruction": "Positive or negative?",
        "labels": ["positive", "negative"],
        "examples": [{"input": "Fun.", "output": "positive"}],
        "metric": "exact_match",
    }
    (tmp_path / "tasks").mkdir()
    path = save(tmp_path / "tasks", data, "sst2.json")
    expected = Task(
        "sst2",
        "Positive or negative?",
        (Example("Fun.", "positive"),),
        ("positive", "negative"),
        licence="research use, b",
    )
    assert import_task(path) == (expected, [])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "sst2.jsonl").write_text(
        '{"input": "Fun.", "output": "positive"}\n{"input": "Dull.", "output": "Negative"}\n'
    )
    assert import_task(path) == (expected, [Example("Dull.", "negative")])


def test_import_names_all_faults(tmp_path: Path) -> None:
    data = super_natural([("a", []), ("b", 3)], [])
    data["Instances"] += ["x", {"input": 1, "output": "a"}]
    del data["Positive Examples"]
    path = save(tmp_path, data)
    with pytest.raises(InputError) as caught:
        import_task(path)
    *of_instances, of_examples = str(caught.value).splitlines()
    assert len(of_instances) == 4
    for number, line in enumerate(of_instances):
        assert line.startswith(f"{path}: Instances[{number}] ")
        assert_says(line, "input", "output")
    assert of_examples == f"{path}: Positive Examples must be a list, not nothing"

    path = save(tmp_path, super_natural([], [], Definition=[]))
    with pytest.raises(InputError) as caught:
        import_task(path)
    assert "instruction must be a text in quotes, not a list" in str(caught.value)
    assert "there are no examples" in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"Definition"', '{"instruction": NaN}', "[" * 100_000])
def test_import_refuses_what_is_no_task(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        import_task(path)


def test_import_refuses_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(r'{"instruction": "\ud83d"}')
    with pytest.raises(InputError, match="surrogate"):
        import_task(path)


def test_import_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)  # sparse
    with pytest.raises(InputError, match="over the limit"):
        import_task(path)
