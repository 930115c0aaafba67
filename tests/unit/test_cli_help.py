"""Help, the list of commands, and what a mistyped one is told."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields

import click
import pytest
from command_line import Call, in_a_process

from sg_local.cli import COMMANDS, cli
from sg_local.cli.options import SettingsCommand
from sg_local.settings import STAGES, Settings


def commands(
    group: click.Group, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with what is typed for it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])
        assert command is not None
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))


ALL = dict(commands(cli))


@pytest.mark.parametrize("names", [(), *ALL], ids=" ".join)
def test_help_starts_with_an_example_that_is_right(sg: Call, names: tuple[str, ...]) -> None:
    result = sg(*names, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    usage, first, *_ = re.split(r"\n\n", result.stdout)
    assert usage.startswith("Usage:")
    examples = [line.strip() for line in first.splitlines()]
    assert examples[0].startswith(" ".join(("sg-local", *names)))
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])[1:]
        command: click.Command = cli
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(click.Context(command), words)
            assert found is not None
            command = found
        command.make_context(name, words)  # raises where an option of the example does not exist


TAKE_SETTINGS = [name for (name, *_), command in ALL.items() if isinstance(command, SettingsCommand)]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", TAKE_SETTINGS)
def test_help_shows_the_everyday_options_and_help_all_every_one(sg: Call, name: str) -> None:
    everyday, all_options = (sg(name, flag).stdout for flag in ("--help", "--help-all"))
    taken = {option.name for option in ALL[name,].params}
    settings = {item.name.replace("_", "-"): item for item in fields(Settings) if item.name in taken}
    rare = {flag for flag, item in settings.items() if not item.metadata["everyday"]}
    assert rare
    assert options_in(all_options) == options_in(everyday) | rare
    assert options_in(everyday) & settings.keys() == settings.keys() - rare
    assert {"help", "help-all"} <= options_in(everyday)


@pytest.mark.parametrize("columns", ["80", "100"])
def test_the_help_of_run_can_be_read_at_once(columns: str) -> None:
    lines = in_a_process("run", "--help", env={"COLUMNS": columns}).stdout.splitlines()
    assert len(lines) <= 60
    headings = [line.removesuffix(":") for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    numbers = dict(zip(STAGES, range(1, 7), strict=True))
    stages = [f"Stage {numbers[stage]}, {stage}" for stage in STAGES if stage != "curate"]  # all rare
    assert headings == ["Options", "Every stage", *stages]


def test_a_bare_call_lists_the_commands_in_the_order_of_the_work(sg: Call) -> None:
    result = sg()
    assert (result.exit_code, result.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z-]+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(COMMANDS)
    assert sg("models").stdout.startswith("Usage: cli models")


def test_the_listed_commands_are_the_ones_that_run() -> None:
    for (name, *rest), command in ALL.items():
        if not rest:
            assert command.name == name


def test_a_mistyped_command_or_option_is_told_with_what_was_meant(sg: Call) -> None:
    result = sg("exprot", "runs/a")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'export'" in result.stderr
    result = sg("run", "a.toml", "--n-input", "7")
    assert result.exit_code == 2
    assert "--n-inputs" in result.stderr


def test_version_works_without_an_installation(sg: Call) -> None:
    result = sg("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("sg-local")
