"""How fast a model file runs on this machine; the speed depends much on the file's type.

    seconds_of_work(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), n_threads=0)   -> 4.1
    seconds_of_work(Path("f16.gguf"), n_threads=0)                          -> 2.2    half the time, the same weights

Measured on a little of what `annotate` does: a prompt, then a few tokens of many sequences side by side.
"""

import time
from pathlib import Path

from sg_local.llama.engine import BatchToken, open_engine

_PROMPT_TOKENS = 256
_SEQUENCES = 16
_STEPS = 8


def seconds_of_work(path: Path, *, n_threads: int) -> float:
    """Wall seconds on the CPU for 256 prompt tokens and 8 steps of 16 sequences, the better of two tries."""
    with open_engine(
        path, n_ctx=512, n_parallel=_SEQUENCES, n_threads=n_threads, n_gpu_layers=0, is_silent=True
    ) as engine:
        token = engine.tokenizer.beginning[0]
        best = float("inf")
        for _ in range(2):
            engine.clear()
            started = time.perf_counter()
            engine.hold_prefix((token,) * _PROMPT_TOKENS)
            for sequence in range(1, _SEQUENCES + 1):
                engine.fork(0, sequence, _PROMPT_TOKENS)
            for step in range(_STEPS):
                position = _PROMPT_TOKENS + step
                engine.decode(
                    [BatchToken(token, position, [number], True) for number in range(1, _SEQUENCES + 1)]
                )
            best = min(best, time.perf_counter() - started)
        return best
