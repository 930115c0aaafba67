"""`sg-local chat`: a tuned model in the terminal, one line after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import SettingsCommand, complete_model, complete_task, given


@click.command(
    cls=SettingsCommand,
    settings=("n_ctx", "n_threads", "n_gpu_layers", "prompt_format", "max_new_tokens"),
)
@click.argument("model", metavar="RUN|MODEL", shell_complete=complete_model)
@click.option(
    "--task",
    "task_source",
    shell_complete=complete_task,
    help="A task file, or a shipped task.  [default: the one in the tuned GGUF]",
)
@click.option("--compare", is_flag=True, help="Show the base's answer above each. Needs a run.")
def chat(model: str, task_source: str | None, compare: bool, **settings: Any) -> None:
    """\b
    sg-local chat runs/support-inbox --compare

    Answers each line that you type. A line is an input of the task, as in `sg-local predict`: the model sees none of
    the lines before. The base has the task's examples in its prompt. Ctrl-D ends.
    """
    from contextlib import ExitStack

    from sg_local.answers import conversation, serve, serve_base
    from sg_local.errors import InputError
    from sg_local.escape import printable
    from sg_local.progress import say
    from sg_local.settings import resolve_settings

    chosen = given(settings)
    resolved = resolve_settings("default", chosen)
    if compare and not (Path(model) / "settings.toml").is_file():
        raise InputError(f"{model} is no run directory: only a run knows the base to compare with")
    asked = {"base": serve_base(Path(model), resolved)} if compare else {}
    answering = serve(
        model,
        task=task_source,
        settings=resolved,
        prompt_format=chosen.get("prompt_format"),
        max_new_tokens=chosen.get("max_new_tokens"),
    )
    asked["fallback" if answering.way else "tuned"] = answering
    width = max(map(len, asked))
    with ExitStack() as stack:
        ask: dict[str, Callable[[str], str | None]] = {
            name: stack.enter_context(conversation(one)) for name, one in asked.items()
        }
        for text in _typed_lines():
            for name, one in asked.items():
                answer = ask[name](text)
                if answer is None:
                    say(f"{name}: {one.why_no_answer}")
                else:
                    head = f"{name:{width}}  " if compare else ""
                    # Further lines are indented: none of them can look like one of ours.
                    click.echo(head + printable(answer).replace("\n", "\n" + (" " * len(head) or "  ")))


def _typed_lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, without empty lines."""
    import sys

    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            if text := line.decode("utf-8", "replace").strip():
                yield text
        return
    while True:
        try:
            typed = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:  # Ctrl-D, Ctrl-C
            click.echo(err=True)
            return
        if text := typed.encode("utf-8", "replace").decode().strip():
            yield text
