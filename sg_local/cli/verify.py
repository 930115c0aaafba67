"""`sg-local verify`: whether a run is still what its manifest says, and a server what was scored."""

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
@click.option(
    "--server", metavar="URL", help="Compare this server's answers with those recorded, and do no more."
)
@click.option(
    "--server-model", metavar="NAME", help="The model to ask for.  [default: the only one it serves]"
)
@click.option(
    "--rows", "n_rows", type=click.IntRange(1), default=100, show_default=True, help="Rows to send at most."
)
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(0.1, 3600),
    default=60,
    show_default=True,
    help="Seconds that one answer of the server may take.",
)
def verify(
    run_dir: Path, parity: bool, server: str | None, server_model: str | None, n_rows: int, seconds: float
) -> None:
    """\b
    sg-local verify runs/support-inbox
    sg-local verify runs/support-inbox --server http://127.0.0.1:8080

    Checks every file of a run against the manifest, then the base, the adapter's fingerprint and the export.

    With --server the recorded rows are sent to a chat server that you run: llama-server, Ollama, LM Studio, or another
    that speaks OpenAI's protocol. Exit code 1 where its answers score significantly lower.
    """
    from sg_local.escape import printable
    from sg_local.runs.directory import open_run

    run = open_run(run_dir)
    if server is None:
        from sg_local.proof.verify import verify_run
        from sg_local.report.checks import passed_line

        for passed in verify_run(run, with_parity=parity):
            click.echo(printable(passed_line(passed.what, passed.evidence)))
        return

    from sg_local.errors import SgLocalError
    from sg_local.proof.chat_server import ChatServer
    from sg_local.proof.server_check import check_server
    from sg_local.report.server import server_lines, worse_line

    check = check_server(run, ChatServer(server, seconds), server_model, n_rows)
    for line in server_lines(check):
        click.echo(printable(line))
    if check.comparison.is_worse:
        raise SgLocalError(worse_line(check))
