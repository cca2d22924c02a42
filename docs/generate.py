"""Write the generated pages of docs/: cli.md, from the `--help` of every command.

    python docs/generate.py

A test fails while a page differs from what this writes.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from loraserve.cli.main import main

DOCS = Path(__file__).parent
WIDTH = 110
HEAD = """\
# Command line

Every option can be spelled with hyphens or with MiniMind's underscores: `--batch-size`, `--batch_size`. A SPEC names
the adapters: `name`, `name:0.5` (scaled), `a:0.7+b:0.3` (an exact blend), `base` (none). Exit codes: 0 done, 1 failed,
2 wrong usage, 130 interrupted. Errors are one line on stderr; `--debug` adds the traceback.

This page is generated from `--help` by `docs/generate.py`.
"""


def pages() -> dict[Path, str]:
    """Every generated page and its text."""
    return {DOCS / "cli.md": command_line()}


def command_line() -> str:
    """The help of every command, the groups' own first."""
    sections = [f"## {name}\n\n```text\n{text}\n```\n" for name, text in helps(main, "loraserve", None)]
    return "\n".join([HEAD, *sections])


def helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """Yield (full name, help) of a command and of all below it."""
    settings = command.context_settings | {"terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from helps(found, child, context)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, "utf-8")
