"""Many tasks, one table: what is read, what is refused, what a failure costs, and what is told.

No model runs: a stage's process is replaced by what would have written a finished run.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Contents
from finished_run import ScriptedStages, finish_run
from messages import assert_says

from sg_local.bench.bench import load_tasks
from sg_local.errors import InputError, SgLocalError
from sg_local.files import write_rows
from sg_local.report.bench import markdown, row_of, summary
from sg_local.runs.directory import Run, open_run
from sg_local.runs.lock import lock_run
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.metrics import metric_of
from sg_local.settings import STAGES

BOXES = {
    "name": "boxes",
    "instruction": "Which box?",
    "labels": ["refund", "login"],
    "licence": ["CC0"],
    "examples": [{"input": "Money back.", "output": "refund"}],
}
SUPER_NI = {
    "Definition": ["Say it politely."],
    "Positive Examples": [{"input": "Give me tea.", "output": "Could I have some tea?"}],
    "Instances": [{"input": f"Give me {n}.", "output": [f"Could I have {n}?"]} for n in range(400)],
    "Instance License": ["CC0"],
}


def write_json_task(directory: Path, name: str, **changes: Any) -> None:
    """tasks/NAME.json and test/NAME.jsonl."""
    for part in ("tasks", "test"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    (directory / f"tasks/{name}.json").write_text(json.dumps({**BOXES, "name": name, **changes}))
    write_rows(directory / f"test/{name}.jsonl", [{"input": "Let me in.", "output": "login"}])


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with three tasks: two of boxes, one of free text."""
    directory = tmp_path / "everyday"
    write_json_task(directory, "boxes")
    write_json_task(directory, "crates")
    (directory / "tasks/task1_polite.json").write_text(json.dumps(SUPER_NI))
    return directory


def all_stages(*runs: str) -> list[tuple[str, str]]:
    """What ran where every stage of these runs did, one run after the other."""
    return [(run, stage) for run in runs for stage in STAGES]


# Reading


def test_all_three_formats_are_read(task: Path, tasks: Path) -> None:
    found = load_tasks(tasks)
    assert [task.name for task, _ in found] == ["boxes", "crates", "task1_polite"]
    assert [metric_of(task) for task, _ in found] == ["exact_match", "exact_match", "rouge_l"]
    assert [len(rows.test) for _, rows in found] == [1, 1, 300]
    assert [len(rows.test) for _, rows in load_tasks(tasks, n_test_rows=7)] == [1, 1, 7]
    assert load_tasks(tasks / "tasks") == found
    task_files = task.parent / "files"
    task_files.mkdir()
    task.rename(task_files / "a.toml")
    task.with_name("inbox.test.jsonl").rename(task_files / "inbox.test.jsonl")
    ((inbox, rows),) = load_tasks(task_files)
    assert (inbox.name, len(rows.test)) == ("inbox", 2)


def test_tasks_are_chosen_by_the_names_of_their_files(tasks: Path) -> None:
    (tasks / "tasks/broken.json").write_text("{")  # is not read where it is not asked for
    assert [task.name for task, _ in load_tasks(tasks, ["c*", "task1_*"])] == ["crates", "task1_polite"]
    with pytest.raises(InputError) as caught:
        load_tasks(tasks, ["boxs", "zzz*"])
    first, second = str(caught.value).splitlines()
    assert_says(first, "'boxs'", "did you mean boxes?")
    assert_says(second, "'zzz*'", "boxes, broken, crates")


def test_all_bad_tasks_are_named_at_once_and_nothing_is_made(sg: Call, tasks: Path, model: Path) -> None:
    place = tasks / "tasks"
    (place / "broken.json").write_text("{")
    (place / "other.json").write_text("[]")
    (place / "bad.toml").write_text('name = "bad"\ncolour = 1\n')
    write_json_task(tasks, "alike", labels=["refund", "refund!"])
    write_json_task(tasks, "results.md")
    (place / "copy.json").write_text((place / "boxes.json").read_text())
    (tasks / "test/crates.jsonl").unlink()
    result = sg("bench", tasks, "--model", model)
    assert (result.exit_code, result.stdout) == (2, "")
    told = result.stderr.splitlines()
    for file, *fault in (
        ("broken.json",),
        ("other.json", "no task"),
        ("bad.toml", "'colour'"),
        ("bad.toml", "instruction is missing"),
        ("crates.json", "no test rows"),
        ("copy.json", "name boxes", str(place / "boxes.json")),
        ("results.md.json", "name results.md"),
    ):
        assert any(all(part in line for part in (str(place / file), *fault)) for line in told), (file, fault)
    assert not Path("benches").exists()


def test_labels_that_scoring_cannot_tell_apart_are_told_with_their_file(tasks: Path) -> None:
    write_json_task(tasks, "alike", labels=["refund", "login", "login!"])
    with pytest.raises(InputError, match=r"alike\.json: .*'login' and 'login!'"):
        load_tasks(tasks)


@pytest.mark.parametrize(("name", "told"), [("empty", "holds no task files"), ("none", "is no directory")])
def test_a_directory_without_tasks(sg: Call, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    result = sg("bench", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr


# Running


def test_every_task_becomes_a_run_and_a_row(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path
) -> None:
    result = sg("bench", tasks, "--model", model, "--n-inputs", 7)
    assert result.exit_code == 0, result.output
    assert stages.ran == all_stages("boxes", "crates", "task1_polite")
    place = Path("benches/everyday")
    assert open_run(place / "crates").settings.n_inputs == 7
    assert [row.output for row in open_run(place / "boxes").test_rows] == ["login"]
    assert len(open_run(place / "task1_polite").test_rows) == 300
    lines = result.stdout.splitlines()
    assert lines[0] == "### Classification: Exact Match"
    assert [line.split()[1] for line in lines if line.startswith("|") and "+0.500" in line] == [
        "boxes",
        "crates",
        "**mean**",
        "task1_polite",
        "**mean**",
    ]
    assert (place / "results.md").read_text() == result.stdout
    begun = json.loads((place / "bench.json").read_text())
    assert begun["model"]["sha256"] == open_run(place / "boxes").model.sha256
    assert begun["settings"]["n_inputs"] == 7


def test_the_table_as_json(sg: Call, stages: ScriptedStages, tasks: Path, model: Path) -> None:
    result = sg("bench", tasks, "--model", model, "--out", "here", "--json")
    found = json.loads(result.stdout)
    assert found == json.loads(Path("here/results.json").read_text())
    assert [row["task"] for row in found["tasks"]] == ["boxes", "crates", "task1_polite"]
    boxes = found["tasks"][0]
    assert list(boxes["scores"]) == [item for item in Contender if item.is_expected(with_labels=True)]
    assert boxes["no_label_share"] == {"base_few_shot": 0.0, "tuned_merged": 0.0}
    assert "base_label_scoring" not in found["tasks"][2]["scores"]
    assert found["summary"]["classification"]["gain_over_better_base"]["mean"] == 0.25
    assert found["summary"]["generation"]["better"] == 1
    assert found["failed"] == {}


def test_called_again_it_goes_on_with_what_is_missing(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path
) -> None:
    arguments = ("bench", tasks, "--model", model)
    assert sg(*arguments, "--tasks", "crates").exit_code == 0
    assert stages.ran == all_stages("crates")
    result = sg(*arguments)
    assert stages.ran == all_stages("crates", "boxes", "task1_polite")
    assert "task 1 of 2: boxes" in result.stderr
    again = sg(*arguments, "--tasks=boxes")
    assert again.exit_code == 0
    assert "is finished" in again.stderr
    assert again.stdout == result.stdout  # nothing that is there is left out of the table
    assert stages.ran == all_stages("crates", "boxes", "task1_polite")


def test_a_task_that_fails_is_told_and_stops_no_other(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path
) -> None:
    stages.failing = {"boxes"}
    result = sg("bench", tasks, "--model", model)
    assert result.exit_code == 1
    assert stages.ran == all_stages("crates", "task1_polite")
    assert_says(
        result.stderr, "Error: boxes: generate did not finish", "`sg-local bench` with the same arguments"
    )
    assert result.stderr.splitlines()[-1].startswith("Error: not finished: boxes;")
    assert "boxes is not finished: generate did not finish" in result.stdout
    assert json.loads(Path("benches/everyday/bench.json").read_text())["failed"].keys() == {"boxes"}
    other = sg("bench", tasks, "--model", model, "--tasks=crates")
    assert other.exit_code == 0
    assert "- boxes is not finished" in other.stdout
    stages.failing.clear()
    result = sg("bench", tasks, "--model", model)
    assert result.exit_code == 0
    assert "not finished" not in result.output
    assert json.loads(Path("benches/everyday/bench.json").read_text())["failed"] == {}


def test_a_failed_task_may_be_finished_by_itself(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path
) -> None:
    stages.failing = {"boxes"}
    assert sg("bench", tasks, "--model", model, "--tasks=boxes").exit_code == 1
    finish_run(open_run(Path("benches/everyday/boxes")))
    result = sg("bench", tasks, "--model", model, "--tasks=boxes", "--json")
    assert (result.exit_code, json.loads(result.stdout)["failed"]) == (0, {})


def test_why_a_stage_failed_is_recorded_in_its_own_words(
    sg: Call, tasks: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_run: Run) -> None:
        raise SgLocalError("no made pair passed\nthe filters")

    monkeypatch.setattr("sg_local.stages.generate.run_generate", broken)
    result = sg("bench", tasks, "--model", model, "--tasks=boxes", "--json")
    assert json.loads(result.stdout)["failed"] == {"boxes": "no made pair passed\nthe filters"}
    assert "- boxes is not finished: no made pair passed; the filters\n" in Path(
        "benches/everyday/results.md"
    ).read_text("utf-8")
    # Another reason is not taken for the same one.
    monkeypatch.setattr("sg_local.runs.process.in_child_process", lambda _run, _stage: -9)
    result = sg("bench", tasks, "--model", model, "--tasks=boxes", "--json")
    assert json.loads(result.stdout)["failed"]["boxes"].startswith("generate was ended by SIGKILL")


def test_an_interruption_keeps_what_is_finished(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Run, stage: str) -> int:
        if run.task.name == "crates":
            raise KeyboardInterrupt
        return stages(run, stage)

    monkeypatch.setattr("sg_local.runs.process.in_child_process", interrupted)
    result = sg("bench", tasks, "--model", model)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1].endswith("the same command goes on from there")
    assert "| boxes |" in Path("benches/everyday/results.md").read_text()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--n-inputs=8"], ["begun with --n-inputs 7,", "called with --n-inputs 8:"]),
        (["--prompt-format=vicuna"], ["prompt format gguf,", "prompt format vicuna:"]),
    ],
)
def test_other_settings_are_refused(
    sg: Call,
    stages: ScriptedStages,
    tasks: Path,
    model: Path,
    contents: Contents,
    arguments: list[str],
    told: list[str],
) -> None:
    begun = ("bench", tasks, "--model", model, "--n-inputs=7", "--tasks=boxes")
    assert sg(*begun).exit_code == 0
    before = contents(Path("benches"))
    result = sg(*begun, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert_says(result.stderr, *told, "--out DIR")
    assert contents(Path("benches")) == before


def test_another_model_and_changed_tasks_are_refused(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path
) -> None:
    assert sg("bench", tasks, "--model", model).exit_code == 0
    other = model.with_name("other.gguf")
    other.write_bytes(model.read_bytes() + bytes(32))
    assert f"called with the model {other}" in sg("bench", tasks, "--model", other).stderr
    write_json_task(tasks, "boxes", instruction="Which one?")
    write_rows(tasks / "test/crates.jsonl", [{"input": "Pay.", "output": "refund"}])
    result = sg("bench", tasks, "--model", model)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "other instruction in it" in result.stderr
    assert "called with other test rows" in result.stderr


def test_a_directory_that_is_no_bench(sg: Call, stages: ScriptedStages, tasks: Path, model: Path) -> None:
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    result = sg("bench", tasks, "--model", model, "--out", "photos")
    assert result.exit_code == 2
    assert_says(result.stderr, "photos", "cat.jpg", "--out DIR")
    assert [path.name for path in Path("photos").iterdir()] == ["cat.jpg"]
    result = sg("bench", tasks, "--model", model, "--out", "photos/cat.jpg/x")
    assert (result.exit_code, "cannot be made" in result.stderr) == (1, True)
    assert stages.ran == []


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": {}, "settings": {}, "failed": {}}'])
def test_a_damaged_bench(sg: Call, stages: ScriptedStages, tasks: Path, model: Path, text: str) -> None:
    assert sg("bench", tasks, "--model", model, "--tasks=boxes").exit_code == 0
    Path("benches/everyday/bench.json").write_text(text)
    result = sg("bench", tasks, "--model", model, "--tasks=boxes")
    assert (result.exit_code, "bench.json is damaged" in result.stderr) == (2, True)


def test_a_bench_with_settings_that_are_gone(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path
) -> None:
    call = ("bench", tasks, "--model", model, "--tasks=boxes")
    assert sg(*call).exit_code == 0
    path = Path("benches/everyday/bench.json")
    begun = json.loads(path.read_text())
    for value, exit_code in ((0.0, 0), (0.5, 2)):
        begun["settings"]["prior_weight"] = value
        path.write_text(json.dumps(begun))
        result = sg(*call)
        assert (result.exit_code, "prior_weight = 0.5 is a setting that" in result.stderr) == (
            exit_code,
            value > 0,
        )


def test_one_writer(
    sg: Call, stages: ScriptedStages, tasks: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_local.runs.lock.LOCK_SECONDS", 0)
    Path("here").mkdir()
    with lock_run(Path("here")):
        result = sg("bench", tasks, "--model", model, "--out", "here")
    assert (result.exit_code, "another sg-local is working on here" in result.stderr) == (2, True)


# The table


def row(task: str, few_shot: float, tuned: float, verdict: str, **changes: Any) -> dict[str, Any]:
    gain = {"mean": tuned - few_shot, "interval_95": [-0.1, 0.9], "p": 0.0123, "verdict": verdict}
    return {
        "task": task,
        "kind": "classification",
        "n_rows": 300,
        "minutes": 10.0,
        "scores": {
            "base_zero_shot": 0.1,
            "base_few_shot": few_shot,
            "base_label_scoring": few_shot + 0.05,
            "tuned_adapter": tuned,
            "tuned_merged": tuned,
        },
        "gain": gain,
        "gain_over_label_scoring": {**gain, "mean": tuned - few_shot - 0.05},
        "gain_over_best": {**gain, "over": "base_label_scoring", "mean": tuned - few_shot - 0.05},
        "no_label_share": {"base_few_shot": 0.5, "tuned_merged": 0.0},
        "label_distance": {"base_few_shot": 0.4, "tuned_merged": 0.1},
        "agreement": {"share": 0.6389, "chance": 0.25, "p": 1e-9},
        **changes,
    }


ROWS = [
    row("a", 0.2, 0.6, "better"),
    row("b", 0.5, 0.7, "better", minutes=20.0),
    row("c", 0.5, 0.5, "no difference shown", agreement=None),
]


def test_a_merged_file_of_another_type_is_named(finished_run: Run) -> None:
    evaluation = json.loads(finished_run.file("evaluation.json").read_text())
    stages: dict[str, Any] = {
        "export": {"seconds": 3, "parity": {"merged_type": "Q8_0"}, "too_coarse": {"merged_type": "Q4_1"}}
    }
    told = markdown([row_of(evaluation, {"stages": stages})], {}).splitlines()
    assert any(all(part in line for part in ("inbox", "model.gguf is Q8_0", "Q4_1")) for line in told)
    stages["export"] |= {"parity": {"merged_type": "Q4_1"}, "made_in": "base+Q8_0"}
    assert "model.gguf is Q4_1 and Q8_0" in markdown([row_of(evaluation, {"stages": stages})], {}).replace(
        "\\", ""
    )
    stages["export"] |= {"made_in": "base"}
    del stages["export"]["too_coarse"]
    assert "model.gguf is" not in markdown([row_of(evaluation, {"stages": stages})], {})


def test_means_are_those_of_the_tasks_with_an_interval_over_them() -> None:
    found = summary(ROWS)["classification"]
    assert found["means"]["base_few_shot"] == 0.4
    assert found["gain"]["mean"] == 0.2
    # Gains 0.4, 0.2, 0: standard deviation 0.2, Student's t for 2 degrees of freedom 4.3027.
    half = 4.3027 * 0.2 / 3**0.5
    assert found["gain"]["interval_95"] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-4)
    assert found["gain_over_better_base"]["mean"] == pytest.approx(0.15)
    assert (found["better"], found["no_difference_shown"], found["worse"]) == (2, 1, 0)
    assert (found["n_tasks"], found["minutes"]) == (3, 40.0)
    assert summary(ROWS[:1])["classification"]["gain"]["interval_95"] is None
    assert summary([]) == {}


def test_the_markdown_is_a_table() -> None:
    lines = markdown(ROWS, {}).splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    assert len({len(cells) for cells in table}) == 1
    cells = dict(zip(table[0], table[2], strict=True))
    assert {head.strip(): cell.strip() for head, cell in cells.items()} == {
        "task": "a",
        "zero-shot": "0.100",
        "few-shot": "0.200",
        "label scoring": "0.250",
        "tuned adapter": "0.600",
        "tuned merged": "0.600",
        "gain over few-shot [95 %]": "+0.400 [-0.100, +0.900]",
        "gain over the base's best [95 %]": "+0.350 [-0.100, +0.900]",
        "p": "0.012",
        "verdict": "better",
        "no label": "50.0% → 0.0%",
        "label distance": "0.40 → 0.10",
        "as asked (chance)": "64% (25%)",
        "minutes": "10",
    }
    assert dict(zip(table[0], table[4], strict=True))[" as asked (chance) "].strip() == ""
    assert lines[-1].startswith(
        "3 tasks, against the base's best way: 2 better, 1 no difference shown, 0 worse. "
        "Mean gain over few-shot +0.200 [-0."
    )
    assert lines[-1].endswith("(95 % interval over tasks).")
    alone = markdown(ROWS[:1], {}).splitlines()[-1]
    assert alone.endswith(
        "Mean gain over few-shot +0.400, over the best of zero-shot, few-shot and label scoring +0.350."
    )


def test_few_shot_cut_at_its_first_line_has_a_column_where_that_makes_a_difference() -> None:
    over_first_line = {**ROWS[0]["gain"], "over": "base_few_shot_first_line", "mean": 0.25}
    cut = row("cut", 0.0, 0.6, "better", gain_over_first_line=over_first_line, gain_over_best=over_first_line)
    cut["scores"]["base_few_shot_first_line"] = 0.35
    lines = markdown([ROWS[0], cut], {}).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    place = table[0].index("its first line")
    assert [cells[place] for cells in table[2:]] == ["0.200", "0.350", "0.275"]
    # The best of all: 0.35 by label scoring for the first, 0.25 by the first line for the second.
    assert "over the best of zero-shot, few-shot, its first line and label scoring +0.300 [" in lines[-1]
    assert "its first line" not in markdown(ROWS, {})

    free = {**cut, "kind": "generation"}
    del free["scores"]["base_label_scoring"], free["gain_over_label_scoring"]
    told = summary([free])["generation"]
    assert (told["gain"]["mean"], told["gain_over_better_base"]["mean"]) == (0.6, 0.25)


def test_the_verdict_is_over_the_strongest_of_the_bases_ways(finished_run: Run) -> None:
    """Few-shot answers of a base model may all be wrong for their form: to beat them shows nothing."""
    evaluation = json.loads(finished_run.file("evaluation.json").read_text())
    worse = {**evaluation["gain"], "over": "base_many_shot", "mean": -0.4, "p": 0.001, "verdict": "worse"}
    evaluation["contenders"]["base_many_shot"] = evaluation["contenders"]["base_few_shot"]
    evaluation["gain_over_best"] = worse
    found = row_of(evaluation, {"stages": {}})
    assert summary([found])["classification"]["worse"] == 1
    lines = markdown([found], {}).splitlines()
    heads, _, cells, *_ = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    told = dict(zip(heads, cells, strict=True))
    assert (told["many-shot"], told["verdict"]) == ("0.500", "worse")
    assert told["gain over the base's best [95 %]"].startswith("-0.400 [")


def test_a_table_without_rows() -> None:
    assert markdown([], {}) == "no task is finished\n"
    assert markdown([], {"a": "why"}) == "- a is not finished: why\n"
