"""`loraserve chat`: one answer, or a conversation in the terminal."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator

import click

from loraserve.cli.options import BaseOptions, LoraserveCommand, base_options, mismatch_option, open_service


@click.command(cls=LoraserveCommand)
@click.argument("prompt", required=False)
@click.option("--adapter", default="base", show_default=True, metavar="SPEC", help="Who answers.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--temperature", type=float, default=0.7, show_default=True, metavar="T", help="0 is greedy.")
@click.option("--top-p", type=float, default=0.9, show_default=True, metavar="P", help="Nucleus sampling.")
@click.option("--max-tokens", type=int, metavar="N", help="Longest answer.  [default: what the context holds]")
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same answer.")
@click.option("--open-thinking", is_flag=True, help="Let a model that can reason do so before it answers.")
@base_options
@mismatch_option
def command(
    prompt: str | None,
    adapter: str,
    system: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int | None,
    seed: int | None,
    open_thinking: bool,
    options: BaseOptions,
    allow_base_mismatch: bool,
) -> None:
    """Chat in the terminal and switch adapters as you go.

    With PROMPT, or with text piped in, the answer goes to stdout and that is all; both together are joined. Without
    them the chat is interactive: /adapter SPEC switches who answers, /help lists what else there is.

    \b
    loraserve chat
    loraserve chat --adapter pirate "How is the weather?"
    loraserve chat --adapter pirate:0.7+poet:0.3 < letter.txt
    """
    from loraserve.cli.conversation import Conversation
    from loraserve.cli.repl import Repl, edit_lines
    from loraserve.engine.params import SamplingParams
    from loraserve.lora.spec import parse_spec

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    parse_spec(adapter)
    question = "\n\n".join(text for text in (prompt or "", _piped()) if text.strip())
    interactive = not question and prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if not question and not interactive:
        raise click.UsageError("nothing to answer: give a PROMPT or pipe one in", click.get_current_context())
    with contextlib.ExitStack() as stack:
        with _status(f"loading {options.base}"):
            service = stack.enter_context(
                open_service(options, allow_base_mismatch=allow_base_mismatch, max_num_seqs=1)
            )
        conversation = Conversation(service, (), sampling, system, open_thinking)
        conversation.use(adapter)
        if interactive:
            repl = Repl(conversation)
            edit_lines(repl.words)
            repl.run()
        elif conversation.ask(question) == "abort":
            raise KeyboardInterrupt
        else:
            click.echo()


def _piped() -> str:
    """What comes through a pipe or from a file on stdin; '' where there is neither."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    with contextlib.suppress(OSError):  # a stream without a descriptor is read as it is
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
            return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace").strip()


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Show `text` on a terminal while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    click.echo(f"{text} ...", err=True, nl=False)
    try:
        yield
    finally:
        click.echo("\r\033[K", err=True, nl=False)
