"""One setting at a time against finished runs: what each part of the method is worth.

    --ablate n_layouts=1       OUT/ablations/n_layouts=1/<task>/     a run with that setting, the rest as in OUT/<task>
    --baselines                OUT/ablations/train_rows=demonstrations/<task>/
    -> {"switch": "n_layouts=1", "task": "sst2", "metric": "exact_match", "default": 0.79, "switched": 0.74,
        "difference": {"mean": 0.05, "interval_95": [-0.01, 0.11], "p": 0.13}}

What a run did before the first stage that reads the setting is copied, not done again; so are the untuned model's
answers. A difference is of the served files over the same test rows, default - switched: over 0 the default helps.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sg_local.errors import InputError, SgLocalError
from sg_local.pipeline import failure, run_pipeline
from sg_local.progress import say
from sg_local.records import Faults, read_json, read_rows
from sg_local.run import Run, create_or_open_run, lock_run, open_run
from sg_local.selfguide.metrics import interval_over_tasks, paired_difference, paired_test
from sg_local.settings import STAGES, Settings, resolve_settings
from sg_local.stages.evaluate import BASELINE, LABEL_SCORING, MANY_SHOT, MAX_EVALUATION_BYTES, TUNED
from sg_local.task import Example, load_test_rows

Row = dict[str, Any]

# The paper's other baselines: the tuned model of the demonstrations alone, and the made pairs as a long prompt.
BASELINES = "train_rows=demonstrations"
_UNTUNED = ("base_zero_shot", BASELINE, LABEL_SCORING, MANY_SHOT)


@dataclass(frozen=True)
class Switch:
    """A setting with another value than the bench's."""

    name: str
    value: Any

    @property
    def text(self) -> str:
        """As it is written on the command line: "n_layouts=1"."""
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name}={shown}"

    @property
    def first_stage(self) -> str:
        """The first stage that reads the setting."""
        [group] = [item.metadata["group"] for item in fields(Settings) if item.name == self.name]
        return STAGES[0] if group == "engine" else str(group)

    def applied(self, settings: Settings) -> Settings:
        """The settings with this one changed. The baselines' run also scores the untuned model with many pairs."""
        changed = {self.name: self.value} | ({"many_shot": True} if self.text == BASELINES else {})
        return replace(settings, **changed)


def parse_switches(texts: Sequence[str], settings: Settings) -> list[Switch]:
    """Switches from "NAME=VALUE", each once.

    Raises InputError with all unknown names, values that are no such setting's, and values that the settings have.
    """
    faults = Faults()
    found: dict[str, Switch] = {}
    types = {item.name: item.type for item in fields(Settings)}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        try:
            switch = Switch(name, _parsed(value.strip(), types.get(name)))
            resolve_settings("default", {**settings.as_dict(), switch.name: switch.value})
        except InputError as error:
            faults.add(f"--ablate {text}: {error}")
            continue
        if getattr(settings, name) == switch.value:
            faults.add(f"--ablate {text}: {name} has this value already: give another")
        found[switch.text] = switch
    faults.raise_any()
    return list(found.values())


def run_switch(switch: Switch, run: Run, place: Path) -> Row:
    """The run of one task with the switch, as far as it is not finished, and its comparison with `run`.

    place: the directory of the bench. Raises SgLocalError or InputError as the pipeline.
    """
    path = place / "ablations" / switch.text / run.task.name
    settings = switch.applied(run.settings)
    switched, _ = create_or_open_run(path, run.task, run.model.path, settings, _all_test_rows(run))
    earlier = STAGES[: STAGES.index(switch.first_stage)]
    if earlier and not switched.is_finished(earlier[-1]):
        with lock_run(path):
            switched.take_over(run, earlier)
    if not switched.is_finished(STAGES[-1]):
        say(f"{switch.text}: {run.task.name}, {path}")
        run_pipeline(switched, STAGES[-2], command="bench")
        if switch.first_stage != STAGES[0] and switch.name != "max_new_tokens":
            _copy_untuned_answers(run, switched)
        run_pipeline(switched, command="bench")
    return compared(switch, run, switched)


def why_failed(switch: Switch, task_name: str, place: Path, error: SgLocalError) -> str:
    """The reason in the words of the stage that failed, if it left any."""
    path = place / "ablations" / switch.text / task_name
    return (failure(open_run(path)) if (path / "settings.toml").exists() else None) or str(error)


def compared(switch: Switch, run: Run, switched: Run) -> Row:
    """The served files' scores on the test rows, without and with the switch."""
    metric = run.task.metric
    default, other = (
        [row[metric] for row in read_rows(one.file(f"predictions/{TUNED}.jsonl"))] for one in (run, switched)
    )
    mean, low, high = paired_difference(default, other)
    row: Row = {
        "switch": switch.text,
        "task": run.task.name,
        "metric": metric,
        "default": round(sum(default) / len(default), 5),
        "switched": round(sum(other) / len(other), 5),
        "difference": {
            "mean": round(mean, 5),
            "interval_95": [round(low, 5), round(high, 5)],
            "p": float(f"{paired_test(default, other):.3g}"),
        },
    }
    contenders = read_json(switched.file("evaluation.json"), MAX_EVALUATION_BYTES)["contenders"]
    if MANY_SHOT in contenders:
        row[MANY_SHOT] = contenders[MANY_SHOT][metric]["mean"]
        row["many_shot_demonstrations"] = contenders[MANY_SHOT]["demonstrations"]
    return row


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """For each switch: the mean difference over its tasks, with the interval over tasks."""
    found = {}
    for text in dict.fromkeys(row["switch"] for row in rows):
        means = [row["difference"]["mean"] for row in rows if row["switch"] == text]
        bounds = interval_over_tasks(means)
        found[text] = {
            "n_tasks": len(means),
            "mean": round(sum(means) / len(means), 5),
            "interval_95": bounds and [round(bound, 5) for bound in bounds],
        }
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The comparisons as tables, the baselines apart; "" without any."""
    parts = []
    switches = [text for text in summary(rows) if text != BASELINES]
    if switches:
        parts += ["### Ablations: the default's score, and without it", ""]
        parts += _lines("| setting | task | default | switched | default - switched [95 %] | p |", 4)
        for text in switches:
            own = [row for row in rows if row["switch"] == text]
            parts += [_line(row, text) for row in own]
            total = summary(own)[text]
            parts.append(f"| **{text}** | mean of {total['n_tasks']} | | | {_interval(total)} | |")
        parts.append("")
    if baselines := [row for row in rows if row["switch"] == BASELINES]:
        parts += ["### Other baselines", ""]
        parts += _lines(
            "| task | tuned | tuned on the demonstrations alone | difference [95 %] | p | many-shot | pairs |",
            6,
        )
        for row in baselines:
            cells = _line(row, "").removeprefix("|  ").removesuffix(" |")
            parts.append(f"{cells} | {row[MANY_SHOT]:.3f} | {row['many_shot_demonstrations']} |")
        parts.append("")
    return "\n".join(parts)


def _lines(head: str, n_numbers: int) -> list[str]:
    n_columns = head.count("|") - 1
    return [head, "|" + " --- |" * (n_columns - n_numbers) + " ---: |" * n_numbers]


def _line(row: Row, text: str) -> str:
    difference = row["difference"]
    return (
        f"| {text} | {row['task']} | {row['default']:.3f} | {row['switched']:.3f} | "
        f"{_interval(difference)} | {difference['p']:.2g} |"
    )


def _interval(difference: dict[str, Any]) -> str:
    if difference["interval_95"] is None:
        return f"{difference['mean']:+.3f}"
    low, high = difference["interval_95"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


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


def _copy_untuned_answers(run: Run, switched: Run) -> None:
    """What the untuned model answers does not depend on the switch; evaluate takes what is there already."""
    with lock_run(switched.path):
        switched.file("predictions").mkdir(exist_ok=True)
        for name in _UNTUNED:
            path = run.file(f"predictions/{name}.jsonl")
            if path.exists() and not switched.file(f"predictions/{name}.jsonl").exists():
                shutil.copyfile(path, switched.file(f"predictions/{name}.jsonl"))
