"""`sg-local cache`: what the store holds, and freeing it."""

import click

from sg_local.cli.group import is_interruption
from sg_local.cli.options import JSON_OPTION
from sg_local.cli.output import echo_json


@click.command()
@click.option("--unused", is_flag=True, help="Free what no run under this directory has as its model.")
@click.option("--all", "everything", is_flag=True, help="Free all but what is in use.")
@click.option("--yes", is_flag=True, help="Free without asking.")
@JSON_OPTION
def cache(unused: bool, everything: bool, yes: bool, as_json: bool) -> None:
    """\b
    sg-local cache
    sg-local cache --unused

    Lists what lies in ~/.cache/sg-local, or $SG_LOCAL_HOME: pulled models, 16-bit working copies of bases, and what
    killed processes left; with its size, its age, and the runs under this directory that have the model.

    Working copies are made again when they are needed, models have to be pulled again. What is not ours stays.
    """
    from pathlib import Path

    from sg_local.errors import InputError, SgLocalError
    from sg_local.escape import json_text, one_line
    from sg_local.models import store_root
    from sg_local.plan.store import NOT_OURS, free, list_store
    from sg_local.progress import say
    from sg_local.report import tables
    from sg_local.report.store import store_lines

    if unused and everything:
        raise InputError("--unused and --all exclude each other: leave one out")
    frees = unused or everything
    if frees and as_json and not yes:
        raise InputError("with --json nobody is asked: add --yes, or leave --json out")
    here = Path.cwd()
    items = list_store(here)
    chosen = [
        item
        for item in items
        if item["what"] != NOT_OURS and (everything or (unused and not item["used_by"]))
    ]
    if not as_json:
        listed = chosen if frees else items
        size = tables.size(sum(item["size_bytes"] for item in listed)) if listed else "nothing"
        click.echo(one_line(f"{store_root()}: {size}{' to free' if frees else ''}"))
        for line in store_lines(listed) if listed else ():
            click.echo(one_line(line))
    if frees and chosen and not yes and not _is_agreed():
        raise SgLocalError("nothing was freed: answer y, or say --yes")
    kept: dict[str, str] = {}
    for item in chosen:
        if reason := free(item, here):
            kept[item["path"]] = reason
            say(f"kept: {item['path']}: {reason}")
    freed = [item for item in chosen if item["path"] not in kept]
    if freed:
        say(f"freed {tables.size(sum(item['size_bytes'] for item in freed))}")
    if as_json:
        rows = [{**item, "is_freed": item in freed} if frees else item for item in items]
        echo_json(json_text(rows, indent=1))


def _is_agreed() -> bool:
    try:
        return click.confirm("Free this?", err=True)
    except click.Abort as abort:
        if is_interruption(abort):
            raise
        click.echo(err=True)  # nobody is there
        return False
