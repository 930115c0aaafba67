"""How a bench places its runs on Ray: what dies is begun again, what fails is not, what depends on a run waits for it.

A real cluster of this machine; in place of the stages of a run a function writes down that it was called.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finished_run import HEADER, MODEL_TEMPLATE, TENSORS, finish_run
from gguf_bytes import tiny_gguf

import sg_local.bench.placing as placing_module
from sg_local.bench.ablation import Ablation
from sg_local.bench.cluster import ClusterOptions, Share
from sg_local.bench.desk import Desk
from sg_local.bench.node import Job, Needs
from sg_local.bench.placing import MAX_TRIES, FarDesk, Placing
from sg_local.bench.ray_connection import connected
from sg_local.bench.units import Ended, Unit
from sg_local.errors import InputError
from sg_local.files import write_rows
from sg_local.runs.begin import create_or_open_run, read_model
from sg_local.runs.directory import open_run
from sg_local.runs.given import TaskRows
from sg_local.settings import Settings
from sg_local.task import Example, Task

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

ROOT = Path(__file__).parents[2]
TASKS = ("boxes", "crates", "drawers")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two runs at a time."""
    paths = [str(path) for path in (ROOT, ROOT / "tests/unit", Path(__file__).parent)]
    with pytest.MonkeyPatch.context() as patch:  # what the workers inherit
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def scripted(desk: Any, job: Job, attempt: str, _names: Any) -> dict[str, Any]:
    """In place of a run: crates kills its worker the first time, drawers fails, others are finished."""
    far = FarDesk(desk)
    far.tell(attempt, ray.get_runtime_context().get_node_id(), "began")
    with (Path(job.needs.bench) / "calls.txt").open("a") as file:
        file.write(f"{job.place}\n")
    if attempt.startswith("crates 1 "):
        time.sleep(0.2)  # what was told arrives
        os.kill(os.getpid(), signal.SIGKILL)
    if job.place == "drawers":
        return {"error": "train did not finish", "exit_code": 1}
    time.sleep(0.2)
    finish_run(open_run(Path(job.needs.bench) / job.place))
    return {"error": None}


class Bench:
    """A bench with three tasks, none of them begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        model_path = path.with_name("tiny.gguf")
        model_path.write_bytes(tiny_gguf({**HEADER, "tokenizer.chat_template": MODEL_TEMPLATE}, TENSORS))
        self.model = read_model(model_path)
        task = Task("", "Which box?", (Example("Money back.", "refund"),), labels=("refund", "login"))
        rows = TaskRows(test=[Example("Let me in.", "login")])
        self.runs = [
            create_or_open_run(path / name, replace(task, name=name), self.model, Settings(), rows)[0]
            for name in TASKS
        ]
        self.needs = Needs(
            bench=str(path),
            bench_id="5d1c",
            probe="",
            model=str(model_path),
            model_sha256=self.model.sha256,
            model_bytes=7,
            trainer="peft",
            base_weights="",
            disk_bytes=0,
            versions={},
            on_node_disk=False,
            keep_remote=False,
        )

    @property
    def calls(self) -> list[str]:
        return (self.path / "calls.txt").read_text().split()

    def place(
        self,
        units: list[Unit],
        task: Any = scripted,
        left_out: dict[str, str] | None = None,
        **options: Any,
    ) -> Iterator[Ended]:
        def can_begin(unit: Unit) -> bool:
            return unit.base is None or unit.base.first_unfinished() is None

        placing = Placing(
            ClusterOptions("auto", **options),
            units,
            self.path,
            self.model,
            can_begin,
            self.needs,
            Share(1, 0, 0),
            left_out or {},
            task=task,
        )
        return placing.run()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench")


@pytest.mark.timeout(300)
def test_runs_are_placed_and_what_dies_is_begun_again(
    cluster: None, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = Ablation("rank", 8)
    units = [*(Unit(run) for run in bench.runs), *(Unit(run, ablation) for run in bench.runs)]
    ended = {one.unit.name: one for one in bench.place(units)}
    assert set(ended) == {*TASKS, "boxes with rank=8", "crates with rank=8"}
    assert {name: str(one.error) for name, one in ended.items() if one.error} == {
        "drawers": "train did not finish"
    }
    calls = bench.calls
    assert [calls.count(name) for name in TASKS] == [1, 2, 1]  # a failure of its own is not tried again
    for name in ("boxes", "crates"):
        assert calls.index(f"ablations/rank=8/{name}") > max(
            i for i, call in enumerate(calls) if call == name
        )
    assert "ablations/rank=8/drawers" not in calls
    told = capsys.readouterr().err
    assert re.search(r"crates: the worker or the node \S+ died", told)
    assert "try 2 of 3" in told
    assert not [one for one in bench.place(units[3:]) if one.had_work]  # called again, there is nothing to do


def dies_always(desk: Any, job: Job, attempt: str, _names: Any) -> dict[str, Any]:
    with (Path(job.needs.bench) / "calls.txt").open("a") as file:
        file.write(f"{job.place}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.timeout(300)
def test_what_dies_again_and_again_is_given_up(cluster: None, bench: Bench) -> None:
    (ended,) = bench.place([Unit(bench.runs[0])], dies_always)
    assert ended.error
    assert "WorkerCrashedError" in str(ended.error)
    assert bench.calls == ["boxes"] * MAX_TRIES


def works_for_long_once(desk: Any, job: Job, attempt: str, names: Any) -> dict[str, Any]:
    return works_for_long(desk, job, attempt, names) if attempt.startswith("boxes 1 ") else {"error": None}


@pytest.mark.timeout(300)
def test_a_node_of_which_nothing_is_heard_is_given_up_when_ray_calls_it_dead(
    cluster: None, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without power closes no connection: a call to it waits for minutes."""
    monkeypatch.setattr(placing_module, "SECONDS_BETWEEN_LINES", 2.0)
    ends = bench.place([Unit(bench.runs[0])], works_for_long_once)
    monkeypatch.setattr(placing_module, "ray_nodes", list)
    assert [one.error for one in ends] == [None]
    assert "boxes: the node" in capsys.readouterr().err


def finds_its_disk_full(_desk: Any, _job: Job, _attempt: str, _names: Any) -> dict[str, Any]:
    return {"unfit": "nothing of disk is free", "node_id": ray.get_runtime_context().get_node_id()}


@pytest.mark.timeout(300)
def test_no_run_is_placed_on_a_node_that_is_left_out(
    cluster: None, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    (ended,) = bench.place([Unit(bench.runs[0])], left_out={"ab" * 28: "no torch"})  # another node
    assert not ended.error
    with pytest.raises(InputError, match=r"\d: nothing of disk is free"):
        list(bench.place([Unit(bench.runs[2])], finds_its_disk_full))
    assert "is left out: nothing of disk is free" in capsys.readouterr().err
    here = ray.get_runtime_context().get_node_id()
    ends = bench.place([Unit(bench.runs[2])], left_out={here: "no torch"})
    with pytest.MonkeyPatch.context() as patch:
        waited: list[int] = []

        def interrupt(self: Any) -> None:
            waited.append(sum(one.began > 0 for one in self._in_flight.values()))
            if len(waited) == 3:
                raise KeyboardInterrupt

        patch.setattr(Placing, "_read_news", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(ends)
    assert waited == [0, 0, 0]
    assert bench.calls == ["boxes"]


def works_for_long(desk: Any, _job: Job, attempt: str, _names: Any) -> dict[str, Any]:
    far = FarDesk(desk)
    far.tell(attempt, ray.get_runtime_context().get_node_id(), "began")
    time.sleep(600)
    return {"error": None}


@pytest.mark.timeout(300)
def test_an_interruption_ends_what_was_begun(cluster: None, bench: Bench) -> None:
    ends = bench.place([Unit(run) for run in bench.runs], works_for_long, max_in_flight=2)
    placed = Placing._read_news

    def interrupt(self: Any) -> None:
        placed(self)
        if sum(one.began > 0 for one in self._in_flight.values()) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placing, "_read_news", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(ends)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2


class Slow:
    """In place of a desk that takes a large file."""

    def wait(self) -> None:
        time.sleep(3)


def waits_for_its_desk(desk: Any, job: Job, attempt: str, _names: Any) -> dict[str, Any]:
    at_work = Path(job.needs.bench) / f"{job.place}.at_work"
    at_work.touch()
    FarDesk(ray.remote(Slow).options(num_cpus=0).remote()).wait()
    n_at_work = len(list(at_work.parent.glob("*.at_work")))
    at_work.unlink()
    return {"error": None if n_at_work <= 2 else f"{n_at_work} at a time", "exit_code": 1}


@pytest.mark.timeout(300)
def test_a_run_that_waits_for_the_desk_lends_its_processors_to_nobody(cluster: None, bench: Bench) -> None:
    assert [ended.error for ended in bench.place([Unit(run) for run in bench.runs], waits_for_its_desk)] == [
        None
    ] * 3


@pytest.mark.timeout(300)
def test_an_error_of_the_desk_arrives_as_it_is(cluster: None, bench: Bench) -> None:
    write_rows(bench.runs[0].file("train.jsonl"), [{"id": 0}])
    desk = FarDesk(ray.remote(Desk).options(num_cpus=0).remote(str(bench.path), str(bench.model.path)))
    assert desk.piece("boxes", "train.jsonl", 0) == b'{"id": 0}\n'
    with pytest.raises(InputError, match="no file of a run") as caught:
        desk.piece("boxes", "settings.toml", 0)
    assert str(caught.value).count("\n") == 0


def test_a_cluster_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(**_options: Any) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray's node.py does

    monkeypatch.setattr(ray, "init", slow)
    with (
        pytest.raises(InputError, match="--ray auto: The current node timed out during startup"),
        connected("auto"),
    ):
        pass
