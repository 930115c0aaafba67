"""The runs of a bench on the nodes of a Ray cluster: placed by Ray, worked on by node.py, their files through desk.py.

ClusterOptions("auto", gpus_per_run=1)
for unit, had_work, error in on_cluster(options, units, …): …        as `in_turn` of units.py, as they end
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sg_local.bench.cluster import ClusterOptions, compared, needs_of_runs, require_able, share_of
from sg_local.bench.node import Needs, rows_depend_on
from sg_local.bench.placing import Placing
from sg_local.bench.ray_connection import connected, lost_cluster_explained, ray_nodes
from sg_local.bench.ray_look import look_at_nodes, say_what_there_is, say_where_ports_are_open
from sg_local.bench.units import CanBegin, Ended, Unit
from sg_local.errors import InputError
from sg_local.files import read_text, write_text
from sg_local.runs.begin import ModelFile
from sg_local.runs.given import TaskRows
from sg_local.settings import Settings
from sg_local.task import Task

_ID = ".cluster_id"  # in the bench: names its directory on the nodes


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
        say_where_ports_are_open(nodes)
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
        facts, faults = look_at_nodes(able, needs)
        needs, left_out = compared(needs, able, facts, faults, needed.gpu_bytes)
        say_what_there_is(able, facts, left_out, share, needs)
        placing = Placing(options, units, bench, model, can_begin, needs, share, left_out)
        with lost_cluster_explained():
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
