"""What `plan` tells of memory beside the peaks of a run, for random models of an architecture and of a real one's size.

    stage        peak GiB   plan GiB
    train            2.31       2.68   +16 %

    python tests/benchmarks/peaks.py [lfm2|gemma3|llama|...] [--hidden 768] [--n-layers 16] [--directory DIR]

The task is support-inbox, a part of its test rows are given as inputs without answers. Peaks are `peak_memory_bytes` of
manifest.json: what the system reports as resident, file pages with it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "gpu")]

import tiny_models  # noqa: E402
from random_model import vocabulary  # noqa: E402

TASK, N_INPUTS, N_VOCAB = "support-inbox", 16, 49152
SETTINGS = [
    "--preset=quick", f"--n-inputs={N_INPUTS}", "--epochs=1", "--max-test-rows=4", "--trainer=peft",
    "--prompt-format=vicuna",
]  # fmt: skip


def write_model(path: Path, architecture: str, hidden: int, n_layers: int) -> None:
    """Random numbers in Q8_0: twelve heads, a third of them for keys, a vocabulary as large as SmolLM2's."""
    texts, scores, types = vocabulary(N_VOCAB)
    tiny_models.TOKENS = [text.decode() for text in texts]
    tiny_models.VOCABULARY |= {
        "tokenizer.ggml.tokens": tiny_models.TOKENS,
        "tokenizer.ggml.scores": tiny_models.floats(scores),
        "tokenizer.ggml.token_type": tiny_models.integers(types),
    }
    tiny_models.FEED_FORWARD, tiny_models.HEADS, tiny_models.KV_HEADS = 8 * hidden // 3 // 32 * 32, 12, 4
    tiny_models.WIDE_HEAD_DIM, tiny_models.CONTEXT = hidden // 12, 4096
    tiny_models.write_tiny_model(
        path, architecture, tied=True, hidden=hidden, n_layers=n_layers, matrix_type="Q8_0"
    )


def write_task(place: Path) -> Path:
    """The shipped task with real inputs."""
    shipped = ROOT / "sg_local" / "tasks" / f"{TASK}.toml"
    rows = [json.loads(line) for line in shipped.with_suffix(".test.jsonl").read_text("utf-8").splitlines()]
    (place / shipped.name).write_text(
        shipped.read_text("utf-8").replace("\nlabels", '\ninputs = "inputs.jsonl"\nlabels', 1)
    )
    (place / f"{TASK}.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    given = [{"input": row["input"]} for row in rows[40 : 40 + N_INPUTS]]
    (place / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return place / shipped.name


def main() -> None:
    """One run, and the plan for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", nargs="?", default="lfm2")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--n-layers", type=int, default=16)
    parser.add_argument("--directory", type=Path, help="keep model and run here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.directory or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        model = place / f"{arguments.architecture}.gguf"
        if not model.exists():
            write_model(model, arguments.architecture, arguments.hidden, arguments.n_layers)
        call(place, "run", write_task(place), f"--model={model}", f"--run={place / 'run'}", *SETTINGS)
        told = json.loads(
            call(place, "plan", place / f"{TASK}.toml", f"--model={model}", "--json", *SETTINGS)
        )
        stages = json.loads((place / "run" / "manifest.json").read_text())["stages"]
        print(f"{arguments.architecture}: {model.stat().st_size / 1e6:.0f} MB")
        print(f"{'stage':12}{'peak GiB':>9}{'plan GiB':>11}")
        for step in told["steps"]:
            peak = stages[step["step"]]["peak_memory_bytes"]
            plan = step["host_bytes"] + sum(step["cache"].values())
            print(f"{step['step']:12}{peak / 2**30:9.2f}{plan / 2**30:11.2f}   {plan / peak - 1:+.0%}")
        print(json.dumps({step["step"]: {**step["host"], **step["cache"]} for step in told["steps"]}))


def call(place: Path, *arguments: object) -> str:
    """Standard output of the command."""
    return subprocess.run(
        [sys.executable, "-m", "sg_local", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SG_LOCAL_HOME": str(place / "home")},
        stdout=subprocess.PIPE, text=True, cwd=place, check=True,
    ).stdout  # fmt: skip


if __name__ == "__main__":
    main()
