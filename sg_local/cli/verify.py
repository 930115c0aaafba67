"""`sg-local verify`: whether a run is still what its manifest says."""

from pathlib import Path

import click

from sg_local.cli.options import RUN_ARGUMENT


@click.command()
@RUN_ARGUMENT
@click.option(
    "--parity/--no-parity",
    default=True,
    show_default=True,
    help="Measure parity again: llama.cpp against torch.",
)
def verify(run_dir: Path, parity: bool) -> None:
    """\b
    sg-local verify runs/support-inbox

    Checks every file of a run against the manifest, then the base, the adapter's fingerprint and the export.
    """
    from sg_local.escape import printable
    from sg_local.proof.verify import verify_run
    from sg_local.report.checks import passed_line
    from sg_local.runs.directory import open_run

    for passed in verify_run(open_run(run_dir), with_parity=parity):
        click.echo(printable(passed_line(passed.what, passed.evidence)))
