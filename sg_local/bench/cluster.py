"""What a cluster is checked for before a bench places a run on it, from what Ray and its nodes say of themselves.

    share_of(ClusterOptions("auto"), nodes)       Share(cpus=8, gpus=1, ...)     what one run gets of a node
    require_able(nodes, share)                    the nodes that can hold a run
    compared(needs, nodes, facts, ...)            the versions that all have, and {node: why it is left out}

Pure functions: nothing here asks a cluster.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sg_local.bench.node import Needs, NodeFacts, differences_of
from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.plan.memory import estimate
from sg_local.plan.sizes import model_sizes, task_tokens
from sg_local.report import tables
from sg_local.runs.begin import ModelFile
from sg_local.runs.given import TaskRows
from sg_local.settings import Settings
from sg_local.task import Task

_USABLE_SHARE_OF_CARD = 0.92  # as `plan` has it


@dataclass(frozen=True)
class ClusterOptions:
    """Where the runs are placed, and what each of them gets; None: by what the nodes have."""

    address: str
    gpus_per_run: int | None = None
    cpus_per_run: int | None = None
    max_in_flight: int | None = None
    on_node_disk: bool = False
    keep_remote: bool = False


@dataclass(frozen=True)
class Node:
    """A node as Ray lists it."""

    id: str
    name: str
    cpus: float
    gpus: float
    memory_bytes: int


@dataclass(frozen=True)
class Share:
    """What one run gets of a node."""

    cpus: float
    gpus: int
    memory_bytes: int

    def slots(self, node: Node) -> int:
        """Runs that a node holds at a time."""
        parts = [
            have / need
            for have, need in (
                (node.cpus, self.cpus),
                (node.gpus, self.gpus),
                (node.memory_bytes, self.memory_bytes),
            )
            if need
        ]
        return int(min(parts) + 1e-9)


@dataclass(frozen=True)
class RunNeeds:
    """What the largest of the runs needs, as `plan` estimates it."""

    host_bytes: int
    gpu_bytes: int
    disk_bytes: int


def share_of(options: ClusterOptions, nodes: Sequence[Node]) -> Share:
    """What a run gets: as it was asked for; else one GPU if there is any, and its part of a node's processors."""
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = 1 if any(node.gpus >= 1 for node in nodes) else 0
    able = [node for node in nodes if node.cpus >= 1 and node.gpus >= gpus]
    parts = [node.cpus // (node.gpus // gpus) if gpus else node.cpus for node in able]
    return Share(options.cpus_per_run or max(1, int(min(parts, default=1))), gpus, 0)


def needs_of_runs(
    tasks: Sequence[tuple[Task, TaskRows]], model: ModelFile, settings: Settings, *, on_gpu: bool
) -> RunNeeds:
    """What the largest run needs at its peak."""
    sizes = model_sizes(model.header)
    host = gpu = disk = 0
    for task, rows in tasks:
        real_inputs = [*rows.inputs, *(row.input for row in rows.labelled)]
        tokens = task_tokens(
            task, settings, len(rows.test), min(settings.n_ctx, sizes.context_length), real_inputs
        )
        steps = estimate(sizes, settings, tokens, on_gpu=on_gpu)
        host = max(host, *(step.host_bytes for step in steps))
        gpu = max(gpu, *(step.gpu_bytes for step in steps))
        copies = max(sum(step.store_disk.values()) for step in steps)  # one at a time
        disk = max(disk, copies + sum(sum(step.run_disk.values()) for step in steps))
    return RunNeeds(host, gpu, disk)


def require_able(nodes: Sequence[Node], share: Share) -> list[Node]:
    """The nodes that can hold a run. Raises InputError where none ever can."""
    able = [node for node in nodes if share.slots(node) >= 1]
    if able:
        return able
    wanted = [
        f"{share.cpus:g} CPUs",
        *([f"{share.gpus} GPUs"] if share.gpus else []),
        tables.size(share.memory_bytes),
    ]
    there = "; ".join(
        f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs, {tables.size(node.memory_bytes)}"
        for node in nodes
    )
    raise InputError(
        f"no node can hold a run, which needs {', '.join(wanted)} of memory ({there}): lower --cpus-per-run or "
        "--gpus-per-run, take settings that need less (`sg-local plan`), or add a node"
    )


def compared(
    needs: Needs,
    nodes: Sequence[Node],
    facts: Mapping[str, NodeFacts],
    faults: Mapping[str, str],
    gpu_bytes: int,
) -> tuple[Needs, dict[str, str]]:
    """The versions that all nodes have, and the nodes that are left out, with the reasons.

    Raises InputError where nodes have other versions than this machine or one another, or none is left.
    """
    left_out = dict(faults)
    for node_id, found in facts.items():
        lacks = [*found.faults, *_card_faults(found.gpus, gpu_bytes)]
        if lacks:
            left_out[node_id] = "; ".join(lacks)
    wanted = dict(needs.versions)
    for node in nodes:  # this machine may be without what trains
        if node.id not in left_out:
            wanted = {**facts[node.id].versions, **wanted}
    if needs.trainer != "unsloth":
        wanted.pop("unsloth", None)
    wrong = Faults()
    for node in nodes:
        if node.id in facts and (differs := differences_of(wanted, facts[node.id].versions)):
            wrong.add(
                f"{node.name} has {differs}: rows would not compare; install the same there, or take it out of the "
                "cluster (`ray stop`)"
            )
    wrong.raise_any()
    if all(node.id in left_out for node in nodes):
        raise InputError("\n".join(f"{node.name}: {left_out[node.id]}" for node in nodes))
    return replace(needs, versions=wanted), left_out


def _card_faults(cards: Sequence[str], gpu_bytes: int) -> list[str]:
    """cards: ["NVIDIA GeForce RTX 3060, 12288 MiB"]; a run may be given any of them."""
    sizes = [int(card.rsplit(", ", 1)[1].split()[0]) * 1024**2 for card in cards if card.endswith(" MiB")]
    if not gpu_bytes or not sizes or min(sizes) * _USABLE_SHARE_OF_CARD >= gpu_bytes:
        return []
    return [f"a card has {tables.size(min(sizes))}, and a run needs {tables.size(gpu_bytes)} of it"]


def is_public(address: str) -> bool:
    """Whether an address is neither of this machine nor of a private network. A name is not looked up."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (found.is_private or found.is_loopback or found.is_link_local)
