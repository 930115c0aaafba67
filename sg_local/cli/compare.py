"""`sg-local compare`: two runs beside each other."""

from pathlib import Path

import click

from sg_local.cli.options import JSON_OPTION
from sg_local.cli.output import echo_json

_RUN = click.Path(path_type=Path)


@click.command()
@click.argument("first", metavar="RUN", type=_RUN)
@click.argument("second", metavar="RUN", type=_RUN)
@JSON_OPTION
def compare(first: Path, second: Path, as_json: bool) -> None:
    """\b
    sg-local compare runs/support-inbox runs/support-inbox-epochs=5

    Shows what differs between two runs: task, model, settings, made rows, scores. If both scored the same test rows, a
    paired test says whether the second is better than the first. Changes nothing.
    """
    from sg_local.escape import json_text
    from sg_local.report.comparison import compare as compare_runs
    from sg_local.report.comparison import comparison_lines
    from sg_local.runs.directory import open_run

    compared = compare_runs(open_run(first), open_run(second))
    if as_json:
        echo_json(json_text(compared, indent=1))
        return
    for line in comparison_lines(compared):
        click.echo(line)
