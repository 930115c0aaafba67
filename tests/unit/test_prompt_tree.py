"""What prompts share is one node: the tree against sets of prefixes, which are slow and plain to see."""

from hypothesis import given
from hypothesis import strategies as st

from sg_local.llama.tree import Node, build_tree, mark_wanted, release, shared_lengths

PROMPTS = st.sets(
    st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple), min_size=1, max_size=12
).map(sorted)


def path_of(end: Node) -> list[Node]:
    nodes = []
    node: Node | None = end
    while node is not None:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


def all_nodes(ends: list[Node]) -> set[Node]:
    return {node for end in ends for node in path_of(end)}


@given(PROMPTS)
def test_there_is_a_node_for_every_distinct_prefix(prompts: list[tuple[int, ...]]) -> None:
    ends = build_tree(prompts)
    prefixes = {prompt[:length] for prompt in prompts for length in range(1, len(prompt) + 1)}
    assert sum(node.stop - node.start for node in all_nodes(ends)) == len(prefixes)
    of_node: dict[Node, tuple[int, ...]] = {}
    for prompt, end in zip(prompts, ends, strict=True):
        path = path_of(end)
        assert [node.stop for node in path[:-1]] == [node.start for node in path[1:]]
        assert end.stop == len(prompt)
        for node in path:  # what passes through a node agrees up to its end
            assert of_node.setdefault(node, prompt[: node.stop]) == prompt[: node.stop]


@given(PROMPTS, st.randoms(use_true_random=False))
def test_a_node_is_needed_until_its_last_prompt_is_released(prompts: list[tuple[int, ...]], rng) -> None:  # type: ignore[no-untyped-def]
    ends = build_tree(prompts)
    left = list(range(len(prompts)))
    rng.shuffle(left)
    while left:
        number = left.pop()
        needed = {prompts[other][:length] for other in left for length in range(1, len(prompts[other]) + 1)}
        own = {prompts[number][:length] for length in range(1, len(prompts[number]) + 1)}
        assert release(ends[number]) == len(own - needed)


def test_wanted_positions_are_marked_where_they_lie() -> None:
    first, second = build_tree([(1, 2, 3, 4), (1, 2, 5)])
    mark_wanted(first, 1)
    mark_wanted(second, 2)
    parent = first.parent
    assert parent is second.parent is not None
    assert (parent.wanted_positions, first.wanted_positions, second.wanted_positions) == ({1}, {2, 3}, {2})


def test_how_much_is_shared_with_the_prompt_before() -> None:
    assert shared_lengths([]) == []
    assert shared_lengths([(1,), (1, 2), (1, 3, 4), (2,)]) == [0, 1, 1, 0]
