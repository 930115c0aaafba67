"""`sg-local review`: a person looks at made rows, in the browser or in the shell."""

import shlex
from pathlib import Path

import click

from sg_local.cli.options import RUN_ARGUMENT


@click.command()
@RUN_ARGUMENT
@click.option("--terminal", is_flag=True, help="In this shell, by keys, instead of the browser.")
def review(run_dir: Path, terminal: bool) -> None:
    """\b
    sg-local review runs/support-inbox
    sg-local review runs/support-inbox --terminal

    Shows rows one at a time, the least sure first and every fourth drawn at random. Say whether the model's answer is
    right, give another, or drop the row. What you say is kept at once; stop when you like, and go on later. Prints an
    address for the browser that this machine alone can open.

    Afterwards `sg-local run` trains on what you said. The rows drawn at random tell how often the model is right.
    """
    from sg_local.escape import printable
    from sg_local.progress import say
    from sg_local.report.review import review_lines
    from sg_local.review.session import open_session

    with open_session(run_dir) as session:
        if terminal:
            from sg_local.review.terminal import review_by_keys

            review_by_keys(session, _show, _read_key, _read_line)
        else:
            from sg_local.review.server import serve

            serve(
                session,
                lambda url: say(f"open {url} in a browser on this machine; Ctrl-C, or End there, ends"),
            )
        lines = review_lines(session.summary)
    curate = shlex.join(["sg-local", "curate", str(run_dir)])
    lines.append(f"{curate}, or the run's own `sg-local run` to train as well, takes this in")
    click.echo(printable("\n".join(lines)))


def _show(line: str) -> None:
    from sg_local.escape import printable

    click.echo(printable(line), err=True)


def _read_key() -> str:
    """One key that is no space, or "" at the end of what is typed, or comes through a pipe."""
    import sys

    try:
        while True:
            key = click.getchar() if sys.stdin.isatty() else sys.stdin.read(1)
            if not key.isspace():
                return key
    except (EOFError, KeyboardInterrupt):
        return ""


def _read_line(question: str) -> str:
    try:
        return str(click.prompt(question, default="", show_default=False, err=True))
    except click.Abort:
        return ""
