"""Reasoning is split from content the same way wherever the pieces of an answer are cut."""

import itertools

import pytest

from loraserve.base.reasoning import ReasoningSplitter

ANSWERS = {
    # answer: (reasoning, content)
    "<think>\nhm, 你好\n</think>\n\nHello!\n\nBye.": ("hm, 你好", "Hello!\n\nBye."),
    "<think>\n\n</think>\n\nHello!": ("", "Hello!"),
    "<think></think>Hi": ("", "Hi"),
    "\n <think>a\n\nb</think>c": ("a\n\nb", "c"),
    "no thought <think>at all</think>": ("", "no thought <think>at all</think>"),
    "  spaces stay\n": ("", "  spaces stay\n"),
    "<thinking> is a word": ("", "<thinking> is a word"),
    "<thin": ("", "<thin"),
    "<": ("", "<"),
    "": ("", ""),
    "<think>a < b </thin </thinks> c</think>d": ("a < b </thin </thinks> c", "d"),
    "<think>never closed\n</thi": ("never closed\n</thi", ""),
    "<think>a</think>b</think>c<think>d": ("a", "b</think>c<think>d"),
}
INSIDE = {
    "\nhm\n</think>\n\nHello!": ("hm", "Hello!"),
    "</think>Hello!": ("", "Hello!"),
    "never closed": ("never closed", ""),
    "a </ b": ("a </ b", ""),
}


def split(pieces: list[str], inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside)
    deltas = [*map(splitter.push, pieces), splitter.flush()]
    return "".join(reasoning for reasoning, _ in deltas), "".join(content for _, content in deltas)


CASES = [(answer, False, wanted) for answer, wanted in ANSWERS.items()]
CASES += [(answer, True, wanted) for answer, wanted in INSIDE.items()]


@pytest.mark.parametrize(("answer", "inside", "wanted"), CASES)
def test_every_pair_of_cuts_gives_the_same_split(answer: str, inside: bool, wanted: tuple[str, str]) -> None:
    assert split([answer], inside) == wanted
    for first, second in itertools.combinations_with_replacement(range(len(answer) + 1), 2):
        assert split([answer[:first], answer[first:second], answer[second:]], inside) == wanted, (first, second)


@pytest.mark.parametrize(("answer", "inside", "wanted"), CASES)
def test_character_by_character_gives_the_same_split(answer: str, inside: bool, wanted: tuple[str, str]) -> None:
    assert split(list(answer), inside) == wanted


def test_text_is_not_held_back_longer_than_it_could_be_a_marker() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("<think>one") == ("one", "")
    assert splitter.push(" two </th") == (" two ", "")
    assert splitter.push("e end") == ("</the end", "")
    assert splitter.push("</think>a") == ("", "a")
    assert splitter.push("b") == ("", "b")


def test_content_without_reasoning_flows_at_once() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("Hel") == ("", "Hel")
    assert splitter.push("lo <") == ("", "lo <")
