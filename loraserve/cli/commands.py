"""How every command of loraserve parses and speaks: the click classes under them all.

Option names may be spelled with hyphens or with MiniMind's underscores (`--batch-size`, `--batch_size`); values are
never touched. Every command understands `--debug` and `-h`. Mistyped names are answered with close matches.
"""

import logging
from typing import Any

import click

from loraserve.errors import did_you_mean

DEBUG = "loraserve.debug"
"""Key in `Context.meta`: the user wants tracebacks."""


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def _settings(given: dict[str, Any] | None) -> dict[str, Any]:
    ours = {"token_normalize_func": _hyphens, "help_option_names": ["-h", "--help"], "max_content_width": 100}
    return ours | (given or {})


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True
        logging.getLogger("loraserve").setLevel(logging.DEBUG)


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_debug,
        help="Show tracebacks and debug messages.",
    )


class LoraserveCommand(click.Command):
    """A command of loraserve; use as `@click.command(cls=LoraserveCommand)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = _settings(kwargs.get("context_settings"))
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class LoraserveGroup(click.Group):
    """A group of commands, each a LoraserveCommand; use as `@click.group(cls=LoraserveGroup)`."""

    command_class = LoraserveCommand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = _settings(kwargs.get("context_settings"))
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            parts = (f"no command named {name!r}", did_you_mean(name, self.list_commands(ctx)))
            raise click.UsageError("; ".join(filter(None, parts)), ctx)
        return super().resolve_command(ctx, args)


LoraserveGroup.group_class = LoraserveGroup
