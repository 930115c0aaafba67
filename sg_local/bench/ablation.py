"""Ablations: the runs of a bench once more with one setting changed, to measure what each part of the method is worth.

    --ablate n_layouts=1       OUT/ablations/n_layouts=1/<task>/     a run with that setting, the rest as in OUT/<task>
    --baselines                OUT/ablations/train_rows=demonstrations/<task>/
    -> {"switch": "n_layouts=1", "task": "sst2", "metric": "exact_match", "default": 0.79, "switched": 0.74,
        "difference": {"mean": 0.05, "interval_95": [-0.01, 0.11], "p": 0.13, "verdict": "no difference shown"}}

The results of the stages that do not depend on the setting are copied, not computed again; so are the base's answers
(runs/second_try.py). A difference is `default` - `switched`, the scores of the served files on the same test rows:
over 0, the default helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.report.ablation import BASELINES, SEED, AblationRow
from sg_local.report.scores import read_evaluation, read_predictions
from sg_local.runs.begin import ModelFile, create_or_open_run, with_full_paths
from sg_local.runs.directory import Run
from sg_local.runs.given import TaskRows
from sg_local.runs.second_try import as_file_name, assigned, take_stages
from sg_local.selfguide.contenders import BASELINE, TUNED, Contender
from sg_local.selfguide.evaluation import metric_mean, scores_of
from sg_local.selfguide.metrics import METRICS, Metric
from sg_local.selfguide.statistics import Difference, average, difference
from sg_local.settings import STAGES, Settings, declared_for, resolve_settings, unreached
from sg_local.task_files.rows import load_test_rows

PLACE = "ablations"  # in the directory of the bench


@dataclass(frozen=True)
class Ablation:
    """A setting, with another value than the bench has. Stored files call it a switch."""

    name: str
    value: Any

    @property
    def text(self) -> str:
        """Setting and value as on the command line: "n_layouts=1"."""
        return assigned(self.name, self.value)

    @property
    def first_stage(self) -> str:
        """The first stage that may read the setting."""
        return declared_for(self.name) or STAGES[0]

    @property
    def earlier(self) -> tuple[str, ...]:
        """The stages that do not depend on the setting."""
        return unreached([self.name])

    def place(self, bench: Path) -> Path:
        """The directory of its runs in that of a bench; a value may be a path, and becomes one name there."""
        return bench / PLACE / as_file_name(self.text)

    def applied(self, settings: Settings) -> Settings:
        """The settings with this one changed. Only `--baselines` scores the base many-shot."""
        return replace(settings, **{self.name: self.value, "many_shot": self.text == BASELINES})


def parse_ablations(texts: Sequence[str], settings: Settings) -> list[Ablation]:
    """Ablations from "NAME=VALUE", or from "NAME" for the opposite of true or false. Repeated ones count once.

    Raises InputError with all unknown names, wrong values, values that the settings already have, and settings that no
    tuned model depends on.
    """
    faults = Faults()
    ablations: dict[str, Ablation] = {}
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
        ablation = Ablation(name, getattr(changed, name))
        if getattr(settings, name) == ablation.value:
            faults.add(f"--ablate {text}: {name} has this value already: give another")
        elif ablation.first_stage == STAGES[-1]:
            faults.add(
                f"--ablate {text}: {name} changes what is scored, and no tuned model: give it to the whole bench"
            )
        ablations[ablation.text] = ablation
    faults.raise_any()
    return list(ablations.values())


def begin_ablation(ablation: Ablation, run: Run, bench: Path, model: ModelFile) -> Run | None:
    """The run of one task with the ablation, as far as it follows from `run`; None if there is nothing left to do.

    The results of earlier stages are copied from `run`; if `run` changed since, they are copied again. Raises
    SgLocalError or InputError where the run cannot be begun.
    """
    path = ablation.place(bench) / run.task.name
    settings = ablation.applied(run.settings)
    ablated, _ = create_or_open_run(path, run.task, model, settings, _rows(run))
    if is_current(ablation, run, ablated):
        return None
    earlier = ablation.earlier
    if earlier and not (ablated.is_finished(earlier[-1]) and ablated.shares(run, earlier)):
        take_stages(ablated, run, earlier)
    return ablated


def is_current(ablation: Ablation, run: Run, ablated: Run) -> bool:
    """Whether the run with the ablation is finished, and differs from `run` only by the ablation."""
    return ablated.is_finished(STAGES[-1]) and ablated.shares(run, ablation.earlier)


def comparison(bench: Path, run: Run, ablated: Run) -> AblationRow | None:
    """A run with an ablation, compared with the run without; None if it is not finished or not of this bench."""
    before, now = run.settings.as_dict(), ablated.settings.as_dict()
    for ablation in [Ablation(name, now[name]) for name in now if now[name] != before[name]]:
        # Any other directory is none of a bench, but someone's copy, set aside.
        is_ours = ablation.place(bench) == ablated.path.parent
        if is_ours and is_current(ablation, run, ablated):
            return compared(ablation, run, ablated)
    return None


def compared(ablation: Ablation, run: Run, ablated: Run) -> AblationRow:
    """The scores of the served files on the test rows, without and with the ablation."""
    evaluation = read_evaluation(run)
    metric = METRICS[evaluation["metric"]]  # an earlier version may have judged the other run by another one
    default, other = _scores(run, TUNED, metric), _scores(ablated, TUNED, metric)
    row: AblationRow = {
        "switch": ablation.text,
        "task": run.task.name,
        "metric": metric,
        "default": average(default),
        "switched": average(other),
        "difference": _difference(default, other),
    }
    if ablation.name == SEED:
        row["base_few_shot"] = metric_mean(evaluation["contenders"][BASELINE], metric)["mean"]
        row["seed"] = run.settings.seed
    if ablation.text == BASELINES:
        many_shot = _scores(ablated, Contender.MANY_SHOT, metric)
        row["base_many_shot"] = average(many_shot)
        row["many_shot_demonstrations"] = read_evaluation(ablated)["contenders"][Contender.MANY_SHOT][
            "demonstrations"
        ]
        row["gain_over_many_shot"] = _difference(default, many_shot)
    return row


def _scores(run: Run, contender: Contender, metric: Metric) -> tuple[float, ...]:
    return tuple(scores_of(read_predictions(run, contender), metric))


@cache  # a bench compares everything again after each run, and resampling takes a tenth of a second
def _difference(after: tuple[float, ...], before: tuple[float, ...]) -> Difference:
    return difference(after, before)


def _parsed(text: str, kind: Any) -> Any:
    """The text as a value of this type. If that fails, it stays text, which the settings then refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _rows(run: Run) -> TaskRows:
    """What a run has of its task's files, all test rows among it."""
    test = load_test_rows(run.file("test.jsonl"), run.task.labels)
    return TaskRows(test, run.given_inputs, run.labelled_rows)
