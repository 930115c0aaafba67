"""The command line: `sg-local COMMAND`. Commands read flags, call one function, print, and exit.

Exit codes: 0 success; 1 the work failed; 2 the call or a file is wrong; 3 worse than the base (`--gate`); 130 Ctrl-C.
A command's module is imported when the command is called, so that the list of commands appears at once.
"""

from importlib import import_module
from typing import Any

import click

from sg_local.cli.group import Group, is_interruption
from sg_local.errors import GOES_ON, SgLocalError, outside_cause
from sg_local.progress import say

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Command -> its module and one line of help, in the order of the work.
COMMANDS = {
    "init": ("init", "Write a task file, by questions."),
    "run": ("run", "All stages: data, training, export, scores."),
    "plan": ("plan", "What a run will need: memory, disk, tokens."),
    "generate": ("stages", "Stage 1: the model makes inputs."),
    "annotate": ("stages", "Stage 2: the model answers its inputs."),
    "curate": ("stages", "Stage 3: choose the pairs to train on."),
    "review": ("review", "Judge rows by hand."),
    "train": ("stages", "Stage 4: finetune on the chosen pairs."),
    "export": ("stages", "Stage 5: write the GGUF files, with proof."),
    "evaluate": ("stages", "Stage 6: score the tuned model beside the base."),
    "explain": ("explain", "What each stage did with a row, and why."),
    "report": ("report", "A run or bench as a page."),
    "compare": ("compare", "What differs; a paired test."),
    "runs": ("runs", "The runs here: state, score, size."),
    "predict": ("predict", "Answer a file of inputs."),
    "chat": ("chat", "Try a model in the terminal."),
    "verify": ("verify", "Check a run, or a server that has it."),
    "bench": ("bench", "Many tasks in one table."),
    "export-adapter": ("export_adapter", "Any PEFT LoRA adapter as GGUF, with proof."),
    "models": ("models", "Models by name."),
    "cache": ("cache", "What the store holds; frees it."),
    "task": ("task", "Task files."),
    "doctor": ("doctor", "What is missing here, and the fix."),
}
# The modules whose commands continue where they stopped, when they are called again.
_RESUMING = {"run", "stages", "bench"}


class _Commands(Group):
    """Lists COMMANDS without importing them. Here alone, an error becomes an exit code."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            module = import_module(f"sg_local.cli.{COMMANDS[name][0]}")
            command = getattr(module, name.replace("-", "_"))
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SgLocalError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except click.Abort as abort:  # at a question; click says "Aborted!" where there is nobody to answer
            if not is_interruption(abort):
                raise
            click.echo(err=True)
            say("Error: interrupted")
            ctx.exit(INTERRUPTED)
        except (KeyboardInterrupt, Exception) as error:
            if (cause := outside_cause(error)) is None:
                raise
            module, _ = COMMANDS[str(ctx.invoked_subcommand)]
            say(f"Error: {cause}{GOES_ON if module in _RESUMING else ''}")
            ctx.exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


def _show_version(ctx: click.Context, _option: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"sg-local {version('sg-local')}")
    except PackageNotFoundError:
        click.echo("sg-local, not installed: a source checkout")
    ctx.exit()


@click.group(
    cls=_Commands,
    commands={name: click.Command(name, short_help=line) for name, (_, line) in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """\b
    sg-local run support-inbox --model smollm2-135m --preset quick

    Makes a local GGUF model better at your task, from an instruction and one to three examples.
    """


def main() -> None:
    """Runs the command line: the entry point of `sg-local` and of `python -m sg_local`."""
    from sg_local.cli.output import escape_what_stdout_lacks

    escape_what_stdout_lacks()
    cli()
