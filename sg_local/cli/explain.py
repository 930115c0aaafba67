"""`sg-local explain`: what the stages did with one row."""

from pathlib import Path

import click

from sg_local.cli.options import JSON_OPTION, RUN_ARGUMENT
from sg_local.cli.output import echo_json


@click.command()
@RUN_ARGUMENT
@click.argument("row_id", metavar="ID")
@JSON_OPTION
def explain(run_dir: Path, row_id: str, as_json: bool) -> None:
    """\b
    sg-local explain runs/support-inbox 7
    sg-local explain runs/support-inbox demonstration-1

    Shows what each stage did with one row and, if it was dropped, why. Changes nothing.
    """
    from sg_local.escape import json_text, printable
    from sg_local.report.explain import explain as explain_row
    from sg_local.report.explain import explained
    from sg_local.runs.directory import open_run

    explanation = explain_row(open_run(run_dir), row_id)
    if as_json:
        echo_json(json_text(explanation, indent=1))
    else:
        click.echo(printable(explained(explanation)))
