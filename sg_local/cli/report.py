"""`sg-local report`: a run, or a bench, as one page."""

from pathlib import Path

import click

from sg_local.cli.options import RUN_ARGUMENT


@click.command()
@RUN_ARGUMENT
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the page.  [default: report.html in it]",
)
def report(run_dir: Path, out: Path | None) -> None:
    """\b
    sg-local report runs/support-inbox
    sg-local report benches/my-tasks

    Writes a run as one page for the browser: scores, rows that changed, the made data, the proof.
    Of a bench: its tasks as a table, the gains as a picture, seeds and changed settings beside each other.

    The page asks for nothing from the network. Of a run that is not finished it shows what is there.
    """  # fmt: skip
    from sg_local.bench.results import is_bench, write_bench_report
    from sg_local.escape import printable
    from sg_local.report.page import write_report

    write = write_bench_report if is_bench(run_dir) else write_report
    click.echo(printable(str(write(run_dir, out))))
