"""How likely is each label as the answer to a question: exact, in one evaluation of the question.

    prompts [(1, 4093, ...)], labels [(21, 2), (487, 19, 2)]      token ids, the end token included
    -> [[-0.41, -3.20]]                                           log p(label | prompt), nats

The labels of a question form a tree behind it: a token that several labels share belongs to all their sequences
and is evaluated once. The end token makes "support" and "supporting" exclude each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from sg_local.errors import SgLocalError
from sg_local.llama.engine import Engine, TokenIds

Logits = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class _Node:
    token: int
    depth: int  # 0 follows the prompt's end
    labels: list[int]  # those that pass through it


def label_logprobs(
    engine: Engine,
    prompts: Sequence[TokenIds],
    labels: Sequence[TokenIds],
    on_finished: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """log p of each label after each prompt, shape (n_prompts, n_labels), in nats.

    Raises SgLocalError when a question with its labels cannot fit the context or has too many labels.
    """
    if not prompts:
        return []
    nodes, paths = _label_tree(labels)
    n_labels = len(labels)
    longest = max(len(prompt) for prompt in prompts)
    if n_labels > engine.n_parallel:
        raise SgLocalError(f"{n_labels} labels need --n-parallel {n_labels}, it is {engine.n_parallel}")
    if not engine.fits(longest, len(nodes)):
        raise SgLocalError(
            f"a prompt of {longest} tokens and its labels do not fit {engine.n_ctx} tokens: raise --n-ctx"
        )

    engine.clear()
    n_common = engine.evaluate_prefix(prompts)
    # Several questions side by side, each with a sequence for every label, as far as sequences and memory last.
    cells = longest - n_common + len(nodes)
    together = max(1, min(engine.n_parallel // n_labels, (engine.n_ctx - n_common) // cells))
    scores: list[list[float]] = []
    for start in range(0, len(prompts), together):
        group = prompts[start : start + together]
        scores += _score_group(engine, group, n_common, labels, nodes, paths)
        if on_finished:
            on_finished(len(group))
    return scores


def _label_tree(labels: Sequence[TokenIds]) -> tuple[list[_Node], list[list[int]]]:
    """The labels' tokens as a tree, and for each label the nodes whose logits its tokens are read from.

    Node -1 is the prompt's end. A label's last token needs no logits after it and is no node.
    """
    nodes: list[_Node] = []
    places: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    paths: list[list[int]] = []
    for label_index, label in enumerate(labels):
        path = [-1]
        for depth, token in enumerate(label[:-1]):
            node = places.setdefault((path[-1], token), len(nodes))
            if node == len(nodes):
                nodes.append(_Node(token, depth, []))
            nodes[node].labels.append(label_index)
            path.append(node)
        paths.append(path)
    return nodes, paths


def _score_group(
    engine: Engine,
    prompts: Sequence[TokenIds],
    n_common: int,
    labels: Sequence[TokenIds],
    nodes: Sequence[_Node],
    paths: Sequence[Sequence[int]],
) -> list[list[float]]:
    items: list[tuple[int, int, Sequence[int], bool]] = []
    keys: list[tuple[int, int]] = []  # (question, node) of each item; node -1 is the prompt's end
    for question, prompt in enumerate(prompts):
        sequences = range(1 + question * len(labels), 1 + (question + 1) * len(labels))
        for sequence in sequences:
            llama_cpp.llama_memory_seq_rm(engine.memory, sequence, -1, -1)
            if n_common:
                llama_cpp.llama_memory_seq_cp(engine.memory, 0, sequence, 0, n_common)
        last = len(prompt) - 1
        items += [(prompt[place], place, sequences, place == last) for place in range(n_common, len(prompt))]
        keys += [(question, -1)] * (len(prompt) - n_common)
        for index, node in enumerate(nodes):
            users = [sequences[label] for label in node.labels]
            items.append((node.token, len(prompt) + node.depth, users, True))
            keys.append((question, index))
    rows: dict[
        tuple[int, int], Logits
    ] = {}  # log-probabilities (n_vocab,) after each place that a label needs
    for start in range(0, len(items), engine.n_batch):
        part = items[start : start + engine.n_batch]
        engine.decode(part)
        for index, item in enumerate(part):
            if item[3]:
                rows[keys[start + index]] = log_softmax(engine.logits_at(index))
    return [
        [
            float(sum(rows[question, node][token] for node, token in zip(path, label, strict=True)))
            for path, label in zip(paths, labels, strict=True)
        ]
        for question in range(len(prompts))
    ]


def sequence_logits(engine: Engine, tokens: TokenIds, first: int) -> Logits:
    """Logits (len(tokens) - first, n_vocab) at the positions first.. of one sequence, evaluated alone."""
    engine.clear()
    rows: list[Logits] = []
    for start in range(0, len(tokens), engine.n_batch):
        part = [
            (token, start + index, (0,), start + index >= first)
            for index, token in enumerate(tokens[start : start + engine.n_batch])
        ]
        engine.decode(part)
        rows += [engine.logits_at(index) for index, item in enumerate(part) if item[3]]
    return np.stack(rows)


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities of logits (..., n_vocab), in double precision inside."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Logits = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)
    return result
