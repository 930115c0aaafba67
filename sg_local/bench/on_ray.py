"""The runs of a bench on the nodes of a Ray cluster: placed by Ray, worked on by node.py, their files through desk.py.

    ClusterOptions("auto", gpus_per_run=1)
    for unit, had_work, error in on_cluster(options, units, …): …        as `in_turn` of units.py, as they end

Ray finds a place for each run and says what died. A run whose worker or node died is begun again with what came back
from it, MAX_TRIES times at most; a run that failed by itself is not. Source: docs.ray.io, "Fault tolerance",
"Scheduling".
"""

import logging
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sg_local.bench.cluster import (
    ClusterOptions,
    Node,
    Share,
    compared,
    is_public,
    needs_of_runs,
    require_able,
    share_of,
)
from sg_local.bench.desk import Desk
from sg_local.bench.node import Job, Needs, NodeFacts, look_at_node, rows_depend_on, work
from sg_local.bench.units import CanBegin, Ended, Unit
from sg_local.errors import GOES_ON, InputError, SgLocalError
from sg_local.files import read_text, write_text
from sg_local.progress import say
from sg_local.report import tables
from sg_local.runs.begin import ModelFile
from sg_local.runs.given import TaskRows
from sg_local.settings import Settings
from sg_local.task import Task

MAX_TRIES = 3  # of a run whose worker or node dies
SECONDS_BETWEEN_LINES = 10.0
LOOK_SECONDS = 900.0  # for a node to hash the base
END_SECONDS = 5.0  # for workers to end
_ID = ".cluster_id"  # in the bench: names its directory on the nodes
_NODE_ID = "ray.io/node-id"  # Ray's own label


def on_cluster(
    options: ClusterOptions,
    units: Sequence[Unit],
    bench: Path,
    model: ModelFile,
    can_begin: CanBegin,
    settings: Settings,
    tasks: Sequence[tuple[Task, TaskRows]],
) -> Iterator[Ended]:
    """Places the units on the nodes, and tells each as it ends. An interruption ends what was begun.

    Raises InputError, before anything is placed, where the cluster is not there or no node can hold a run.
    """
    _require_options(options, units)
    if not units:
        return
    with connected(options.address), _probe(bench) as probe:
        nodes = ray_nodes()
        _say_where_ports_are_open(nodes)
        share = share_of(options, nodes)
        needed = needs_of_runs(tasks, model, settings, on_gpu=share.gpus > 0)
        share = replace(share, memory_bytes=needed.host_bytes)
        able = require_able(nodes, share)
        needs = Needs(
            bench=str(bench.absolute()),
            bench_id=_bench_id(bench),
            probe=probe,
            model=str(model.path.absolute()),
            model_sha256=model.sha256,
            model_bytes=model.header.size_bytes,
            trainer=settings.trainer,
            base_weights=settings.base_weights,
            disk_bytes=needed.disk_bytes,
            versions=rows_depend_on(),
            on_node_disk=options.on_node_disk,
            keep_remote=options.keep_remote,
        )
        facts, faults = _look_at_nodes(able, needs)
        needs, left_out = compared(needs, able, facts, faults, needed.gpu_bytes)
        _say_what_there_is(able, facts, left_out, share, needs)
        placing = _Placing(options, units, bench, model, can_begin, needs, share, left_out)
        with _lost_cluster_explained():
            yield from placing.run()


def _require_options(options: ClusterOptions, units: Sequence[Unit]) -> None:
    if options.address.startswith("ray://"):
        raise InputError(
            f"--ray {options.address}: runs are collected on a machine of the cluster: call this there, with --ray auto"
        )
    if options.keep_remote:
        for unit in units:
            if unit.ablation and "train" in unit.ablation.earlier:
                raise InputError(
                    f"--keep-remote leaves trained weights on the nodes, and {unit.ablation.text} begins with them: "
                    "leave one of them out"
                )


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
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
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
def _lost_cluster_explained() -> Iterator[None]:
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


def _say_where_ports_are_open(nodes: Sequence[Node]) -> None:
    if public := sorted({node.name for node in nodes if is_public(node.name.split(" ")[0])}):
        say(
            f"Ray listens on {', '.join(public)}, outside of private networks: who reaches its ports can run code "
            "there; see bench/README.md"
        )


def _look_at_nodes(nodes: Sequence[Node], needs: Needs) -> tuple[dict[str, NodeFacts], dict[str, str]]:
    """What each node says of itself, and why some say nothing."""
    import ray

    look = ray.remote(look_at_node)
    asked = {
        node.id: look.options(
            num_cpus=0, max_retries=0, scheduling_strategy=_affinity(node.id, soft=False)
        ).remote(needs)
        for node in nodes
    }
    facts, faults = {}, {}
    for node_id, ref in asked.items():
        try:
            facts[node_id] = ray.get(ref, timeout=LOOK_SECONDS)
        except ray.exceptions.RayTaskError as error:
            faults[node_id] = (
                f"sg_local cannot work there ({_last_line(error)}): install the version that is here"
            )
        except ray.exceptions.RayError as error:
            faults[node_id] = f"it does not answer ({type(error).__name__}): see `ray status`"
    return facts, faults


def _say_what_there_is(
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


class FarDesk:
    """Passes calls on to the desk, from a worker. Raises the desk's own errors."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._waiter = ThreadPoolExecutor(1)

    def __getattr__(self, name: str) -> Any:
        import ray

        def call(*arguments: Any) -> Any:
            # A task that waits in its main thread lends its processors to another one meanwhile.
            reply = self._waiter.submit(ray.get, getattr(self._handle, name).remote(*arguments))
            try:
                return reply.result()
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, SgLocalError) else error) from error

        return call


def work_with(handle: Any, job: Job, attempt: str, node_names: Mapping[str, str]) -> dict[str, Any]:
    """The Ray task: one run on the node that Ray chose."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return work(FarDesk(handle), job, attempt, node_id, node_names.get(node_id, node_id[:6]))


@dataclass
class _Try:
    unit: Unit
    attempt: str
    number: int
    node_id: str = ""
    began: float = 0.0
    stage: str = ""


@dataclass
class _Placing:
    """The units on their way: waiting here, given to Ray, ended."""

    options: ClusterOptions
    units: Sequence[Unit]
    bench: Path
    model: ModelFile
    can_begin: CanBegin
    needs: Needs
    share: Share
    left_out: dict[str, str]
    task: Any = work_with  # what Ray runs; a measurement gives another
    names: dict[str, str] = field(default_factory=dict)

    def run(self) -> Iterator[Ended]:
        """Places all, and tells each as it ends."""
        import ray

        self._waiting = deque((unit, 1, "") for unit in self.units)
        self._in_flight: dict[Any, _Try] = {}
        self._seconds: list[float] = []
        self._n_ended = 0
        self._last_line = time.monotonic()
        self.names = {node.id: node.name for node in ray_nodes()}
        here = ray.get_runtime_context().get_node_id()
        desk_class = ray.remote(Desk)
        self._desk = desk_class.options(num_cpus=0, scheduling_strategy=_affinity(here, soft=False)).remote(
            str(self.bench.absolute()), str(self.model.path.absolute())
        )
        self._far = FarDesk(self._desk)
        self._remote = ray.remote(self.task)  # once: each would be sent to every worker
        try:
            while self._waiting or self._in_flight:
                yield from self._place()
                if not self._in_flight:
                    continue
                done, others = ray.wait(list(self._in_flight), num_returns=1, timeout=1.0)
                done += ray.wait(others, num_returns=len(others), timeout=0)[0] if done and others else []
                self._read_news()
                for ref in done:
                    if ended := self._ended(ref, self._in_flight.pop(ref)):
                        self._n_ended += 1
                        yield ended
                self._say_status()
        finally:
            for ref in self._in_flight:
                ray.cancel(ref, force=True)
            if self._in_flight:
                ray.wait(list(self._in_flight), num_returns=len(self._in_flight), timeout=END_SECONDS)

    def _place(self) -> Iterator[Ended]:
        """Gives Ray what can begin."""
        open_tasks = {unit.task_run.path for unit, _, _ in self._waiting if not unit.ablation}
        open_tasks |= {one.unit.task_run.path for one in self._in_flight.values() if not one.unit.ablation}
        for _ in range(len(self._waiting)):
            if len(self._in_flight) >= (self.options.max_in_flight or len(self.units)):
                return
            unit, number, last_node = self._waiting.popleft()
            if unit.base and unit.base.path in open_tasks:
                self._waiting.append((unit, number, last_node))
                continue
            if not self.can_begin(unit):  # what it begins with has failed
                self._n_ended += 1
                continue
            try:
                run = unit.begin(self.bench, self.model)
            except SgLocalError as error:
                self._n_ended += 1
                yield Ended(unit, True, error)
                continue
            if run is None:
                self._n_ended += 1
                yield Ended(unit, False)
                continue
            self._submit(unit, number, last_node)

    def _submit(self, unit: Unit, number: int, last_node: str) -> None:
        place = unit.path(self.bench).relative_to(self.bench).as_posix()
        base = unit.base.path.relative_to(self.bench).as_posix() if unit.base else ""
        attempt = f"{place} {number} {secrets.token_hex(4)}"
        self._far.expect(place, attempt)
        options: dict[str, Any] = {
            "num_cpus": self.share.cpus,
            "num_gpus": self.share.gpus,
            "memory": self.share.memory_bytes,
            "max_retries": 0,  # it is begun again from here, with what came back
        }
        if last_node and last_node not in self.left_out and last_node in {node.id for node in ray_nodes()}:
            options["scheduling_strategy"] = _affinity(last_node, soft=True)  # its pieces are there
        elif self.left_out:
            options["label_selector"] = {_NODE_ID: f"!in({','.join(self.left_out)})"}
        job = Job(self.needs, place, base, max(1, int(self.share.cpus)), self.share.gpus)
        ref = self._remote.options(**options).remote(self._desk, job, attempt, self.names)
        self._in_flight[ref] = _Try(unit, attempt, number)

    def _ended(self, ref: Any, one: _Try) -> Ended | None:
        """What became of a unit; None where it is placed again."""
        import ray

        unit, node = one.unit, self._name(one.node_id)
        try:
            outcome = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ray.exceptions.RayError):
                say(str(error))
                return Ended(unit, True, SgLocalError(f"{node}: {_last_line(error)}: please report it"))
            return self._again(one, f"{node} lost the bench")
        except ray.exceptions.RayError as error:
            return self._again(one, f"the worker or the node {node} died ({type(error).__name__})")
        if reason := outcome.get("unfit"):
            self._leave_out(outcome["node_id"], reason)
            self._waiting.appendleft((unit, one.number, ""))
            return None
        if error_text := outcome["error"]:
            kind = InputError if outcome["exit_code"] == InputError.exit_code else SgLocalError
            return Ended(unit, True, kind(error_text))
        self._seconds.append(time.monotonic() - one.began)
        say(f"{unit.name} is finished on {node} ({self._counts(1)})")
        return Ended(unit, True)

    def _again(self, one: _Try, why: str) -> Ended | None:
        if one.number >= MAX_TRIES:
            return Ended(
                one.unit,
                True,
                SgLocalError(f"{why}, as did {MAX_TRIES - 1} before: the same command goes on with it"),
            )
        say(f"{one.unit.name}: {why}; what came back is kept, try {one.number + 1} of {MAX_TRIES}")
        self._waiting.appendleft((one.unit, one.number + 1, one.node_id))
        return None

    def _leave_out(self, node_id: str, reason: str) -> None:
        nodes = [node for node in ray_nodes() if self.share.slots(node)]
        self.names |= {node.id: node.name for node in nodes}
        if node_id not in self.left_out:
            say(f"{self._name(node_id)} is left out: {reason}")
        self.left_out[node_id] = reason
        if all(node.id in self.left_out for node in nodes):
            raise InputError("\n".join(f"{node.name}: {self.left_out[node.id]}" for node in nodes))

    def _read_news(self) -> None:
        tries = {one.attempt: one for one in self._in_flight.values()}
        news = self._far.news()
        if {item.node_id for item in news} - self.names.keys():  # one that joined later
            self.names |= {node.id: node.name for node in ray_nodes()}
        for attempt, node_id, what in news:
            if one := tries.get(attempt):
                one.node_id = node_id
                one.stage = "" if what == "began" else what
                one.began = one.began or time.monotonic()

    def _counts(self, change: int = 0) -> str:
        running = sum(one.began > 0 for one in self._in_flight.values())
        waiting = len(self._waiting) + len(self._in_flight) - running
        return f"{waiting} waiting, {running} running, {self._n_ended + change} ended"

    def _say_status(self) -> None:
        if time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        running = [one for one in self._in_flight.values() if one.began]
        shown = [
            f"{one.unit.name} on {self._name(one.node_id)}{f' after {one.stage}' if one.stage else ''}"
            for one in running[:4]
        ]
        more = ["…"] if len(running) > len(shown) else []
        left = ""
        if self._seconds and running:
            n_left = len(self._waiting) + len(self._in_flight)
            minutes = n_left * sum(self._seconds) / len(self._seconds) / len(running) / 60
            left = f", about {minutes:.0f} min left"
        say(f"{self._counts()}{left}: {', '.join([*shown, *more])}" if shown else self._counts())

    def _name(self, node_id: str) -> str:
        return self.names.get(node_id) or node_id[:6] or "that it was given to"


def _affinity(node_id: str, *, soft: bool) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=soft)


@contextmanager
def _probe(bench: Path) -> Iterator[str]:
    """A file in the bench that holds its own name: a node that reads it works on the same disk."""
    name = f".probe.{secrets.token_hex(4)}.tmp"
    write_text(bench / name, name)
    try:
        yield name
    finally:
        (bench / name).unlink(missing_ok=True)


def _bench_id(bench: Path) -> str:
    """The name of this bench on the nodes, the same in every call."""
    if not (bench / _ID).is_file():
        write_text(bench / _ID, secrets.token_hex(8))
    text = read_text(bench / _ID, 100)
    if not (text.isalnum() and text.isascii()):
        raise InputError(f"{bench / _ID} is damaged: delete it, and run the same command again")
    return text


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
