"""What is dropped from the device, and for whom: checked without a device and without threads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from loraserve.engine.residency import Entry, Residency


@dataclass
class Fake:
    """As much of an adapter as the table looks at."""

    num_bytes: int


def size_of(name: str) -> int:
    return int(name[1:])


class Table(Residency):
    """Names say their size: `a3` has 3 bytes."""

    def bring(self, *names: str) -> None:
        adapter: Any
        for name in names:
            adapter = Fake(size_of(name))
            self.entries[name] = Entry(name, None, adapter)


def wants(*specs: str) -> Iterator[Mapping[str, int]]:
    return iter([{name: size_of(name) for name in spec.split("+")} for spec in specs])


def load(table: Table, *specs: str) -> tuple[str | None, list[str]]:
    """What is loaded next for a line of requests, and what is dropped for it."""
    choice = table.choose(wants(*specs))
    if choice is None:
        return None, []
    dropped = [entry.name for entry in table.make_room(choice)]
    table.bring(choice.name)
    assert table.num_bytes <= table.capacity
    return choice.name, dropped


def test_the_least_recently_used_goes_first_and_only_as_many_as_must() -> None:
    table = Table(10)
    table.bring("a3", "b3", "c3")
    table.free(table.use("a3"))
    assert load(table, "d1") == ("d1", [])
    assert load(table, "e3") == ("e3", ["b3"])
    assert load(table, "f5") == ("f5", ["c3", "a3"])


def test_what_a_request_holds_is_never_dropped() -> None:
    table = Table(10)
    table.bring("a6", "b3")
    held = table.use("a6")
    assert load(table, "c3") == ("c3", ["b3"])
    assert load(table, "d5") == (None, []), "it waits, and nothing is dropped in vain"
    table.free(held)
    assert load(table, "d5") == ("d5", ["a6"])


def test_who_is_first_in_line_comes_first_and_keeps_what_it_waits_for() -> None:
    table = Table(10)
    table.bring("a4", "b4")
    assert load(table, "a4+c4", "b4", "d4") == ("c4", ["b4"])
    assert load(table, "a4+c4", "b4") == (None, []), "b4 has no room beside what the first waits for"
    assert load(table, "a4", "e2") == ("e2", [])


def test_nobody_further_back_takes_the_room_that_the_first_waits_for() -> None:
    table = Table(10)
    table.bring("a6")
    held = table.use("a6")
    assert load(table, "b8", "c1") == (None, [])
    table.free(held)
    assert load(table, "b8", "c1") == ("b8", ["a6"])
    assert load(table, "b8", "c1") == ("c1", [])


def test_an_old_version_takes_room_until_nobody_holds_it() -> None:
    table = Table(10)
    table.bring("a6")
    held = table.use("a6")
    table.retire("a6")
    assert table.num_bytes == 6 and load(table, "a6") == (None, [])
    assert table.free(held)
    assert load(table, "a6") == ("a6", [])
    assert not table.free(table.use("a6"))


def test_pinned_ones_are_spared() -> None:
    table = Table(10)
    table.pinned = {"a4": 4}
    table.bring("a4", "b4")
    assert load(table, "c5") == ("c5", ["b4"])
    table.use("c5")
    assert load(table, "d4") == (None, []), "it waits for who runs rather than unseat a pinned one"


def test_pinned_ones_give_way_to_what_cannot_fit_beside_them_and_come_back() -> None:
    table = Table(10)
    table.pinned = {"a4": 4}
    table.bring("a4")
    assert load(table, "b7") == ("b7", ["a4"])
    held = table.use("b7")
    assert load(table) == (None, [])
    table.free(held)
    assert load(table) == ("a4", ["b7"])


@pytest.mark.parametrize("pinned", [{}, {"a3": 3}, {"a3": 3, "b5": 5}])
def test_whoever_is_first_gets_its_adapters_once_nobody_runs(pinned: dict[str, int]) -> None:
    names = ["a3", "b5", "c2", "d9", "e10", "a3+b5", "c2+a3+b5"]
    for first in names:
        for second in names:
            table = Table(10)
            table.pinned = pinned
            for line in ([first, second], [second, first]):
                for _ in range(8):
                    load(table, *line)
                assert all(name in table.entries for name in line[0].split("+"))
