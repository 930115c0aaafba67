"""The results of a bench: a row for each finished task, one for each finished ablation, and their files.

    results = BenchResults(Path("benches/everyday"))     checks and reads every run in the directory
    results.read_run("sst2"); results.write({})          reads that one again, writes results.json and results.md

A bench may have hundreds of runs. Each is read once, and again after it ran.
"""

from pathlib import Path

from sg_local.bench.ablation import PLACE, comparison
from sg_local.files import write_json, write_text
from sg_local.models import directory_name
from sg_local.report import ablation as ablation_table
from sg_local.report.ablation import AblationRow
from sg_local.report.bench import BenchRow, Results, results_markdown, row_of, summary
from sg_local.report.bench_page import bench_page
from sg_local.report.html import PAGE
from sg_local.report.scores import read_evaluation
from sg_local.runs.directory import Run, open_run
from sg_local.settings import STAGES


class BenchResults:
    """The finished runs in the directory of a bench, as far as they were checked."""

    def __init__(self, bench: Path) -> None:
        self.bench = bench
        self._runs: dict[str, tuple[Run, BenchRow]] = {}  # by task
        self._comparisons: dict[Path, AblationRow] = {}  # by directory of the run with an ablation
        for path in sorted(bench.glob("*/settings.toml")):
            self.read_run(path.parent.name)
        for path in sorted(bench.glob(f"{PLACE}/*/*/settings.toml")):
            self.read_comparison(path.parent)

    def is_finished(self, task_name: str) -> bool:
        """Whether the run of this task was finished when it was read."""
        return task_name in self._runs

    def read_run(self, task_name: str) -> None:
        """Checks and reads the run of a task."""
        run = open_run(self.bench / task_name)
        if run.is_finished(STAGES[-1]):
            row = row_of(read_evaluation(run), run.manifest())
            self._runs[task_name] = run, row
        else:
            self._runs.pop(task_name, None)

    def read_comparison(self, path: Path) -> None:
        """Checks and reads a run with an ablation, to be compared with the run without."""
        self._comparisons.pop(path, None)
        if self.is_finished(path.name):
            run, _ = self._runs[path.name]
            if row := comparison(self.bench, run, open_run(path)):
                self._comparisons[path] = row

    def results(self, failed: dict[str, str]) -> Results:
        """What results.json holds. failed: task -> why it is not finished."""
        rows = [self._runs[name][1] for name in sorted(self._runs)]
        results: Results = {"tasks": rows, "summary": summary(rows), "failed": failed}
        if compared := [self._comparisons[path] for path in sorted(self._comparisons)]:
            results["ablations"] = compared
            results["ablations_summary"] = ablation_table.summary(compared)
        if (seeds := ablation_table.seeds(compared))["tasks"]:
            results["seeds"] = seeds
        return results

    def write(self, failed: dict[str, str]) -> Results:
        """Writes results.json and results.md, and returns the first."""
        results = self.results(failed)
        write_json(self.bench / "results.json", results)
        write_text(self.bench / "results.md", results_markdown(results))
        return results


def is_bench(directory: Path) -> bool:
    """Whether a directory is that of a bench, which wrote its results there."""
    return (directory / "results.json").is_file()


def write_bench_report(bench: Path, out: Path | None = None) -> Path:
    """Writes the page of a bench, of the runs in it that are finished, and returns where: `out`, or in the bench.

    Raises InputError where a run's scores are not as they were written.
    """
    found = BenchResults(bench)
    unfinished = {
        path.parent.name: "`sg-local bench` with the same arguments goes on with it"
        for path in sorted(bench.glob("*/settings.toml"))
        if not found.is_finished(path.parent.name)
    }
    path = out or bench / PAGE
    write_text(path, bench_page(directory_name(bench), found.results(unfinished)))
    return path
