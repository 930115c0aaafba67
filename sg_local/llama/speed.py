"""How fast a model file runs on this machine; the speed depends much on the file's type.

    measure_speed(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))    -> Speed(prompt=180.0, generated=75.0)
    measure_speed(Path("f16.gguf"))                           -> Speed(prompt=310.0, generated=110.0), the same weights

Measured on a little of what `annotate` does: a prompt, then a few tokens of many sequences side by side.
"""

import time
from pathlib import Path

from sg_local.llama.engine import BatchToken, Engine, open_engine
from sg_local.plan.times import SAMPLE_PROMPT_TOKENS, SAMPLE_SEQUENCES, SAMPLE_STEPS, Speed

_LONG_ENOUGH_SECONDS = 10.0  # after that a second try would tell nothing new


def measure_speed(path: Path, *, n_threads: int, n_gpu_layers: int = 0) -> Speed:
    """Tokens a second of a prompt of 256, and of 8 steps of 16 sequences, the better of two short tries."""
    with open_engine(
        path,
        n_ctx=512,
        n_parallel=SAMPLE_SEQUENCES,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        is_silent=True,
    ) as engine:
        tries = [_seconds(engine)]
        if sum(tries[0]) < _LONG_ENOUGH_SECONDS:
            tries.append(_seconds(engine))
        prompt_seconds, step_seconds = min(tries, key=sum)
        return Speed(SAMPLE_PROMPT_TOKENS / prompt_seconds, SAMPLE_SEQUENCES * SAMPLE_STEPS / step_seconds)


def _seconds(engine: Engine) -> tuple[float, float]:
    token = engine.tokenizer.beginning[0]
    engine.clear()
    started = time.perf_counter()
    engine.hold_prefix((token,) * SAMPLE_PROMPT_TOKENS)
    prompted = time.perf_counter()
    for sequence in range(1, SAMPLE_SEQUENCES + 1):
        engine.fork(0, sequence, SAMPLE_PROMPT_TOKENS)
    for step in range(SAMPLE_STEPS):
        position = SAMPLE_PROMPT_TOKENS + step
        engine.decode(
            [BatchToken(token, position, [number], True) for number in range(1, SAMPLE_SEQUENCES + 1)]
        )
    return prompted - started, time.perf_counter() - prompted
