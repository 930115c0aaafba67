"""The rehearsal of a 7B model on a machine without a card: each step's time, memory and disk beside what `plan` says.

    step        wall s   CPU s   own GiB   resident GiB   disk GiB    plan: own   resident   disk
    merge        102.3   150.1       0.4            0.4        3.8          3.5       13.7   16.5

    python tests/benchmarks/seven_billion.py [--shape 7b|1b|2-layers|tiny] [--only merge,proof] [--directory DIR]

The model has random weights in Vicuna's shape and types (tests/gpu/random_model.py), the adapter changes all seven
projections. Each step is a process of its own. `own` is memory that the system cannot take back, `resident` has pages
of mapped files too; both are peaks of the process with its children, sampled. `disk` is what stands in the directory at
the peak, without model and adapter, which are given. Steps that others need are made if they are not there; --directory
keeps them for the next call, else all of it is removed at the end. A limit such as a memory cgroup's is put around the
whole command.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "gpu")]

from random_adapter import write_random_adapter  # noqa: E402
from random_model import TINY, TWO_LAYERS, VICUNA_7B, Shape, write_random_llama  # noqa: E402

SHAPES = {
    "7b": VICUNA_7B,
    "1b": Shape(n_layers=16, hidden=2048, feed_forward=5632, n_heads=16),
    "2-layers": TWO_LAYERS,  # as wide as 7b: what a layer needs
    "tiny": replace(TINY, n_layers=4),
}
GIB = 1024**3
BATCH_SIZE, ROW_TOKENS, ANSWER_TOKENS = 2, 48, 3
SECONDS_BETWEEN_SAMPLES = 0.1


def settings() -> Any:
    """Those of the rehearsal: a small context, training in 4 bits without Unsloth, which has its own on a CPU."""
    from sg_local.settings import Settings

    return Settings(
        n_ctx=1024,
        n_parallel=4,
        load_in_4bit=True,
        trainer="peft",
        batch_size=BATCH_SIZE,
        gradient_checkpointing="always",
        n_inputs=2 * BATCH_SIZE,  # rows that are trained on: none near the decision are compared
        quant="auto",  # a random adapter is a small change: the base's types are too coarse for it
        working_copy="never",
        prompt_format="vicuna",
    )


def base_of(place: Path) -> Any:
    """The model as a run has it; its working copies lie in place/home."""
    from sg_local.runs.begin import describe_base, read_model

    return describe_base(read_model(place / "base.gguf"), settings())


def generate(place: Path) -> None:
    """Four answers of eight tokens."""
    from sg_local.llama.asking import open_with
    from sg_local.llama.generation import Request, generate

    draw = random.Random(0)
    with open_with(settings(), place / "base.gguf") as engine:
        prompts = [_tokens(draw, 32, engine.tokenizer.n_vocab) for _ in range(4)]
        generate(engine, [Request(prompt, 8) for prompt in prompts])


def labels(place: Path) -> None:
    """Four labels after eight prompts."""
    from sg_local.llama.asking import open_with
    from sg_local.llama.scoring import label_logprobs

    draw = random.Random(1)
    with open_with(settings(), place / "base.gguf") as engine:
        n_vocab = engine.tokenizer.n_vocab
        answers = [(*_tokens(draw, 2, n_vocab), 2) for _ in range(4)]
        label_logprobs(engine, [_tokens(draw, 32, n_vocab) for _ in range(8)], answers)


def train(place: Path) -> None:
    """Two steps in 4 bits, from the dequantized weights."""
    from sg_local.finetune.batches import TrainRow
    from sg_local.finetune.environment import prepare_process
    from sg_local.finetune.stand_in_tokenizer import Vocabulary
    from sg_local.finetune.train import train_adapter
    from sg_local.gguf_header import read_model_header
    from sg_local.gguf_io.base_weights import write_base_weights
    from sg_local.gguf_io.check_base import target_modules
    from sg_local.plan.sizes import model_sizes
    from sg_local.settings import TrainSettings

    header = read_model_header(place / "base.gguf")
    n_vocab = model_sizes(header).vocab
    draw = random.Random(2)
    prefix = _tokens(draw, ROW_TOKENS // 2, n_vocab)
    n_own = ROW_TOKENS - len(prefix) - ANSWER_TOKENS
    rows = [
        TrainRow((*prefix, *_tokens(draw, n_own, n_vocab)), (*_tokens(draw, ANSWER_TOKENS - 1, n_vocab), 2))
        for _ in range(2 * BATCH_SIZE)
    ]
    with tempfile.TemporaryDirectory(dir=place) as directory:
        work = Path(directory).resolve()
        write_base_weights(place / "base.gguf", work / "hf")
        base, modules = place.resolve(), target_modules(header, settings())
        prepare_process(work / "work")
        chosen = {name: getattr(settings(), name) for name in TrainSettings.__dataclass_fields__}
        train_adapter(
            work / "hf",
            Vocabulary([f"t{index}" for index in range(n_vocab)], 1, 2, 0),
            rows,
            work / "adapter",
            work / "checkpoints",
            str(base),
            modules,
            TrainSettings(**{**chosen, "epochs": 1}),
            lambda _steps: None,
        )
        os.chdir(base)


def merge(place: Path) -> None:
    """adapter.gguf and model.gguf in the base's own types."""
    from sg_local.gguf_io.adapter import write_adapter_gguf
    from sg_local.gguf_io.merge import merge_gguf

    write_adapter_gguf(place / "adapter", place / "base.gguf", place / "adapter.gguf", {})
    merge_gguf(place / "base.gguf", place / "adapter.gguf", place / "model.gguf", metadata={})


def copy(place: Path) -> None:
    """The 16-bit copy."""
    from sg_local.proof.working_copies import f16_gguf

    f16_gguf(base_of(place), 0)


def proof(place: Path) -> None:
    """llama.cpp beside torch."""
    from sg_local.proof.parity import trained_on_texts

    if not (place / "model.gguf").exists():
        merge(place)
    trained = trained_on_texts(base_of(place), settings(), place / "adapter", place / "adapter.gguf")
    parity = trained.compare(place / "model.gguf")
    print(parity.in_words(), file=sys.stderr)
    for fault in parity.faults():
        print(f"proof: {fault}", file=sys.stderr)


def export(place: Path) -> None:
    """`sg-local export-adapter`: all of it, from the adapter's directory to files that are proved."""
    from sg_local.stages.export import export_adapter

    with tempfile.TemporaryDirectory(dir=place) as directory:
        export_adapter(place / "adapter", str(place / "base.gguf"), Path(directory) / "out", settings())


def hash_file(place: Path) -> None:
    """SHA-256 of the model, once in a run."""
    from sg_local.files import sha256_file

    sha256_file(place / "base.gguf")


# Name -> what it does, and the step of `plan` that tells of it.
STEPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "hash": (hash_file, ""),
    "generate": (generate, "generate"),
    "labels": (labels, "annotate"),
    "train": (train, "train"),
    "merge": (merge, "export"),
    "copy": (copy, "export"),
    "proof": (proof, "export"),
    "export": (export, "export"),
}


def planned(place: Path) -> dict[str, Any]:
    """Step -> what `plan` estimates for it here without a card, from the header and the sizes of the rehearsal."""
    from sg_local.gguf_header import read_model_header
    from sg_local.plan.machine import total_memory_bytes
    from sg_local.plan.memory import estimate
    from sg_local.plan.sizes import TaskTokens, model_sizes

    half = ROW_TOKENS // 2
    tokens = TaskTokens(
        instruction=half, demonstrations=0, input=half - ANSWER_TOKENS, answer=ANSWER_TOKENS, labels=12
    )
    model = model_sizes(read_model_header(place / "base.gguf"))
    needs = estimate(model, settings(), tokens, on_gpu=False, memory_bytes=total_memory_bytes())
    return {need.step: need for need in needs}


def _tokens(draw: random.Random, count: int, n_vocab: int) -> tuple[int, ...]:
    """Random ids that are no special token."""
    return (1, *(draw.randrange(300, n_vocab) for _ in range(count - 1)))


def measured(name: str, place: Path) -> dict[str, float]:
    """Runs a step in a process of its own; seconds, and peaks in GiB."""
    given = _disk_bytes(place)
    command = [sys.executable, __file__, "--step", name, "--directory", str(place)]
    environment = {
        **os.environ,
        "SG_LOCAL_HOME": str(place / "home"),
        "OPENBLAS_NUM_THREADS": "1",  # as in every child process of the program
    }
    peaks = {"own": 0, "resident": 0, "disk": 0}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SECONDS_BETWEEN_SAMPLES):
            own, resident = _memory_bytes(process.pid)
            now = {"own": own, "resident": resident, "disk": _disk_bytes(place) - given}
            for key, value in now.items():
                peaks[key] = max(peaks[key], value)

    sampler = threading.Thread(target=sample)
    sampler.start()
    before = os.times()
    code = process.wait()
    ended.set()
    sampler.join()
    after = os.times()
    if code:
        raise SystemExit(f"{name} ended with exit code {code}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "wall": time.perf_counter() - started,
        "cpu": cpu,
        **{key: value / GIB for key, value in peaks.items()},
    }


def _memory_bytes(pid: int) -> tuple[int, int]:
    """Own and resident memory of a process and its children."""
    own = resident = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0, 0
    for process in processes:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            own += int(status["RssAnon"].split()[0]) * 1024
            resident += int(status["VmRSS"].split()[0]) * 1024
        except (OSError, KeyError):  # it ended
            continue
    return own, resident


def _disk_bytes(place: Path) -> int:
    total = 0
    for directory, _, names in os.walk(place):
        for name in names:
            try:
                status = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            total += status.st_blocks * 512
    return total


def rehearse(place: Path, shape: Shape, names: list[str]) -> None:
    """Runs the steps in their order, and prints a line for each as it ends."""
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "base.gguf").exists():
        started = time.perf_counter()
        write_random_llama(place / "part.gguf", shape)
        (place / "part.gguf").rename(place / "base.gguf")
        write_random_adapter(place / "adapter", place / "base.gguf", scale=0.004)
        print(f"model and adapter written in {time.perf_counter() - started:.0f} s")
    needs = planned(place)
    print(
        f"{'step':10}{'wall s':>9}{'CPU s':>9}{'own GiB':>10}{'resident':>10}{'disk':>8}"
        f"{'plan: own':>12}{'resident':>10}{'disk':>8}"
    )
    rows = {}
    for name in names:
        rows[name] = found = measured(name, place)
        line = (
            f"{name:10}{found['wall']:9.1f}{found['cpu']:9.1f}{found['own']:10.2f}{found['resident']:10.2f}"
        )
        line += f"{found['disk']:8.2f}"
        if need := needs.get(STEPS[name][1]):
            estimates = need.host_bytes, need.resident_bytes, need.disk_bytes
            line += "".join(
                f"{size / GIB:{width}.2f}" for size, width in zip(estimates, (12, 10, 8), strict=True)
            )
        print(line, flush=True)
    (place / "results.json").write_text(json.dumps(rows, indent=1))


def main() -> None:
    """All steps or some of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, with commas between them")
    parser.add_argument("--directory", type=Path, help="keep model, copies and results here")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        STEPS[arguments.step][0](arguments.directory)
        return
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"no step is called {unknown[0]!r}; there are {', '.join(STEPS)}")
    if arguments.directory:
        rehearse(arguments.directory, SHAPES[arguments.shape], names)
        return
    with tempfile.TemporaryDirectory() as directory:
        rehearse(Path(directory), SHAPES[arguments.shape], names)


if __name__ == "__main__":
    main()
