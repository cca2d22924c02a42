"""Tables as a terminal shows them."""

import click
import pytest

from loraserve.cli.tables import count, pairs, size, table


def columns(text: str, character: str) -> set[int]:
    """Where `character` stands on each line, in cells of a terminal."""
    return {sum(2 if "一" <= c <= "龥" else 1 for c in line[: line.index(character)]) for line in text.splitlines()}


def test_columns_line_up_with_chinese_in_them_and_numbers_stand_right(capsys: pytest.CaptureFixture[str]) -> None:
    table(("NAME", "RANK", "|"), [("古风诗人", 8, "|"), ("pirate", 16, "|"), ("x", "-", "|")])
    shown = click.unstyle(capsys.readouterr().out)
    assert columns(shown, "|") == {16}
    assert shown.splitlines()[2:] == ["pirate      16  |", "x            -  |"]
    assert not any(line != line.rstrip() for line in shown.splitlines())


def test_a_table_without_rows_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    table(("NAME", "RANK"), [])
    assert click.unstyle(capsys.readouterr().out) == "NAME  RANK\n"


def test_pairs_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    pairs([("size", "3 MiB"), ("fingerprint", "sha256:1")])
    assert click.unstyle(capsys.readouterr().out) == "  size         3 MiB\n  fingerprint  sha256:1\n"


@pytest.mark.parametrize(
    ("number", "parameters", "in_bytes"),
    [(0, "0", "0 B"), (999, "999", "999 B"), (63_912_192, "63.9M", "61.0 MiB"), (1_500, "1.5K", "1.5 KiB")],
)
def test_numbers_read_as_people_write_them(number: int, parameters: str, in_bytes: str) -> None:
    assert count(number) == parameters
    assert size(number) == in_bytes
    assert count(1_543_714_304) == "1.54B"


def test_what_a_file_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table(("NAME",), [("a\x1b[2Jb\r",)])
    pairs([("description", "诗人\x1b]0;title\x07\nline")])
    shown = click.unstyle(capsys.readouterr().out)
    assert shown == "NAME\na�[2Jb�\n  description  诗人�]0;title��line\n"
