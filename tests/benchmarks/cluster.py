"""What a Ray cluster costs a bench: its start, the placing of many short runs, and the driver's memory meanwhile.

    python tests/benchmarks/cluster.py --runs 1000 --slots 100
    {"runs": 1000, "slots": 100, "start_seconds": 9.8, "seconds": 12.1, "efficiency": 0.83, …}

A run is one second of sleep in place of its stages, which tells the desk as a real one does. The workers are started
before the clock is: each is a Python process, and they are used again. Efficiency: runs x 1 s / slots, of the seconds.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from finished_run import HEADER, MODEL_TEMPLATE, TENSORS
from gguf_bytes import tiny_gguf

from sg_local.bench.cluster import ClusterOptions, Share
from sg_local.bench.node import Job, Needs
from sg_local.bench.placing import FarDesk, Placing
from sg_local.bench.units import Unit
from sg_local.runs.begin import create_or_open_run, read_model
from sg_local.settings import Settings
from sg_local.task import Example, Task

PATHS = os.pathsep.join([*sys.path[:2], str(Path(__file__).parent)])  # of the workers
RUN_SECONDS = 1.0
CPUS = 2  # as Ray counts them: a run of 100 has a weight of 0.02


def second(desk: Any, _job: Job, attempt: str, _names: Any) -> dict[str, Any]:
    """In place of a run."""
    import ray

    far = FarDesk(desk)
    far.tell(attempt, ray.get_runtime_context().get_node_id(), "began")
    time.sleep(RUN_SECONDS)
    return {"error": None}


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=100)
    given = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = PATHS
    import ray

    started = time.monotonic()
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    start_seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as place:
        bench = Path(place) / "bench"
        model_path = Path(place) / "tiny.gguf"
        model_path.write_bytes(tiny_gguf({**HEADER, "tokenizer.chat_template": MODEL_TEMPLATE}, TENSORS))
        model = read_model(model_path)
        task = Task("", "Which box?", (Example("Money back.", "refund"),), labels=("refund", "login"))
        names = [f"task{n}" for n in range(max(given.runs, given.slots))]
        units = [
            Unit(create_or_open_run(bench / name, replace(task, name=name), model, Settings())[0])
            for name in names
        ]
        needs = Needs(
            str(bench), "5d1c", "", str(model_path), model.sha256, 7, "peft", "", 0, {}, False, False
        )

        def place_runs(some: list[Unit]) -> float:
            begun = time.monotonic()
            placing = Placing(
                ClusterOptions("auto"),
                some,
                bench,
                model,
                lambda _unit: True,
                needs,
                Share(CPUS / given.slots, 0, 0),
                {},
                task=second,
            )
            failed = [one.error for one in placing.run() if one.error]
            assert not failed, failed[0]
            return time.monotonic() - begun

        warm_seconds = place_runs(units[: given.slots])
        before, cpu_before, all_before = _mib(), time.process_time(), _cpu_seconds()
        seconds = place_runs(units[: given.runs])
        cpu_seconds, all_seconds = time.process_time() - cpu_before, _cpu_seconds() - all_before
    print(
        json.dumps(
            {
                "runs": given.runs,
                "slots": given.slots,
                "start_seconds": round(start_seconds, 1),
                "workers_seconds": round(warm_seconds, 1),
                "seconds": round(seconds, 1),
                "efficiency": round(given.runs * RUN_SECONDS / given.slots / seconds, 2),
                "driver_cpu_ms_per_run": round(1000 * cpu_seconds / given.runs, 1),
                "cluster_cpu_ms_per_run": round(1000 * all_seconds / given.runs, 1),
                "driver_mib": [before, _mib()],
            }
        )
    )


def _cpu_seconds() -> float:
    """Of this process and of all that it started: Ray's own, and the workers."""
    import psutil

    here = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in [here, *here.children(recursive=True)])


def _mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
