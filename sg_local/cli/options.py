"""Click options made from the settings: `n_inputs` in settings.py is `--n-inputs` here, with its help and default."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from sg_local.settings import PRESETS, Settings

Function = TypeVar("Function", bound=Callable[..., Any])

RUN_ARGUMENT = click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
MODEL_OPTION = click.option(
    "--model",
    default="smollm2-135m",
    show_default=True,
    help="A GGUF file, or a name of `sg-local models list`.",
)
RUN_OPTION = click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    help="The run's directory.  [default: runs/<task name>]",
)
PRESET_OPTION = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="default",
    show_default=True,
    help="A set of settings to start from.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="JSON, for a program to read.")


def setting_options(*names: str) -> Callable[[Function], Function]:
    """Adds options for the named settings, or for all. They default to None: a preset gives the rest."""

    def add(function: Function) -> Function:
        for item in reversed([item for item in fields(Settings) if not names or item.name in names]):
            rule = item.metadata
            flag = "--" + item.name.replace("_", "-")
            shown = str(item.default).lower() if item.type is bool else item.default
            function = click.option(
                f"{flag}/--no-{flag[2:]}" if item.type is bool else flag,
                item.name,
                type=click.Choice(rule["choices"]) if rule["choices"] else item.type,
                default=None,
                help=f"[{rule['group']}] {rule['help']}  [default: {shown}]",
            )(function)
        return function

    return add


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}
