"""Options that several commands share, and the base, registry and engine they open."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraserve.cli.commands import LoraserveCommand, LoraserveGroup

if TYPE_CHECKING:
    from loraserve.base.load import Base
    from loraserve.engine.service import Service
    from loraserve.registry import Registry

__all__ = [
    "BaseOptions",
    "LoraserveCommand",
    "LoraserveGroup",
    "adapters_dir_option",
    "base_options",
    "format_option",
    "mismatch_option",
    "open_base",
    "open_registry",
    "open_service",
    "parse_size",
    "pick_format",
]

Function = Callable[..., Any]
SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class BaseOptions:
    """What `@base_options` collects: which base, where its adapters are, and on what it runs."""

    base: str
    adapters_dir: Path
    device: str
    dtype: str
    tokenizer: str | None
    num_attention_heads: int | None


adapters_dir_option = click.option(
    "--adapters-dir",
    type=click.Path(path_type=Path),
    default=Path("adapters"),
    envvar="LORASERVE_ADAPTERS",
    show_default=True,
    show_envvar=True,
    metavar="DIR",
    help="Where the adapters are.",
)

mismatch_option = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Accept adapters trained on other weights of the same shapes.",
)

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "minimind"]),
    help="hf: a directory for transformers and --base; minimind: a .pth for MiniMind's own scripts. "
    "By default minimind if the output ends in .pth, else hf.",
)


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Turn an option such as 512M or 2GB into bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 512M or 2G", ctx, param)
    return int(float(match[1]) * SIZES[match[2]])


def pick_format(form: str | None, out: Path) -> str:
    """The format to write `out` in. Raises click.UsageError if the name does not go with the format asked for."""
    by_name = "minimind" if out.suffix == ".pth" else "hf"
    if form not in (None, by_name):
        wanted = "a file name that ends in .pth" if form == "minimind" else "a directory's name, not a .pth"
        raise click.UsageError(f"--format {form} needs {wanted}, not {out}", click.get_current_context())
    return by_name


def base_options(function: Function) -> Function:
    """Add --base, --adapters-dir, --device, --dtype, --tokenizer and --num-attention-heads to a command.

    The command's function receives them as one argument, `options: BaseOptions`.
    """

    @functools.wraps(function)
    def collect(
        *args: Any,
        base: str,
        adapters_dir: Path,
        device: str,
        dtype: str,
        tokenizer: str | None,
        num_attention_heads: int | None,
        **kwargs: Any,
    ) -> Any:
        options = BaseOptions(base, adapters_dir, device, dtype, tokenizer, num_attention_heads)
        return function(*args, options=options, **kwargs)

    for option in (
        click.option(
            "--num-attention-heads", type=click.IntRange(1), metavar="N", help="Of a MiniMind 2 .pth, if it is not 8."
        ),
        click.option("--tokenizer", metavar="DIR", help="Of a .pth, if not beside it or in ../model."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
            default="auto",
            show_default=True,
            metavar="TYPE",
            help="What the model computes in: auto, float32, bfloat16, float16, or int8 (8-bit weights, on a CPU).",
        ),
        click.option(
            "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the model runs."
        ),
        adapters_dir_option,
        click.option(
            "--base",
            default="bundled",
            envvar="LORASERVE_BASE",
            show_default=True,
            show_envvar=True,
            metavar="REF",
            help="bundled, a Hugging Face directory, a MiniMind .pth, or a hub id owner/name[@revision].",
        ),
    ):
        collect = option(collect)
    return collect


def open_base(options: BaseOptions, *, weights: bool = True) -> "Base":
    """Load the base the options name, with its weights or without. Raises what `load_base` raises."""
    from loraserve.base.load import load_base

    return load_base(
        options.base,
        device=options.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        num_attention_heads=options.num_attention_heads,
        weights=weights,
    )


def open_registry(options: BaseOptions, base: "Base | None" = None, *, allow_base_mismatch: bool = False) -> "Registry":
    """Open the adapters' directory; with a base, adapters are checked against it when they are loaded."""
    from loraserve.registry import Registry

    if base is None:
        return Registry(options.adapters_dir)
    return Registry(options.adapters_dir, base.shapes, base.fingerprint, allow_base_mismatch=allow_base_mismatch)


@contextlib.contextmanager
def open_service(options: BaseOptions, *, allow_base_mismatch: bool = False, **limits: Any) -> "Iterator[Service]":
    """Run an engine on the base and the registry for the duration of a `with` block.

    Args:
        limits: `max_model_len`, `max_num_seqs`, `max_queue`, `kv_memory`, `adapter_memory`, `merge_memory`, `seed` of
            `Service`.
    """
    from loraserve.engine.service import Service

    base = open_base(options)
    service = Service(base, open_registry(options, base, allow_base_mismatch=allow_base_mismatch), **limits)
    service.start()
    try:
        yield service
    finally:
        service.stop()
