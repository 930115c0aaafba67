"""What waiting threads cost, alone and beside busy processes: by how OpenMP's threads wait for one another.

    generation, seconds                              0 busy   1 busy   2 busy
      spinning (GCC's default)                         1.62     3.44     5.64
      1,000 spins                                      1.54     3.37     3.28

    python tests/benchmarks/threads.py [--repetitions 5] [--only generation]

Generation is llama/speed.py's piece of annotation, training three steps on rows as a tree (training.py), both on
SmolLM2-135M. Each measurement is a process of its own, since libgomp reads its environment once; the ways to wait come
by turns. A busy process is a loop in Python. Numbers are medians; with 0 busy, nothing else should run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.models import resolve_model

WAITS = {
    "spinning (GCC's default)": {"GOMP_SPINCOUNT": "300000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
BUSY = (0, 1, 2)


def generation(_weights: Path) -> float:
    """Seconds, in this process."""
    from sg_local.llama.speed import measure_speed

    return measure_speed(resolve_model("smollm2-135m"), n_threads=0).sample_seconds


def training(weights: Path) -> float:
    """Median seconds of a step, in this process."""
    from training import make_rows, steps

    rows, vocabulary = make_rows(48, with_demonstrations=False)
    return statistics.median(step[0] for step in steps(weights, vocabulary, rows, ["tree"])["tree"][1:])


WORKS = {"generation": generation, "training": training}


def measured(work: str, wait: dict[str, str], weights: Path) -> float:
    """Seconds of one kind of work in a process with this environment."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    command = [sys.executable, __file__, "--work", work, "--weights", str(weights)]
    done = subprocess.run(
        command,
        env={**environment, **wait},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many loops in Python while the body runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Prints a table for each kind of work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=WORKS)
    parser.add_argument("--busy", type=int, nargs="+", default=BUSY)
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(WORKS[given.work](given.weights))
        return
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "hf"
        write_base_weights(resolve_model("smollm2-135m"), weights)
        for work in [given.only] if given.only else WORKS:
            show(work, given.busy, given.repetitions, weights)


def show(work: str, busy: list[int], repetitions: int, weights: Path) -> None:
    """One table."""
    print(f"\n{work + ', seconds':32}" + "".join(f"{count:>20} busy" for count in busy))
    found: dict[tuple[str, int], list[float]] = {}
    for count in busy:
        with busy_processes(count):
            for _ in range(repetitions):
                for name, wait in WAITS.items():
                    found.setdefault((name, count), []).append(measured(work, wait, weights))
    for name in WAITS:
        cells = [found[name, count] for count in busy]
        print(
            f"  {name:30}"
            + "".join(
                f"{statistics.median(cell):9.2f} ({min(cell):5.2f} - {max(cell):5.2f})" for cell in cells
            )
        )


if __name__ == "__main__":
    main()
