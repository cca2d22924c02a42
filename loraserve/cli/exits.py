"""What the process says and returns when a command ends early.

    0 done · 1 failed · 2 an option or argument that can never work · 130 interrupted

Each failure is one line on stderr, `error: ...`; of several processes of a training run one says it.
"""

import contextlib
import errno
import os
import sys

import click

from loraserve.errors import InvalidRequest, LoraserveError, PeerFailed, TrainingInterrupted

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ended with `error`."""
    if isinstance(error, click.UsageError | InvalidRequest):
        return USAGE
    if isinstance(error, TrainingInterrupted | click.Abort | KeyboardInterrupt):
        return INTERRUPTED
    return FAILED


def report(error: BaseException) -> None:
    """Say on stderr why a command ended, on one line."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
    elif isinstance(error, click.Abort | KeyboardInterrupt):
        click.echo("interrupted", err=True)
    elif not is_broken_pipe(error) and not isinstance(error, PeerFailed):
        click.echo(f"error: {_one_line(describe(error))}", err=True)


def describe(error: BaseException) -> str:
    """The text of an error: what, where and how to fix it."""
    if isinstance(error, LoraserveError):
        return str(error)
    if isinstance(error, click.UsageError):
        message = error.format_message().rstrip(".")
        path = error.ctx.command_path if error.ctx else "loraserve"
        return f"{message[:1].lower()}{message[1:]} (see {path} --help)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return f"out of memory ({error}); use a smaller batch, context or number of sequences, or another --device"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return f"unexpected {type(error).__name__}: {error}; run it again with --debug and report the traceback"


def is_broken_pipe(error: BaseException) -> bool:
    """Whether the reader of our output (`| head`) has gone, which is not worth a word."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush cannot fail on a closed pipe."""
    with contextlib.suppress(OSError, ValueError):  # stdout may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
