"""`sg-local predict`: answers for a file of inputs."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import SettingsCommand, complete_model, complete_task, given
from sg_local.cli.output import echo_utf8


@click.command(
    cls=SettingsCommand,
    settings=("n_ctx", "n_parallel", "n_threads", "n_gpu_layers", "prompt_format", "max_new_tokens"),
)
@click.option(
    "--model",
    required=True,
    shell_complete=complete_model,
    help="A run's directory, a GGUF file, or a name of `sg-local models list`.",
)
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA adapter (GGUF) for the model.")
@click.option(
    "--task",
    "task_source",
    shell_complete=complete_task,
    help="A task file, or a shipped task.  [default: the one in the tuned GGUF]",
)
@click.option("--column", help="Column of a table, or key of JSON, that holds the input.  [default: input]")
@click.option("--encoding", default="utf-8", show_default=True, help="FILE's encoding; answers are in UTF-8.")
@click.option("--probabilities", is_flag=True, help="Show how probable each label is.")
@click.option(
    "--abstain-below",
    metavar="P",
    type=click.FloatRange(0, 1),
    help="Give no answer where the label's probability is below P.",
)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
def predict(
    model: str,
    adapter: Path | None,
    task_source: str | None,
    column: str | None,
    encoding: str,
    probabilities: bool,
    abstain_below: float | None,
    file: Path,
    **settings: Any,
) -> None:
    """\b
    sg-local predict --model runs/support-inbox messages.txt > answers.jsonl
    sg-local predict --model runs/support-inbox --column text --abstain-below 0.7 inbox.csv > answers.csv

    Answers every input of FILE, in the order of the file. The answers are greedy: no sampling.

    FILE has one input per line: plain text, or JSON (.jsonl, .ndjson, .json) with the key "input"; or it is a table
    with a header (.csv, .tsv), which gives a table. Other keys and columns pass through; an "output" that is there
    already is taken as right and called "reference". For standard input FILE is -.
    """
    import sys

    from sg_local.answers import in_order, serve, summary
    from sg_local.errors import SgLocalError
    from sg_local.inputs import Answer, AnswerLines, read_inputs
    from sg_local.progress import say
    from sg_local.settings import resolve_settings
    from sg_local.task_files.row_files import RowFile

    chosen = given(settings)
    served = serve(
        model,
        adapter=adapter,
        task=task_source,
        settings=resolve_settings("default", chosen),
        prompt_format=chosen.get("prompt_format"),
        max_new_tokens=chosen.get("max_new_tokens"),
    )
    inputs = read_inputs(RowFile(file, column, encoding=encoding))
    is_scored = probabilities or abstain_below is not None
    lines = AnswerLines(inputs.form, is_scored, served.task.labels if probabilities else ())
    # On a terminal the answers themselves show how far the work is, and a bar would run into them.
    shows_progress = not (sys.stdout and sys.stdout.isatty())
    answered = served.answered(inputs.texts, scores_labels=is_scored, shows_progress=shows_progress)
    answers: list[Answer] = []
    waiting: dict[int, Answer] = {}

    def write(index: int, answer: Answer) -> None:
        if not answers and lines.header is not None:
            echo_utf8(lines.header, inputs.line_end)
        answers.append(answer)
        echo_utf8(lines.line(inputs.rows[index], answer), inputs.line_end)

    results = ((item.index, served.answer(item, abstain_below or 0.0)) for item in answered)
    try:
        for index, answer in in_order(results, waiting):
            write(index, answer)
    except (KeyboardInterrupt, SgLocalError):
        for index in sorted(waiting):  # answered before those that come first in the file
            write(index, waiting[index])
        raise
    for line in summary(served.task, inputs.rows, answers):
        say(line)
