"""What a Ray cluster costs a bench: many short runs beside a bare loop of Ray, and a few real ones beside no Ray.

    python tests/benchmarks/cluster.py
    {"stub runs": "bench", "runs": 1000, "slots": 100, "seconds": 11.4, "efficiency": 0.88, "cpu_ms_per_run": {…}, …}
    {"stub runs": "Ray alone", …}
    {"real runs": 3, "seconds": 48.0, "seconds_with_ray": 55.2, "ray_start_seconds": 4.2, "more": 0.06}

A stub run is one second of sleep in place of its stages, which tells the desk as a real one does; Ray alone has the
same sleep, and nothing of sg_local. The clock starts when all slots have their worker, a Python process that takes more
than half a second of processor time to start. Efficiency: runs x 1 s / slots, of the seconds. The real runs are of a
random llama with two layers, one after the other: without Ray, and on one slot with it, three of each in turn; more:
what Ray adds to them, without its start. Stubs take about three minutes on two idle cores, a round of real runs two.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATHS = [str(path) for path in (ROOT, ROOT / "tests/unit", ROOT / "tests/gpu", Path(__file__).parent)]
sys.path[:0] = PATHS

from finished_run import HEADER, MODEL_TEMPLATE, TENSORS  # noqa: E402
from gguf_bytes import tiny_gguf  # noqa: E402
from random_model import TINY, write_random_llama  # noqa: E402

from sg_local.bench.cluster import ClusterOptions, Share  # noqa: E402
from sg_local.bench.node import Job, Needs  # noqa: E402
from sg_local.bench.placing import FarDesk, Placing  # noqa: E402
from sg_local.bench.units import Unit  # noqa: E402
from sg_local.files import read_text, write_text  # noqa: E402
from sg_local.runs.begin import create_or_open_run, read_model  # noqa: E402
from sg_local.runs.directory import open_run  # noqa: E402
from sg_local.settings import Settings  # noqa: E402
from sg_local.task import Example, Task  # noqa: E402

RUN_SECONDS = 1.0
CPUS = 2  # as Ray counts them: a run of 100 has a weight of 0.02
FIRST = "first"  # names of the runs that wait until all slots have a worker
GATE_SECONDS = 0.5
TASK = """\
name = "{name}"
instruction = "Which box does the message belong to?"
labels = ["refund", "login"]
inputs = "inputs.txt"
test = "test.jsonl"

[[examples]]
input = "Money back."
output = "refund"

[[examples]]
input = "Let me in."
output = "login"
"""
SMALL = [
    "--n-inputs",
    "12",
    "--max-new-tokens",
    "16",
    "--n-ctx",
    "512",
    "--max-test-rows",
    "8",
    "--trainer",
    "peft",
]
RUNS_OF_A_ROUND = 3
WORDS = ["parcel", "letter", "card", "login", "door", "key", "bill", "cat", "dog", "sun", "tea", "hat"]


def wait_until_all_are_there(gate: Path, n_slots: int) -> None:
    """Of n_slots callers, each in a worker of its own, none returns before the last came."""
    (gate / str(os.getpid())).touch()
    if len(list(gate.iterdir())) >= n_slots:
        (gate / "open").touch()
    while not (gate / "open").exists():
        time.sleep(GATE_SECONDS)


def sleep(gate: Path | None, n_slots: int) -> None:
    """What a stub run does, and all that it is where there is Ray alone."""
    if gate:
        wait_until_all_are_there(gate, n_slots)
    else:
        time.sleep(RUN_SECONDS)


def stubs_of_bench(place: Path, n_runs: int, n_slots: int) -> dict[str, Any]:
    """The runs as a bench places them."""
    bench, gate = place / "bench", place / "bench's gate"
    gate.mkdir()
    model_path = place / "tiny.gguf"
    model_path.write_bytes(tiny_gguf({**HEADER, "tokenizer.chat_template": MODEL_TEMPLATE}, TENSORS))
    model = read_model(model_path)

    def stub_run(desk: Any, job: Job, attempt: str, _names: Any) -> dict[str, Any]:
        import ray

        FarDesk(desk).tell(attempt, ray.get_runtime_context().get_node_id(), "began")
        sleep(gate if job.place.startswith(FIRST) else None, n_slots)
        return {"error": None}

    task = Task("task", "Which box?", (Example("Money back.", "refund"),), labels=("refund", "login"))
    begun = create_or_open_run(place / "task", task, model, Settings())[0].path
    units = []
    for name in [*(f"{FIRST}{n}" for n in range(n_slots)), *(f"task{n}" for n in range(n_runs))]:
        shutil.copytree(begun, bench / name)  # to begin each would take minutes
        write_text(
            bench / name / "task.toml", read_text(begun / "task.toml", 9999).replace('"task"', f'"{name}"')
        )
        units.append(Unit(open_run(bench / name)))
    needs = Needs(str(bench), "5d1c", "", str(model_path), model.sha256, 7, "peft", "", 0, {}, False, False)
    placing = Placing(
        ClusterOptions("auto"),
        units,
        bench,
        model,
        lambda _unit: True,
        needs,
        Share(CPUS / n_slots, 0, 0),
        {},
        task=stub_run,
    )
    clock = Clock(gate / "open", n_runs, n_slots)
    for ended in placing.run():
        assert not ended.error, ended.error
        clock.count()
    return clock.result("bench")


def stubs_of_ray(place: Path, n_runs: int, n_slots: int) -> dict[str, Any]:
    """The same by Ray alone."""
    import ray

    gate = Path(tempfile.mkdtemp(dir=place))
    task = ray.remote(sleep).options(num_cpus=CPUS / n_slots, max_retries=0)
    waiting = [task.remote(gate, n_slots) for _ in range(n_slots)]
    waiting += [task.remote(None, n_slots) for _ in range(n_runs)]
    clock = Clock(gate / "open", n_runs, n_slots)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        ray.get(done)
        clock.count()
    return clock.result("Ray alone")


class Clock:
    """Counts runs that ended; time and processor time are those since the gate opened."""

    def __init__(self, gate: Path, n_runs: int, n_slots: int) -> None:
        self.gate, self.n_runs, self.n_slots, self.n_ended = gate, n_runs, n_slots, 0

    def count(self) -> None:
        """One more."""
        if self.n_ended == 0:
            self.before = processor_seconds()
            self.mib = memory_mib()
        self.n_ended += 1

    def result(self, name: str) -> dict[str, Any]:
        """After the last."""
        assert self.n_ended == self.n_runs + self.n_slots
        seconds = time.time() - self.gate.stat().st_mtime
        spent = processor_seconds()
        spent.subtract(self.before)
        per_run = {part: round(1000 * taken / self.n_runs, 1) for part, taken in spent.most_common()}
        return {
            "stub runs": name,
            "runs": self.n_runs,
            "slots": self.n_slots,
            "seconds": round(seconds, 1),
            "efficiency": round(self.n_runs * RUN_SECONDS / self.n_slots / seconds, 2),
            "cpu_ms_per_run": {"all": round(sum(per_run.values()), 1), **per_run},
            "driver_mib": [self.mib, memory_mib()],
            "load": os.getloadavg()[0],
        }


def processor_seconds() -> "Counter[str]":
    """Of this process and of all that it started, by what they are."""
    import psutil

    here = psutil.Process()
    seconds: Counter[str] = Counter()
    for one in [here, *here.children(recursive=True)]:
        try:
            command, times = " ".join(one.cmdline()), one.cpu_times()
        except psutil.Error:  # it ended
            continue
        known = ("ray::Desk", "ray::", "gcs_server", "raylet/raylet")
        part = next((name for name in known if name in command), "other")
        names = {"ray::Desk": "desk", "ray::": "workers", "gcs_server": "gcs", "raylet/raylet": "raylet"}
        seconds["driver" if one == here else names.get(part, part)] += times.user + times.system
    return seconds


def memory_mib() -> int:
    """What this process has in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss) >> 20


def measure_stubs(n_runs: int, n_slots: int) -> None:
    """Prints a line for the bench, and one for Ray alone."""
    import ray

    started = time.monotonic()
    # Ray ends workers beyond the number of processors when they idle for a second. With a processor or more for each
    # run, as in a bench, there are none of these; here they would be started anew, 100 of them.
    ray.init(
        address="local",
        num_cpus=CPUS,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"num_workers_soft_limit": n_slots},
    )
    start_seconds = round(time.monotonic() - started, 1)
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nothing:
        stubs_of_ray(
            Path(place), 2 * n_slots, n_slots
        )  # Ray starts more workers than slots in the first seconds
        with redirect_stderr(nothing):
            ours = stubs_of_bench(Path(place), n_runs, n_slots)
        say({**ours, "ray_start_seconds": start_seconds})
        say(stubs_of_ray(Path(place), n_runs, n_slots))
    ray.shutdown()


def measure_real_runs(n_rounds: int) -> None:
    """Prints a line for each round, and one for all."""
    all_seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_random_llama(place / "tiny.gguf", TINY)
        (place / "tasks").mkdir()
        (place / "tasks/inputs.txt").write_text("".join(f"Where is my {word} today?\n" for word in WORDS))
        (place / "tasks/test.jsonl").write_text(
            "".join(f'{{"input": "My {word} is late.", "output": "refund"}}\n' for word in WORDS[:8])
        )
        n_runs = n_rounds * RUNS_OF_A_ROUND
        for number in range(n_runs):
            (place / f"tasks/task{number}.toml").write_text(TASK.format(name=f"task{number}"))
        for begin in range(0, n_runs, RUNS_OF_A_ROUND):
            chosen = [f"task{number}" for number in range(begin, begin + RUNS_OF_A_ROUND)]
            seconds = Counter(
                {
                    "seconds": bench_seconds(place, "without", chosen),
                    "ray_start_seconds": ray_start_seconds(),
                    "seconds_with_ray": bench_seconds(
                        place, "with_ray", chosen, "--ray", "local", "--gpus-per-run", "0"
                    ),
                }
            )
            all_seconds += seconds
            say_real(RUNS_OF_A_ROUND, seconds)
        say_real(n_runs, all_seconds)


def bench_seconds(place: Path, name: str, tasks: list[str], *options: str) -> float:
    """Of one call of the command."""
    environment = {**os.environ, "SG_LOCAL_HOME": str(place / "home"), "PYTHONPATH": os.pathsep.join(PATHS)}
    command = [sys.executable, "-m", "sg_local", "bench", "tasks", "--model", "tiny.gguf", "--out", name]
    command += ["--tasks", ",".join(tasks), *SMALL, *options]
    started = time.monotonic()
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.monotonic() - started


def ray_start_seconds() -> float:
    """Of a process that starts Ray, and ends it."""
    code = "import ray; ray.init(address='local', log_to_driver=False, logging_level='ERROR'); ray.shutdown()"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.monotonic() - started


def say_real(n_runs: int, seconds: "Counter[str]") -> None:
    """One line."""
    alone, with_ray = seconds["seconds"], seconds["seconds_with_ray"] - seconds["ray_start_seconds"]
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    say({"real runs": n_runs, **rounded, "more": round(with_ray / alone - 1, 3), "load": os.getloadavg()[0]})


def say(line: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(line), flush=True)


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("stubs", "real"))
    parser.add_argument("--runs", type=int, default=1000, help="stub runs")
    parser.add_argument("--slots", type=int, default=100, help="stub runs at a time")
    parser.add_argument("--rounds", type=int, default=4, help="of real runs, three each")
    given = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # of the workers
    if given.only != "real":
        measure_stubs(given.runs, given.slots)
    if given.only != "stubs":
        measure_real_runs(given.rounds)


if __name__ == "__main__":
    main()
