"""`sg-local run`: all stages, one after the other."""

import shlex
from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import JSON_OPTION, MODEL_OPTION, PRESET_OPTION, RUN_OPTION, SettingsCommand, given
from sg_local.cli.output import echo_json
from sg_local.settings import STAGES


@click.command(cls=SettingsCommand)
@click.argument("task_source", metavar="TASK")
@MODEL_OPTION
@RUN_OPTION
@PRESET_OPTION
@click.option(
    "--until",
    type=click.Choice(STAGES),
    default=STAGES[-1],
    show_default=True,
    help="Stop after this stage.",
)
@click.option(
    "--gate",
    is_flag=True,
    help="Exit with code 3 if the tuned model is significantly worse than the base's best way.",
)
@JSON_OPTION
def run(
    task_source: str,
    model: str,
    run_dir: Path | None,
    preset: str,
    until: str,
    gate: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """\b
    sg-local run support-inbox --model smollm2-135m --preset quick
    sg-local run my-task.toml --model ./vicuna-7b-v1.5.Q4_K_M.gguf --prompt-format vicuna --load-in-4bit

    The model makes data for TASK and is finetuned, exported as GGUF and scored.

    TASK is a file or a shipped task. The same call again continues the run.
    """  # fmt: skip
    from sg_local.errors import InputError
    from sg_local.escape import json_text, printable
    from sg_local.runs import loop
    from sg_local.settings import resolve_settings

    if gate and until != STAGES[-1]:
        raise InputError(f"--gate judges the scores, and --until {until} stops before them: leave one out")
    resolved = resolve_settings(preset, given(settings))
    result = loop.run(task_source, model=model, settings=resolved, run_dir=run_dir, until=until)
    if until != STAGES[-1]:
        return
    from sg_local.report.scores import read_evaluation, score_table

    if as_json:
        echo_json(json_text(read_evaluation(result.run), indent=1))
    else:
        create = shlex.join(["ollama", "create", result.run.task.name, "-f", str(result.modelfile)])
        files = [
            f"{result.adapter}  (llama.cpp, beside the base: --lora)",
            f"{result.model}  (llama.cpp, LM Studio, sg-local predict)",
            f"{result.modelfile}  ({create})",
        ]
        page = shlex.join(["sg-local", "report", str(result.directory)])
        files.append(f"{page}  (this as a page)")
        click.echo(printable("\n".join([score_table(result.run), "", *files])))
    if gate:
        result.gate()
