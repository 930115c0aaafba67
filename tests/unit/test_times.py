"""How long a run takes: told before it starts, beside what it took, and by what earlier runs took."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call
from finished_run import ScriptedStages
from known_sizes import SMOLLM2
from messages import assert_says

import sg_local.runs.times as times_module
from sg_local.models import store_root
from sg_local.plan.sizes import TaskTokens
from sg_local.plan.times import Earlier, Speed, seconds_by_speed, stage_works, told_seconds
from sg_local.runs.directory import Run, open_run
from sg_local.settings import STAGES, Settings

SPEED = Speed(prompt=100.0, generated=50.0)
INBOX = TaskTokens(
    instruction=73, demonstrations=108, input=16, answer=3, input_limit=128, labels=12, test_rows=100
)
QUICK = Settings(n_inputs=160, max_new_tokens=64, max_test_rows=100)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base was measured on this machine."""
    monkeypatch.setattr(times_module, "known_speeds", lambda _base, _settings: {"base": SPEED})


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What stages take, by their entries in the manifest."""
    took = dict.fromkeys(STAGES, 30.0)
    note_told = Run.note_told

    def noted(run: Run, stage: str, told: float) -> float:
        manifest = run.manifest()
        manifest["stages"][stage]["seconds"] = took[stage]
        run._write_manifest(manifest)
        return note_told(run, stage, told)

    monkeypatch.setattr(Run, "note_told", noted)
    return took


def told_in(run: Path) -> dict[str, float]:
    entries = open_run(run).manifest()["stages"]
    return {stage: entry["told_seconds"] for stage, entry in entries.items()}


def test_the_work_of_the_stages_is_what_a_real_run_counted() -> None:
    """support-inbox with SmolLM2-135M and `quick`: unshared prompt tokens, generated tokens, tokens of batches."""
    works = stage_works(SMOLLM2, QUICK, INBOX)
    counted = {
        "generate": (6532, 8066, 0),
        "annotate": (20028, 0, 0),
        "train": (0, 0, 17900),
        "evaluate": (13671, 1794, 0),
    }
    for stage, (prompt, generated, trained) in counted.items():
        work = works[stage]
        assert work.prompt_tokens == pytest.approx(prompt, rel=0.35)
        assert work.generated_tokens == pytest.approx(generated, rel=0.25)
        assert work.trained_tokens == pytest.approx(trained, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "prompt", "decoded"),
    [
        ((60, 114, 10, 14), 13752, 8031),  # polite-request
        ((88, 96, 17, 5), 10316, 4856),  # task036
    ],
)
def test_samples_that_agree_are_computed_once(
    tokens: tuple[int, int, int, int], prompt: int, decoded: int
) -> None:
    """Free answers with SmolLM2-135M and `quick`: unshared prompt tokens, and those that were evaluated beside them."""
    instruction, demonstrations, of_input, answer = tokens
    counted = TaskTokens(instruction, demonstrations, of_input, answer, 128, labels=0, test_rows=100)
    work = stage_works(SMOLLM2, QUICK, counted)["annotate"]
    assert work.prompt_tokens == pytest.approx(prompt, rel=0.25)
    assert work.generated_tokens == pytest.approx(decoded, rel=0.35)


def test_more_to_do_takes_longer() -> None:
    def seconds_of(stage: str, settings: Settings = QUICK, tokens: TaskTokens = INBOX, **given: Any) -> float:
        return seconds_by_speed(stage_works(SMOLLM2, settings, tokens, **given)[stage], SPEED)

    more = Settings(n_inputs=320, max_new_tokens=64, max_test_rows=100)
    for stage in ("generate", "annotate", "train"):
        assert 1.4 < seconds_of(stage, more) / seconds_of(stage) < 2.1
    assert seconds_of("generate", n_real_inputs=160) == seconds_of("generate")  # as many are made beside them
    for stage in ("annotate", "train"):
        assert 1.3 < seconds_of(stage, n_real_inputs=160) / seconds_of(stage) < 2.1
    alone = Settings(n_inputs=160, max_new_tokens=64, max_test_rows=100, least_made_share=0)
    assert seconds_of("generate", alone, n_real_inputs=160) < 0.1 * seconds_of("generate")
    assert seconds_of("annotate", n_real_inputs=160) > 0.7 * seconds_of("annotate")
    assert seconds_of("train", Settings(n_inputs=160, epochs=6)) > 1.8 * seconds_of("train")
    # The examples are computed where the tuned model sees them.
    shown = Settings(n_inputs=160, train_demonstrations=True)
    assert seconds_of("export", shown) - seconds_of("export") == pytest.approx(4 * 16 * 108 / SPEED.prompt)


def test_earlier_runs_correct_what_is_told() -> None:
    work = stage_works(SMOLLM2, QUICK, INBOX)["annotate"]
    by_speed = told_seconds(work, SPEED)
    slow = Speed(SPEED.prompt / 2, SPEED.generated / 2)
    alike = [Earlier(work, SPEED, factor * by_speed) for factor in (1.5, 1.5, 9.0)]
    assert told_seconds(work, SPEED, alike) == pytest.approx(1.5 * by_speed)
    # Of a slower model: it took what its own speed says, and nothing is to be corrected.
    other = [Earlier(work, slow, told_seconds(work, slow))]
    assert told_seconds(work, SPEED, other) == pytest.approx(by_speed)


def test_a_run_tells_and_shows_what_it_took_and_the_next_one_knows(
    sg: Call, task: Path, model: Path, stages: ScriptedStages, measured: None, seconds: dict[str, float]
) -> None:
    result = sg("run", task, "--model", model, "--run", "first")
    assert result.exit_code == 0
    first = told_in(Path("first"))
    assert first.keys() == set(STAGES)
    assert_says(result.stderr, "by a short measurement here", "other work")
    head, *table = result.stderr.partition("told    took\n")[0:3:2]
    assert "generate" in head
    assert [line.split()[0] for line in table[0].splitlines()[:7]] == [*STAGES, "in"]
    assert table[0].splitlines()[5].endswith("30 s")
    assert table[0].splitlines()[6].split()[-2:] == ["3", "min"]
    # The next one is told what the first took, more for more to do; a finished run tells nothing.
    again = sg("run", task, "--model", model, "--run", "first")
    assert "about" not in again.stderr
    result = sg("run", task, "--model", model, "--run", "second")
    assert "as 1 earlier run here took" in result.stderr
    assert told_in(Path("second")) == dict.fromkeys(STAGES, 30.0)
    more = told_in(Path("third")) if sg(*_more(task, model)).exit_code == 0 else {}
    assert more["annotate"] > 50
    assert more["export"] == 30.0


def _more(task: Path, model: Path) -> list[object]:
    return ["run", task, "--model", model, "--run", "third", "--n-inputs", 800]


def test_what_went_on_with_pieces_is_no_measure(
    sg: Call, task: Path, model: Path, stages: ScriptedStages, measured: None, seconds: dict[str, float]
) -> None:
    assert sg("run", task, "--model", model, "--run", "first", "--until", "generate").exit_code == 0
    Path("first/outputs.jsonl").write_text("")
    assert sg("run", task, "--model", model, "--run", "first").exit_code == 0
    (records,) = json.loads((store_root() / "times.json").read_text()).values()
    assert [record["stage"] for record in records] == [stage for stage in STAGES if stage != "annotate"]


def test_damaged_times_are_nobodys_loss(
    sg: Call, task: Path, model: Path, stages: ScriptedStages, measured: None, seconds: dict[str, float]
) -> None:
    store_root().mkdir(parents=True, exist_ok=True)
    path = store_root() / "times.json"
    for text in ("{", "[]", '{"a": 3}'):
        path.write_text(text)
        result = sg("run", task, "--model", model, "--run", f"run{len(text)}", "--until", "generate")
        assert result.exit_code == 0
        assert "by a short measurement" in result.stderr
        assert len(json.loads(path.read_text())) >= 1


def test_where_nothing_can_be_measured_nothing_is_told(
    sg: Call, task: Path, model: Path, stages: ScriptedStages
) -> None:
    result = sg("run", task, "--model", model, "--run", "first")
    assert result.exit_code == 0
    assert "about" not in result.stderr
    assert "told_seconds" not in Path("first/manifest.json").read_text()


def test_plan_tells_the_time(sg: Call, task: Path, nvidia: Path, model: Path, measured: None) -> None:
    result = sg("plan", task, "--model", model)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2].split()[-1] == "time"
    assert_says(result.stdout, "in all, by a short measurement here")
    facts = json.loads(sg("plan", task, "--model", model, "--json").stdout)
    assert facts["time"]["seconds"].keys() == set(STAGES)
    # Nobody knows how fast another machine is.
    assert "time" not in sg("plan", task, "--model", model, "--gpu-memory", 8).stdout.splitlines()[2]
