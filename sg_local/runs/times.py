"""How long a run takes: told before it starts, and beside what it took, which corrects what the next one is told.

    ~/.cache/sg-local/times.json
    {"x86_64, 2 processors, ...": [{"base": "b179c9523d0e6a0f", "kind": "labels", "stage": "annotate",
                                    "work": {"prompt_tokens": 21279.0, ...}, "seconds": 43.7,
                                    "prompt": 455.0, "generated": 160.0}]}

The formulas are those of plan/times.py. Stages that went on with pieces of an earlier call are not kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sg_local import child_process
from sg_local.errors import InputError, SgLocalError
from sg_local.files import read_json, write_json
from sg_local.gguf_header import GgufHeader
from sg_local.models import make_store_directory, store_root
from sg_local.plan.sizes import mean_tokens, model_sizes
from sg_local.plan.times import Earlier, Speed, Work, stage_works, told_seconds
from sg_local.progress import PlaceInRun, duration, say
from sg_local.proof.working_copies import (
    LEAST_GAIN,
    gain_of_copy,
    generating_model,
    known_speeds,
    machine_key,
    speeds_here,
)
from sg_local.report.tables import counted
from sg_local.report.times import times_table
from sg_local.runs.directory import BaseModel, Run, open_run
from sg_local.runs.given import TaskRows
from sg_local.runs.lock import lock_run
from sg_local.runs.stage_files import STAGE_FILES
from sg_local.settings import STAGES, Settings
from sg_local.task import Task

KEPT_OF_A_STAGE = 5  # of one base and kind of task, the last ones: a machine changes
MAX_RECORDS = 600  # of a machine
MAX_TIMES_BYTES = 1 << 20
_BY_BASE = {"export", "evaluate"}  # computed with the base's own file, or one of its types


@dataclass(frozen=True)
class Told:
    """The seconds of each stage, and what they were told from."""

    seconds: Mapping[str, float]
    works: Mapping[str, Work]
    speeds: Mapping[str, Speed]
    source: str

    def as_dict(self) -> dict[str, object]:
        """For a program."""
        return {"source": self.source, "seconds": {stage: round(s, 1) for stage, s in self.seconds.items()}}


def tell(base: BaseModel, header: GgufHeader, settings: Settings, task: Task, rows: TaskRows) -> Told | None:
    """How long the stages of a run take on this machine; None where nothing was measured yet."""
    speeds = known_speeds(base, settings)
    if "base" not in speeds:
        return None
    making = speeds["f16" if gain_of_copy(speeds) >= LEAST_GAIN else "base"]
    tokens = mean_tokens(task, settings, [row.input for row in rows.test], rows.inputs)
    works = stage_works(
        model_sizes(header),
        settings,
        tokens,
        n_real_inputs=len(rows.inputs),
        n_labelled=len(rows.labelled),
    )
    records = _records(machine_key(settings))
    by_stage = {stage: speeds["base"] if stage in _BY_BASE else making for stage in works}
    earlier = {stage: _of_the_kind(records, stage, base, task, by_stage[stage]) for stage in works}
    seconds = {stage: told_seconds(work, by_stage[stage], earlier[stage]) for stage, work in works.items()}
    n_used = max(map(len, earlier.values()))
    source = f"as {counted(n_used, 'earlier run')} here took" if n_used else "by a short measurement here"
    return Told(seconds, works, by_stage, source)


def tell_before(
    base: BaseModel, header: GgufHeader, settings: Settings, task: Task, rows: TaskRows
) -> Told | None:
    """The same where there is no run yet: the base is measured if need be, no copy of it is made.

    None where it cannot be measured; a run of it then says why.
    """
    with suppress(SgLocalError):
        if "base" not in known_speeds(base, settings):
            child_process.result_from_child(
                "measuring",
                f"{__name__}.measure_base",
                base={**asdict(base), "path": str(base.path)},
                settings=settings.as_dict(),
            )
        return tell(base, header, settings, task, rows)
    return None


def measure(run_dir: str) -> None:
    """Measures how fast a run's base computes here, for the process that is made for it."""
    run = open_run(Path(run_dir))
    if generating_model(run) == run.model.path:
        speeds_here(run.model, run.settings, {"base": run.model.path})


def measure_base(base: dict[str, Any], settings: dict[str, Any]) -> None:
    """The same for a base alone, which no run has yet."""
    model = BaseModel(**{**base, "path": Path(base["path"])})
    speeds_here(model, Settings(**settings), {"base": model.path})


class RunTimes:
    """What is told of the stages of one call, and what they take."""

    def __init__(self, run: Run, stages: Sequence[str]) -> None:
        """Tells it. Measures first where nothing was measured on this machine; that takes about half a minute."""
        self.run, self.stages = run, stages
        self.told: Told | None = None
        self.went_on: set[str] = set()
        with suppress(SgLocalError):  # what is wrong here is told by the stage that meets it
            if "base" not in known_speeds(run.model, run.settings):
                child_process.result_from_child("measuring", f"{__name__}.measure", run_dir=str(run.path))
            rows = TaskRows(run.test_rows, run.given_inputs, run.labelled_rows)
            self.told = tell(run.model, run.base_header, run.settings, run.task, rows)
        if self.told:
            seconds = {stage: self.told.seconds[stage] for stage in stages}
            say(
                f"about {duration(sum(seconds.values()))}, {self.told.source}; more where other work goes on beside"
            )
            say(", ".join(f"{stage} {duration(told)}" for stage, told in seconds.items()))

    def begin(self, stage: str, number: str) -> PlaceInRun:
        """A stage begins: what its lines say of the time that is left to it, and to the run."""
        has_pieces = any(any(self.run.path.glob(pattern)) for pattern in STAGE_FILES[stage].pieces)
        # A second try comes upon the base's answers of the other run.
        is_second = any("from_run" in entry for entry in self.run.manifest()["stages"].values())
        if has_pieces or (is_second and stage == STAGES[-1]):
            self.went_on.add(stage)
        if not self.told:
            return PlaceInRun(number)
        later = self.stages[self.stages.index(stage) + 1 :]
        # A stage that goes on has less to do than was told of it, and nobody knows how much less.
        own = None if stage in self.went_on else self.told.seconds[stage]
        return PlaceInRun(number, own, sum(self.told.seconds[name] for name in later))

    def finish(self, stage: str) -> None:
        """A stage is finished: what was told of it goes into the manifest; what it took is kept for the next run."""
        if not self.told:
            return
        with lock_run(self.run.path):
            took = self.run.note_told(stage, round(self.told.seconds[stage], 1))
        if stage not in self.went_on:
            _keep(self.run, stage, self.told, took)

    def say_table(self) -> None:
        """What was told and what it took, a line for each stage."""
        if self.told:
            entries = self.run.manifest()["stages"]
            for line in times_table({stage: entries[stage] for stage in self.stages}):
                say(line)


def _times_path() -> Path:
    return store_root() / "times.json"


def _kind(task: Task) -> str:
    return "labels" if task.is_classification else "free answers"


def _read() -> dict[str, Any]:
    with suppress(InputError):  # missing or damaged: then nothing is known
        times = read_json(_times_path(), MAX_TIMES_BYTES)
        return times if isinstance(times, dict) else {}
    return {}


def _records(machine: str) -> list[dict[str, Any]]:
    """What was kept of this machine, as far as it is whole."""
    names = {item.name for item in fields(Work)}
    found = []
    for record in records if isinstance(records := _read().get(machine), list) else ():
        match record:
            case {
                "base": str(),
                "kind": str(),
                "stage": str(),
                "work": dict(work),
                "seconds": float(seconds),
                "prompt": float(prompt),
                "generated": float(generated),
            } if (
                min(seconds, prompt, generated) > 0
                and work.keys() == names
                and all(isinstance(number, float) and number >= 0 for number in work.values())
            ):
                found.append(record)
    return found


def _of_the_kind(
    records: list[dict[str, Any]], stage: str, base: BaseModel, task: Task, speed: Speed
) -> list[Earlier]:
    """What is most like the stage: of this base and kind of task, else of this base, else of any base."""
    own = [record for record in records if record["stage"] == stage]
    of_base = [record for record in own if record["base"] == base.sha256[:16]]
    of_kind = [record for record in of_base if record["kind"] == _kind(task)]
    return [
        Earlier(
            Work(**record["work"]),
            # A base is measured anew where its copies were deleted.
            speed if of_base else Speed(record["prompt"], record["generated"]),
            record["seconds"],
        )
        for record in (of_kind or of_base or own)[-KEPT_OF_A_STAGE:]
    ]


def _keep(run: Run, stage: str, told: Told, took: float) -> None:
    """Keeps what a stage took for the runs after it."""
    machine, speed = machine_key(run.settings), told.speeds[stage]
    record = {
        "base": run.model.sha256[:16],
        "kind": _kind(run.task),
        "stage": stage,
        "work": told.works[stage].as_dict(),
        "seconds": max(took, 0.1),
        "prompt": round(speed.prompt, 3),
        "generated": round(speed.generated, 3),
    }
    with suppress(SgLocalError):  # a full disk: the run itself is whole
        make_store_directory(store_root())
        times, records = _read(), _records(machine)
        alike = [
            other for other in records if all(other[key] == record[key] for key in ("base", "kind", "stage"))
        ]
        if len(alike) >= KEPT_OF_A_STAGE:
            records.remove(alike[0])
        write_json(_times_path(), times | {machine: [*records, record][-MAX_RECORDS:]})
