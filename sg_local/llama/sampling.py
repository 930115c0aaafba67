"""From logits to the next token, by llama.cpp's samplers, in its order.

    repeat penalty -> top-k | -> top-p -> min-p -> temperature -> a draw with the request's seed

The part before the bar depends only on the tokens so far. It is done once for all requests that share them, and leaves
the top-k candidates of the whole vocabulary. The part after the bar has a state: the random numbers of the request.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt

from sg_local.llama.tree import TokenIds

PENALIZED_TOKENS = (
    64  # the repeat penalty counts the last 64, with those of the prompt, as llama.cpp's server does
)

GROUP_SIZE = 64  # logits; near_top looks at the maximum of each group first

_CANDIDATE = np.dtype(
    [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
)  # llama.h, llama_token_data


class Parameters(Protocol):
    """The sampling parameters of a request; `generation.Request` has them."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repeat_penalty(self) -> float: ...
    @property
    def seed(self) -> int: ...


class Sampling:
    """The samplers of one request, which have a state. Close it after use."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.chain: Any = None  # none for greedy
        if parameters.temperature <= 0:
            return
        self.chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if parameters.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(parameters.top_p, 1))
        if parameters.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(parameters.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(parameters.temperature))
        self._add(llama_cpp.llama_sampler_init_dist(parameters.seed))

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self.chain, sampler)

    def close(self) -> None:
        """Frees the samplers."""
        if self.chain:
            llama_cpp.llama_sampler_free(self.chain)
            self.chain = None


class Choice:
    """The logits after one sequence of tokens, for all requests that sample there."""

    def __init__(self, logits: npt.NDArray[np.float32], prompt: TokenIds, answer: Sequence[int]) -> None:
        self._logits = logits  # (n_vocab,)
        self._prompt = prompt
        self._answer = answer
        self._candidates: dict[tuple[float, int], tuple[npt.NDArray[Any], bool]] = {}

    def sample(self, sampling: Sampling) -> int:
        """The next token of one request."""
        parameters = sampling.parameters
        if sampling.chain is None and parameters.repeat_penalty == 1:
            return int(self._logits.argmax())
        key = (parameters.repeat_penalty, 0 if sampling.chain is None else parameters.top_k)
        if key not in self._candidates:
            self._candidates[key] = self._shared(*key)
        candidates, is_sorted = self._candidates[key]
        if sampling.chain is None:
            return int(candidates["id"][candidates["logit"].argmax()])
        copied = candidates.copy()  # the chain works in place
        array = _token_data_array(copied, is_sorted)
        llama_cpp.llama_sampler_apply(sampling.chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        llama_cpp.llama_sampler_accept(sampling.chain, token)
        return token

    def _shared(self, repeat_penalty: float, top_k: int) -> tuple[npt.NDArray[Any], bool]:
        """The candidates that the samplers of each request start from, and whether they are sorted."""
        # After a penalty a token from far below may be at the top, so all tokens stay candidates.
        ids = near_top(self._logits, top_k) if repeat_penalty == 1 else np.arange(len(self._logits))
        candidates = np.zeros(len(ids), _CANDIDATE)
        candidates["id"] = ids
        candidates["logit"] = self._logits[ids]
        array = _token_data_array(candidates, False)
        if repeat_penalty != 1:
            penalties = llama_cpp.llama_sampler_init_penalties(
                len(self._logits), PENALIZED_TOKENS, repeat_penalty, 0.0, 0.0
            )
            for token in (*self._prompt[-PENALIZED_TOKENS:], *self._answer)[-PENALIZED_TOKENS:]:
                llama_cpp.llama_sampler_accept(penalties, token)
            llama_cpp.llama_sampler_apply(penalties, ctypes.byref(array))
            llama_cpp.llama_sampler_free(penalties)
        if top_k > 0:
            sampler = llama_cpp.llama_sampler_init_top_k(top_k)
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
            llama_cpp.llama_sampler_free(sampler)
        return candidates[: array.size].copy(), bool(array.sorted)


def near_top(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """The ids of the k highest logits and a few others, ascending; all ids if k is 0 or large.

    The vocabulary is split into groups. At least k logits reach the k-th highest maximum of a group, so no lower
    logit is among the k highest. To copy and sort the whole vocabulary takes ten times as long.
    """
    n_groups = len(logits) // GROUP_SIZE
    if not 0 < k < n_groups:
        return np.arange(len(logits))
    maxima = logits[: n_groups * GROUP_SIZE].reshape(GROUP_SIZE, n_groups).max(axis=0)
    bound = np.partition(maxima, n_groups - k)[n_groups - k]
    ids = np.flatnonzero(logits >= bound)
    return ids if len(ids) >= k else np.arange(len(logits))  # there are fewer if logits are NaN


def _token_data_array(candidates: npt.NDArray[Any], is_sorted: bool) -> Any:
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    return llama_cpp.llama_token_data_array(data, len(candidates), -1, is_sorted)
