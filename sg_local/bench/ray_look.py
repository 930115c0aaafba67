"""What each node of a Ray cluster says of itself before a bench places a run there, and what the user is told of it.

    facts, faults = look_at_nodes(nodes, needs)      {"5f3a…": NodeFacts(…)}, {"81c0…": "it does not answer …"}
    say_what_there_is(nodes, facts, {}, share, needs)
    4 nodes, 8 runs at a time, each with 8 CPUs and 1 GPU

What they say is judged in cluster.py, without Ray.
"""

from collections.abc import Mapping, Sequence

from sg_local.bench.cluster import Node, Share, is_public
from sg_local.bench.node import Needs, NodeFacts, look_at_node
from sg_local.bench.ray_connection import last_line, on_node
from sg_local.progress import say
from sg_local.report import tables

LOOK_SECONDS = 900.0  # for a node to hash the base


def look_at_nodes(nodes: Sequence[Node], needs: Needs) -> tuple[dict[str, NodeFacts], dict[str, str]]:
    """What each node says of itself, and why some say nothing."""
    import ray

    look = ray.remote(look_at_node)
    asked = {
        node.id: look.options(
            num_cpus=0, max_retries=0, scheduling_strategy=on_node(node.id, soft=False)
        ).remote(needs)
        for node in nodes
    }
    facts, faults = {}, {}
    for node_id, ref in asked.items():
        try:
            facts[node_id] = ray.get(ref, timeout=LOOK_SECONDS)
        except ray.exceptions.RayTaskError as error:
            faults[node_id] = (
                f"sg_local cannot work there ({last_line(error)}): install the version that is here"
            )
        except ray.exceptions.RayError as error:
            faults[node_id] = f"it does not answer ({type(error).__name__}): see `ray status`"
    return facts, faults


def say_where_ports_are_open(nodes: Sequence[Node]) -> None:
    if public := sorted({node.name for node in nodes if is_public(node.name.split(" ")[0])}):
        say(
            f"Ray listens on {', '.join(public)}, outside of private networks: who reaches its ports can run code "
            "there; see bench/README.md"
        )


def say_what_there_is(
    nodes: Sequence[Node],
    facts: Mapping[str, NodeFacts],
    left_out: Mapping[str, str],
    share: Share,
    needs: Needs,
) -> None:
    for node in nodes:
        if node.id in left_out:
            say(f"{node.name} is left out: {left_out[node.id]}")
        elif facts[node.id].model == "other bytes":
            say(f"{node.name} has other bytes in {needs.model}: the base is copied to its store")
    used = [node for node in nodes if node.id not in left_out]
    slots = sum(share.slots(node) for node in used)
    gets = " and ".join(
        tables.counted(n, noun) for n, noun in ((int(share.cpus), "CPU"), (share.gpus, "GPU")) if n
    )
    say(f"{tables.counted(len(used), 'node')}, {tables.counted(slots, 'run')} at a time, each with {gets}")
    n_shared = sum(facts[node.id].shares_bench and facts[node.id].model == "same" for node in used)
    if needs.on_node_disk:
        n_shared = 0
    if n_shared == len(used):
        say("all nodes see the directory of the bench: they work in it, and nothing is copied")
    else:
        say(
            f"{len(used) - n_shared} of {len(used)} nodes work on their own disks: runs are sent there and back"
        )
    cards = {card for node in used for card in facts[node.id].gpus}
    if share.gpus and len(cards) > 1:
        say(
            f"the cards differ ({', '.join(sorted(cards))}): rows of the same run are the same on equal ones only"
        )
