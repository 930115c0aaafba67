"""`sg-local plan`: what a run will need, before it starts."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import (
    JSON_OPTION,
    MODEL_OPTION,
    PRESET_OPTION,
    RUN_OPTION,
    TASK_ARGUMENT,
    SettingsCommand,
    given,
)
from sg_local.cli.output import echo_json


@click.command(cls=SettingsCommand)
@TASK_ARGUMENT
@MODEL_OPTION
@RUN_OPTION
@PRESET_OPTION
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0),
    metavar="GIB",
    help="Plan for a GPU with this much memory; 0: no GPU.  [default: the first NVIDIA GPU here]",
)
@JSON_OPTION
def plan(
    task_source: str,
    model: str,
    run_dir: Path | None,
    preset: str,
    gpu_memory: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """\b
    sg-local plan support-inbox --model smollm2-135m
    sg-local plan my-task.toml --model ./vicuna-7b-v1.5.Q4_K_M.gguf --load-in-4bit --gpu-memory 8

    Estimates what `sg-local run` with the same arguments will need: memory, disk, tokens, and time, for which the model
    is measured once, in about half a minute.

    Exit code 0: this machine has enough; 1: it has not, and the message says what to change.

    The plan uses the GPU that nvidia-smi finds. `sg-local doctor` says whether llama.cpp and torch can use it.
    """  # fmt: skip
    from sg_local.errors import SgLocalError
    from sg_local.escape import json_text, printable
    from sg_local.plan.memory import GIB
    from sg_local.plan.plan import plan_run
    from sg_local.report.plan import plan_table
    from sg_local.settings import resolve_settings

    gpu_bytes = None if gpu_memory is None else int(gpu_memory * GIB)
    planned = plan_run(task_source, model, run_dir, resolve_settings(preset, given(settings)), gpu_bytes)
    if as_json:
        echo_json(json_text(planned.as_dict(), indent=1))
    else:
        table = plan_table(
            planned.title,
            planned.needs,
            planned.machine,
            batch_size=planned.settings.batch_size,
            batch_tokens=planned.batch_tokens,
            notes=planned.notes,
            seconds=planned.told.seconds if planned.told else None,
            timed_by=planned.told.source if planned.told else "",
        )
        click.echo(printable(table))
    if planned.faults:
        raise SgLocalError("\n".join(planned.faults))
