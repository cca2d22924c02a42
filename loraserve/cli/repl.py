"""The interactive chat: lines that begin with `/` command it, all others are said to the model."""

import atexit
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import click

import loraserve
from loraserve.cli.conversation import Conversation
from loraserve.cli.tables import count, table
from loraserve.errors import ContextLengthExceeded, LoraserveError, NotReady, did_you_mean
from loraserve.lora.spec import BASE, format_spec

HISTORY_LENGTH = 1000


class Repl:
    """Reads lines until the end of input.

    Args:
        read: shows a prompt and returns a line; raises EOFError at the end and KeyboardInterrupt on Ctrl-C.
    """

    def __init__(self, conversation: Conversation, read: Callable[[str], str] = input) -> None:
        self._conversation = conversation
        self._read = read
        self._leaving = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/adapter": ("SPEC", "answer with name, name:0.5, a:0.7+b:0.3 or base from now on", self._adapter),
            "/adapters": ("", "list the adapters", self._adapters),
            "/system": ("[TEXT]", "set the system prompt, or remove it", self._system),
            "/clear": ("", "forget what was said", self._clear),
            "/help": ("", "list these commands", self._help),
            "/exit": ("", "leave, as Ctrl-D does; Ctrl-C stops an answer", self._exit),
        }

    def run(self) -> None:
        self._greet()
        while not self._leaving:
            try:
                line = self._read(_prompt("you> ")).strip()
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._say(line)
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D leaves)")
            except EOFError:
                click.echo()
                return
            except NotReady:
                raise
            except LoraserveError as error:
                hint = "; /clear starts over" if isinstance(error, ContextLengthExceeded) else ""
                click.secho(f"error: {error}{hint}", fg="red", err=True)

    def words(self) -> list[str]:
        """What a line may begin with, for completion."""
        names = [*self._conversation.service.registry.names(), BASE]
        return [*self._commands, *(f"/adapter {name}" for name in names)]

    def _greet(self) -> None:
        service = self._conversation.service
        base = service.base
        what = (
            f"{count(base.config.num_parameters)} parameters, {str(base.dtype).removeprefix('torch.')} on {base.device}"
        )
        click.echo(f"{click.style('loraserve', bold=True)} {loraserve.__version__} · {base.name}, {what}")
        names = service.registry.names()
        click.echo(f"adapters: {', '.join(names)}" if names else f"no adapters in {service.registry.root} yet")
        click.secho("/help lists the commands, Ctrl-D leaves\n", dim=True)

    def _say(self, line: str) -> None:
        try:
            click.secho(f"{format_spec(self._conversation.spec)}> ", fg="cyan", bold=True, nl=False)
            reason = self._conversation.ask(line)
        except KeyboardInterrupt:  # Ctrl-C before the answer began
            reason = "abort"
        except LoraserveError:
            click.echo()
            raise
        notes = {"abort": " (stopped)", "length": " (cut: the length limit is reached)"}
        click.secho(f"{notes.get(reason, '')}\n", dim=True)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            hint = did_you_mean(name, self._commands) or "/help lists the commands"
            click.secho(f"error: no command named {name}; {hint}", fg="red", err=True)
            return
        self._commands[name][2](rest.strip())

    def _adapter(self, text: str) -> None:
        if text:
            self._conversation.use(text)
        click.echo(f"{format_spec(self._conversation.spec)} answers{' from now on' if text else ''}")

    def _adapters(self, text: str) -> None:
        registry = self._conversation.service.registry
        active = {term.name for term in self._conversation.spec}
        rows: list[tuple[object, ...]] = []
        for name in registry.names():
            mark = "*" if name in active else ""
            try:
                record = registry.get(name)
            except LoraserveError as error:
                rows.append((mark, name, "-", "-", str(error)))
                continue
            rows.append((mark, name, record.rank, count(record.num_parameters), record.manifest.description or ""))
        if rows:
            table(("", "ADAPTER", "RANK", "SIZE", ""), rows)
        else:
            click.echo(f"no adapters in {registry.root} yet; `loraserve train` makes one")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        click.echo("system prompt set" if text else "no system prompt")

    def _clear(self, text: str) -> None:
        self._conversation.messages.clear()
        click.echo("forgotten")

    def _help(self, text: str) -> None:
        width = max(len(f"{name} {argument}") for name, (argument, _, _) in self._commands.items())
        for name, (argument, meaning, _) in self._commands.items():
            click.echo(f"  {f'{name} {argument}':{width}}  {meaning}")

    def _exit(self, text: str) -> None:
        self._leaving = True


def edit_lines(words: Callable[[], list[str]]) -> None:
    """Give `input` line editing, completion and a history that outlives the process, where readline is there."""
    try:
        import readline
    except ImportError:
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "loraserve"
    history = state / "chat_history"

    def complete(text: str, index: int) -> str | None:
        matches = [word for word in words() if word.startswith(text)] if text.startswith("/") else []
        return matches[index] if index < len(matches) else None

    def save() -> None:
        with contextlib.suppress(OSError):
            state.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)

    readline.set_completer_delims("\n")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(HISTORY_LENGTH)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    atexit.register(save)


def _prompt(text: str) -> str:
    """`text` in bold; readline is told which characters take no room."""
    if os.environ.get("NO_COLOR"):
        return text
    return f"\001\033[1m\002{text}\001\033[0m\002"
