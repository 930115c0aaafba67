"""The manuals lead somewhere: every link in them, and every option that they name."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sg_local.cli import cli

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"
MANUALS = [ROOT / "models" / "README.md", *sorted((ROOT / "sg_local").glob("*/README.md"))]


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """The options of a command and of those below it: "--n-inputs", "--no-parity"."""
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            _, below, _ = command.resolve_command(context, [name])
            assert below is not None
            yield from options(below, context)


@pytest.mark.parametrize("path", [GUIDE, *MANUALS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


def test_every_option_in_a_manual_exists() -> None:
    there = set(options(cli, click.Context(cli)))
    for path in MANUALS:
        named = set(re.findall(r"`(--[a-z0-9-]+)", path.read_text("utf-8")))
        assert named <= there, path
