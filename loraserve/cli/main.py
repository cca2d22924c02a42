"""The console script `loraserve`.

A command's module `loraserve/cli/<name>.py` holds a click command named `command` and is imported only when that
command is asked for; a command without a module does not appear. The one-line summaries stand here, so that
`loraserve --help` imports no command.
"""

import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import loraserve
from loraserve.cli.commands import DEBUG, LoraserveGroup
from loraserve.cli.exits import exit_code, is_broken_pipe, report, silence_stdout

SUMMARIES = {
    "train": "Train an adapter on the frozen base and publish it.",
    "serve": "Serve the base with all adapters: OpenAI's API and a chat page.",
    "chat": "Chat in the terminal and switch adapters as you go.",
    "merge": "Fold an adapter or a blend into a standalone checkpoint.",
    "adapters": "List, inspect, import, export and version adapters.",
    "base": "List, inspect, download and convert bases.",
    "bench": "Run reproducible benchmarks; the last line of stdout is JSON.",
    "version": "Print the versions of loraserve and what it runs on.",
}


class LazyGroup(LoraserveGroup):
    """The commands of SUMMARIES whose modules exist, imported on demand; turns every error into a line and a code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in SUMMARIES if importlib.util.find_spec(f"loraserve.cli.{name}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"loraserve.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            expected = isinstance(error, click.ClickException | click.exceptions.Exit) or is_broken_pipe(error)
            if ctx.meta.get(DEBUG) and not expected:
                traceback.print_exc()
            raise

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command line and exit: an int returned by the command is the exit code."""
        _set_up_logging()
        extra["standalone_mode"] = False
        try:
            result = super().main(args, prog_name, **extra)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            if is_broken_pipe(error):
                silence_stdout()
            report(error)
            sys.exit(exit_code(error))
        sys.exit(result if isinstance(result, int) else 0)


class _StderrHandler(logging.Handler):
    """Log lines on stderr: bare on a terminal, with time and level where they are kept (nohup, CI)."""

    def emit(self, record: logging.LogRecord) -> None:
        plain = sys.stderr.isatty()
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        form = f"{level}%(message)s" if plain else "%(asctime)s %(levelname)s %(message)s"
        click.echo(logging.Formatter(form, "%Y-%m-%d %H:%M:%S").format(record), err=True)


def _set_up_logging() -> None:
    """Log from INFO on; `--debug` lowers that."""
    log = logging.getLogger("loraserve")
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler())
    log.setLevel(logging.INFO)


@click.group(cls=LazyGroup, epilog="An adapter SPEC: name, name:0.5, a:0.7+b:0.3 (a blend), base (none).")
@click.version_option(loraserve.__version__, message="loraserve %(version)s")
def main() -> None:
    """Many LoRA adapters on one small frozen model: train, serve, chat, merge."""
