"""What real inputs and labelled rows are worth to the tuned model: every task run with different things brought.

    task         seed few-shot     made     real  ceiling
    sms-spam        0     0.51     0.72     0.85     0.97
    mean of 1            0.510    0.720    0.850    0.970
    way from made alone to the ceiling: real 0.52

    python tests/benchmarks/bring.py TASKS OUT [--tasks sst2,agnews] [--ways real,ceiling] [--seeds 2] [--jobs 2]

TASKS holds JSON as `sg-local task import` reads it, with 300 rows for each task. Scored are the first 100. The others
are brought: `real`, their 200 inputs without answers, of which the preset takes 160; `labelled`, 30 rows with answers;
`both`, these 30 and the other 170 inputs; `ceiling`, all 200 with answers, and next to nothing made. `made` is the tool
alone. Settings are those of the preset quick, exported as Q8_0, so that the type of the file says nothing. The way is
that of the means, over the tasks that have all scores.

A run that is there goes on where it stopped, and a finished one is only read: a call that was ended goes on. With
--jobs 2 two runs stand side by side, on half of the processors each. --table runs nothing and prints what is there.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue

from sg_local.files import write_rows
from sg_local.report.scores import read_evaluation
from sg_local.runs.directory import open_run
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.evaluation import metric_mean
from sg_local.selfguide.metrics import METRICS
from sg_local.task import Example, Task, task_to_toml
from sg_local.task_files.importing import import_task
from sg_local.task_files.row_files import RowFile

N_SCORED = 100
N_BROUGHT = 200
N_LABELLED = 30
MADE = "made"
CEILING = "ceiling"
QUICK = ("--preset", "quick", "--quant", "Q8_0", "--max-test-rows", str(N_SCORED))
EVERYDAY = ("banking-a", "sst2", "sms-spam", "agnews")
PAPER = ("task1529", "task190", "task199", "task937")
FREE = ("task036", "task039", "task281", "task1195")


@dataclass(frozen=True)
class Brought:
    """What a person has: rows without answers, rows with them, and the settings for that."""

    inputs: range = range(0)  # of the rows that are not scored
    labelled: range = range(0)
    options: tuple[str, ...] = ()


WAYS = {
    MADE: Brought(),
    "real": Brought(inputs=range(N_BROUGHT)),
    "labelled": Brought(labelled=range(N_LABELLED)),
    "both": Brought(inputs=range(N_LABELLED, N_BROUGHT), labelled=range(N_LABELLED)),
    CEILING: Brought(labelled=range(N_BROUGHT), options=("--n-inputs", "1", "--max-copies", "1")),
}


@dataclass(frozen=True)
class Cell:
    """One task, with one seed and one thing brought, and where its run is."""

    task: str
    seed: int
    way: str
    out: Path

    @property
    def run_dir(self) -> Path:
        return self.out / "runs" / f"{self.task}-{self.seed}-{self.way}"

    def score(self, contender: Contender) -> float | None:
        """The contender's mean on the scored rows; None where the run is not finished."""
        if not (self.run_dir / "evaluation.json").exists():
            return None
        evaluation = read_evaluation(open_run(self.run_dir))
        return float(metric_mean(evaluation["contenders"][contender], METRICS[evaluation["metric"]])["mean"])


def write_task(cell: Cell, task: Task, rows: Sequence[Example]) -> Path:
    """The task file of the cell, with the files that it names."""
    way, place = WAYS[cell.way], cell.out / "tasks" / cell.way
    place.mkdir(parents=True, exist_ok=True)
    scored, brought = rows[:N_SCORED], rows[N_SCORED:]
    files: dict[str, Sequence[Mapping[str, object]]] = {
        "test": [row.as_row() for row in scored],
        "inputs": [{"input": brought[number].input} for number in way.inputs],
        "labelled": [brought[number].as_row() for number in way.labelled],
    }
    paths = {name: (place / f"{cell.task}.{name}.jsonl").resolve() for name in files}
    for name, lines in files.items():
        write_rows(paths[name], lines)
    named = replace(
        task,
        test=paths["test"],
        inputs=RowFile(paths["inputs"]) if files["inputs"] else None,
        labelled=RowFile(paths["labelled"]) if files["labelled"] else None,
    )
    path = place / f"{cell.task}.toml"
    path.write_text(task_to_toml(named), "utf-8")
    return path


def run_cell(cell: Cell, task_path: Path, processors: set[int]) -> None:
    """Runs a cell on these processors; what it prints stands in a log beside the run."""
    made = replace(cell, way=MADE)
    begins = QUICK if cell == made else ("--from", str(made.run_dir))
    command = [sys.executable, "-m", "sg_local", "run", str(task_path), *begins, *WAYS[cell.way].options]
    command += ["--seed", str(cell.seed), "--run", str(cell.run_dir)]
    with cell.run_dir.with_suffix(".log").open("ab") as log:
        ended = subprocess.run(
            command, stdout=log, stderr=log, preexec_fn=lambda: os.sched_setaffinity(0, processors)
        )
    print(
        f"{cell.run_dir.name}: {told(cell.score(Contender.TUNED_MERGED))}, exit code {ended.returncode}",
        flush=True,
    )


def told(score: float | None) -> str:
    """A score in two digits."""
    return "-" if score is None else f"{score:.2f}"


def way_to_ceiling(cells: Sequence[dict[str, float]], way: str) -> float:
    """How far the mean of this way goes from that of made alone (0) to that of the ceiling (1)."""
    made, reached, ceiling = (statistics.fmean(cell[name] for cell in cells) for name in (MADE, way, CEILING))
    return (reached - made) / (ceiling - made)


def print_table(cells: Sequence[Cell], ways: Sequence[str]) -> None:
    """A line for each task and seed, the means of those that have all ways, and how far each way goes."""
    print(f"{'task':12} {'seed':>4} few-shot " + " ".join(f"{way:>8}" for way in ways))
    whole: list[dict[str, float]] = []
    for task, seed in dict.fromkeys((cell.task, cell.seed) for cell in cells):
        of_way = {cell.way: cell for cell in cells if (cell.task, cell.seed) == (task, seed)}
        few_shot = of_way[MADE].score(Contender.FEW_SHOT)
        scores = {way: of_way[way].score(Contender.TUNED_MERGED) for way in ways}
        print(
            f"{task:12} {seed:4} {told(few_shot):>8} " + " ".join(f"{told(scores[way]):>8}" for way in ways)
        )
        known = {way: score for way, score in {"few-shot": few_shot, **scores}.items() if score is not None}
        if len(known) == len(ways) + 1:
            whole.append(known)
    if whole:
        means = {name: statistics.fmean(row[name] for row in whole) for name in ("few-shot", *ways)}
        print(
            f"{f'mean of {len(whole)}':17} {means['few-shot']:8.3f} "
            + " ".join(f"{means[w]:8.3f}" for w in ways)
        )
        others = [way for way in ways if way not in {MADE, CEILING}]
        if CEILING in ways and others:
            print(
                "way from made alone to the ceiling: "
                + ", ".join(f"{way} {way_to_ceiling(whole, way):.2f}" for way in others)
            )


def main() -> None:
    """Runs what is missing, made alone first, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="TASKS")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join((*EVERYDAY, *PAPER, *FREE)))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    ways = [MADE, *(way for way in given.ways.split(",") if way != MADE)]
    cells = [
        Cell(task, seed, way, given.out)
        for seed in range(given.seeds)
        for way in ways
        for task in given.tasks.split(",")
    ]
    if not given.table:
        run_all(cells, given.directory, given.jobs)
    print_table(cells, ways)


def run_all(cells: Sequence[Cell], directory: Path, n_jobs: int) -> None:
    """Runs the cells that are not finished; those of made alone first, since the others begin from them."""
    (cells[0].out / "runs").mkdir(parents=True, exist_ok=True)
    processors = sorted(os.sched_getaffinity(0))
    free: Queue[set[int]] = Queue()
    for job in range(n_jobs):
        free.put(set(processors[job::n_jobs]))

    def in_turn(cell: Cell) -> None:
        task, rows = import_task(directory / f"{cell.task}.json")
        share = free.get()
        try:
            run_cell(cell, write_task(cell, task, rows), share)
        finally:
            free.put(share)

    due = [cell for cell in cells if cell.score(Contender.TUNED_MERGED) is None]
    with ThreadPoolExecutor(n_jobs) as pool:
        list(pool.map(in_turn, [cell for cell in due if cell.way == MADE]))
        list(pool.map(in_turn, [cell for cell in due if cell.way != MADE]))


if __name__ == "__main__":
    main()
