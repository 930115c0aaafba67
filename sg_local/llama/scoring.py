"""The probability of each label as the answer to a prompt: exact, with one evaluation of the prompt.

    prompts [(1, 4093, ...)], labels [(21, 2), (487, 19, 2)]      token ids, the end token included
    -> [[-0.41, -3.20]]                                           log p(label | prompt), nats

    pairs [((1, 4093, ...), (21, 2)), ((1, 77, ...), (9, 2))]         a prompt and its own answer
    -> [-0.41, -7.30]                                             log p(answer | prompt), nats

Prompts and labels form one tree (prefill.py): many prompts fit into one batch, and a token that several labels share is
evaluated once. A label's last token is not evaluated, since no logits are needed after it. With the end token,
"support" and "supporting" exclude each other.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from sg_local.errors import SgLocalError
from sg_local.llama.engine import BatchToken, Engine
from sg_local.llama.logits import Logits, log_sum_exp
from sg_local.llama.prefill import Prefill
from sg_local.llama.tree import Node, TokenIds, mark_wanted, nodes_between, release


def label_logprobs(
    engine: Engine,
    prompts: Sequence[TokenIds],
    labels: Sequence[TokenIds],
    on_finished: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """log p of each label after each prompt, shape (n_prompts, n_labels), in nats.

    `on_finished` gets the index of each prompt whose labels are all evaluated.
    Raises SgLocalError if a prompt with a label cannot fit the context.
    """
    if not labels:
        return [[] for _ in prompts]
    pairs = [(prompt, label) for prompt in prompts for label in labels]
    owners = [index for index in range(len(prompts)) for _ in labels]
    scores = _scores(engine, pairs, owners, on_finished)
    return [scores[start : start + len(labels)] for start in range(0, len(scores), len(labels))]


def answer_logprobs(engine: Engine, pairs: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
    """log p of each answer after its prompt, in nats. Raises SgLocalError as `label_logprobs` does."""
    return _scores(engine, pairs, list(range(len(pairs))), None)


def _scores(
    engine: Engine,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    owners: Sequence[int],
    on_finished: Callable[[int], None] | None,
) -> list[float]:
    """log p of each pair's answer after its prompt; on_finished gets each owner whose pairs are all evaluated."""
    if not pairs:
        return []
    longest = max(len(prompt) for prompt, _ in pairs), max(len(answer) for _, answer in pairs)
    if not engine.fits(*longest):
        raise SgLocalError(
            f"a prompt of {longest[0]} tokens and a label of {longest[1]} do not fit {engine.longest_sequence} "
            f"tokens: {engine.room_advice(sum(longest))}"
        )
    pairs = [(prompt or engine.tokenizer.beginning, answer) for prompt, answer in pairs]
    # Counted as if each answer were scored alone, with its whole prompt.
    engine.counters.prompt_tokens += sum(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
    engine.use_backend_top_k(0)
    with engine.counters.timed():
        return _tree_scores(engine, pairs, owners, on_finished)


def _tree_scores(
    engine: Engine,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    owners: Sequence[int],
    on_finished: Callable[[int], None] | None,
) -> list[float]:
    waiting: dict[TokenIds, list[int]] = {}  # prompt and answer without its last token -> owners
    first_reads: dict[TokenIds, set[int]] = {}  # the same -> first positions whose logits are read
    for (prompt, answer), owner in zip(pairs, owners, strict=True):
        path = (*prompt, *answer[:-1])
        waiting.setdefault(path, []).append(owner)
        first_reads.setdefault(path, set()).add(len(prompt) - 1)
    paths = sorted(waiting)
    prefill = Prefill(engine, paths, min(len(prompt) for prompt, _ in pairs) - 1)
    for path, end in zip(paths, prefill.ends, strict=True):
        for first in first_reads[path]:
            mark_wanted(end, first)
    tokens = sorted({token for _, answer in pairs for token in answer})
    column = {token: place for place, token in enumerate(tokens)}
    logprobs = _evaluate(engine, prefill, [waiting[path] for path in paths], tokens, on_finished)

    ends = dict(zip(paths, prefill.ends, strict=True))

    def score(prompt: TokenIds, answer: TokenIds) -> float:
        end = ends[*prompt, *answer[:-1]]
        parts = nodes_between(end, len(prompt) - 1, end.stop)
        rows = [logprobs[node, place] for node, start, stop in parts for place in range(start, stop)]
        return float(sum(row[column[token]] for row, token in zip(rows, answer, strict=True)))

    return [score(prompt, answer) for prompt, answer in pairs]


def _evaluate(
    engine: Engine,
    prefill: Prefill,
    owners: list[list[int]],
    tokens: list[int],
    on_finished: Callable[[int], None] | None,
) -> dict[tuple[Node, int], Logits]:
    """(Node, position) -> log p of these tokens there, for all positions that are wanted."""
    logprobs: dict[tuple[Node, int], Logits] = {}
    n_pending = Counter(index for indices in owners for index in indices)
    free_sequences = list(range(engine.n_sequences - 1, 0, -1))
    free_cells = engine.n_ctx - prefill.n_prefix

    def admit(_number: int) -> int | None:
        nonlocal free_cells
        if not free_sequences or prefill.n_next > free_cells:
            return None
        free_cells -= prefill.n_next
        return free_sequences.pop()

    try:
        while not prefill.is_done:
            batch: list[BatchToken] = []
            ended, wanted = prefill.fill(batch, engine.n_batch, admit)
            engine.decode(batch)
            prefill.settle()
            engine.counters.evaluated_prompt_tokens += len(batch)
            if wanted:
                logits = engine.logits()
                rows = (logits[:, tokens] - log_sum_exp(logits)[:, None]).astype(np.float32)
                logprobs.update(zip(wanted, rows, strict=True))
            for end in ended:
                engine.cut(end.sequence, 0)
                free_sequences.append(end.sequence)
                free_cells += release(prefill.ends[end.prompt])
                for index in owners[end.prompt]:
                    n_pending[index] -= 1
                    if not n_pending[index] and on_finished:
                        on_finished(index)
    except BaseException:
        engine.clear()  # the remaining cells belong to no prompt
        raise
    return logprobs


def sequence_logits(engine: Engine, tokens: TokenIds, first: int) -> Logits:
    """Logits (len(tokens) - first, n_vocab) of one sequence from position `first` on; it is evaluated alone."""
    engine.use_backend_top_k(0)
    engine.clear()
    rows: list[Logits] = []
    for start in range(0, len(tokens), engine.n_batch):
        part = [
            BatchToken(token, start + index, [0], start + index >= first)
            for index, token in enumerate(tokens[start : start + engine.n_batch])
        ]
        engine.decode(part)
        if part[-1].wants_logits:
            rows.append(engine.logits().copy())
    engine.clear()
    return np.concatenate(rows)
