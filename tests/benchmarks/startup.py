"""How long does `sg-local --help` take, beside what no click program can avoid?

    contender                      median   min    max     ratio
    python -c "import click"       0.081 s  0.079  0.090   1.00
    sg-local --help                0.097 s  0.094  0.110   1.20      goal: at most 1.5

Wall time of whole processes, run alternately; ratio of the medians.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

REPETITIONS = 15
GOAL = 1.5


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    contenders = {
        'python -c "import click"': [sys.executable, "-c", "import click"],
        "sg-local --help": [str(Path(sys.executable).parent / "sg-local"), "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPETITIONS):
        for name, command in contenders.items():
            times[name].append(seconds(command))
    base = statistics.median(times['python -c "import click"'])
    print(f"{'contender':30} median   min    max     ratio")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:30} {median:.3f} s  {min(found):.3f}  {max(found):.3f}   {median / base:.2f}")
    print(f"goal: at most {GOAL}")


if __name__ == "__main__":
    main()
