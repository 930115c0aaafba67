"""The prompt tree changes no answer: random trees of prompts, side by side, against each request alone.

Tiny random models in F32: a llama, and two whose state cannot be taken back (LFM2 with short convolutions, Qwen 3.5
with linear attention), so that only the prefix of all prompts is shared. What rounds there is the key-value memory, to
half precision: where two tokens are nearer than that can tell apart, and there alone, answers may differ.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TOKENS, write_tiny_llama, write_tiny_model

from sg_local.errors import SgLocalError
from sg_local.llama.engine import Engine, open_engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.llama.logits import log_softmax
from sg_local.llama.scoring import answer_logprobs, label_logprobs, sequence_logits

N_CTX = 256
ROUNDING = 0.02  # logits; measured 0.004, while logits differ by tens


@pytest.fixture(scope="module", params=["llama", "lfm2", "qwen35"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    if request.param == "llama":
        return write_tiny_llama(path)
    return write_tiny_model(path, request.param, n_layers=4)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with open_engine(model, n_ctx=N_CTX, n_parallel=5) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Engine]:
    with open_engine(model, n_ctx=N_CTX, n_parallel=1) as opened:
        yield opened


def distinct_nodes(requests: list[Request], completions: list[Completion]) -> int:
    """Prefixes of prompts, and of answers behind a prompt: all but an answer's last token, which nobody follows."""
    nodes: set[Any] = set()
    for request, completion in zip(requests, completions, strict=True):
        nodes |= {request.prompt[:length] for length in range(1, len(request.prompt) + 1)}
        answer = completion.token_ids[:-1]
        nodes |= {(request.prompt, answer[:length]) for length in range(1, len(answer) + 1)}
    return len(nodes)


def each_node_once(engine: Engine, n_evaluated: int, n_nodes: int) -> bool:
    """Whether each node of the tree was evaluated once; without a way back, some are evaluated more often."""
    return n_evaluated == n_nodes if engine.can_go_back else n_evaluated >= n_nodes


def agree(alone: Engine, request: Request, found: Completion, expected: Completion) -> bool:
    """Whether two greedy answers are equal, or part where the logits of both choices are the same but for rounding."""
    if found == expected:
        return True
    pairs = enumerate(zip(found.token_ids, expected.token_ids, strict=False))
    place = next(place for place, (one, other) in pairs if one != other)
    logits = sequence_logits(
        alone, request.prompt + expected.token_ids[:place], len(request.prompt) + place - 1
    )
    return abs(logits[0, found.token_ids[place]] - logits[0].max()) < ROUNDING


# Few tokens, so that random prompts share beginnings of every length.
TOKEN = st.integers(260, 263)
PROMPT = st.lists(TOKEN, min_size=1, max_size=40).map(tuple)
STOPS = st.lists(st.sampled_from(["a", "th", "e", "b c", "日", "é", " x"]), max_size=2).map(tuple)


@st.composite
def request_lists(draw: st.DrawFn) -> list[Request]:
    stems = draw(st.lists(PROMPT, min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 14))):
        stem = draw(st.sampled_from(stems))
        prompt = stem[: draw(st.integers(0, len(stem)))] + draw(PROMPT)
        found.append(Request(prompt, draw(st.integers(1, 12)), stop=draw(STOPS)))
    return found + draw(st.lists(st.sampled_from(found), max_size=5))  # some twice


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=request_lists())
def test_answers_are_those_of_each_request_alone(
    engine: Engine, alone: Engine, requests: list[Request]
) -> None:
    before = engine.counters.evaluated_tokens, engine._prefix
    together = generate(engine, requests)
    for request, completion in zip(requests, together, strict=True):
        assert agree(alone, request, completion, generate(alone, [request])[0])
    reused = len(before[1]) if before[1] == engine._prefix else 0
    n_evaluated = engine.counters.evaluated_tokens - before[0]
    assert each_node_once(engine, n_evaluated, distinct_nodes(requests, together) - reused)
    assert engine.counters.in_flight == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(PROMPT, min_size=1, max_size=8),
    labels=st.lists(
        st.lists(TOKEN, min_size=0, max_size=3).map(lambda tokens: (*tokens, 2)), min_size=1, max_size=5
    ),
)
def test_label_scores_are_those_of_each_label_alone(
    engine: Engine, prompts: list[tuple[int, ...]], labels: list[tuple[int, ...]]
) -> None:
    scores = label_logprobs(engine, prompts, labels)
    for prompt, row in zip(prompts, scores, strict=True):
        for label, score in zip(labels, row, strict=True):
            logits = log_softmax(sequence_logits(engine, (*prompt, *label), len(prompt) - 1))
            alone = sum(float(logits[place, token]) for place, token in enumerate(label))
            assert score == pytest.approx(alone, abs=ROUNDING)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(
        st.tuples(PROMPT, st.lists(TOKEN, min_size=0, max_size=4).map(lambda tokens: (*tokens, 2))),
        max_size=10,
    )
)
def test_answers_to_prompts_of_their_own_score_as_each_alone(
    engine: Engine, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    scores = answer_logprobs(engine, pairs)
    assert len(scores) == len(pairs)
    for (prompt, answer), score in zip(pairs, scores, strict=True):
        logits = log_softmax(sequence_logits(engine, (*prompt, *answer), len(prompt) - 1))
        alone = sum(float(logits[place, token]) for place, token in enumerate(answer))
        assert score == pytest.approx(alone, abs=ROUNDING)


def test_label_scoring_evaluates_every_node_once(engine: Engine) -> None:
    rng = random.Random(3)
    prompts = [
        (260, 261, 262, *(rng.randrange(260, 320) for _ in range(rng.randrange(1, 9)))) for _ in range(90)
    ]
    labels = [(270, 271, 2), (270, 271, 272, 2), (280, 2), (2,)]
    engine.clear()
    before = engine.counters.evaluated_tokens
    label_logprobs(engine, prompts, labels)
    paths = {(*prompt, *label[:-1]) for prompt in prompts for label in labels}
    nodes = {path[:length] for path in paths for length in range(1, len(path) + 1)}
    assert each_node_once(engine, engine.counters.evaluated_tokens - before, len(nodes))


@pytest.mark.parametrize(("n_parallel", "n_requests"), [(1, 300), (3, 1000), (16, 5000)])
def test_thousands_of_requests_in_a_small_memory(model: Path, n_parallel: int, n_requests: int) -> None:
    rng = random.Random(1)
    requests = []
    for number in range(n_requests):
        prompt = (260, 261, *(rng.randrange(260, 320) for _ in range(rng.randrange(0, 30))))
        requests.append(
            Request(prompt, 1 + number % 7, temperature=number % 2 * 1.5, top_k=number % 3 * 20, seed=number)
        )
    with open_engine(model, n_ctx=N_CTX, n_parallel=n_parallel) as engine:
        finished: list[int] = []
        completions = generate(engine, requests, finished.append)
        assert sorted(finished) == list(range(n_requests))
        assert each_node_once(engine, engine.counters.evaluated_tokens, distinct_nodes(requests, completions))
        assert len(engine.counters.rates()) == 2
        assert engine.counters.decode_seconds <= engine.counters.seconds


def test_a_request_may_fill_the_context_to_the_last_token(engine: Engine) -> None:
    prompt = tuple(260 + number % 9 for number in range(N_CTX - 8))
    first, second = generate(engine, [Request(prompt, 8), Request((300, *prompt[1:]), 8)])
    assert {len(first.token_ids), len(second.token_ids)} <= set(range(1, 9))
    with pytest.raises(SgLocalError, match=f"{N_CTX - 8} tokens and 9 new ones do not fit {N_CTX}"):
        generate(engine, [Request((1,), 3), Request(prompt, 9)])


def test_an_empty_prompt_stands_for_the_beginning(engine: Engine) -> None:
    assert TOKENS[1] == "<s>"
    assert generate(engine, [Request((), 5)]) == generate(engine, [Request((1,), 5)])
    assert label_logprobs(engine, [()], [(260, 2)]) == label_logprobs(engine, [(1,)], [(260, 2)])


def test_samples_part_and_meet_nobody_else(engine: Engine, alone: Engine) -> None:
    """Samples of one prompt are one branch until they part; each draws as it would have drawn alone."""
    requests = [Request((260, 261), 4, temperature=0.4, top_k=3, min_p=0.01, seed=seed) for seed in range(40)]
    before = engine.counters.evaluated_tokens
    engine.clear()
    together = generate(engine, requests)
    expected = [generate(alone, [request])[0] for request in requests]
    # rounding may move a draw that falls between two tokens
    assert sum(a == b for a, b in zip(together, expected, strict=True)) >= 38
    distinct = {completion.token_ids for completion in together}
    assert 1 < len(distinct) < 40  # some agree, some do not
    n_evaluated = engine.counters.evaluated_tokens - before
    assert each_node_once(engine, n_evaluated, distinct_nodes(requests, together))


def test_a_failed_call_leaves_nothing_behind(engine: Engine) -> None:
    expected = generate(engine, [Request((260, 261, 262), 6)])

    def fail(_index: int) -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        generate(engine, [Request((260, 261, 262, number), 3) for number in range(263, 280)], fail)
    assert engine.counters.in_flight == 0
    assert generate(engine, [Request((260, 261, 262), 6)]) == expected
