"""`sg-local bench`: many tasks, one table."""

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
    help="Where the runs and the table go.  [default: benches/<name of DIR>]",
)
@PRESET_OPTION
@click.option(
    "--tasks",
    default="",
    metavar="NAMES",
    help="Only these: names of files without ending, with commas; * stands for anything.",
)
@click.option(
    "--seeds",
    "n_seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Run each task with N seeds, starting at --seed; the table has each, and their mean.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Also the model tuned on the demonstrations alone, and the base with made pairs in its prompt.",
)
@click.option(
    "--ablate",
    multiple=True,
    metavar="NAME=VALUE",
    help="Also every task with this one setting changed (n_layouts=1; calibrate for its opposite); may be given again.",
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
    as_json: bool,
    **settings: Any,
) -> None:
    """\b
    sg-local bench my-tasks --model smollm2-135m --preset quick
    sg-local bench natural-instructions --tasks 'task190_*,task1529_*' --model ./vicuna-7b-v1.5.Q4_K_M.gguf
    sg-local bench my-tasks --preset quick --baselines --ablate n_layouts=1 --ablate calibrate=false

    Runs every task of a directory with the same model and settings, and makes one table of their scores.

    DIR holds task files (.toml), or JSON as `sg-local task import` reads it, in itself or in its directory `tasks`.
    Each needs test rows. Called again, it goes on with what is missing; a task that failed does not stop the others
    (exit code 1). What --seeds, --baselines and --ablate compare with is run first, if it is not there; stages that a
    changed setting does not reach are not run again.
    """  # fmt: skip
    import json

    from sg_local.bench.ablation import parse_switches
    from sg_local.bench.bench import run_bench
    from sg_local.errors import SgLocalError
    from sg_local.progress import printable
    from sg_local.report.ablation import BASELINES, SEED
    from sg_local.report.bench import results_markdown
    from sg_local.settings import resolve_settings

    patterns = [name.strip() for name in tasks.split(",") if name.strip()]
    resolved = resolve_settings(preset, given(settings))
    seeds = [f"{SEED}={resolved.seed + more}" for more in range(1, n_seeds)]
    switches = parse_switches([*seeds, *([BASELINES] if baselines else []), *ablate], resolved)
    found, failed = run_bench(directory, model, bench_dir, resolved, patterns, switches)
    if as_json:
        echo_json(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        click.echo(printable(results_markdown(found)), nl=False)
    if failed:
        raise SgLocalError(
            f"not finished: {', '.join(failed)}; the same command goes on with what is missing"
        )
