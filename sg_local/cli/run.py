"""`sg-local run`: all stages, one after the other."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

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
from sg_local.settings import STAGES

if TYPE_CHECKING:
    from sg_local.runs.loop import Result


@click.command(cls=SettingsCommand)
@TASK_ARGUMENT
@MODEL_OPTION
@RUN_OPTION
@click.option(
    "--from",
    "other_dir",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Keep what another run has, as far as it fits.",
)
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
    help="Exit code 3 where worse than the base at its best.",
)
@click.option(
    "--fallback",
    "has_fallback",
    is_flag=True,
    help="Hand out the base where it scored as high.",
)
@JSON_OPTION
def run(
    task_source: str,
    model: str,
    run_dir: Path | None,
    other_dir: Path | None,
    preset: str,
    until: str,
    gate: bool,
    has_fallback: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """\b
    sg-local run support-inbox --model smollm2-135m --preset quick
    sg-local run my-task.toml --model ./vicuna-7b-v1.5.Q4_K_M.gguf --prompt-format vicuna --load-in-4bit
    sg-local run my-task.toml --from runs/my-task --epochs 5

    The model makes data for TASK, a file or a shipped task, and is finetuned, exported as GGUF and scored.
    The same call again continues the run.
    """  # fmt: skip
    from sg_local.errors import InputError
    from sg_local.escape import json_text, printable
    from sg_local.runs import loop, second_try
    from sg_local.settings import resolve_settings

    if (gate or has_fallback) and until != STAGES[-1]:
        flag = "--gate" if gate else "--fallback"
        raise InputError(f"{flag} judges the scores, and --until {until} stops before them: leave one out")
    if other_dir is None:
        resolved = resolve_settings(preset, given(settings))
        result = loop.run(task_source, model=model, settings=resolved, run_dir=run_dir, until=until)
    else:
        if _is_typed("preset"):
            raise InputError(f"--preset and --from {other_dir} both say which settings hold: leave one out")
        result = second_try.run_from(
            task_source,
            other_dir,
            given(settings),
            model=model if _is_typed("model") else None,
            run_dir=run_dir,
            until=until,
        )
    if until != STAGES[-1]:
        return
    from sg_local.report.scores import read_evaluation, scores_with_advice

    fallback = result.hand_out_fallback() if has_fallback else None
    if as_json:
        told = {"fallback": fallback and fallback.told} if has_fallback else {}
        echo_json(json_text({**read_evaluation(result.run), **told}, indent=1))
    else:
        files = _files(result)
        make_page = shlex.join(["sg-local", "report", str(result.directory)])
        page = str(result.page) if result.page.is_file() else make_page
        files.append(f"{page}  (this as a page)")
        if other_dir:
            compare = shlex.join(["sg-local", "compare", str(other_dir), str(result.directory)])
            files.append(f"{compare}  (what the changes did)")
        click.echo(printable("\n".join([scores_with_advice(result.run), "", *files])))
    if gate:
        result.gate()


def _files(result: "Result") -> list[str]:
    """What can be served, and with what: first what was handed out in place of the tuned model."""
    from sg_local.runs.handed_out import CHAT_TEMPLATE, MODELFILE, read_fallback

    def create(modelfile: Path) -> str:
        return shlex.join(["ollama", "create", result.run.task.name, "-f", str(modelfile)])

    files = [
        f"{result.adapter}  (llama.cpp, beside the base: --lora)",
        f"{result.model}  (llama.cpp, LM Studio, sg-local predict)",
        f"{result.modelfile}  ({create(result.modelfile)})",
    ]
    fallback = read_fallback(result.run)
    if fallback is None:
        return files
    served = [shlex.join(["sg-local", "predict", "--model", str(result.directory)]) + " FILE"]
    if fallback.in_chat:
        template, modelfile = result.run.file(CHAT_TEMPLATE), result.run.file(MODELFILE)
        words = [
            "llama-server",
            "-m",
            str(result.run.model.path),
            "--jinja",
            "--chat-template-file",
            str(template),
        ]
        served += [f"{template}  ({shlex.join(words)})", f"{modelfile}  ({create(modelfile)})"]
    return ["the base, in place of the tuned model:", *served, "", "the tuned model:", *files]


def _is_typed(name: str) -> bool:
    """Whether an option was given on the command line, and has not its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
