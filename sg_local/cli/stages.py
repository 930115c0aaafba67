"""`sg-local generate|annotate|curate|train|evaluate RUN`: one stage of a run that `sg-local run` began.

`export`, which also takes adapters from elsewhere, is in export.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sg_local.cli import COMMANDS
from sg_local.cli.options import JSON_OPTION, RUN_ARGUMENT
from sg_local.settings import STAGES

if TYPE_CHECKING:
    from sg_local.run.directory import Run


REDO_OPTION = click.option(
    "--redo", is_flag=True, help="Run it again, and forget it and the stages after it."
)


def run_one(stage: str, run_dir: Path, redo: bool) -> "Run":
    """Runs one stage of a run, or says that there is nothing to do."""
    from sg_local.progress import say
    from sg_local.run.directory import open_run
    from sg_local.run.stage import run_stage

    run = open_run(run_dir)
    if not run_stage(run, stage, redo=redo):
        say(f"{stage} of {run_dir} is finished, nothing to do (--redo runs it again)")
    return run


def _stage_command(stage: str) -> click.Command:
    @click.command(stage, help=f"\b\nsg-local {stage} runs/support-inbox\n\n{COMMANDS[stage][1]}")
    @RUN_ARGUMENT
    @REDO_OPTION
    def command(run_dir: Path, redo: bool) -> None:
        from sg_local.progress import printable

        run = run_one(stage, run_dir, redo)
        if stage == "evaluate":
            from sg_local.report.scores import score_table

            click.echo(printable(score_table(run)))

    return command


generate, annotate, train, evaluate = (
    _stage_command(stage) for stage in STAGES if stage not in ("curate", "export")
)


@click.command(
    "curate",
    help=f"""\b
sg-local curate runs/support-inbox
sg-local curate runs/support-inbox --explain 7

{COMMANDS["curate"][1]} It ends with a table of what was made and dropped, which is also in manifest.json.""",
)
@RUN_ARGUMENT
@REDO_OPTION
@click.option(
    "--explain",
    "row_id",
    metavar="ID",
    help="Tell the life of one row instead: a number, or demonstration-1. Changes nothing.",
)
@JSON_OPTION
def curate(run_dir: Path, redo: bool, row_id: str | None, as_json: bool) -> None:
    """See the help above."""
    import json

    from sg_local.errors import InputError
    from sg_local.progress import printable
    from sg_local.run.directory import open_run

    if row_id is None:
        if as_json:
            raise InputError("--json is for --explain: the numbers of the made data are in manifest.json")
        run_one("curate", run_dir, redo)
        return
    if redo:
        raise InputError("--explain changes nothing, and --redo would: give one of them")
    from sg_local.report.explain import explain, explained

    found = explain(open_run(run_dir), row_id)
    click.echo(json.dumps(found, indent=1, ensure_ascii=True) if as_json else printable(explained(found)))
