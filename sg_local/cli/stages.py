"""`sg-local generate|annotate|curate|train|export|evaluate RUN`: one stage of a run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from sg_local.cli import COMMANDS
from sg_local.cli.options import RUN_ARGUMENT, given
from sg_local.settings import STAGES, Settings

# A finished training can be exported in another type: of all settings, nothing else was made with this one.
_QUANT_OPTION = click.option(
    "--quant",
    type=click.Choice(next(item for item in fields(Settings) if item.name == "quant").metadata["choices"]),
    help="Type of model.gguf, for this export alone.  [default: what the run was begun with]",
)


def _stage_command(stage: str) -> click.Command:
    @click.command(stage, help=f"\b\nsg-local {stage} runs/support-inbox\n\n{COMMANDS[stage][1]}")
    @RUN_ARGUMENT
    @click.option("--redo", is_flag=True, help="Discard this stage and later ones, then run it again.")
    def command(run_dir: Path, redo: bool, **settings: Any) -> None:
        from sg_local.escape import printable
        from sg_local.progress import say
        from sg_local.runs.directory import open_run
        from sg_local.runs.pipeline import run_one_stage

        run = open_run(run_dir).with_given(given(settings))
        if not run_one_stage(run, stage, redo=redo):
            say(f"{stage} of {run_dir} is finished, nothing to do (--redo runs it again)")
        if stage == "evaluate":
            from sg_local.report.scores import scores_with_advice

            click.echo(printable(scores_with_advice(run)))

    return _QUANT_OPTION(command) if stage == "export" else command


generate, annotate, curate, train, export, evaluate = map(_stage_command, STAGES)
