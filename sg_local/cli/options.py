"""Click options made from the settings: `n_inputs` in settings.py is `--n-inputs` here, with its help and default.

`--help` shows the everyday options under a heading for each stage, `--help-all` shows all options.
"""

from collections.abc import Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sg_local.settings import PRESETS, STAGES, Settings, declared_for

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

MAX_OPTION_WIDTH = 24  # the help of a longer option begins on the next line


def _completions(names: Iterable[str], ending: str, incomplete: str) -> "list[CompletionItem]":
    """For a shell: names, and files of this directory; any other path is the shell's own matter."""
    from click.shell_completion import CompletionItem

    files = (path.name for path in Path().glob(f"*{ending}"))
    words = [name for name in (*names, *sorted(files)) if name.startswith(incomplete) and name.isprintable()]
    return [*map(CompletionItem, words)] or [CompletionItem(incomplete, type="file")]


def complete_task(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    """The shipped tasks, and task files."""
    from sg_local.task import shipped_names

    return _completions(shipped_names(), ".toml", incomplete)


def complete_model(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    """The listed models, and GGUF files."""
    from sg_local.models import list_models

    return _completions([model.name for model in list_models()], ".gguf", incomplete)


TASK_ARGUMENT = click.argument("task_source", metavar="TASK", shell_complete=complete_task)
RUN_ARGUMENT = click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
MODEL_OPTION = click.option(
    "--model",
    default="smollm2-135m",
    show_default=True,
    shell_complete=complete_model,
    help="A GGUF file, or a name or reference (hf:...) of `sg-local models list`.",
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
    help="Settings to start from.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class _SettingOption(click.Option):
    """The option of a setting. Its default is None, since the preset gives the values that the user does not."""

    def __init__(self, setting: "Field[Any]") -> None:
        rules = setting.metadata
        flag = "--" + setting.name.replace("_", "-")
        is_bool = setting.type is bool
        default = str(setting.default).lower() if is_bool else setting.default
        stage = declared_for(setting.name)
        super().__init__(
            [f"{flag}/--no-{flag[2:]}" if is_bool else flag, setting.name],
            type=click.Choice(rules["choices"]) if rules["choices"] else setting.type,
            default=None,
            help=f"{rules['help']}  [default: {'none' if default == '' else default}]",
        )
        self.is_everyday = bool(rules["everyday"])
        self.heading = f"Stage {STAGES.index(stage) + 1}, {stage}" if stage else "Every stage"


class SettingsCommand(click.Command):
    """A command with options for settings: for all, or for those in `settings`. Its help has a part for each stage."""

    def __init__(self, *, settings: Sequence[str] = (), params: list[click.Parameter], **rest: Any) -> None:
        options = [_SettingOption(item) for item in fields(Settings) if not settings or item.name in settings]
        super().__init__(params=[*params, _HELP_ALL_OPTION, *options], **rest)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records_of: dict[str, list[tuple[str, str]]] = {}  # by heading
        for option in self.get_params(ctx):
            heading = "Options"
            if isinstance(option, _SettingOption):
                if not (option.is_everyday or ctx.meta.get(_SHOWS_ALL)):
                    continue
                heading = option.heading
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                records_of.setdefault(heading, []).append(record)
        for heading, records in records_of.items():
            with formatter.section(heading):
                formatter.write_dl(records, MAX_OPTION_WIDTH)


_SHOWS_ALL = f"{__name__}.shows_all"  # key of a context's meta


def _show_all(ctx: click.Context, _option: click.Parameter, is_wanted: bool) -> None:
    if is_wanted and not ctx.resilient_parsing:
        ctx.meta[_SHOWS_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


_HELP_ALL_OPTION = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show all options, also the rare ones, and exit.",
)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings given on the command line."""
    return {name: value for name, value in values.items() if value is not None}
