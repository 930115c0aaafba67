"""Sampling looks at few of a vocabulary's logits, and chooses as if it had looked at all."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from tiny_models import write_tiny_llama

from sg_local.llama import logits as logits_module
from sg_local.llama.engine import Engine, open_engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.llama.logits import log_sum_exp, near_top
from sg_local.llama.sampling import Sampling, sample
from sg_local.llama.scoring import label_logprobs

RANDOM = np.random.default_rng(0)


def kinds_of_rows(n_vocab: int) -> dict[str, Any]:
    return {
        "spread": RANDOM.normal(size=n_vocab),
        "negative": RANDOM.normal(size=n_vocab) - 100,
        "with ties": RANDOM.integers(0, 30, n_vocab),
        "all equal": np.zeros(n_vocab),
        "mostly forbidden": np.where(RANDOM.random(n_vocab) < 0.99, -np.inf, RANDOM.normal(size=n_vocab)),
        "ascending": np.arange(n_vocab),
        "descending": -np.arange(n_vocab),
    }


@pytest.mark.parametrize("n_vocab", [40, 324, 4096, 32000, 49153])
@pytest.mark.parametrize("k", [0, 1, 40, 400])
def test_the_highest_logits_are_among_those_looked_at(n_vocab: int, k: int) -> None:
    kinds = kinds_of_rows(n_vocab)
    rows = np.array([*kinds.values()], np.float32)
    places = near_top(rows, k)
    assert list(places) == sorted(set(places))
    for number, kind in enumerate(kinds):
        ids = places[places // n_vocab == number] % n_vocab
        if not 0 < k < n_vocab:
            assert len(ids) == n_vocab
        else:
            assert np.array_equal(np.sort(rows[number, ids])[-k:], np.sort(rows[number])[-k:]), kind
        if kind == "spread" and k == 40 and n_vocab > 30000:
            assert len(ids) < 200


def test_a_row_without_numbers_is_looked_at_as_a_whole() -> None:
    rows = np.stack([np.full(4096, np.nan), RANDOM.normal(size=4096)]).astype(np.float32)
    assert len(near_top(rows, 40)) == 2 * 4096


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RANDOM.normal(scale=3, size=(9, 5000)).astype(np.float32)
    places, sums = near_top(rows, 40), log_sum_exp(rows)
    monkeypatch.setattr(logits_module, "THREAD_SIZE", 1000)
    monkeypatch.setattr(logits_module, "usable_cores", lambda: 4)
    assert np.array_equal(near_top(rows, 40), places)
    assert np.array_equal(log_sum_exp(rows), sums)


def test_the_sum_of_a_row_is_exact_to_single_precision() -> None:
    for n_vocab in (324, 49153, 151936):
        kinds = kinds_of_rows(n_vocab) | {"far": RANDOM.normal(scale=3, size=n_vocab) + 1e4}
        rows = np.array([*kinds.values()], np.float32)
        highest = rows.max(axis=1, keepdims=True).astype(np.float64)
        exact = np.log(np.exp(rows.astype(np.float64) - highest).sum(axis=1)) + highest[:, 0]
        assert np.abs(log_sum_exp(rows) - exact).max() < 1e-6


def chosen_by_llama_cpp(rows: Any, request: Request) -> list[int]:
    """What llama.cpp's samplers choose, given the whole vocabulary each time."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in (
        llama_cpp.llama_sampler_init_top_k(request.top_k),
        llama_cpp.llama_sampler_init_min_p(request.min_p, 1),
        llama_cpp.llama_sampler_init_temp(request.temperature),
        llama_cpp.llama_sampler_init_dist(request.seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    tokens = []
    for row in rows:
        data = (llama_cpp.llama_token_data * len(row))()
        for token, logit in enumerate(row):
            data[token].id, data[token].logit = token, logit
        array = llama_cpp.llama_token_data_array(data, len(row), -1, False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        tokens.append(int(data[array.selected].id))
        llama_cpp.llama_sampler_accept(chain, tokens[-1])
    llama_cpp.llama_sampler_free(chain)
    return tokens


def test_the_same_tokens_as_llama_cpp_draws_from_the_whole_vocabulary() -> None:
    steps = RANDOM.normal(scale=3, size=(20, 2, 2000)).astype(np.float32)
    # Requests of several settings, several of them at one output of a batch.
    settings = [(0.9, 1), (0.9, 5), (0.9, 40), (0.9, 400), (0.2, 40), (0.7, 0), (0.0, 7)]
    requests = [
        (output, Request((1,), 8, temperature=temperature, top_k=top_k, min_p=0.02, seed=seed))
        for seed, (temperature, top_k) in enumerate(settings)
        for output in (0, 1)
    ]
    requests.sort(key=lambda item: item[0])
    samplings = [Sampling(request) for _, request in requests]
    outputs = [output for output, _ in requests]
    tokens = [sample(rows, outputs, samplings) for rows in steps]
    for number, (output, request) in enumerate(requests):
        expected = chosen_by_llama_cpp(steps[:, output], request)
        assert [step[number] for step in tokens] == expected, request
    for state in samplings:
        state.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def on_backend(model: Path) -> Iterator[Engine]:
    with open_engine(model, n_ctx=256, n_parallel=5, has_backend_top_k=True) as opened:
        yield opened


# Prompts that share beginnings, one of which ends inside another; several samples of each.
PROMPTS = [(260, 261), (260, 261, 262), (260, 261, 262, 263, 264), (270,), (260, 300, 301)]
SAMPLED = [
    Request(prompt, 9, temperature=1.5, top_k=20, min_p=0.01, seed=seed)
    for prompt in PROMPTS
    for seed in range(6)
]
GREEDY = [Request(prompt, 9) for prompt in PROMPTS]
LABELS = [(270, 271, 2), (280, 2)]


def in_numpy(model: Path) -> tuple[list[Completion], list[Completion], list[list[float]]]:
    with open_engine(model, n_ctx=256, n_parallel=5) as engine:
        found = generate(engine, SAMPLED), generate(engine, GREEDY), label_logprobs(engine, PROMPTS, LABELS)
        assert engine.backend_top_k == 0  # nothing is on a card here
    return found


def test_the_backend_chooses_the_same_tokens(model: Path, on_backend: Engine) -> None:
    sampled, greedy, scores = in_numpy(model)
    assert generate(on_backend, SAMPLED) == sampled
    assert on_backend.backend_top_k == 20
    assert generate(on_backend, GREEDY) == greedy
    assert on_backend.backend_top_k == 1
    assert label_logprobs(on_backend, PROMPTS, LABELS) == scores  # which need all logits
    assert on_backend.backend_top_k == 0
    assert (
        generate(on_backend, SAMPLED + GREEDY) == sampled + greedy
    )  # of several kinds at once: all logits again
    assert on_backend.backend_top_k == 0
    assert generate(on_backend, SAMPLED) == sampled


@pytest.mark.parametrize("fault", ["not attached", "no operation"])
def test_where_the_backend_cannot_numpy_does(
    model: Path, on_backend: Engine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "not attached":  # as with the split mode "tensor"
        attach = llama_cpp.llama_set_sampler
        monkeypatch.setattr(
            llama_cpp,
            "llama_set_sampler",
            lambda context, sequence, sampler: sequence < 3 and attach(context, sequence, sampler),
        )
    else:
        monkeypatch.setattr(llama_cpp, "llama_sampler_name", lambda _sampler: b"-top-k")
    sampled, greedy, _scores = in_numpy(model)
    assert generate(on_backend, SAMPLED) == sampled
    assert on_backend.backend_top_k == 0
    assert generate(on_backend, GREEDY) == greedy
