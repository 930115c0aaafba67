"""`sg-local bench`: many tasks in one table."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import JSON_OPTION, MODEL_OPTION, PRESET_OPTION, SettingsCommand, given
from sg_local.cli.output import echo_json


@click.command(cls=SettingsCommand)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@MODEL_OPTION
@click.option(
    "--out",
    "bench_dir",
    type=click.Path(path_type=Path),
    help="Directory for the runs and the table.  [default: benches/<name of DIR>]",
)
@PRESET_OPTION
@click.option(
    "--tasks",
    default="",
    metavar="NAMES",
    help="Run only these tasks: file names without ending, separated by commas; * matches any text.",
)
@click.option(
    "--seeds",
    "n_seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Run each task with N seeds, starting at --seed. The table shows each seed, and the mean.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Score also the model tuned on the examples alone, and the base with made pairs in its prompt.",
)
@click.option(
    "--ablate",
    multiple=True,
    metavar="NAME=VALUE",
    help="Run each task also with this one setting changed: n_layouts=1, or calibrate for its opposite. Repeatable.",
)
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS",
    help="Place the runs on a Ray cluster; auto: on that of this machine, which is started if there is none.",
)
@click.option(
    "--gpus-per-run",
    type=click.IntRange(min=0),
    metavar="N",
    help="GPUs for each run.  [default: 1, or 0 if the cluster has none]",
)
@click.option(
    "--cpus-per-run",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processors for each run; its threads, too.  [default: a GPU's part of a node, or a node]",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(min=1),
    metavar="N",
    help="Give Ray no more than N runs at a time.  [default: all]",
)
@click.option(
    "--node-disk",
    is_flag=True,
    help="With --ray: work on the nodes' own disks, also where they see the directory of the bench.",
)
@click.option(
    "--keep-remote",
    is_flag=True,
    help="With --ray: leave the trained weights on the nodes that made them; all else comes back.",
)
@JSON_OPTION
def bench(
    directory: Path,
    model: str,
    bench_dir: Path | None,
    preset: str,
    tasks: str,
    n_seeds: int,
    baselines: bool,
    ablate: tuple[str, ...],
    ray_address: str | None,
    gpus_per_run: int | None,
    cpus_per_run: int | None,
    max_in_flight: int | None,
    node_disk: bool,
    keep_remote: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """\b
    sg-local bench my-tasks --model smollm2-135m --preset quick
    sg-local bench natural-instructions --tasks 'task190_*,task1529_*' --model ./vicuna-7b-v1.5.Q4_K_M.gguf
    sg-local bench my-tasks --preset quick --baselines --ablate n_layouts=1 --ablate calibrate=false
    sg-local bench my-tasks --ray auto --gpus-per-run 1

    Runs every task of a directory with the same model and settings, and makes one table of their scores.

    DIR, or its directory `tasks`, holds task files (.toml), or JSON as `sg-local task import` reads it. Each task needs
    test rows. If a task fails, the others go on, and the exit code is 1. The same call again runs what is missing.

    --seeds, --baselines and --ablate compare with the plain runs, which come first. Stages that do not depend on the
    changed setting are not run again.

    --ray places the same runs on the GPUs and nodes of a Ray cluster. What a dead node had not finished runs elsewhere.
    """  # fmt: skip
    from sg_local.bench.ablation import parse_ablations
    from sg_local.bench.bench import run_bench
    from sg_local.errors import InputError, SgLocalError
    from sg_local.escape import json_text, printable
    from sg_local.report.ablation import BASELINES, SEED
    from sg_local.report.bench import results_markdown
    from sg_local.settings import resolve_settings

    patterns = [name.strip() for name in tasks.split(",") if name.strip()]
    resolved = resolve_settings(preset, given(settings))
    seeds = [f"{SEED}={resolved.seed + more}" for more in range(1, n_seeds)]
    ablations = parse_ablations([*seeds, *([BASELINES] if baselines else []), *ablate], resolved)
    cluster = None
    if ray_address:
        from sg_local.bench.cluster import ClusterOptions

        cluster = ClusterOptions(
            ray_address, gpus_per_run, cpus_per_run, max_in_flight, node_disk, keep_remote
        )
    elif gpus_per_run is not None or cpus_per_run or max_in_flight or node_disk or keep_remote:
        raise InputError(
            "--gpus-per-run, --cpus-per-run, --max-in-flight, --node-disk and --keep-remote are for --ray: "
            "add --ray auto"
        )
    results, failed = run_bench(directory, model, bench_dir, resolved, patterns, ablations, cluster)
    if as_json:
        echo_json(json_text(results, indent=1))
    else:
        click.echo(printable(results_markdown(results)), nl=False)
    if failed:
        raise SgLocalError(
            f"not finished: {', '.join(failed)}; the same command goes on with what is missing"
        )
