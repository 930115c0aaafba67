"""The connection to a Ray cluster, and its nodes as Ray lists them.

    with connected("auto"):
        ray_nodes()                              [Node("5f3a…", "10.0.0.4", cpus=16, gpus=2, …), …]
        on_node("5f3a…", soft=False)             for a task of that node alone

Ray is imported inside functions: a bench without --ray works without it. Source: docs.ray.io, "Ray Core API".
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from sg_local.bench.cluster import Node
from sg_local.errors import GOES_ON, InputError, SgLocalError
from sg_local.progress import say


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster; "auto": to the one of this machine, which is started if there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray, not installed here: `pip install 'sg-local[cluster]'`") from error
    # To stdout Ray says what died, which is said here too.
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        try:
            dashboard = _init(address)
        except ray.exceptions.AuthenticationError as error:
            raise InputError(
                f"--ray {address}: the cluster wants another token: give RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
                "as its nodes have them; see bench/README.md"
            ) from error
        except Exception as error:  # also a plain one, where a node is too slow to start
            reason = (str(error).strip().splitlines() or ["no answer"])[0]
            raise InputError(
                f"--ray {address}: {reason[:300]}: see `ray status`; `ray stop` forgets a cluster that is "
                "gone, `ray start --head` begins one"
            ) from error
        try:
            if dashboard:
                say(f"Ray's dashboard: http://{dashboard}")
            yield
        finally:
            ray.shutdown()


def _init(address: str) -> str:
    """Connects, and returns the address of the dashboard."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        context = ray.init(address=address, **quiet)
    except ConnectionError:
        if address != "auto":
            raise
        say("no Ray cluster runs here: one of this machine alone is started")
        context = ray.init(address="local", **quiet)
    return str(context.dashboard_url or "")


@contextmanager
def lost_cluster_explained() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise SgLocalError(f"the cluster no longer answers ({type(error).__name__}){GOES_ON}") from error


def ray_nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    found = [node for node in ray.nodes() if node["Alive"]]
    times = Counter(node["NodeManagerAddress"] for node in found)
    nodes = []
    for node in found:
        address, resources = node["NodeManagerAddress"], node["Resources"]
        name = address if times[address] == 1 else f"{address} ({node['NodeID'][:6]})"
        nodes.append(
            Node(
                node["NodeID"],
                name,
                resources.get("CPU", 0.0),
                resources.get("GPU", 0.0),
                int(resources.get("memory", 0)),
            )
        )
    return nodes


def on_node(node_id: str, *, soft: bool) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=soft)


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
