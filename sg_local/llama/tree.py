"""The prompt tree of one call: what several prompts begin with is one node, to be evaluated once.

    build_tree([(1, 5, 6), (1, 5, 7), (1, 5, 7, 9)])
      [1 5] -- [6]            prompt 0 ends
            '- [7]            prompt 1 ends
                '- [9]        prompt 2 ends

This is a radix tree. A node holds the tokens at positions start..stop, and is split where prompts part or end. The
prompts are sorted, so the tree is walked depth first: what a prompt shares with earlier ones lies on the last path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

TokenIds = tuple[int, ...]

_STEP = 32  # tokens


@dataclass(eq=False)
class Node:
    """The tokens at positions start..stop, which all prompts below it share."""

    parent: "Node | None"
    start: int
    stop: int
    holders: int  # children and prompts that end here, as far as they are still needed
    wanted_positions: set[int] = field(default_factory=set)  # positions whose logits are needed


def build_tree(prompts: Sequence[TokenIds]) -> list[Node]:
    """Builds the tree, and returns the node at which each prompt ends. Prompts are sorted, distinct and not empty."""
    root = Node(None, 0, 0, 1)
    path = [root]  # to the end of the last prompt
    ends = []
    for prompt, shared in zip(prompts, shared_lengths(prompts), strict=True):
        while path[-1] is not root and path[-1].start >= shared:
            path.pop()
        if path[-1].stop > shared:
            lower = path[-1]
            path[-1] = upper = Node(lower.parent, lower.start, shared, 1)
            lower.parent, lower.start = upper, shared
        end = Node(path[-1], shared, len(prompt), 1)
        path[-1].holders += 1
        path.append(end)
        ends.append(end)
    return ends


def build_star(prompts: Sequence[TokenIds], n_prefix: int) -> list[Node]:
    """The same for an engine that cannot go back: the prompts share their first n_prefix tokens, and no others."""
    root = Node(None, 0, n_prefix, 1 + len(prompts))
    return [Node(root, n_prefix, len(prompt), 1) for prompt in prompts]


def shared_lengths(prompts: Sequence[TokenIds]) -> list[int]:
    """How many tokens each of the sorted prompts shares with the one before it; 0 for the first."""
    lengths = [0] if prompts else []
    for before, prompt in pairwise(prompts):
        length, limit = 0, min(len(before), len(prompt))
        # In steps first: Python compares slices 20 times as fast as their tokens one by one.
        while length < limit and before[length : length + _STEP] == prompt[length : length + _STEP]:
            length += _STEP
        while length < limit and before[length] == prompt[length]:
            length += 1
        lengths.append(min(length, limit))
    return lengths


def release(node: Node | None) -> int:
    """Takes one holder from this node. Returns how many tokens are no longer needed."""
    freed = 0
    while node is not None:
        node.holders -= 1
        if node.holders:
            break
        freed += node.stop - node.start
        node = node.parent
    return freed


def nodes_between(end: Node, start: int, stop: int) -> list[tuple[Node, int, int]]:
    """The nodes on the path to this end that have tokens at start..stop, each with the part that lies in there."""
    parts = []
    node: Node | None = end
    while node is not None and node.stop > start:
        if node.start < stop:
            parts.append((node, max(start, node.start), min(stop, node.stop)))
        node = node.parent
    return parts[::-1]


def mark_wanted(end: Node, first: int) -> None:
    """Marks the positions from `first` to the end of a prompt: their logits are needed."""
    for node, start, stop in nodes_between(end, first, end.stop):
        node.wanted_positions.update(range(start, stop))
