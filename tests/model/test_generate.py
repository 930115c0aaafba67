"""Making inputs with a model that cannot do what the filters ask for: tiny, of random numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_llama

import sg_local.stages.generate as stage
from sg_local.errors import SgLocalError
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.selfguide.prompts import INPUT_PROMPTS
from sg_local.settings import Settings
from sg_local.stages.generate import run_generate
from sg_local.task import load_task

TASK = """
name = "pairs"
instruction = "Sort the pair."
labels = ["same", "other"]

[[examples]]
input = "[left]: red? | (right): _red_ = 1?"
output = "same"

[[examples]]
input = "[left]: red? | (right): _blue_ = 0?"
output = "other"
"""


def begun(tmp_path: Path, **settings: Any) -> Run:
    (tmp_path / "task.toml").write_text(TASK)
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    made = Settings(prompt_format="vicuna", n_inputs=4, n_ctx=1024, max_input_tokens=24, **settings)
    return create_or_open_run(tmp_path / "run", load_task(str(tmp_path / "task.toml")), model, made)[0]


def test_where_no_trial_input_has_the_form_of_the_examples_inputs_of_any_form_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(engine: Engine, requests: Sequence[Request], *rest: Any) -> list[Completion]:
        calls.append(len(requests))
        return generate(engine, requests, *rest)

    monkeypatch.setattr(stage, "generate", counted)
    run = begun(tmp_path)
    run_generate(run)
    assert calls.count(stage.N_TRIALS) == len(INPUT_PROMPTS)  # each is made once, and judged twice
    told = capsys.readouterr().err
    assert "no trial input has the form of the examples; trying with inputs of any form" in told
    generated = run.manifest()["stages"]["generate"]
    trials = [(trial["style"], trial["form_filter"]) for trial in generated["probe"]]
    assert trials == [(style, holds_form) for holds_form in (True, False) for style in INPUT_PROMPTS]
    assert not any(trial["good"] for trial in generated["probe"][:3])
    assert any(trial["good"] for trial in generated["probe"][3:])
    assert generated["counts"]["kept"] >= 4
    assert "marks" not in generated["counts"]["dropped"]


def test_without_the_form_filter_inputs_are_tried_once(tmp_path: Path) -> None:
    run = begun(tmp_path, form_filter=False)
    run_generate(run)
    probe = run.manifest()["stages"]["generate"]["probe"]
    assert [(trial["style"], trial["form_filter"]) for trial in probe] == [
        (style, False) for style in INPUT_PROMPTS
    ]


def test_a_way_of_asking_that_was_set_by_hand_is_held_to_the_form(tmp_path: Path) -> None:
    run = begun(tmp_path, input_prompt="turns")
    with pytest.raises(SgLocalError, match=r"'marks': .*--no-form-filter"):
        run_generate(run)
