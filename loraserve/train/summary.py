"""What a finished run says on the terminal: figures before and after, answers side by side, and warnings."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from loraserve.train.samples import Comparison

PLAIN_WIDTH = 100
UNCHECKED = "no dialogues were held out; --val-split 0.1 would tell how well the adapter does on new ones"


def before_and_after(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, of the base, with the adapter) of every figure that both have."""
    figures = {"val_loss": ("validation loss", ".4f"), "perplexity": ("perplexity on general text", ".2f")}
    return [
        (label, format(metrics[f"{key}_base"], form), format(metrics[key], form))
        for key, (label, form) in figures.items()
        if metrics.get(key) is not None and metrics.get(f"{key}_base") is not None
    ]


def show_summary(
    stream: TextIO, metrics: Mapping[str, Any], answers: Sequence[Comparison], warnings: Sequence[str]
) -> None:
    """Print it; a stream that is no terminal gets the same tables 100 columns wide, without colours."""
    show_tables(stream, ("base", "adapter"), before_and_after(metrics), answers)
    if metrics.get("val_loss") is None:
        print(f"note: {UNCHECKED}", file=stream)
    for warning in warnings:
        _console(stream).print(f"warning: {warning}", style="yellow", soft_wrap=True)


def show_sweep(stream: TextIO, losses: Mapping[str, float | None], best: str) -> None:
    """Print the validation loss at each learning rate."""
    shown = [(rate, failed_or(loss), "best" if rate == best else "") for rate, loss in losses.items()]
    _table(_console(stream), ("learning rate", "validation loss", ""), shown)


def failed_or(loss: float | None) -> str:
    """A validation loss, or that there is none."""
    return "failed" if loss is None else f"{loss:.4f}"


def show_tables(
    stream: TextIO, sides: tuple[str, str], figures: Sequence[tuple[str, str, str]], answers: Sequence[Comparison]
) -> None:
    """Print figures and answers of two sides, each under its name."""
    console = _console(stream)
    _table(console, ("", *sides), figures)
    if answers:
        header = ("question", *(f"{side} answers" for side in sides))
        _table(console, header, [(a.question, a.before, a.after) for a in answers])


def _console(stream: TextIO) -> Any:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False, markup=False)


def _table(console: Any, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_lines=False, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    console.print(table)


def _printable(text: str) -> str:
    """Without control characters: what a model says must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
