"""Many tasks with the same base and settings: a run for each task, and one table of their scores.

    benches/everyday/
      bench.json      {"model": {"sha256": "6f2e…"}, "settings": {"n_inputs": 400}, "failed": {"sst2": "train …"}}
      agnews/ sst2/   run directories, as of `sg-local run`
      results.json results.md
      ablations/      the same runs with one setting changed (ablation.py)

Tasks are read from a directory, or from its directory `tasks` if there is one: task files (.toml), and the JSON that
`sg-local task import` reads: one object with its test rows in ../test, or Super-NaturalInstructions v2
(https://github.com/allenai/natural-instructions).
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from sg_local.bench.ablation import PLACE, Ablation
from sg_local.bench.results import BenchResults
from sg_local.bench.units import Unit, in_turn
from sg_local.errors import InputError, SgLocalError
from sg_local.files import Faults, read_json, write_json
from sg_local.finetune.environment import require_trainer
from sg_local.models import resolve_model
from sg_local.progress import say
from sg_local.report.bench import Results
from sg_local.runs.begin import (
    ModelFile,
    create_or_open_run,
    describe_base,
    differences,
    read_model,
    require_chat_base,
    say_about_export,
    with_full_paths,
)
from sg_local.runs.directory import BaseModel, Run, open_run
from sg_local.runs.given import TaskRows, check_task
from sg_local.runs.lock import lock_run, make_directory
from sg_local.runs.process import reason_of_failure
from sg_local.runs.process_facts import versions
from sg_local.settings import Settings, resolve_settings, without_removed
from sg_local.task import Task
from sg_local.task_files.importing import import_task

if TYPE_CHECKING:
    from sg_local.bench.cluster import ClusterOptions

N_TEST_ROWS = 300  # drawn from a JSON file, as `sg-local task import` does
MAX_BENCH_BYTES = 1 << 20
_OWN_FILES = ("bench.json", "results.json", "results.md", PLACE)


def load_tasks(
    directory: Path, patterns: Sequence[str] = (), n_test_rows: int = N_TEST_ROWS
) -> list[tuple[Task, TaskRows]]:
    """The tasks of a directory with their rows, in the order of the file names.

    patterns: only files whose name without ending matches one of them ("task19*"). Raises InputError with the
    faults of all files.
    """
    place = directory / "tasks" if (directory / "tasks").is_dir() else directory
    if not place.is_dir():
        raise InputError(f"{directory} is no directory: give one that holds task files")
    paths = sorted(path for path in place.iterdir() if path.suffix in {".toml", ".json"} and path.is_file())
    if not paths:
        raise InputError(f"{place} holds no task files: give a directory with .toml or .json ones")
    if patterns:
        paths = _chosen(paths, patterns)
    tasks: dict[str, tuple[Path, Task, TaskRows]] = {}
    faults = Faults(n_shown=50)
    for path in paths:
        try:
            task, rows = _load_task(path, n_test_rows)
        except InputError as error:
            for line in str(error).splitlines():
                faults.add(line if str(path) in line else f"{path}: {line}")
            continue
        if not rows.test:
            faults.add(
                f"{path}: {task.name} has no test rows, and made ones would not measure accuracy: give it some"
            )
        elif task.name in _OWN_FILES:
            faults.add(f"{path}: the name {task.name} is taken by a file of the results: choose another")
        elif task.name in tasks:
            faults.add(f"{path}: the name {task.name} is also that of {tasks[task.name][0]}: choose another")
        else:
            tasks[task.name] = path, task, rows
    faults.raise_any()
    return [(task, rows) for _, task, rows in tasks.values()]


def run_bench(
    directory: Path,
    model_source: str,
    bench_dir: Path | None,
    settings: Settings,
    patterns: Sequence[str] = (),
    ablations: Sequence[Ablation] = (),
    cluster: "ClusterOptions | None" = None,
) -> tuple[Results, list[str]]:
    """Runs the unfinished tasks of a directory. Returns the content of results.json, and the names of failed tasks.

    Then each ablation of each finished task runs (ablation.py). If a run fails, its reason goes under "failed", and the
    others go on. cluster: where the runs are placed, if not here one after the other.

    Raises InputError, before anything runs, if a task, the model or a setting is wrong, or is not what the bench was
    begun with.
    """
    tasks = load_tasks(directory, patterns, max(N_TEST_ROWS, settings.max_test_rows))
    model = read_model(resolve_model(model_source))
    settings = with_full_paths(settings)
    path = bench_dir or Path("benches") / directory.resolve().name
    for changed in (settings, *(ablation.applied(settings) for ablation in ablations)):
        require_chat_base(model, changed, [task for task, _ in tasks])
    base = describe_base(model, settings)
    _make_directory(path)
    with lock_run(path):
        failed = _begin(path, base, settings)
        runs = _begin_runs(path, tasks, model, settings)
        say_about_export(model, settings, [task for task, _ in tasks])
        results = BenchResults(path)
        unfinished = [run for run in runs if not results.is_finished(run.task.name)]
        for run in runs:
            if run not in unfinished:  # `sg-local run` may have finished it meanwhile
                failed.pop(run.task.name, None)
        units = [
            *(Unit(run) for run in unfinished),
            *(Unit(run, ablation) for ablation in ablations for run in runs),
        ]

        def can_begin(unit: Unit) -> bool:
            return unit.base is None or results.is_finished(unit.base.task.name)

        if cluster:
            from sg_local.bench.on_ray import on_cluster

            ends = on_cluster(cluster, units, path, model, can_begin, settings, tasks)
        else:
            if any(not run.is_finished("train") for run in unfinished):
                require_trainer(settings.trainer)
            ends = in_turn(units, path, model, can_begin)
        failed_ablations = []
        n_worked = 0
        for unit, had_work, error in ends:
            had_work |= failed.pop(unit.name, None) is not None
            if not had_work:
                continue
            n_worked += 1
            if not error and unit.ablation:
                error = _fault(results.read_comparison, unit.path(path))
            if error:
                failed[unit.name] = _why_failed(unit.path(path), error)
                failed_ablations += [unit.name] if unit.ablation else []
                say(f"Error: {unit.name}: {error}")
            if not unit.ablation:
                results.read_run(unit.name)
            _write_bench(path, base, settings, failed)
            results.write(failed)
        if not n_worked:
            say(f"{path} is finished, nothing to do")
        written = BenchResults(path).write(failed)  # a run may have been finished by itself meanwhile
    return written, [*(task.name for task, _ in tasks if task.name in failed), *failed_ablations]


def _fault(read: Callable[[Path], None], path: Path) -> SgLocalError | None:
    """What is wrong with a run that was read; None where nothing is."""
    try:
        read(path)
    except SgLocalError as error:
        return error
    return None


def _why_failed(path: Path, error: SgLocalError) -> str:
    """The reason that the failed stage gave; without one, the error."""
    return (reason_of_failure(open_run(path)) if (path / "settings.toml").exists() else None) or str(error)


def _chosen(paths: list[Path], patterns: Sequence[str]) -> list[Path]:
    task_names = [path.stem for path in paths]
    faults = Faults()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in task_names):
            near = difflib.get_close_matches(pattern, task_names, 1)
            hint = f"did you mean {near[0]}?" if near else f"the first are {', '.join(task_names[:5])}"
            faults.add(f"{paths[0].parent} has no task {pattern!r}: {hint}")
    faults.raise_any()
    return [path for path in paths if any(fnmatchcase(path.stem, pattern) for pattern in patterns)]


def _load_task(path: Path, n_test_rows: int) -> tuple[Task, TaskRows]:
    if path.suffix == ".toml":
        return check_task(str(path))
    return check_task(*import_task(path, n_test_rows))


def _make_directory(path: Path) -> None:
    """Makes the directory. Raises InputError if it holds files that are not of a bench."""
    ours = (".lock", "bench.json", ".bench.json.")  # also temporary files of a bench that was killed at once
    if path.is_dir() and not (path / "bench.json").exists():
        strange = [item.name for item in path.iterdir() if not item.name.startswith(ours)]
        if strange:
            raise InputError(
                f"{path} holds other files ({min(strange)}) and is no bench: choose another with --out DIR"
            )
    make_directory(path)


def _begin(path: Path, base: BaseModel, settings: Settings) -> dict[str, str]:
    """Begins a bench, or checks that it was begun with the same; returns the tasks that failed, with the reasons."""
    bench_path = path / "bench.json"
    if not bench_path.exists():
        _write_bench(path, base, settings, {})
        return {}
    match read_json(bench_path, MAX_BENCH_BYTES):
        case {
            "model": {"path": str(old_path), "sha256": str(sha256), "prompt_format": str(prompt_format)},
            "settings": dict(values),
            "failed": dict(failed),
        }:
            old_base = BaseModel(Path(old_path), sha256, 0, "", prompt_format)
        case _:
            raise InputError(f"{bench_path} is damaged: restore it, or begin anew with --out DIR")
    old = resolve_settings("default", without_removed(values, bench_path))
    before, now = differences(old_base, old, base, settings)
    if before:
        raise InputError(
            f"{path} was begun with {', '.join(before)}, and is called with {', '.join(now)}: "
            "call it as it was begun, or begin anew with --out DIR"
        )
    return failed


def _begin_runs(
    path: Path, tasks: Sequence[tuple[Task, TaskRows]], model: ModelFile, settings: Settings
) -> list[Run]:
    """A run for each task. Raises InputError with all tasks that changed since their runs began."""
    runs = []
    faults = Faults(n_shown=50)
    for task, rows in tasks:
        try:
            runs.append(create_or_open_run(path / task.name, task, model, settings, rows)[0])
        except InputError as error:
            faults.add(str(error))
    faults.raise_any()
    return runs


def _write_bench(path: Path, base: BaseModel, settings: Settings, failed: dict[str, str]) -> None:
    write_json(
        path / "bench.json",
        {
            "model": {**asdict(base), "path": str(base.path)},
            "settings": settings.as_dict(),
            "versions": versions(),
            "failed": failed,
        },
    )
