"""Plain tables for a terminal: columns aligned by what is seen, Chinese characters two wide."""

import unicodedata
from collections.abc import Iterable, Sequence

import click


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a header, columns two spaces apart; numbers stand to the right."""
    lines = [[_printable(cell) for cell in row] for row in rows]
    numeric = [
        bool(lines) and all(line[i][:1].isdigit() or line[i] == "-" for line in lines) for i in range(len(header))
    ]
    widths = [max(map(_width, column)) for column in zip(header, *lines, strict=True)]
    click.secho(_row(header, widths, numeric), bold=True)
    for line in lines:
        click.echo(_row(line, widths, numeric))


def pairs(entries: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns, indented."""
    entries = list(entries)
    width = max(_width(name) for name, _ in entries)
    for name, value in entries:
        click.echo(f"  {click.style(_pad(name, width), dim=True)}  {_printable(value)}")


def shorten(fingerprint: str) -> str:
    """`sha256:` and the first twelve digits, enough to tell two apart."""
    return fingerprint[: len("sha256:") + 12]


def count(number: int) -> str:
    """A number of parameters as people say it: 812, 3.1M, 1.5B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def size(number: int) -> str:
    """A number of bytes in binary units."""
    for power, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= power:
            return f"{number / power:.1f} {unit}"
    return f"{number} B"


def _printable(value: object) -> str:
    """As text without control characters: a file from elsewhere must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _row(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [_pad(c, w, right) for c, w, right in zip(cells, widths, numeric, strict=True)]
    return "  ".join(padded).rstrip()


def _pad(text: str, width: int, right: bool = False) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
