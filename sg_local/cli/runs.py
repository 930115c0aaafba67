"""`sg-local runs`: the runs that there are, and how far each is."""

from pathlib import Path

import click

from sg_local.cli.options import JSON_OPTION
from sg_local.cli.output import echo_json


@click.command()
@click.argument("directory", metavar="[DIR]", type=click.Path(path_type=Path), default=".")
@JSON_OPTION
def runs(directory: Path, as_json: bool) -> None:
    """\b
    sg-local runs
    sg-local runs benches

    Lists the runs under DIR, or under this directory: how far each is, its score (of model.gguf, by the task's
    metric) with the verdict against the base's best way, its size, its age, and its model. Changes nothing.
    """
    from sg_local.escape import json_text
    from sg_local.plan.run_list import list_runs
    from sg_local.report.run_list import run_lines

    items = [*list_runs(directory)]
    if as_json:
        echo_json(json_text(items, indent=1))
        return
    for line in run_lines(items) if items else ["no runs here"]:
        click.echo(line)
