"""`loraserve merge`: an adapter or a blend folded into a checkpoint of its own."""

import dataclasses
from pathlib import Path

import click

from loraserve.cli.options import (
    BaseOptions,
    LoraserveCommand,
    base_options,
    format_option,
    mismatch_option,
    open_base,
    open_registry,
    pick_format,
)
from loraserve.cli.tables import pairs, shorten


@click.command(cls=LoraserveCommand)
@click.argument("spec")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR|FILE",
    help="A new directory for hf, a new .pth file for minimind.",
)
@format_option
@base_options
@mismatch_option
def command(spec: str, out: Path, form: str | None, options: BaseOptions, allow_base_mismatch: bool) -> None:
    """Fold an adapter or a blend into a standalone checkpoint.

    SPEC is name, name:0.5 or a:0.7+b:0.3. The base stays as it is. A report compares the checkpoint with base plus
    adapter: the largest difference of any logit, and how often both choose the same next token. It is computed in
    float32 unless --dtype says otherwise; the checkpoint keeps the number format of the base's file.

    \b
    loraserve merge pirate --out out/pirate
    loraserve merge pirate:0.7+poet:0.3 --out out/blend
    loraserve merge lumi --out ../out/lumi_768.pth --base ../out/full_sft_768.pth
    """
    from loraserve.engine.merge import merge
    from loraserve.lora.spec import parse_spec

    form = pick_format(form, out)
    parsed = parse_spec(spec)
    base = open_base(dataclasses.replace(options, dtype="float32") if options.dtype == "auto" else options)
    registry = open_registry(options, base, allow_base_mismatch=allow_base_mismatch)
    done = merge(base, registry, parsed, out, form)
    parity = done.parity
    same = round(parity.greedy_agreement * parity.greedy_tokens)
    difference = f"differ by at most {parity.max_logit_difference:.2g}"
    how = f"{parity.dtype} on {parity.device}"
    what = "MiniMind checkpoint" if form == "minimind" else "Hugging Face directory"
    untied = ["lm_head is no longer tied to the embeddings"] if done.untied else []
    click.secho(f"{spec} merged into {base.name}", bold=True)
    pairs(
        [
            ("written", f"{done.path} ({what}, {done.dtype})"),
            ("changed", "; ".join([f"{done.num_layers} layers", *untied])),
            ("logits", f"{difference}, where the largest is {parity.max_logit:.3g} ({how})"),
            ("greedy tokens", f"{same} of {parity.greedy_tokens} the same ({same / parity.greedy_tokens:.1%})"),
            ("report", f"{done.report_path}"),
            ("base", f"unchanged, {shorten(base.fingerprint)}"),
        ]
    )
