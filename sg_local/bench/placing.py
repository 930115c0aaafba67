"""The runs of a bench on their way through a Ray cluster: waiting here, given to Ray, ended.

    for ended in Placing(options, units, …).run(): …      Ended(unit, True, None)

Ray finds a place for each run and says what died. A run whose worker or node died is begun again with what came back
from it, MAX_TRIES times at most; a run that failed by itself is not. Source: docs.ray.io, "Fault tolerance",
"Scheduling".
"""

import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sg_local.bench.cluster import ClusterOptions, Share
from sg_local.bench.desk import Desk
from sg_local.bench.node import Job, Needs, work
from sg_local.bench.ray_connection import last_line, on_node, ray_nodes
from sg_local.bench.units import CanBegin, Ended, Unit
from sg_local.errors import InputError, SgLocalError
from sg_local.progress import say
from sg_local.runs.begin import ModelFile

MAX_TRIES = 3  # of a run whose worker or node dies
SECONDS_BETWEEN_LINES = 10.0
END_SECONDS = 5.0  # for workers to end
SECONDS_BETWEEN_NEWS = 1.0
GATHER_SECONDS = (
    0.05  # runs that end within are collected together: each time all that are in flight are looked at
)
_NODE_ID = "ray.io/node-id"  # Ray's own label


class FarDesk:
    """Passes calls on to the desk, from a worker. Raises the desk's own errors. What is told waits for no answer."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._waiter = ThreadPoolExecutor(1)

    def tell(self, attempt: str, node_id: str, what: str) -> None:
        """As the desk's, later."""
        self._handle.tell.remote(attempt, node_id, what)

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
class Placing:
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
        self._last_line = self._last_news = time.monotonic()
        self.names = {node.id: node.name for node in ray_nodes()}
        here = ray.get_runtime_context().get_node_id()
        desk_class = ray.remote(Desk)
        self._desk = desk_class.options(num_cpus=0, scheduling_strategy=on_node(here, soft=False)).remote(
            str(self.bench.absolute()), str(self.model.path.absolute())
        )
        self._far = FarDesk(self._desk)
        self._remote = ray.remote(self.task)  # once: each would be sent to every worker
        try:
            while self._waiting or self._in_flight:
                yield from self._place()
                if not self._in_flight:
                    continue
                done = self._wait()
                is_due = time.monotonic() - self._last_news >= SECONDS_BETWEEN_NEWS
                if is_due or not all(self._in_flight[ref].began for ref in done):
                    self._read_news()
                for ref in done:
                    if ended := self._ended(ref, self._in_flight.pop(ref)):
                        self._n_ended += 1
                        yield ended
                if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
                    yield from self._give_up_dead_nodes()
                    self._say_status()
        finally:
            for ref in self._in_flight:
                ray.cancel(ref, force=True)
            if self._in_flight:
                ray.wait(list(self._in_flight), num_returns=len(self._in_flight), timeout=END_SECONDS)

    def _wait(self) -> list[Any]:
        """What ended, after SECONDS_BETWEEN_NEWS at most."""
        import ray

        refs = list(self._in_flight)
        if not ray.wait(refs, num_returns=1, timeout=SECONDS_BETWEEN_NEWS)[0]:
            return []
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=GATHER_SECONDS)
        return list(done)

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
            options["scheduling_strategy"] = on_node(last_node, soft=True)  # its pieces are there
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
                return Ended(unit, True, SgLocalError(f"{node}: {last_line(error)}: please report it"))
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
        if one.began:
            self._seconds.append(time.monotonic() - one.began)
        say(f"{unit.name} is finished on {node} ({self._counts(1)})")
        return Ended(unit, True)

    def _give_up_dead_nodes(self) -> Iterator[Ended]:
        """Of a machine that lost its power or network nothing is heard; Ray would wait for its answer for minutes."""
        import ray

        alive = {node.id for node in ray_nodes()}
        for ref, one in list(self._in_flight.items()):
            if one.node_id and one.node_id not in alive:
                del self._in_flight[ref]
                ray.cancel(ref, force=True)
                if ended := self._again(one, f"the node {self._name(one.node_id)} died"):
                    self._n_ended += 1
                    yield ended

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
        self._last_news = time.monotonic()
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
