"""`loraserve train`: the options of a training run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loraserve.cli.minimind import FLAG, MiniMindBase, minimind_options, with_minimind_base
from loraserve.cli.options import BaseOptions, base_options, open_base, open_registry, parse_size
from loraserve.cli.processes import ProcessesCommand, meet
from loraserve.cli.runs import check_together, runs_of, say_published, train_all_of
from loraserve.errors import InvalidRequest

if TYPE_CHECKING:
    from loraserve.train.options import TrainOptions

FRACTION = click.FloatRange(0, 1)
POSITIVE = click.FloatRange(0, min_open=True)
COUNT = click.IntRange(1)


def parse_patterns(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Turn PATTERN=NUMBER options into PEFT's `rank_pattern` (whole numbers) or `alpha_pattern`, in their order."""
    number: click.ParamType[Any] = COUNT if param.name == "rank_pattern" else POSITIVE
    found: dict[str, Any] = {}
    for value in values:
        pattern, equals, text = value.rpartition("=")
        if not pattern or not equals:
            raise click.BadParameter(f"{value!r} is not PATTERN=NUMBER, such as q_proj=4", ctx, param)
        if pattern in found:
            raise click.BadParameter(f"{pattern!r} is given twice", ctx, param)
        found[pattern] = number.convert(text, param, ctx)
    return found


def parse_rates(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Turn RATE,RATE into numbers; none without the option."""
    number: click.ParamType[Any] = POSITIVE
    return tuple(number.convert(rate.strip(), param, ctx) for rate in value.split(",")) if value is not None else ()


@click.command(cls=ProcessesCommand)
@base_options
@click.option(
    "--data",
    "--data-path",
    "data",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Dialogues: JSON lines of MiniMind, OpenAI, ShareGPT or Alpaca rows; with dpo preference pairs. Several, each "
    "with its --name, train as many adapters at once.",
)
@click.option(
    "--objective",
    type=click.Choice(["sft", "dpo"]),
    default="sft",
    show_default=True,
    help="sft: learn the answers. dpo: learn to prefer the chosen answer of each pair to the rejected one.",
)
@click.option(
    "--dpo-beta",
    type=POSITIVE,
    metavar="BETA",
    help="How much dpo holds the adapter to what it starts from.  [default: 0.1]",
)
@click.option(
    "--name", "--lora-name", "name", multiple=True, help="The adapter's name.  [default: the data file's stem]"
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Train several adapters at once, each with options of its own: a [[run]] table each, instead of --data.",
)
@click.option(
    "--targets",
    metavar="TARGETS",
    help="all-linear, all (with lm_head), attention, minimind (as upstream: rank 16, scale 1), module names "
    "separated by commas, or a regex over module paths.  [default: all-linear]",
)
@click.option("--rank", "-r", type=click.IntRange(1), metavar="R", help="Of the update.  [default: 8; minimind: 16]")
@click.option("--alpha", type=POSITIVE, metavar="ALPHA", help="Scale is alpha/rank.  [default: 2·rank; minimind: rank]")
@click.option(
    "--rank-pattern",
    multiple=True,
    metavar="PATTERN=R",
    callback=parse_patterns,
    help="Another rank where PATTERN, a name or a regex, is the end of a module path; repeatable, the first counts.",
)
@click.option(
    "--alpha-pattern",
    multiple=True,
    metavar="PATTERN=ALPHA",
    callback=parse_patterns,
    help="Another alpha, likewise.",
)
@click.option("--rslora", "use_rslora", is_flag=True, help="Scale is alpha/sqrt(rank); alpha is 16 by default.")
@click.option("--dora", "use_dora", is_flag=True, help="Train a magnitude for every output, too (DoRA).")
@click.option(
    "--init-from",
    metavar="ADAPTER",
    help="Go on with an adapter, given by its name or directory, at its own targets, ranks and scales.",
)
@click.option(
    "--lora-plus-ratio",
    type=POSITIVE,
    default=1.0,
    show_default=True,
    metavar="RATIO",
    help="LoRA+: B's learning rate is so many times A's.",
)
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Dialogues or pairs per step."
)
@click.option("--learning-rate", type=POSITIVE, default=1e-3, show_default=True, help="Falls to a tenth on a cosine.")
@click.option(
    "--lr-sweep",
    metavar="RATE,RATE,...",
    callback=parse_rates,
    help="Train at each of these rates at once and publish what does best on validation.",
)
@click.option("--accumulation-steps", type=click.IntRange(1), default=1, show_default=True, help="Steps per update.")
@click.option("--grad-clip", type=POSITIVE, default=1.0, show_default=True)
@click.option(
    "--loss-reduction",
    type=click.Choice(["tokens", "mean"]),
    default="tokens",
    show_default=True,
    help="tokens: each supervised token of an update weighs the same. mean: MiniMind's mean of means.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(2),
    metavar="N",
    help="Cut longer dialogues.  [default: refuse those beyond the base's context]",
)
@click.option("--val-split", type=FRACTION, default=0.0, show_default=True, help="Fraction of dialogues held out.")
@click.option(
    "--val-data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Dialogues to validate on, instead of held out ones.",
)
@click.option(
    "--patience",
    type=COUNT,
    metavar="N",
    help="Stop after N epochs without a lower validation loss.  [default: all epochs; the best one is published]",
)
@click.option(
    "--publish",
    type=click.Choice(["better", "always"]),
    default="better",
    show_default=True,
    help="better: nothing that is worse than the base on validation. always: whatever comes out.",
)
@click.option(
    "--on-bad-row",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="stop: name every row that cannot be used, and end. skip: train on the rest and keep them in rejected.jsonl.",
)
@click.option(
    "--random-system-prompt",
    type=FRACTION,
    default=0.0,
    show_default=True,
    help="Fraction of dialogues without a system message that get one (MiniMind: 0.2).",
)
@click.option(
    "--drop-empty-think",
    type=FRACTION,
    default=0.0,
    show_default=True,
    help="Fraction whose empty think block is removed (MiniMind-3: 0.8).",
)
@click.option(
    "--memory-budget",
    metavar="SIZE",
    callback=parse_size,
    help="Split batches, run blocks twice and quantise the base as needed to stay within 4GB or so.  [default: none]",
)
@click.option(
    "--quantize",
    type=click.Choice(["auto", "none", "int8", "nf4"]),
    default="auto",
    show_default=True,
    help="Train on a base whose layers are kept in 8 or, as in QLoRA, 4 bits. auto: as --memory-budget needs.",
)
@click.option("--seed", type=click.IntRange(0, 2**32), default=42, show_default=True)
@click.option("--log-interval", type=click.IntRange(1), default=10, show_default=True, help="Steps between log lines.")
@click.option("--save-interval", type=click.IntRange(1), default=100, show_default=True, help="Steps between saves.")
@click.option(
    "--save-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where an unfinished run keeps its state.  [default: .training in the adapters' directory]",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of this name.")
@click.option("--from-resume", type=FLAG, default="0", help="1 is --resume.")
@click.option("--dry-run", is_flag=True, help="Check the data and show what is in it; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what --dry-run finds as JSON.")
@click.option(
    "--report-to",
    type=click.Choice(["wandb", "swanlab", "trackio", "tensorboard"]),
    multiple=True,
    help="Send the losses there, too; may be given more than once.",
)
@click.option("--use-wandb", is_flag=True, help="Is --report-to wandb.")
@click.option(
    "--report-project",
    "--wandb-project",
    "report_project",
    default="loraserve",
    show_default=True,
    help="The project that such a run belongs to.",
)
@minimind_options
def command(
    options: BaseOptions,
    minimind: MiniMindBase,
    data: tuple[Path, ...],
    name: tuple[str, ...],
    runs: Path | None,
    lr_sweep: tuple[float, ...],
    resume: bool,
    from_resume: str,
    dry_run: bool,
    as_json: bool,
    report_to: tuple[str, ...],
    use_wandb: bool,
    **settings: Any,
) -> int:
    """Train an adapter on the frozen base and publish it.

    MiniMind's command lines run as they are: replace `python train_lora.py` by `loraserve train`. A run that was
    stopped or killed goes on with --resume and ends with the same adapter.

    torchrun --nproc-per-node 2 -m loraserve train ... trains it with two processes or GPUs.
    """
    from loraserve.train.reporters import check_installed
    from loraserve.train.trainer import sweep, train

    ctx = click.get_current_context()
    options, ranks = meet(ctx, options)
    settings |= {
        "resume": resume or from_resume == "1",
        "report_to": tuple(dict.fromkeys([*report_to, *(["wandb"] if use_wandb else [])])),
    }
    each = [_train_options(**settings | own) for own in runs_of(ctx, data, name, runs)]
    for one in each:
        one.check()
    train_options = each[0]
    check_together(ctx, len(each), lr_sweep, dry_run, as_json)
    if not dry_run:
        check_installed(train_options.report_to)
    explicit_base = ctx.get_parameter_source("base") == ParameterSource.COMMANDLINE
    options = with_minimind_base(options, minimind, train_options.save_dir, explicit_base)
    if dry_run:
        from loraserve.cli.dry_run import survey

        if ranks.leads:
            survey(options, train_options, as_json=as_json)
        return 0
    with ranks.lead_first():
        base = open_base(options, weights=False)
    layers = base.config.num_hidden_layers
    if minimind.num_hidden_layers not in (None, layers):
        raise InvalidRequest(
            f"{base.path} has {layers} layers, not the {minimind.num_hidden_layers} of --num-hidden-layers",
            param="num_hidden_layers",
        )
    registry = open_registry(options, base)
    if len(each) > 1:
        return train_all_of(base, registry, each, ranks)
    if lr_sweep:
        record = sweep(base, registry, train_options, lr_sweep, sys.stderr, ranks).record
    else:
        record = train(base, registry, train_options, sys.stderr, ranks).record
    say_published(record)
    return 0


def _train_options(
    *,
    targets: str | None,
    rank: int | None,
    alpha: float | None,
    random_system_prompt: float,
    drop_empty_think: float,
    **settings: Any,
) -> "TrainOptions":
    from loraserve.lora.config import parse_targets
    from loraserve.train.data import Augmentation
    from loraserve.train.options import TrainOptions

    return TrainOptions(
        targets=None if targets is None else parse_targets(targets),
        r=rank,
        lora_alpha=alpha,
        augmentation=Augmentation(random_system_prompt, drop_empty_think),
        **settings,
    )
