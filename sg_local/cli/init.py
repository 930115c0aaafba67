"""`sg-local init`: a task file, by questions."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Answer = TypeVar("Answer")


@click.command()
@click.argument("out", metavar="[TASK]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--labelled", type=click.Path(path_type=Path), help="A table or JSON lines: inputs with right outputs."
)
@click.option("--column", help="The file's column, or key, of inputs.  [default: input]")
@click.option(
    "--output-column", default="output", show_default=True, help="The file's column, or key, of outputs."
)
@click.option("--encoding", default="utf-8", show_default=True, help="The file's encoding.")
def init(
    out: Path | None, labelled: Path | None, column: str | None, output_column: str, encoding: str
) -> None:
    """\b
    sg-local init my-task.toml
    sg-local init my-task.toml --labelled tickets.csv --column text --output-column box

    Asks what the task is, and writes TASK: an instruction, labels if the answer is one of a few, and examples, or the
    labelled rows to choose them from. Nothing is written before all of it is right.
    """
    from sg_local.errors import InputError
    from sg_local.escape import printable
    from sg_local.files import write_text
    from sg_local.progress import say
    from sg_local.runs.given import check_task
    from sg_local.task_files.draft import draft
    from sg_local.task_files.row_files import RowFile, encoding_fault

    values: dict[str, object] = {}
    if labelled:
        if fault := encoding_fault(encoding):
            raise InputError(fault)
        values["labelled"] = RowFile(labelled, column, output_column, encoding)
    if out is not None and out.exists():
        raise InputError(f"{out} exists: move it away, or give another name")
    values["name"] = _ask("Name of the task", "name", default=out.stem if out else "my-task")
    path = out or Path(f"{values['name']}.toml")
    if path.exists():
        raise InputError(f"{path} exists: move it away, or call `sg-local init` with another name")
    if not path.parent.is_dir():
        raise InputError(f"there is no directory {path.parent}: make it first")
    values["instruction"] = _ask("Instruction: what to do with an input", "instruction")
    values["labels"] = _labels(values.get("labelled"))
    if not labelled:
        values["examples"] = _examples(values["labels"])
    values["inputs"] = _inputs()
    drafted, text = draft(values, path)
    _, rows = check_task(drafted)
    write_text(path, text)
    for note in rows.notes:
        say(note)
    click.echo(printable(f"wrote {path}; now\n  sg-local run {path} --model smollm2-135m --preset quick"))


def _ask(question: str, key: str, default: str | None = None) -> str:
    """One text, asked for again until it is right."""
    from sg_local.task_files.draft import faults_of

    return _until_right(question, lambda text: (text, faults_of(**{key: text})), default=default)


def _until_right(
    question: str, read: Callable[[str], tuple[Answer, list[str]]], default: str | None = None
) -> Answer:
    """What `read` makes of a text, asked for again while it says that something is wrong with it."""
    from sg_local.progress import say

    while True:
        answer, faults = read(click.prompt(question, default=default, err=True).strip())
        if not faults:
            return answer
        for fault in faults:
            say(fault)


def _labels(labelled: object) -> list[str]:
    """The labels, [] for free answers."""
    from sg_local.escape import one_line
    from sg_local.progress import say
    from sg_local.task_files.draft import faults_of, found_labels, labelled_rows
    from sg_local.task_files.row_files import RowFile

    if isinstance(labelled, RowFile) and (found := found_labels(labelled_rows(labelled))):
        say(f"outputs of the labelled rows: {', '.join(map(one_line, found))}")
        if click.confirm("Are these the labels?", default=True, err=True):
            return found

    def read(text: str) -> tuple[list[str], list[str]]:
        labels = [label.strip() for label in text.split(",") if label.strip()]
        return labels, faults_of(labels=labels)

    return _until_right("Labels, separated by commas; empty: the answer is free text", read, default="")


def _examples(labels: object) -> list[dict[str, str]]:
    """One to three examples."""
    from sg_local.task import MAX_EXAMPLES
    from sg_local.task_files.draft import faults_of

    examples: list[dict[str, str]] = []
    for number in range(1, MAX_EXAMPLES + 1):
        question = f"Example {number}, input" + ("; empty: no more" if examples else "")
        text = click.prompt(question, default="" if examples else None, err=True).strip()
        if not text:
            break

        def read(output: str, text: str = text) -> tuple[dict[str, str], list[str]]:
            example = {"input": text, "output": output}
            return example, faults_of(labels=labels, examples=[example])

        examples.append(_until_right(f"Example {number}, its right output", read))
    return examples


def _inputs() -> object:
    """A file of real inputs, or None."""
    from sg_local.task_files.draft import faults_of
    from sg_local.task_files.row_files import INPUT, RowFile, holds_plain_lines

    def read(text: str) -> tuple[str, list[str]]:
        return text, faults_of(inputs=text) if text else []

    name = _until_right("File of real inputs without answers; empty: none", read, default="")
    if not name:
        return None
    if holds_plain_lines(Path(name)):
        return RowFile(Path(name))
    column = click.prompt("Its column, or key, of the inputs", default=INPUT, err=True)
    return RowFile(Path(name), None if column == INPUT else column)
