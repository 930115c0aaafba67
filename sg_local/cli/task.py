"""`sg-local task check|import`: task files."""

from pathlib import Path

import click

from sg_local.cli.group import Group
from sg_local.cli.options import JSON_OPTION, TASK_ARGUMENT
from sg_local.cli.output import echo_json


@click.group(cls=Group)
def task() -> None:
    """\b
    sg-local task check my-task.toml

    Task files: check, import.
    """


@task.command("check", short_help="Check a task file, and show what it holds.")
@TASK_ARGUMENT
@JSON_OPTION
def check_command(task_source: str, as_json: bool) -> None:
    """\b
    sg-local task check my-task.toml

    Checks a task file and its test file, shows what they hold, and warns of what is likely to cost quality.
    """
    from sg_local.escape import json_text, one_line, printable
    from sg_local.progress import say
    from sg_local.report.tables import counted
    from sg_local.runs.given import check_task
    from sg_local.selfguide.advice import task_warnings
    from sg_local.selfguide.given import n_held_out_labelled
    from sg_local.selfguide.metrics import STRUCTURED, kind_of, metric_of

    checked_task, rows = check_task(task_source)
    warnings = task_warnings(checked_task, rows.test, rows.labelled)
    if as_json:
        facts = {
            "name": checked_task.name,
            "labels": list(checked_task.labels),
            "metric": metric_of(checked_task),
            "n_examples": len(checked_task.examples),
            "n_test_rows": len(rows.test),
            "n_inputs": len(rows.inputs),
            "n_labelled": len(rows.labelled),
            "warnings": warnings,
        }
        echo_json(json_text(facts, indent=1))
        return
    if checked_task.labels:
        kind = f"classification, labels {', '.join(map(one_line, checked_task.labels))}"
    else:
        kind = "free answers" + ", JSON of one shape" * (kind_of(checked_task) == STRUCTURED)
    lines = [
        f"{checked_task.name}: {kind}; {counted(len(checked_task.examples), 'example')}; "
        f"scored by {metric_of(checked_task)}"
    ]
    if checked_task.test:
        lines.append(f"{checked_task.test}: {counted(len(rows.test), 'test row')}")
    elif n_held_out := n_held_out_labelled(len(rows.labelled)):
        lines.append(f"no test file: {n_held_out} of the labelled rows will be held out, and scored on")
    else:
        lines.append("no test file: a part of the made data will be held out, and agreement with it reported")
    if checked_task.inputs:
        lines.append(f"{checked_task.inputs.path}: {counted(len(rows.inputs), 'real input')}")
    if rows.labelled:
        lines.append(counted(len(rows.labelled), "labelled row"))
    click.echo(printable("\n".join(lines)))
    for note in rows.notes:
        say(note)
    for warning in warnings:
        say(f"warning: {warning}")


@task.command("import", short_help="Make a task file from Super-NaturalInstructions JSON.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("."),
    show_default=True,
    help="Directory to write to.",
)
@click.option(
    "--n-test-rows", type=click.IntRange(1), default=300, show_default=True, help="Test rows to take at most."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for drawing the test rows.")
def import_command(file: Path, out: Path, n_test_rows: int, seed: int) -> None:
    """\b
    sg-local task import task1195_disflqa_disfluent_to_fluent_conversion.json

    Makes a task file and a test file from Super-NaturalInstructions JSON.
    """
    from dataclasses import replace

    from sg_local.errors import InputError, SgLocalError
    from sg_local.escape import printable
    from sg_local.files import write_rows, write_text
    from sg_local.report.tables import counted
    from sg_local.task import task_to_toml
    from sg_local.task_files.importing import import_task

    imported, rows = import_task(file, n_test_rows, seed)
    target = out / f"{imported.name}.toml"
    test = out / f"{imported.name}.test.jsonl"
    for path in (target, test):
        if path.exists():
            raise InputError(f"{path} exists: move it away, or give another directory with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SgLocalError(f"{out} cannot be made ({error.strerror}): give another with --out") from error
    if rows:
        write_rows(test, [row.as_row() for row in rows])
    write_text(target, task_to_toml(replace(imported, test=Path(test.name) if rows else None)))
    tested = f"{counted(len(rows), 'test row')} in {test}" if rows else "no test rows"
    click.echo(printable(f"{target}: {counted(len(imported.examples), 'example')}, {tested}"))
