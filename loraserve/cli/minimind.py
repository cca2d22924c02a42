"""MiniMind's way to name a base on its command lines, for `loraserve train`."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from loraserve.cli.options import BaseOptions

FLAG = click.Choice(["0", "1"])
COUNT = click.IntRange(1)
MINIMIND_WEIGHT, MINIMIND_HIDDEN_SIZE = "full_sft", 768
"""What MiniMind's own script takes where its command line does not say."""


@dataclass(frozen=True)
class MiniMindBase:
    """How a MiniMind command line names its base. Nothing given means that it does not."""

    from_weight: str | None
    hidden_size: int | None
    num_hidden_layers: int | None
    use_moe: str | None


def minimind_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that only MiniMind's command lines have; the function receives `minimind: MiniMindBase`."""

    @functools.wraps(function)
    def collect(
        *args: Any,
        from_weight: str | None,
        hidden_size: int | None,
        num_hidden_layers: int | None,
        use_moe: str | None,
        **kwargs: Any,
    ) -> Any:
        return function(*args, minimind=MiniMindBase(from_weight, hidden_size, num_hidden_layers, use_moe), **kwargs)

    for option in (
        # Upstream turns compilation off for LoRA itself, and here no workers are needed: data is tokenized once.
        click.option("--use-compile", type=FLAG, expose_value=False, hidden=True),
        click.option("--num-workers", type=click.IntRange(0), expose_value=False, hidden=True),
        click.option("--use-moe", type=FLAG, help="1: the weights' file name ends in _moe."),
        click.option("--num-hidden-layers", type=COUNT, metavar="N", help="Checked against the weights."),
        click.option("--hidden-size", type=COUNT, metavar="N", help="Part of the weights' file name.  [default: 768]"),
        click.option(
            "--from-weight",
            metavar="NAME",
            help="MiniMind's base instead of --base: ../out/NAME_<hidden size>[_moe].pth, then in --save-dir.",
        ),
    ):
        collect = option(collect)
    return collect


def with_minimind_base(
    options: BaseOptions, minimind: MiniMindBase, save_dir: Path | None, explicit_base: bool
) -> BaseOptions:
    """The options with the base a MiniMind command line names; unchanged if it names none.

    Raises:
        UsageError: --base names another.
        ModelNotFound: the weights are in neither place.
    """
    from loraserve.base.resolve import minimind_weights

    if minimind == MiniMindBase(None, None, None, None):
        return options
    if explicit_base:
        if minimind.from_weight is None:
            return options
        raise click.UsageError("--base and --from-weight both name a base; give one of them")
    path = minimind_weights(
        minimind.from_weight or MINIMIND_WEIGHT,
        minimind.hidden_size or MINIMIND_HIDDEN_SIZE,
        minimind.use_moe == "1",
        save_dir or Path("out"),
    )
    return dataclasses.replace(options, base=str(path))
