"""docs/python.md names the whole public API, and what is public has a docstring."""

import dataclasses
import inspect

import loraserve
from loraserve.engine import LLM, Completion, SamplingParams
from tests.docs.conftest import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")


def test_everything_exported_is_documented() -> None:
    exported = [name for name in loraserve.__all__ if not name.startswith("__")]
    assert exported
    for name in exported:
        assert f"\n## {name}\n" in PAGE
        assert inspect.getdoc(getattr(loraserve, name))


def test_every_field_is_documented_with_its_default() -> None:
    for kind in (SamplingParams, Completion):
        assert [f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in PAGE] == []
    rows = [line.strip("| ").split(" | ") for line in PAGE.partition("## SamplingParams")[2].splitlines()]
    documented = {
        name.strip("`"): value
        for names, values, *_ in (row for row in rows if len(row) == 3)
        for name, value in zip(names.split(", "), values.split(", ") * names.count("`"), strict=False)
    }
    for field in dataclasses.fields(SamplingParams):
        assert documented[field.name] == str(field.default), field.name


def test_every_method_is_documented_with_its_parameters() -> None:
    methods = {name: method for name, method in vars(LLM).items() if inspect.isfunction(method) and name[0] != "_"}
    assert {"generate", "chat", "logits"} <= methods.keys()
    for name, method in methods.items():
        assert inspect.getdoc(method)
        assert f"`{name}({signature(method)})`" in PAGE
    assert f"`LLM({signature(LLM.__init__)})`" in PAGE


def signature(function: object) -> str:
    """The parameters as one would write them, without annotations."""
    parameters = list(inspect.signature(function).parameters.values())[1:]  # type: ignore[arg-type]
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)).replace("'", '"') for p in parameters)
