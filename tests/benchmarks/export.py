"""Export measured: seconds to write an adapter and to merge it, beside copying and quantizing alone; peak memory.

    adapter.gguf of rank 16, SmolLM2-135M         0.31 s   (goal 2 s)
    merge, Q4_1, the base's own types             2.9 s    copy 0.1 s + quantize 1.9 s: ratio 1.4 (goal 5)
    merge, 1.1 billion parameters in Q8_0         peak 310 MB (goal 1500 MB)

    python tests/benchmarks/export.py [--repetitions 3]

Quantizing alone is llama.cpp's, from the F16 copy to the type that is written. The large model is made here: random
blocks in the shapes of TinyLlama-1.1B, and a random adapter on all seven projections. Peak memory is of a process that
writes the adapter and merges it, and no more.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sg_local.gguf_header import DEFAULT_ALIGNMENT_BYTES, read_model_header
from sg_local.gguf_io.adapter import base_matrices, write_adapter_gguf
from sg_local.gguf_io.layout import OutputTensor, float32_value, pad, string_value, uint32_value, write_header
from sg_local.gguf_io.merge import merge_gguf
from sg_local.llama.quantize import requantize
from sg_local.models import resolve_model

RANK = 16
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
Q8_0_ELEMENTS, Q8_0_BYTES = 32, 34


def main() -> None:
    """Measures everything once, times of several repetitions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--merge-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge_in:
        export(arguments.merge_in / "base.gguf", arguments.merge_in)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        times(place, arguments.repetitions)
        large = place / "large"
        large.mkdir()
        n_parameters = write_large_model(large / "base.gguf")
        write_random_adapter(large / "base.gguf", large / "adapter")
        before = seconds(lambda: shutil.copyfile(large / "base.gguf", large / "copy.gguf"))
        command = [sys.executable, __file__, "--merge-in", str(large)]
        started = time.perf_counter()
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        took = time.perf_counter() - started
        print(
            f"merge, {n_parameters / 1e9:.2f} billion parameters in Q8_0: peak {ran.stdout.strip()} MB (goal 1500 MB), "
            f"{took:.1f} s with the start of the process; a copy takes {before:.1f} s"
        )


def times(place: Path, repetitions: int) -> None:
    """SmolLM2: the adapter, then merges beside copying and quantizing."""
    base = resolve_model("smollm2-135m")
    write_random_adapter(base, place / "adapter")
    adapter = place / "adapter.gguf"
    written = [
        seconds(lambda: write_adapter_gguf(place / "adapter", base, adapter, {})) for _ in range(repetitions)
    ]
    print(f"adapter.gguf of rank {RANK}, SmolLM2-135M: {statistics.median(written):.2f} s (goal 2 s)")
    f16 = place / "f16.gguf"
    requantize(base, f16, "F16")
    for quant in ("base", "Q8_0", "Q4_K_M", "Q4_0"):
        ours, copies, quantizings = [], [], []
        for _ in range(repetitions):
            ours.append(seconds(lambda quant=quant: merge(base, adapter, place, quant)))
            copies.append(seconds(lambda: shutil.copyfile(base, place / "copy.gguf")))
            # llama.cpp's name for the base's own type is not among those to choose from
            target = "Q4_0" if quant == "base" else quant
            quantizings.append(seconds(lambda target=target: requantize(f16, place / "q.gguf", target)))
        alone = statistics.median(copies) + statistics.median(quantizings)
        print(
            f"merge, {quant:6}: {statistics.median(ours):5.2f} s ({min(ours):.2f} - {max(ours):.2f}); copy and "
            f"quantize alone {alone:.2f} s: ratio {statistics.median(ours) / alone:.1f} (goal 5)"
        )


def merge(base: Path, adapter: Path, place: Path, quant: str) -> None:
    """As `sg-local export --quant` does it."""
    if quant == "base":
        merge_gguf(base, adapter, place / "model.gguf", metadata={})
        return
    requantize(base, place / "base.gguf", quant)
    merge_gguf(place / "base.gguf", adapter, place / "model.gguf", metadata={}, force=True)


def export(base: Path, place: Path) -> None:
    """Adapter and merged file."""
    write_adapter_gguf(place / "adapter", base, place / "adapter.gguf", {})
    merge_gguf(base, place / "adapter.gguf", place / "model.gguf", metadata={})


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_random_adapter(base: Path, directory: Path) -> None:
    """A PEFT adapter for all matrices of the layers, of the size that trained ones have."""
    random = np.random.default_rng(0)
    directory.mkdir()
    arrays = {}
    for matrix in base_matrices(read_model_header(base)).values():
        rows, columns = matrix.shape
        module = f"base_model.model.{matrix.hf.removesuffix('.weight')}"
        arrays[f"{module}.lora_A.weight"] = random.normal(0, 0.02, (RANK, columns)).astype(np.float32)
        arrays[f"{module}.lora_B.weight"] = random.normal(0, 0.01, (rows, RANK)).astype(np.float32)
    save_file(arrays, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "target_modules": sorted({name.rsplit(".", 3)[1] for name in arrays}),
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "init_lora_weights": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def write_large_model(path: Path) -> int:
    """Random Q8_0 blocks in the shapes of TinyLlama-1.1B; returns the number of parameters."""
    kv_rows = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv_rows, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv_rows, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
    metadata = {
        "general.architecture": string_value("llama"),
        "llama.block_count": uint32_value(LAYERS),
        "llama.context_length": uint32_value(2048),
        "llama.embedding_length": uint32_value(HIDDEN),
        "llama.feed_forward_length": uint32_value(INTERMEDIATE),
        "llama.attention.head_count": uint32_value(HEADS),
        "llama.attention.head_count_kv": uint32_value(KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": float32_value(1e-5),
    }
    outputs = [
        OutputTensor(name, shape[::-1], "Q8_0", shape[0] * shape[1] // Q8_0_ELEMENTS * Q8_0_BYTES)
        for name, shape in shapes.items()
    ]
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        write_header(file, metadata, outputs, DEFAULT_ALIGNMENT_BYTES)
        for output in outputs:
            blocks = random.integers(0, 256, (output.size_bytes // Q8_0_BYTES, Q8_0_BYTES), np.uint8)
            blocks[:, :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)  # the block's scale
            file.write(blocks.data)
            pad(file, DEFAULT_ALIGNMENT_BYTES)
    return sum(rows * columns for rows, columns in shapes.values())


if __name__ == "__main__":
    main()
