"""`sg-local report`: a run as one page."""

from pathlib import Path

import click

from sg_local.cli.options import RUN_ARGUMENT


@click.command()
@RUN_ARGUMENT
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the page.  [default: report.html in RUN]",
)
def report(run_dir: Path, out: Path | None) -> None:
    """\b
    sg-local report runs/support-inbox

    Writes a run as one page for the browser: scores, rows that changed, the made data, the proof.

    The page asks for nothing from the network. Of a run that is not finished it shows what is there.
    """
    from sg_local.escape import printable
    from sg_local.report.page import write_report

    click.echo(printable(str(write_report(run_dir, out))))
