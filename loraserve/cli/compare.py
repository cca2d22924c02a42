"""`loraserve adapters compare`: two adapters, or an adapter and the base, side by side."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraserve.cli.options import BaseOptions, LoraserveCommand, base_options, open_base, open_registry
from loraserve.cli.records import print_json
from loraserve.cli.tables import count

if TYPE_CHECKING:
    from loraserve.registry import Registry

BASE = "base"
RECIPE = "recipe: "
FIGURES = {"loss": "training loss", "val_loss": "validation loss", "dialogues": "dialogues trained on"}


@click.command("compare", cls=LoraserveCommand)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="FILE", help="Dialogues to measure and to answer, as in train."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@base_options
def compare_adapters(first: str, second: str, data: Path | None, as_json: bool, options: BaseOptions) -> None:
    """Compare two adapters, or an adapter and `base`.

    \b
    loraserve adapters compare pirate poet
    loraserve adapters compare base pirate --data examples/data/pirate.jsonl
    """
    from loraserve.train.compare import measure
    from loraserve.train.summary import show_tables

    base = open_base(options)
    registry = open_registry(options, base)
    facts = [_facts(registry, name) for name in (first, second)]
    weights = [None if name == BASE else registry.load(name).weights for name in (first, second)]
    measured, answers = measure(base, (weights[0], weights[1]), data)
    rows = {what: [side.get(what) for side in facts] for what in dict.fromkeys([*facts[0], *facts[1]])} | measured
    if as_json:
        named = [{"question": a.question, "first": a.before, "second": a.after} for a in answers]
        print_json({"adapters": [first, second], "figures": rows, "answers": named})
        return
    shown = [(what, _shown(a), _shown(b)) for what, (a, b) in rows.items() if _worth_showing(what, a, b)]
    show_tables(sys.stdout, (first, second), shown, answers)


def _facts(registry: "Registry", name: str) -> dict[str, Any]:
    """What is known of an adapter without running it; of the base, nothing."""
    if name == BASE:
        return {}
    record = registry.get(name)
    metrics: Mapping[str, Any] = record.manifest.metrics
    facts: dict[str, Any] = {"version": record.version, "rank": record.rank, "parameters": record.num_parameters}
    facts |= {label: metrics.get(key) for key, label in FIGURES.items()}
    return facts | {f"{RECIPE}{key}": value for key, value in record.manifest.recipe.items()}


def _worth_showing(what: str, a: Any, b: Any) -> bool:
    """Of recipes only what differs; nothing that neither side has."""
    return a != b if what.startswith(RECIPE) else (a, b) != (None, None)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    return count(value) if isinstance(value, int) and value >= 10_000 else str(value)
