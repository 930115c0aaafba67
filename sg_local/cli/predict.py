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
@click.option("--task", "task_source", help="The task.  [default: the one that the tuned GGUF was made for]")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
def predict(model: str, adapter: Path | None, task_source: str | None, file: Path, **settings: Any) -> None:
    """\b
    sg-local predict --model runs/support-inbox/model.gguf messages.txt > answers.jsonl
    sg-local predict --model smollm2-135m --adapter runs/support-inbox/adapter.gguf messages.jsonl

    Answers every input of FILE, greedily, in the order of the file.

    FILE holds JSON lines with "input" where its name ends in .jsonl, else plain text, one input a line; blank
    lines are left out. - is standard input, in either form.
    """
    from sg_local.models import resolve_model
    from sg_local.predict import predict_file
    from sg_local.settings import resolve_settings

    chosen = given(settings)
    for line in predict_file(
        file, resolve_model(model), adapter, task_source, resolve_settings("default", chosen), chosen
    ):
        echo_json(line)
