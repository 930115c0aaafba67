"""The engine on a real model: what is shared is evaluated once, and nobody's answer depends on its neighbours."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sg_local.errors import SgLocalError
from sg_local.gguf_header import read_model_header
from sg_local.llama.engine import Engine, open_engine
from sg_local.llama.generation import Request, generate
from sg_local.llama.logits import log_softmax
from sg_local.llama.quantize import requantize
from sg_local.llama.scoring import label_logprobs, sequence_logits
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import load_task
from sg_local.task_files.rows import load_test_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with open_engine(smollm2, n_ctx=2048, n_parallel=8) as opened:
        yield opened


def tokens(engine: Engine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode_plain(text))


SHARED = "Here is a list of animals and what they eat.\nThe cow eats grass.\nThe"
ANIMALS = [" dog", " cat", " horse", " old horse", " old dog", " mouse"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_there_are_as_many_threads_as_cores_unless_a_number_is_given(smollm2: Path) -> None:
    """llama.cpp's own default is 4, which on fewer cores takes up to three times the time."""
    program = (
        "import os, sys, llama_cpp\nfrom pathlib import Path\n"
        "from sg_local.llama.engine import open_engine\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "for given in (0, 3):\n"
        "    with open_engine(Path(sys.argv[1]), n_ctx=256, n_parallel=1, n_threads=given) as engine:\n"
        "        print(llama_cpp.llama_n_threads(engine.context), llama_cpp.llama_n_threads_batch(engine.context))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(smollm2)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["1 1", "3 3"]


def test_every_node_is_evaluated_once(engine: Engine) -> None:
    prompts = [tokens(engine, SHARED + animal + " eats") for animal in ANIMALS]
    before = engine.counters.evaluated_tokens
    completions = generate(engine, [Request(prompt, 4) for prompt in prompts for _ in range(3)])
    nodes: set[object] = set()
    for index, completion in enumerate(completions):
        prompt = prompts[index // 3]
        nodes |= {prompt[:length] for length in range(1, len(prompt) + 1)}
        # a request's last token is sampled, but never evaluated; equal answers are evaluated once
        answer = completion.token_ids[:-1]
        nodes |= {(prompt, answer[:length]) for length in range(1, len(answer) + 1)}
    assert engine.counters.evaluated_tokens - before == len(nodes)


def test_answers_come_in_the_order_of_the_requests(engine: Engine) -> None:
    questions = [
        tokens(engine, f"One, two, three. {word}, {word}, {word},") for word in ("red", "blue", "green")
    ]
    completions = generate(engine, [Request(prompt, 1) for prompt in questions])
    assert [completion.text.strip() for completion in completions] == ["red", "blue", "green"]


def test_greedy_answers_do_not_depend_on_the_order(engine: Engine) -> None:
    requests = [Request(tokens(engine, SHARED + animal + " eats"), 5) for animal in ANIMALS]
    expected = {
        request.prompt: c.token_ids for request, c in zip(requests, generate(engine, requests), strict=True)
    }
    random.Random(1).shuffle(requests)
    found = {
        request.prompt: c.token_ids for request, c in zip(requests, generate(engine, requests), strict=True)
    }
    assert found == expected


@pytest.mark.parametrize("n_parallel", [1, 2, 5])
def test_few_sequences_and_many_samples_of_one_prompt_come_to_an_end(smollm2: Path, n_parallel: int) -> None:
    # Prompts that held every sequence while their own samples waited for one once stood still for ever.
    with open_engine(smollm2, n_ctx=256, n_parallel=n_parallel) as engine:
        prompts = [tokens(engine, SHARED + animal + " eats") for animal in ANIMALS]
        requests = [
            Request(prompt, 1 + seed % 4, temperature=0.9, seed=seed)
            for prompt in prompts
            for seed in range(7)
        ]
        completions = generate(engine, requests)
    assert [len(c.token_ids) <= r.max_new_tokens for c, r in zip(completions, requests, strict=True)] == [
        True
    ] * 42


def test_the_same_call_gives_the_same_tokens(engine: Engine) -> None:
    requests = [
        Request(tokens(engine, SHARED), 12, temperature=1.0, top_k=40, min_p=0.01, seed=seed)
        for seed in range(12)
    ]
    first = generate(engine, requests)
    generate(engine, requests[:5])  # other work in between
    assert generate(engine, requests) == first
    # 12 samples of 12 tokens at temperature 1: all equal would mean that the seed is not used
    assert len({completion.token_ids for completion in first}) > 6
    other = generate(engine, [replace(request, seed=request.seed + 100) for request in requests])
    assert [c.token_ids for c in other] != [c.token_ids for c in first]


def test_a_stop_string_across_token_borders_ends_the_answer(engine: Engine) -> None:
    prompt = tokens(engine, "One, two, three, four, five, six, seven,")
    whole = generate(engine, [Request(prompt, 12)])[0]
    stop = whole.text[5:9]  # begins and ends in the middle of words
    cut = generate(engine, [Request(prompt, 12, stop=("never there", stop))])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_request_that_can_never_fit_is_refused_with_its_numbers(engine: Engine) -> None:
    with pytest.raises(SgLocalError, match=r"3 tokens and 2046 new ones do not fit 2048"):
        generate(engine, [Request((1, 2, 3), 2046)])


def test_nothing_to_do_is_done_at_once(engine: Engine) -> None:
    assert generate(engine, []) == []
    assert label_logprobs(engine, [], [(1, 2)]) == []


def test_label_scores_are_those_of_each_label_alone(engine: Engine) -> None:
    prompts = [
        tokens(engine, f"Is a {thing} big or small? It is")
        for thing in ("mountain", "very tiny ant", "house")
    ]
    end = engine.tokenizer.eos
    # one label is a prefix of another, two begin alike
    labels = [(*tokens(engine, text), end) for text in (" big", " big and tall", " small", " small one")]
    scores = label_logprobs(engine, prompts, labels)
    for prompt, row in zip(prompts, scores, strict=True):
        for label, score in zip(labels, row, strict=True):
            rows = log_softmax(sequence_logits(engine, (*prompt, *label), len(prompt) - 1))
            alone = sum(float(rows[place][token]) for place, token in enumerate(label))
            # batches of other sizes round otherwise; the scores themselves differ by nats
            assert score == pytest.approx(alone, abs=0.15)


def test_an_engine_can_be_opened_again_and_again(smollm2: Path) -> None:
    answers = set()
    for _ in range(3):
        with open_engine(smollm2, n_ctx=256, n_parallel=2) as engine:
            answers.add(generate(engine, [Request(tokens(engine, SHARED), 4)])[0].token_ids)
    assert len(answers) == 1


def resident_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_models_after_one_another_leave_no_memory_behind(smollm2: Path) -> None:
    sizes = []
    for _ in range(6):
        with open_engine(smollm2, n_ctx=1024, n_parallel=4) as engine:
            generate(engine, [Request(tokens(engine, SHARED), 4)])
        sizes.append(resident_bytes())
    # one context alone takes 60 MB, the model 98
    assert sizes[-1] - sizes[1] < 20e6


def test_greedy_answers_do_not_depend_on_what_is_answered_beside_them(smollm2: Path, tmp_path: Path) -> None:
    """Other batches round otherwise: answers may part where two tokens are as likely as each other, there alone."""
    path = tmp_path / "f16.gguf"
    requantize(smollm2, path, "F16")
    source = read_model_header(smollm2).chat_template
    assert source
    task = load_task("polite-request")
    answers = {}
    for n_parallel in (1, 4, 16):
        with open_engine(path, n_ctx=2048, n_parallel=n_parallel) as engine:
            template = engine.tokenizer.chat_template(source)
            requests = [
                Request(
                    tuple(
                        engine.tokenizer.encode_prompt(
                            template, answer_messages(task.instruction, row.input, task.examples)
                        )
                    ),
                    24,
                )
                for row in load_test_rows(task)[:20]
            ]
            order = list(range(20))
            random.Random(n_parallel).shuffle(order)
            found = generate(engine, [requests[index] for index in order])
            answers[n_parallel] = [found[order.index(index)].token_ids for index in range(20)]
    with open_engine(path, n_ctx=2048, n_parallel=1) as engine:
        for n_parallel in (4, 16):
            equal = 0
            for request, one, other in zip(requests, answers[1], answers[n_parallel], strict=True):
                if one == other:
                    equal += 1
                    continue
                place = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
                logits = sequence_logits(
                    engine, request.prompt + one[:place], len(request.prompt) + place - 1
                )[0]
                assert abs(logits[one[place]] - logits[other[place]]) < 0.1
            assert equal >= 18
