"""`sg-local run`: the whole loop."""

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
    help="Exit with code 3 when the tuned model is significantly worse than the base's best way.",
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

    Makes data for TASK with the model, finetunes the model on it, exports it as GGUF, scores it.

    TASK is a task file or the name of a shipped example. Called again, it goes on where it stopped.
    """  # fmt: skip
    from sg_local.errors import InputError, WorseThanBase
    from sg_local.progress import printable, say
    from sg_local.run.begin import begin_run
    from sg_local.run.pipeline import run_pipeline
    from sg_local.settings import resolve_settings

    if gate and until != STAGES[-1]:
        raise InputError(f"--gate judges the scores, and --until {until} stops before them: leave one out")
    found, is_new = begin_run(task_source, model, run_dir, resolve_settings(preset, given(settings)))
    say(f"{'new run' if is_new else 'run'} {found.path}: {found.task.name} with {found.model.path.name}")
    if not run_pipeline(found, until):
        say(f"{found.path} is finished{'' if until == STAGES[-1] else f' until {until}'}, nothing to do")
    if until != STAGES[-1]:
        return
    from sg_local.report.scores import score_table, worse_than

    if as_json:
        echo_json(found.file("evaluation.json").read_text("utf-8").rstrip("\n"))
    else:
        create = shlex.join(["ollama", "create", found.task.name, "-f", str(found.file("Modelfile"))])
        uses = {
            "adapter.gguf": "llama.cpp, beside the base: --lora",
            "model.gguf": "llama.cpp, LM Studio, sg-local predict",
            "Modelfile": create,
        }
        files = [f"{found.file(name)}  ({use})" for name, use in uses.items()]
        click.echo(printable("\n".join([score_table(found), "", *files])))
    if gate and (opponent := worse_than(found)):
        raise WorseThanBase(
            f"{found.path}: the tuned model is significantly worse than {opponent}, the base's best way"
        )
