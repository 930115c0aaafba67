"""The prompts of one call as a tree: what several of them begin with is one node, to be evaluated once.

    plant([(1, 5, 6), (1, 5, 7), (1, 5, 7, 9)])
      [1 5] -- [6]            prompt 0 ends
            '- [7]            prompt 1 ends
                '- [9]        prompt 2 ends

A radix tree: a node is a run of tokens at positions start..stop, cut where prompts part or end. Prompts come sorted,
so the tree is walked depth first, and what later prompts share with earlier ones is always a part of the last path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

TokenIds = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """Tokens start..stop of every prompt that passes through it."""

    parent: "Node | None"
    start: int
    stop: int
    holders: int  # child nodes, and prompts that end here, that are still needed
    wanted: set[int] = field(default_factory=set)  # positions whose logits are needed


def plant(prompts: Sequence[TokenIds]) -> list[Node]:
    """The node at which each prompt ends. The prompts are sorted, distinct and not empty."""
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


def shared_lengths(prompts: Sequence[TokenIds]) -> list[int]:
    """How many tokens each of the sorted prompts shares with the one before it; 0 for the first."""
    found = [0] if prompts else []
    for before, prompt in pairwise(prompts):
        length, limit = 0, min(len(before), len(prompt))
        while length < limit and before[length] == prompt[length]:
            length += 1
        found.append(length)
    return found


def release(node: Node | None) -> int:
    """Notes that one holder of this node is done. Returns how many tokens are no longer needed."""
    freed = 0
    while node is not None:
        node.holders -= 1
        if node.holders:
            break
        freed += node.stop - node.start
        node = node.parent
    return freed


def runs(end: Node, start: int, stop: int) -> list[tuple[Node, int, int]]:
    """The nodes on the path to this end that cover the positions start..stop, with the part of them that lies there."""
    found = []
    node: Node | None = end
    while node is not None and node.stop > start:
        if node.start < stop:
            found.append((node, max(start, node.start), min(stop, node.stop)))
        node = node.parent
    return found[::-1]


def want(end: Node, first: int) -> None:
    """Marks the positions from `first` up to this end of a prompt as wanted."""
    for node, start, stop in runs(end, first, end.stop):
        node.wanted.update(range(start, stop))
