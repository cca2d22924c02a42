"""A command that torchrun may start several times over: its processes meet, and one of them is heard."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from loraserve.cli.options import BaseOptions, LoraserveCommand
from loraserve.errors import PeerFailed
from loraserve.train.environment import rank_and_size

if TYPE_CHECKING:
    from loraserve.train.ranks import Ranks


class ProcessesCommand(LoraserveCommand):
    """A command whose own mistakes, which every process makes, are told by the first process alone."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            if rank_and_size()[0]:
                raise PeerFailed("process 0 says what is wrong with the command line") from error
            raise


def meet(ctx: click.Context, options: BaseOptions) -> "tuple[BaseOptions, Ranks]":
    """Join the other processes until the command ends; the options with the device of this one, and who they are.

    Raises as `join` does.
    """
    from loraserve.train.ranks import join

    ranks = ctx.with_resource(join(options.device))
    return dataclasses.replace(options, device=ranks.device), ranks
