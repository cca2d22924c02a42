"""Adapter SPECs: what requests may ask for, and how what they may not is answered."""

import pytest

from loraserve.errors import InvalidRequest
from loraserve.lora.spec import Term, check_name, format_spec, make_spec, parse_spec


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (None, []),
        ("", []),
        ("base", []),
        ("pirate", [("pirate", 1.0)]),
        ("pirate:0.5", [("pirate", 0.5)]),
        (" a:0.7 + b:-0.3 ", [("a", 0.7), ("b", -0.3)]),
        ("a+b+a:0.5", [("a", 1.5), ("b", 1.0)]),
        ("base+a:2", [("a", 2.0)]),
        ("a:1e-3", [("a", 0.001)]),
        ("海盗-v2.1_x:0", [("海盗-v2.1_x", 0.0)]),
    ],
)
def test_specs_are_parsed(text, terms):
    assert parse_spec(text) == tuple(Term(name, scale) for name, scale in terms)


@pytest.mark.parametrize("text", ["a", "a:0.5", "a:0.7+b:-0.3", "base"])
def test_spec_survives_formatting(text):
    assert format_spec(parse_spec(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:x", "must be a number, as in 'a:0.5'"),
        ("a:", "must be a number"),
        ("a:nan", "is not a number between -100 and 100"),
        ("a:inf", "is not a number between"),
        ("a:101", "is not a number between"),
        ("a+", "cannot name an adapter"),
        ("../a", "cannot name an adapter"),
        ("a b", "cannot name an adapter"),
        ("+".join(f"a{i}" for i in range(40)), "a blend of 40 adapters is over the limit of 16"),
    ],
)
def test_bad_specs_name_the_field_and_the_part(text, message):
    with pytest.raises(InvalidRequest, match=message) as refused:
        parse_spec(text)
    assert refused.value.param == "adapter"


@pytest.mark.parametrize("name", ["a", "a-b.c_d", "_x", "9", "模型", "x" * 64])
def test_names_that_may_be(name):
    assert check_name(name) == name
    assert make_spec([Term(name)]) == (Term(name, 1.0),)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a.", "-a", "a/b", "a\\b", "a\nb", "a\0", "x" * 65, "base", None, 1]
)
def test_names_that_may_not_be(name):
    with pytest.raises(InvalidRequest):
        check_name(name, param="name")
