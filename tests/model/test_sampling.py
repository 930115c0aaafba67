"""Sampling looks at few of a vocabulary's logits, and chooses as if it had looked at all."""

import numpy as np
import pytest

import sg_local.llama.sampling as sampling
from sg_local.llama.generation import Request
from sg_local.llama.sampling import Choice, Sampling, near_top

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("n_vocab", [40, 324, 4096, 32000, 49153])
@pytest.mark.parametrize("k", [0, 1, 40, 400])
def test_the_highest_logits_are_among_those_looked_at(n_vocab: int, k: int) -> None:
    kinds = {
        "spread": RANDOM.normal(size=n_vocab),
        "with ties": RANDOM.integers(0, 30, n_vocab),
        "all equal": np.zeros(n_vocab),
        "mostly forbidden": np.where(RANDOM.random(n_vocab) < 0.99, -np.inf, RANDOM.normal(size=n_vocab)),
        "no numbers": np.full(n_vocab, np.nan),
        "ascending": np.arange(n_vocab),
    }
    for kind, values in kinds.items():
        logits = values.astype(np.float32)
        ids = near_top(logits, k)
        assert list(ids) == sorted(set(ids)), kind
        if kind == "no numbers" or not 0 < k < n_vocab:
            assert len(ids) == n_vocab
        else:
            assert np.array_equal(np.sort(logits[ids])[-k:], np.sort(logits)[-k:]), kind
        if kind == "spread" and k == 40 and n_vocab > 30000:
            assert len(ids) < 200


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_the_same_tokens_as_from_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    rows = RANDOM.normal(scale=3, size=(50, 32000)).astype(np.float32)

    def tokens() -> list[int]:
        request = Request((1,), 8, temperature=0.9, top_k=top_k, top_p=0.95, min_p=0.05, seed=11)
        state = Sampling(request)
        try:
            return [Choice(row, (1,), []).sample(state) for row in rows]
        finally:
            state.close()

    few = tokens()
    monkeypatch.setattr(sampling, "near_top", lambda logits, _k: np.arange(len(logits)))
    assert few == tokens()
