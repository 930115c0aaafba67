"""Writes what README.md and SETTINGS.md take from the program: a real run, the commands, the settings.

    .venv/bin/python .ci/readme.py            runs the shipped task support-inbox and writes every part: some minutes
    .venv/bin/python .ci/readme.py --tables   writes the tables alone: a second
    .venv/bin/python .ci/readme.py --check    writes nothing; exit code 1, and a line for each fault

A part stands between two comments. Whatever is there is overwritten:

    <!-- make readme: commands -->
    | command | does |
    <!-- end -->

The check compares the tables with the program, and looks whether every link, command and option of README and manuals
exists. The run is not repeated: tests/unit/test_readme.py compares headings and contenders with those of today.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sg_local.cli import COMMANDS, cli  # noqa: E402
from sg_local.settings import PRESETS, STAGES, Settings, declared_for  # noqa: E402

README = ROOT / "README.md"
SETTINGS = ROOT / "sg_local" / "SETTINGS.md"
PAGES = [
    README,
    SETTINGS,
    *(ROOT / name for name in ("CHANGELOG.md", ".github/CONTRIBUTING.md", "models/README.md")),
    *sorted((ROOT / "sg_local").glob("*/README.md")),
]

MAX_README_CHARACTERS = 12_000
MAX_LINE_CHARACTERS = 118  # of what a stage says; scores are never cut

RUN = "sg-local run support-inbox --model smollm2-135m --preset quick"

# "annotate: 206 inputs", "train: 8/66 steps, 0.4 steps/s, 145 s left"
_PROGRESS = re.compile(r"[\w ]+: \d+(/\d+ \w+, .*| \w+)$")


# What is written


def command_table() -> str:
    """Each command as it is called, with its line of help."""
    context = click.Context(cli)
    rows = []
    for name, (_, line) in COMMANDS.items():
        _, command, _ = cli.resolve_command(context, [name])
        assert command is not None
        rows.append([f"`{_call(name, command)}`", line])
    return _table(["command", "does"], rows)


def _call(name: str, command: click.Command) -> str:
    """ "explain RUN ID", "models list|pull|show"; of the options those that have to be given."""
    if isinstance(command, click.Group):
        return f"{name} {'|'.join(command.list_commands(click.Context(command)))}"
    words = [name]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.append(parameter.metavar or str(parameter.name).upper())
        elif parameter.required:
            words.append(f"{parameter.opts[0]} {parameter.metavar or parameter.type.name.upper()}")
    return " ".join(words)


def settings_tables() -> str:
    """A table for each stage: the settings that it is the first to read."""
    by_stage: dict[str | None, list[Field[Any]]] = {stage: [] for stage in (None, *STAGES)}
    for setting in fields(Settings):
        by_stage[declared_for(setting.name)].append(setting)
    parts = []
    for stage, declared in by_stage.items():
        heading = f"{STAGES.index(stage) + 1}. `{stage}`" if stage else "Every stage"
        rows = [
            [_option(setting), _value(setting.default), _allowed(setting), setting.metadata["help"]]
            for setting in declared
        ]
        parts.append(f"## {heading}\n\n{_table(['option', 'default', 'allowed', 'does'], rows)}")
    return "\n\n".join(parts)


def presets_table() -> str:
    """What the presets change; empty where one leaves the default."""
    others = {name: changes for name, changes in PRESETS.items() if changes}
    rows = [
        [
            _option(setting),
            _value(setting.default),
            *(
                _value(changes[setting.name]) if setting.name in changes else ""
                for changes in others.values()
            ),
        ]
        for setting in fields(Settings)
        if any(setting.name in changes for changes in others.values())
    ]
    return _table(["option", "default", *others], rows)


def _option(setting: "Field[Any]") -> str:
    flag = setting.name.replace("_", "-")
    option = f"`--[no-]{flag}`" if setting.type is bool else f"`--{flag}`"
    return f"**{option}**" if setting.metadata["everyday"] else option


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{value}`" if isinstance(value, str) and value else str(value) or "none"


def _allowed(setting: "Field[Any]") -> str:
    rules = setting.metadata
    if rules["choices"]:
        return ", ".join(f"`{choice}`" for choice in rules["choices"])
    if rules["high"] is not None:
        return f"{rules['low']} to {rules['high']}"
    return f"from {rules['low']}" if rules["low"] is not None else ""


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def transcript() -> str:
    """What a person sees who runs the shipped task: run here and now, in a directory of its own."""
    said = []
    arguments = [sys.executable, "-P", "-m", "sg_local", *shlex.split(RUN)[1:]]
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(
            arguments,
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)  # it takes minutes
            said.append(line.rstrip("\n"))
        if code := process.wait():
            sys.exit(f"`{RUN}` ended with exit code {code}: the transcript stays as it was")
        stdout.seek(0)
        scores = stdout.read().rstrip()
    return "\n".join(["```console", f"$ {RUN}", *shortened(said), "", scores, "```"])


def shortened(lines: list[str]) -> list[str]:
    """The first line, and for each stage the last thing that it said and how long it took."""
    kept, last = lines[:1], ""
    for line in lines[1:]:
        if re.fullmatch(r"\[\d/\d\] \w+ done in \d+ s", line):
            kept += [*([last] if last else []), line]
            last = ""
        elif re.match(rf"({'|'.join(STAGES)}): ", line) and not _PROGRESS.fullmatch(line):
            last = (
                line
                if len(line) <= MAX_LINE_CHARACTERS
                else f"{line[: MAX_LINE_CHARACTERS - 4].rstrip()} ..."
            )
    return kept


# Where it is written

TABLES: dict[tuple[Path, str], Callable[[], str]] = {
    (README, "commands"): command_table,
    (SETTINGS, "settings"): settings_tables,
    (SETTINGS, "presets"): presets_table,
}
TRANSCRIPT = (README, "transcript")


def part_of(text: str, name: str) -> str:
    """What stands between the comments of a part. Raises ValueError where they are not there."""
    begin, end = _span(text, name)
    return text[begin:end].strip("\n")


def write_part(path: Path, name: str, content: str) -> None:
    text = path.read_text("utf-8")
    begin, end = _span(text, name)
    path.write_text(f"{text[:begin]}{content}\n{text[end:]}", "utf-8")


def _span(text: str, name: str) -> tuple[int, int]:
    found = re.search(rf"<!-- make readme: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if not found:
        raise ValueError(
            f"there is no <!-- make readme: {name} --> with an <!-- end -->: put them where it belongs"
        )
    return found.span(1)


# What is checked


def faults() -> list[str]:
    """What is not as the program is, one line each."""
    checks = (link_faults, command_faults, option_faults)
    of_pages = [fault for path in PAGES for check in checks for fault in check(path)]
    return [*stale_tables(), *readme_faults(README.read_text("utf-8")), *of_pages]


def stale_tables() -> Iterator[str]:
    for (path, name), table in TABLES.items():
        if part_of(path.read_text("utf-8"), name) != table():
            yield f"{_name(path)}: the part {name} is out of date: call `make tables`"


def readme_faults(text: str) -> Iterator[str]:
    """Whether it is short, and whether its transcript still is one of this program."""
    if len(text) > MAX_README_CHARACTERS:
        yield f"README.md: {len(text)} characters, at most {MAX_README_CHARACTERS}"
    shown = part_of(text, TRANSCRIPT[1])
    if f"$ {RUN}\n" not in shown:
        yield f"README.md: the transcript is not of `{RUN}`: call `make readme`"
    if path := re.search(r"(?<![\w.])~?/[\w.]+/\S+", shown):
        yield f"README.md: the transcript has a path of a machine, {path[0]}: call `make readme`"
    if not all(score_columns(shown)):
        yield "README.md: the transcript has no table of scores: call `make readme`"


def score_columns(shown: str) -> tuple[list[str], list[str]]:
    """The headings of the table of scores and the contenders in it; none where there is no such table."""
    # It follows its title, "support-inbox: 100 rows, ..."; a table of labels may come after it.
    table = re.search(r": \d+ rows, .*\n\n( {10,}\S.*)\n((?:\S.*\n)+)", shown)
    if not table:
        return [], []
    return re.split(r"  +", table[1].strip()), [line.split()[0] for line in table[2].splitlines()]


def link_faults(path: Path) -> Iterator[str]:
    """Links to files that there are not, or to headings that they do not have."""
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            yield f"{_name(path)}: {link} leads nowhere"


def _anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub writes them in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_faults(path: Path) -> Iterator[str]:
    """Calls of sg-local in the console blocks that it would refuse."""
    for block in re.findall(r"```console\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
        for call in re.findall(r"^\$.*?\b(sg-local .*)", block, re.MULTILINE):
            try:
                _parse(shlex.split(re.split(r" [>|] ", call)[0], comments=True)[1:])
            except click.ClickException as error:
                yield f"{_name(path)}: `{call}`: {error.format_message()}"


def option_faults(path: Path) -> Iterator[str]:
    """Options in the text that no command has."""
    named = re.findall(r"`(--[a-z0-9-]+)", path.read_text("utf-8"))
    for option in sorted(set(named) - set(_options(cli, click.Context(cli)))):
        yield f"{_name(path)}: no command has the option {option}"


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    """The options of a command and of those below it: "--n-inputs", "--no-parity"."""
    for parameter in command.get_params(context):
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            _, below, _ = command.resolve_command(context, [name])
            assert below is not None
            yield from _options(below, context)


def _name(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _parse(words: list[str]) -> None:
    """Raises UsageError for words that are no call of sg-local."""
    command: click.Command | None = cli
    name: str | None = "sg-local"
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), words)
    assert command is not None
    command.make_context(name, words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes what README.md and SETTINGS.md take from the program."
    )
    parser.add_argument("--tables", action="store_true", help="write the tables alone, without a run")
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is out of date")
    arguments = parser.parse_args()
    if not arguments.check:
        for (path, name), table in TABLES.items():
            write_part(path, name, table())
        if not arguments.tables:
            write_part(*TRANSCRIPT, transcript())
    if found := faults():
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
