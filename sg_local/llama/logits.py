"""What is read from logits, one row of the vocabulary for each output of a batch, all rows in a few numpy calls.

    logits (32, 151936)    near_top(logits, 40)      -> where the 40 highest of each row are, and a few others
                           log_sum_exp(logits)       -> (32,) log of the sum of exp over each row

The time is that of reading the vocabulary, so larger batches are shared among threads: numpy lets others run meanwhile.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from sg_local.llama.library import usable_cores

Logits = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Places = np.ndarray[Any, np.dtype[np.int64]]
Result = TypeVar("Result")

GROUP_SIZE = 8  # logits; near_top looks at the highest of each group first
BLOCK_SIZE = 2**16  # logits; log_sum_exp's copy of so many stays in a core's cache
THREAD_SIZE = 2**20  # logits; for fewer, a thread takes longer to start than to work
MAX_THREADS = 8  # more wait for each other and for memory


def near_top(logits: Logits, k: int) -> Places:
    """Where the k highest logits of each row are, in logits.ravel(), and a few others; all if k is 0. Ascending.

    Each row is split into groups. At least k logits reach the k-th highest maximum of a group, so no lower logit is
    among the k highest. The groups whose maximum reaches it are found in the same way. So the whole vocabulary is read
    once, and nothing of its size is written.
    """
    n_vocab = logits.shape[1]
    if 0 < k < n_vocab:
        found = _in_threads(lambda rows: _reaching(rows, k)[0], logits)
        places = np.concatenate([start * n_vocab + part for start, part in found])
        if (
            np.bincount(places // n_vocab, minlength=len(logits)).min() >= k
        ):  # there are fewer if logits are NaN
            return np.sort(places)
    return np.arange(logits.size)


def _reaching(values: Logits, k: int) -> tuple[Places, Logits]:
    """Where values, (n_rows, n), reach a bound that at least k of each row reach, and the bounds."""
    n_rows, n = values.shape
    n_groups = n // GROUP_SIZE
    if n_groups < 2 * k:
        bounds = np.partition(values, n - k, axis=1)[:, n - k]
        return np.flatnonzero(values >= bounds[:, None]), bounds
    n_grouped = n_groups * GROUP_SIZE
    # The members of a group lie n_groups apart: so the maxima of neighbours are taken together.
    maxima = values[:, :n_grouped].reshape(n_rows, GROUP_SIZE, n_groups).max(axis=1)
    groups, bounds = _reaching(maxima, k)
    rows = groups // n_groups
    members = (groups + rows * (n - n_groups))[:, None] + np.arange(0, n_grouped, n_groups)
    others = np.arange(n_rows)[:, None] * n + np.arange(n_grouped, n)
    places = np.concatenate([members.ravel(), others.ravel()])
    reached = np.concatenate([np.repeat(bounds[rows], GROUP_SIZE), np.repeat(bounds, n - n_grouped)])
    return places[values.ravel()[places] >= reached], bounds


def log_sum_exp(logits: Logits) -> Doubles:
    """log(sum(exp(logits))) of each row, in single precision inside: within 1e-6."""
    return np.concatenate([part for _, part in _in_threads(_log_sum_exp, logits)])


def _log_sum_exp(logits: Logits) -> Doubles:
    n_rows, n_vocab = logits.shape
    n_together = max(1, BLOCK_SIZE // n_vocab)
    copy = np.empty((n_together, n_vocab), np.float32)
    sums: Doubles = np.empty(n_rows)
    for start in range(0, n_rows, n_together):
        rows = logits[start : start + n_together]
        exps = copy[: len(rows)]
        highest = rows.max(axis=1, keepdims=True)
        np.subtract(rows, highest, out=exps)
        np.exp(exps, out=exps)
        sums[start : start + len(rows)] = np.log(exps.sum(axis=1), dtype=np.float64) + highest[:, 0]
    return sums


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities of logits (n, n_vocab)."""
    result: Logits = (logits.astype(np.float64) - log_sum_exp(logits)[:, None]).astype(np.float32)
    return result


def _in_threads(function: Callable[[Logits], Result], rows: Logits) -> list[tuple[int, Result]]:
    """(start, function(rows[start:stop])) for parts that are all the rows together."""
    n_parts = max(1, min(rows.size // THREAD_SIZE, len(rows), MAX_THREADS, usable_cores()))
    starts = [part * len(rows) // n_parts for part in range(n_parts + 1)]
    parts = [rows[start:stop] for start, stop in pairwise(starts)]
    if n_parts == 1:
        return [(0, function(rows))]
    return list(zip(starts, _threads().map(function, parts), strict=False))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="logits")
