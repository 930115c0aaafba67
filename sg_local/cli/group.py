"""A group of commands, listed in the order of declaration. `sg-local models` shows the help, as --help does."""

import click


class Group(click.Group):
    """A click group that does not sort its commands, and shows its help when no command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


def is_interruption(abort: click.Abort) -> bool:
    """Whether Ctrl-C ended a question, and not that nobody is there to answer: click tells both alike."""
    return isinstance(abort.__context__, KeyboardInterrupt)
