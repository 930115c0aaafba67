"""`sg-local predict`: answers for a file of inputs."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import SettingsCommand, given
from sg_local.cli.output import echo_json


@click.command(
    cls=SettingsCommand,
    settings=("n_ctx", "n_parallel", "n_threads", "n_gpu_layers", "prompt_format", "max_new_tokens"),
)
@click.option("--model", required=True, help="A GGUF file, or a name of `sg-local models list`.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA adapter (GGUF) for the model.")
@click.option("--task", "task_source", help="The task.  [default: the one in the tuned GGUF]")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
def predict(model: str, adapter: Path | None, task_source: str | None, file: Path, **settings: Any) -> None:
    """\b
    sg-local predict --model runs/support-inbox/model.gguf messages.txt > answers.jsonl
    sg-local predict --model smollm2-135m --adapter runs/support-inbox/adapter.gguf messages.jsonl

    Answers every input of FILE, in the order of the file. The answers are greedy: no sampling.

    FILE has one input per line: plain text, or JSON with the key "input" if the file's name ends in .jsonl. Blank lines
    are ignored. For standard input, in either form, FILE is -.
    """
    import sys

    from sg_local.answers import answer_line, answers, read_inputs, why_no_answer
    from sg_local.settings import resolve_settings

    chosen = given(settings)
    resolved = resolve_settings("default", chosen)
    inputs = read_inputs(file)
    outputs = answers(
        inputs,
        model=model,
        adapter=adapter,
        task=task_source,
        settings=resolved,
        prompt_format=chosen.get("prompt_format"),
        max_new_tokens=chosen.get("max_new_tokens"),
        # On a terminal the answers themselves show how far the work is, and a bar would run into them.
        shows_progress=not (sys.stdout and sys.stdout.isatty()),
    )
    for text, output in zip(inputs, outputs, strict=True):
        error = why_no_answer(model, resolved) if output is None else None
        echo_json(answer_line(text, output, error))
