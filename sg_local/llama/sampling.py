"""From logits to the next token, by llama.cpp's samplers, in its order.

    the highest logits of each output | -> top-k -> min-p -> temperature -> a draw with the request's seed

The part before the bar is the same for all requests that sample at an output, and looks at the whole vocabulary. It is
done here in numpy for all outputs of a batch at once, or where the logits are, by llama.cpp's backend samplers
(`Engine.use_backend_top_k`). The part after the bar has a state: the random numbers of the request. Greedy is top-k 1.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import llama_cpp
import numpy as np

from sg_local.llama.logits import Logits, Places, near_top

Ids = np.ndarray[Any, np.dtype[np.int32]]

# llama.h: llama_token_data, llama_token_data_array
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_ARRAY = np.dtype(
    [("data", np.uintp), ("size", np.uintp), ("selected", np.int64), ("sorted", np.bool_)], align=True
)


class Parameters(Protocol):
    """The sampling parameters of a request; `generation.Request` has them."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int: ...


def n_candidates(parameters: Parameters) -> int:
    """How many of the highest logits a request chooses from; 0: from all."""
    return 1 if parameters.temperature <= 0 else max(parameters.top_k, 0)


class Sampling:
    """The samplers of one request, which have a state. Close it after use."""

    def __init__(self, parameters: Parameters) -> None:
        self.n_candidates = n_candidates(parameters)
        self.chain: Any = None
        if self.n_candidates == 1:
            return
        self.chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if self.n_candidates:
            self._add(llama_cpp.llama_sampler_init_top_k(self.n_candidates))
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


def sample(logits: Logits, outputs: Sequence[int], samplings: Sequence[Sampling]) -> list[int]:
    """The next token of each request, given the logits (n_outputs, n_vocab) of a batch and the output it samples at."""
    tokens = [0] * len(samplings)
    by_count: dict[int, list[int]] = {}
    for user, sampling in enumerate(samplings):
        by_count.setdefault(sampling.n_candidates, []).append(user)
    for count, users in by_count.items():
        if count == 1:
            best = logits.argmax(axis=1).tolist()
            found = [best[outputs[user]] for user in users]
        elif not 0 < count < logits.shape[1]:  # from all: one by one, for a copy has three times a row's size
            found = [_sample_all(logits[outputs[user]], samplings[user]) for user in users]
        else:
            places = near_top(logits, count)
            rows, ids = np.divmod(places, logits.shape[1])
            starts = np.searchsorted(rows, np.arange(len(logits) + 1))
            chains = [samplings[user].chain for user in users]
            found = _draw(ids, logits.ravel()[places], starts, [outputs[user] for user in users], chains)
        for user, token in zip(users, found, strict=True):
            tokens[user] = token
    return tokens


def _sample_all(logits: Logits, sampling: Sampling) -> int:
    """The same for one request, given the logits (n_vocab,) of its output: it chooses from all."""
    starts = np.array([0, len(logits)])
    return _draw(np.arange(len(logits)), logits, starts, [0], [sampling.chain])[0]


def sample_highest(
    ids: Ids, logits: Logits, outputs: Sequence[int], samplings: Sequence[Sampling]
) -> list[int]:
    """The same, given the highest logits alone, (n_outputs, k): all requests have top-k k."""
    n_outputs, count = ids.shape
    if count == 1:
        best = ids[:, 0].tolist()
        return [best[output] for output in outputs]
    starts = np.arange(0, n_outputs * count + 1, count)
    return _draw(ids.ravel(), logits.ravel(), starts, outputs, [sampling.chain for sampling in samplings])


def _draw(
    ids: Ids | Places, logits: Logits, starts: Places, outputs: Sequence[int], chains: Sequence[Any]
) -> list[int]:
    """A token for each chain out of the candidates of its output: those at starts[output]:starts[output + 1]."""
    sizes = np.diff(starts)[outputs]
    ends = sizes.cumsum()
    # Chains work in place, so each has a copy.
    places = np.arange(ends[-1]) + np.repeat(starts[outputs] - ends + sizes, sizes)
    candidates = np.zeros(len(places), _CANDIDATE)
    candidates["id"], candidates["logit"] = ids[places], logits[places]
    arrays = np.zeros(len(chains), _ARRAY)
    arrays["data"] = candidates.ctypes.data + _CANDIDATE.itemsize * (ends - sizes)
    arrays["size"], arrays["selected"] = sizes, -1
    # None of these samplers learns from the token that was chosen, so there is no llama_sampler_accept.
    for chain, array in zip(
        chains, (llama_cpp.llama_token_data_array * len(chains)).from_buffer(arrays), strict=True
    ):
        llama_cpp.llama_sampler_apply(chain, array)
    tokens: list[int] = candidates["id"][ends - sizes + arrays["selected"]].tolist()
    return tokens
