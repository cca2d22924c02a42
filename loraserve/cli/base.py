"""`loraserve base`: which bases there are, what is in them, and their conversion."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from loraserve.cli.options import LoraserveGroup, format_option, pick_format
from loraserve.cli.tables import count, pairs, shorten, size, table

tokenizer_option = click.option("--tokenizer", metavar="DIR", help="Of a .pth, if not beside it or in ../model.")
heads_option = click.option(
    "--num-attention-heads", type=click.IntRange(1), metavar="N", help="Of a MiniMind 2 .pth, if it is not 8."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=LoraserveGroup)
def command() -> None:
    """List, inspect, download and convert bases.

    A base is named by a REF: bundled, a Hugging Face directory, a MiniMind .pth, or a hub id owner/name[@revision].
    """


@command.command("list")
@click.argument("directories", metavar="[DIR]...", nargs=-1, type=click.Path(exists=True, path_type=Path))
@json_option
def list_bases(directories: tuple[Path, ...], as_json: bool) -> None:
    """List the bases at hand.

    They are the bundled one, the hub ids in the local cache, and what is in or directly below each DIR.
    """
    from loraserve.base.catalog import find_bases

    found = find_bases(directories)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(entry) | {"path": str(entry.path)} for entry in found], indent=2))
    elif found:
        rows = [(entry.ref, entry.architecture, entry.format, size(entry.size_bytes)) for entry in found]
        table(("BASE", "ARCHITECTURE", "FORMAT", "SIZE"), rows)
    else:
        click.echo("no bases here; `loraserve base pull jingyaogong/minimind-3` fetches one")


@command.command("show")
@click.argument("ref", default="bundled", envvar="LORASERVE_BASE")
@tokenizer_option
@heads_option
@json_option
def show_base(ref: str, tokenizer: str | None, num_attention_heads: int | None, as_json: bool) -> None:
    """Show a base's architecture, size and fingerprint.

    Without REF it is the one in LORASERVE_BASE, else the bundled one.
    """
    facts = _facts(ref, tokenizer, num_attention_heads)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    config = facts.pop("config")
    click.secho(ref, bold=True)
    facts["parameters"] = f"{count(facts['parameters'])} ({facts['parameters']:,})"
    facts["size_bytes"] = size(facts["size_bytes"])
    facts["tokenizer"] = facts["tokenizer"] or "none found; give its directory with --tokenizer"
    pairs((name.partition("_")[0], value) for name, value in facts.items())
    click.secho("\nconfig", bold=True)
    dense = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "norm_topk_prob")
    absent = () if config["num_experts"] else dense
    shown = {name: value for name, value in config.items() if value is not None and name not in absent}
    pairs((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in shown.items())


@command.command("pull")
@click.argument("hub_id", metavar="OWNER/NAME[@REVISION]")
def pull_base(hub_id: str) -> None:
    """Download a base from the Hugging Face hub, or bring its local copy up to date."""
    from loraserve.base.hub import HUB_ID
    from loraserve.base.resolve import resolve_base

    if Path(hub_id).exists() or not HUB_ID.fullmatch(hub_id):
        raise click.UsageError(
            f"{hub_id!r} is not a hub id: write owner/name or owner/name@revision", click.get_current_context()
        )
    path = resolve_base(hub_id)
    facts = _facts(hub_id, None, None)
    click.echo(f"{hub_id}: {count(facts['parameters'])} parameters, {size(facts['size_bytes'])}, in {path}")
    click.echo(f"use it with --base {hub_id}")


@command.command("convert")
@click.argument("ref")
@click.argument("out", type=click.Path(path_type=Path))
@format_option
@tokenizer_option
@heads_option
def convert_base(ref: str, out: Path, form: str | None, tokenizer: str | None, num_attention_heads: int | None) -> None:
    """Convert a base between Hugging Face and MiniMind.

    \b
    loraserve base convert ../out/full_sft_768.pth minimind-hf
    loraserve base convert jingyaogong/minimind-3 out/full_sft_768.pth
    """
    from loraserve.base.checkpoint import read_checkpoint
    from loraserve.base.export import write_hf, write_minimind
    from loraserve.base.fingerprint import compute
    from loraserve.base.resolve import resolve_base, tokenizer_path

    form = pick_format(form, out)
    path = resolve_base(ref)
    checkpoint = read_checkpoint(path, num_attention_heads=num_attention_heads)
    if form == "minimind":
        write_minimind(checkpoint, out)
    else:
        write_hf(checkpoint, out, tokenizer_path(path, tokenizer))
    written = read_checkpoint(out, num_attention_heads=num_attention_heads)
    click.secho(f"{ref} written to {out}", bold=True)
    same = "the same as before" if compute(written) == compute(checkpoint) else "not the one it had"
    pairs(
        [
            ("format", "MiniMind checkpoint" if form == "minimind" else "Hugging Face directory"),
            ("parameters", count(written.config.num_parameters)),
            ("fingerprint", f"{shorten(compute(written))}, {same}"),
        ]
    )


def _facts(ref: str, tokenizer: str | None, num_attention_heads: int | None) -> dict[str, Any]:
    """What `show` prints, as JSON."""
    from loraserve.base.checkpoint import read_checkpoint
    from loraserve.base.fingerprint import fingerprint
    from loraserve.base.resolve import resolve_base, tokenizer_path
    from loraserve.errors import CheckpointError

    path = resolve_base(ref)
    checkpoint = read_checkpoint(path, num_attention_heads=num_attention_heads)
    try:
        tokens: str | None = str(tokenizer_path(path, tokenizer))
    except CheckpointError:
        tokens = None
    config = checkpoint.config
    kind = f"mixture of {config.num_experts} experts" if config.num_experts else "dense"
    files = [f for f in path.iterdir() if f.suffix in (".safetensors", ".bin")] if path.is_dir() else [path]
    return {
        "path": str(path),
        "format": checkpoint.format,
        "architecture": f"{kind}, {config.num_hidden_layers} layers of {config.hidden_size}",
        "parameters": config.num_parameters,
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})),
        "size_bytes": sum(file.stat().st_size for file in files),
        "fingerprint": fingerprint(checkpoint),
        "tokenizer": tokens,
        "config": dataclasses.asdict(config) | {"eos_token_ids": list(config.eos_token_ids)},
    }
