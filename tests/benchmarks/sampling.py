"""Sampling and label scoring by vocabulary: what the processor does between two steps of the model.

    vocabulary    sample    greedy     score        ms for 32 outputs: top-k 40, the best token, log p of 4 labels
        32,000      0.44      0.08      1.16

    python tests/benchmarks/sampling.py [--threads 1]

Random logits. The product's own functions, the best of many tries: processor time with one thread, wall time with more.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

import sg_local.llama.logits as logits_module
from sg_local.llama.generation import Request
from sg_local.llama.logits import log_sum_exp
from sg_local.llama.sampling import Sampling, sample

VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 262_144)
N_OUTPUTS = 32
LABEL_TOKENS = [300, 301, 302, 2]
TRIES = 40


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    logits_module.MAX_THREADS = n_threads = parser.parse_args().threads
    clock = time.thread_time if n_threads == 1 else time.perf_counter

    def best_ms(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(TRIES):
            started = clock()
            work()
            seconds.append(clock() - started)
        return min(seconds) * 1000

    print("vocabulary    sample    greedy     score")
    outputs = list(range(N_OUTPUTS))
    sampled = [Request((1,), 1, temperature=0.9, top_k=40, min_p=0.05, seed=seed) for seed in outputs]
    greedy = [Request((1,), 1)] * N_OUTPUTS
    for n_vocab in VOCABULARIES:
        logits = np.random.default_rng(0).normal(scale=3, size=(N_OUTPUTS, n_vocab)).astype(np.float32)
        times = []
        for requests in (sampled, greedy):
            samplings = [Sampling(request) for request in requests]
            times.append(best_ms(lambda: sample(logits, outputs, samplings)))  # noqa: B023 - runs in this round
            for state in samplings:
                state.close()
        times.append(best_ms(lambda: logits[:, LABEL_TOKENS] - log_sum_exp(logits)[:, None]))  # noqa: B023
        print(f"{n_vocab:>10,}" + "".join(f"{value:10.2f}" for value in times), flush=True)


if __name__ == "__main__":
    main()
