"""`import sg_local`: what it offers, that it costs nothing, and that its example is true."""

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_run import ScriptedStages, finish_run, rewrite
from scripted_engine import ScriptedEngine

import sg_local
from sg_local.errors import InputError, SgLocalError, WorseThanBase
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.runs.process import REASON_FILE
from sg_local.settings import Settings
from sg_local.task import load_task

ROOT = Path(__file__).parents[2]


def set_scores(run: Run, scores: dict[str, float], verdict: str = "better") -> None:
    """Other means than those that a scripted stage writes."""
    evaluation = json.loads(run.file("evaluation.json").read_text())
    for name, mean in scores.items():
        evaluation["contenders"][name]["exact_match"]["mean"] = mean
    evaluation["gain_over_best"]["verdict"] = verdict
    rewrite(run, "evaluation.json", json.dumps(evaluation))


def test_the_example_is_true(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a finished run in its place, and an engine that knows where this parcel belongs."""
    run, _ = create_or_open_run(
        Path("runs/support-inbox"), load_task("support-inbox"), model, Settings(n_inputs=160)
    )
    finish_run(run)
    set_scores(run, {"base_few_shot": 0.34, "tuned_merged": 0.71})
    monkeypatch.setattr("sg_local.models.find_present", lambda _model: model)
    engine = ScriptedEngine(
        lambda _file, prompt: "delivery" if "parcel?" in prompt else "login", room_tokens=4096
    )
    engine.replace_llama_cpp(monkeypatch)
    examples = doctest.DocTestFinder(recurse=False).find(sg_local, "sg_local")
    assert [len(example.examples) for example in examples] == [4]
    failures = doctest.DocTestRunner().run(examples[0], out=lambda text: pytest.fail(text)).failed
    assert failures == 0
    assert engine.opened == [("model.gguf", None, -1)]


def test_the_example_is_that_of_the_readme() -> None:
    lines = [line.strip() for line in (sg_local.__doc__ or "").splitlines() if line.startswith("    ")]
    assert "\n".join(lines) in (ROOT / "README.md").read_text("utf-8")


def test_every_name_is_offered_and_documented() -> None:
    for name in sg_local.__all__:
        offered = getattr(sg_local, name)
        assert offered.__doc__, name
        assert offered.__module__.startswith("sg_local."), name
    assert set(sg_local.__all__) <= set(dir(sg_local))
    assert sg_local.InputError is InputError
    with pytest.raises(AttributeError, match="module 'sg_local' has no attribute 'runn'"):
        _ = sg_local.runn


def loaded_by(code: str) -> set[str]:
    """The modules of the package that are loaded after this code ran in a fresh interpreter."""
    code += "\nimport sys; print(*[name for name in sys.modules if name.startswith('sg_local')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_it_loads_nothing_else() -> None:
    assert loaded_by("import sg_local") == {"sg_local"}
    assert loaded_by("from sg_local import SgLocalError") == {"sg_local", "sg_local.errors"}


def test_functions_stay_functions_whatever_was_imported_before() -> None:
    """A module of the same name would take the place of the function."""
    code = """
import pkgutil, importlib
import sg_local
for module in pkgutil.iter_modules(sg_local.__path__):
    assert module.name not in sg_local.__all__, module.name
import sg_local.runs.pipeline, sg_local.answers, sg_local.cli.run, sg_local.cli.predict
assert callable(sg_local.run) and callable(sg_local.predict)
"""
    assert "sg_local.runs.loop" in loaded_by(code)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ScriptedStages:
    scripted = ScriptedStages()
    monkeypatch.setattr("sg_local.runs.process.in_child_process", scripted)
    return scripted


def test_a_run_ends_with_its_files_and_scores(task: Path, model: Path, stages: ScriptedStages) -> None:
    result = sg_local.run(task, model=model, settings=sg_local.Settings(n_inputs=7), run_dir="here")
    assert result.directory == Path("here")
    for path in (result.adapter, result.model, result.modelfile):
        assert path.is_file()
    assert list(result.scores) == [
        "base_zero_shot",
        "base_few_shot",
        "base_label_scoring",
        "tuned_adapter",
        "tuned_merged",
    ]
    assert result.scores["tuned_merged"] == 0.5
    assert result.run.settings == Settings(n_inputs=7)
    result.gate()
    n_stages = len(stages.ran)
    again = sg_local.run(str(task), model=str(model), settings=Settings(n_inputs=7), run_dir=Path("here"))
    assert (again, len(stages.ran)) == (result, n_stages)


def test_a_tuned_model_that_is_worse_fails_at_the_gate(finished_run: Run, task: Path) -> None:
    set_scores(finished_run, {}, verdict="worse")
    result = sg_local.run(
        task, model=finished_run.model.path, settings=Settings(n_inputs=7), run_dir=finished_run.path
    )
    with pytest.raises(WorseThanBase, match="significantly worse than base_label_scoring"):
        result.gate()


def test_a_run_may_stop_before_its_end(task: Path, model: Path, stages: ScriptedStages) -> None:
    result = sg_local.run(task, model=model, until="curate")
    assert result.directory == Path("runs/inbox")
    assert [stage for _, stage in stages.ran] == ["generate", "annotate", "curate"]
    with pytest.raises(InputError, match=r"evaluation\.json is missing"):
        _ = result.scores


def test_a_task_of_ones_own_making_is_checked_as_one_from_a_file(model: Path, stages: ScriptedStages) -> None:
    example = sg_local.Example("Money back.", "refund")
    task = sg_local.Task("boxes", "Which box?", (example,), ("refund", "login"))
    assert sg_local.run(task, model=model, until="generate").run.task == task
    wrong = sg_local.Task("No name", "Which box?", (example,) * 4, ("login", "invoice"))
    with pytest.raises(InputError) as caught:
        sg_local.run(wrong, model=model)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["task No name"] * 5
    assert "examples[3]: output 'refund' is not one of the labels" in str(caught.value)
    assert not Path("runs/No name").exists()


def test_why_a_stage_failed_is_a_note_on_the_error(
    task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message itself says "see above", which is on stderr."""

    def fail(run: Run, _stage: str) -> int:
        run.file(REASON_FILE).write_text("no made input passed")
        return 1

    monkeypatch.setattr("sg_local.runs.process.in_child_process", fail)
    with pytest.raises(SgLocalError, match="generate did not finish") as caught:
        sg_local.run(task, model=model)
    assert caught.value.__notes__ == ["no made input passed"]


def test_answers_come_in_order_and_none_for_what_does_not_fit(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ScriptedEngine().replace_llama_cpp(monkeypatch)
    inputs = (text for text in ("one a", " two b ", "long " * 50))
    assert sg_local.predict(inputs, model=finished_run.file("model.gguf")) == ["a", "b", None]
    assert sg_local.predict([], model=finished_run.file("model.gguf")) == []


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"inputs": ["a", " ", 3, "\ud800"]},
            "input 2 is empty\ninput 3 must be a text in quotes, not a number\ninput 4 holds half of a surrogate",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 should be at least 1"),
        ({"prompt_format": "vicunia"}, "prompt_format = 'vicunia' should be one of auto, gguf, vicuna"),
        ({"task": "nothing"}, "no shipped task is named 'nothing'"),
        ({"model": "nothing"}, "no model is named 'nothing'"),
    ],
)
def test_what_cannot_be_answered_is_refused(finished_run: Run, options: dict[str, Any], fault: str) -> None:
    call = {"inputs": ["a"], "model": finished_run.file("model.gguf"), **options}
    with pytest.raises(InputError) as caught:
        sg_local.predict(**call)
    assert fault in str(caught.value)
