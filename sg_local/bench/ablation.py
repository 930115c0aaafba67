"""One setting at a time against finished runs: what each part of the method is worth.

    --ablate n_layouts=1       OUT/ablations/n_layouts=1/<task>/     a run with that setting, the rest as in OUT/<task>
    --baselines                OUT/ablations/train_rows=demonstrations/<task>/
    -> {"switch": "n_layouts=1", "task": "sst2", "metric": "exact_match", "default": 0.79, "switched": 0.74,
        "difference": {"mean": 0.05, "interval_95": [-0.01, 0.11], "p": 0.13, "verdict": "no difference shown"}}

What a run did before the first stage that reads the setting is copied, not done again; so are the untuned model's
answers. A difference is of the served files over the same test rows, default - switched: over 0 the default helps.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from sg_local.errors import InputError, SgLocalError
from sg_local.files import Faults, copy_file
from sg_local.progress import say
from sg_local.report.ablation import BASELINES, SEED, AblationRow
from sg_local.report.scores import read_evaluation, read_predictions
from sg_local.runs.begin import ModelFile, create_or_open_run, with_full_paths
from sg_local.runs.directory import Run, open_run
from sg_local.runs.lock import lock_run
from sg_local.runs.pipeline import run_pipeline
from sg_local.runs.process import reason_of_failure
from sg_local.selfguide.contenders import BASELINE, TUNED, Contender
from sg_local.selfguide.evaluation import metric_mean, predictions_file, scores_of
from sg_local.selfguide.metrics import metric_of
from sg_local.selfguide.statistics import Difference, average, difference
from sg_local.settings import STAGES, Settings, declared_for, resolve_settings
from sg_local.task import Example, load_test_rows

PLACE = "ablations"  # in the directory of the bench
# What the base's greedy answers depend on; with any other switch they are what they were.
_READ_BY_BASE = ("prompt_format", "n_ctx", "n_parallel", "n_threads", "n_gpu_layers", "max_new_tokens")


@dataclass(frozen=True)
class Switch:
    """A setting with another value than the bench's."""

    name: str
    value: Any

    @property
    def text(self) -> str:
        """As it is written on the command line: "n_layouts=1"."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name}={value}"

    @property
    def first_stage(self) -> str:
        """The first stage that may read the setting."""
        return declared_for(self.name) or STAGES[0]

    @property
    def earlier(self) -> tuple[str, ...]:
        """The stages that do not read the setting, nor what comes of it."""
        return STAGES[: STAGES.index(self.first_stage)]

    def place(self, bench: Path) -> Path:
        """Where its runs are, in the directory of a bench; a value may be a path, and is one name there."""
        return bench / PLACE / re.sub(r"[^\w=., -]", lambda match: f"%{ord(match[0]):02x}", self.text)

    def applied(self, settings: Settings) -> Settings:
        """The settings with this one changed. The untuned model with many pairs is scored for the baselines alone."""
        return replace(settings, **{self.name: self.value, "many_shot": self.text == BASELINES})


def parse_switches(texts: Sequence[str], settings: Settings) -> list[Switch]:
    """Switches from "NAME=VALUE", or "NAME" for the opposite of true or false, each once.

    Raises InputError with all unknown names, values that are no such setting's, values that the settings have, and
    settings that no tuned model depends on.
    """
    faults = Faults()
    switches: dict[str, Switch] = {}
    types = {item.name: item.type for item in fields(Settings)}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name in types and not equals and types[name] is not bool:
            faults.add(f"--ablate {text}: give a value, {name}=VALUE")
            continue
        parsed = _parsed(value.strip(), types.get(name)) if equals else not getattr(settings, name, None)
        try:
            changed = with_full_paths(resolve_settings("default", {**settings.as_dict(), name: parsed}))
        except InputError as error:
            faults.add(f"--ablate {text}: {error}")
            continue
        switch = Switch(name, getattr(changed, name))
        if getattr(settings, name) == switch.value:
            faults.add(f"--ablate {text}: {name} has this value already: give another")
        elif switch.first_stage == STAGES[-1]:
            faults.add(
                f"--ablate {text}: {name} changes what is scored, and no tuned model: give it to the whole bench"
            )
        switches[switch.text] = switch
    faults.raise_any()
    return list(switches.values())


def run_switch(switch: Switch, run: Run, bench: Path, model: ModelFile) -> bool:
    """Runs what is not finished of one task with the switch; returns False when there was nothing to do.

    What the stages before it wrote is taken from `run`, and again where that was done anew since. Raises SgLocalError
    or InputError as the pipeline.
    """
    path = switch.place(bench) / run.task.name
    settings = switch.applied(run.settings)
    switched, _ = create_or_open_run(path, run.task, model, settings, _all_test_rows(run))
    if is_current(switch, run, switched):
        return False
    say(f"{switch.text}: {run.task.name}, {path}")
    earlier = switch.earlier
    if earlier and not (switched.is_finished(earlier[-1]) and switched.shares(run, earlier)):
        with lock_run(run.path), lock_run(path):
            switched.forget_from(switch.first_stage, keep_partial=False)
            switched.take_over(run, earlier)
    run_pipeline(switched, STAGES[-2], command="bench")
    if switch.name not in _READ_BY_BASE:
        _copy_base_answers(run, switched)
    run_pipeline(switched, command="bench")
    return True


def is_current(switch: Switch, run: Run, switched: Run) -> bool:
    """Whether a run with the switch is finished, and differs from `run` by the switch alone."""
    return switched.is_finished(STAGES[-1]) and switched.shares(run, switch.earlier)


def why_failed(switch: Switch, task_name: str, bench: Path, error: SgLocalError) -> str:
    """The reason in the words of the stage that failed, if it left any."""
    path = switch.place(bench) / task_name
    return (reason_of_failure(open_run(path)) if (path / "settings.toml").exists() else None) or str(error)


def comparison(bench: Path, run: Run, switched: Run) -> AblationRow | None:
    """A finished run with a switch in a bench's directory, beside the one without; None where it is no such run."""
    before, now = run.settings.as_dict(), switched.settings.as_dict()
    for switch in [Switch(name, now[name]) for name in now if now[name] != before[name]]:
        # Any other directory is none of a bench, but someone's copy, set aside.
        is_ours = switch.place(bench) == switched.path.parent
        if is_ours and is_current(switch, run, switched):
            return compared(switch, run, switched)
    return None


def compared(switch: Switch, run: Run, switched: Run) -> AblationRow:
    """The served files' scores on the test rows, without and with the switch."""
    metric = metric_of(run.task)
    default, other = _scores(run, TUNED), _scores(switched, TUNED)
    row: AblationRow = {
        "switch": switch.text,
        "task": run.task.name,
        "metric": metric,
        "default": average(default),
        "switched": average(other),
        "difference": _difference(default, other),
    }
    if switch.name == SEED:
        few_shot = read_evaluation(run.file("evaluation.json"))["contenders"][BASELINE]
        row["base_few_shot"] = metric_mean(few_shot, metric)["mean"]
        row["seed"] = run.settings.seed
    if switch.text == BASELINES:
        many_shot = read_evaluation(switched.file("evaluation.json"))["contenders"][Contender.MANY_SHOT]
        row["base_many_shot"] = metric_mean(many_shot, metric)["mean"]
        row["many_shot_demonstrations"] = many_shot["demonstrations"]
        row["gain_over_many_shot"] = _difference(default, _scores(switched, Contender.MANY_SHOT))
    return row


def _scores(run: Run, contender: Contender) -> tuple[float, ...]:
    rows = read_predictions(run.file(predictions_file(contender)))
    return tuple(scores_of(rows, metric_of(run.task)))


@cache  # a bench compares everything again after each run, and resampling takes a tenth of a second
def _difference(after: tuple[float, ...], before: tuple[float, ...]) -> Difference:
    return difference(after, before)


def _parsed(text: str, kind: Any) -> Any:
    """The value of a setting of this type; text that is none stays text, which the settings then refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _all_test_rows(run: Run) -> list[Example]:
    return load_test_rows(run.file("test.jsonl"), run.task.labels)


def _copy_base_answers(run: Run, switched: Run) -> None:
    """What the base answers without made rows does not depend on the switch; evaluate takes what is there already."""
    with lock_run(switched.path):
        for contender in Contender:
            source, target = (place.file(predictions_file(contender)) for place in (run, switched))
            if not contender.uses_made_rows and source.exists() and not target.exists():
                copy_file(source, target)
