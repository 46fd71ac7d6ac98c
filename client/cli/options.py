"""The click option class that the parser and the spec's flags share."""

from typing import Any

import click


class Option(click.Option):
    """A click option under a heading of ``--help``. Another option's name is not its value: ``--token --json``."""

    def __init__(self, *names: str, section: str = "Options", **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.section = section

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert the value. Raises click.BadOptionUsage if it is the name of another option."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and text.startswith("-") and text in option_names(ctx):
                raise click.BadOptionUsage(self.opts[0], f"Option {self.opts[0]!r} requires an argument.", ctx)
        return super().type_cast_value(ctx, value)


def option_names(ctx: click.Context) -> set[str]:
    """Return the names of all options of the command, as typed."""
    return {name for param in ctx.command.get_params(ctx) for name in param.opts}
