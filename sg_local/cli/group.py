"""A group of commands: listed in the order of their declaration; `sg-local models` is `sg-local models --help`."""

import click


class Group(click.Group):
    """click's group sorts its commands, and takes a bare call for a mistake."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])
