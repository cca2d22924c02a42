"""`loraserve bench`: reproducible benchmarks. The last line of stdout is JSON."""

import json

import click

from loraserve.cli.options import LoraserveCommand, LoraserveGroup


@click.group(cls=LoraserveGroup)
def command() -> None:
    """Run reproducible benchmarks; the last line of stdout is JSON."""


@command.command(cls=LoraserveCommand)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Measured rounds of each case.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--r", type=click.IntRange(1), default=8, show_default=True, help="Rank of the adapters.")
@click.option("--no-peers", is_flag=True, help="Measure loraserve alone.")
def serve(repeats: int, dtype: str, r: int, no_peers: bool) -> None:
    """Measure the engine's throughput on a random minimind-3 beside transformers + PEFT, in turn, in one run.

    64 prompt tokens and 128 new ones per client, greedy. PEFT takes part if transformers and peft are installed.
    """
    from loraserve.bench.serve import run

    result = run(repeats=repeats, dtype=dtype, r=r, peers=() if no_peers else ("peft",))
    click.echo(f"{'case':24} {'engine':8} {'tokens/s':>9} {'TTFT ms':>9} {'peak MB':>8}")
    for title, row in result["cases"].items():
        for name, figures in row.items():
            if isinstance(figures, dict):
                values = (figures["tokens_per_s"], figures["ttft_ms"], figures["peak_rss_mb"])
                click.echo(f"{title:24} {name:8} {values[0]:9.1f} {values[1]:9.1f} {values[2]:8.0f}")
            else:
                click.echo(f"{'':24} {name} = {figures:.2f}x")
    click.echo(json.dumps(result))


@command.command(cls=LoraserveCommand)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Starts to measure.")
@click.option("--base", default="bundled", envvar="LORASERVE_BASE", show_default=True, metavar="REF")
def start(repeats: int, base: str) -> None:
    """Measure what a newcomer waits for: --help, the server's start, the first token of an idle server."""
    from loraserve.bench.start import run

    result = run(repeats=repeats, base=base)
    click.echo(f"loraserve --help          {result['help_s']:8.3f} s")
    click.echo(f"launch to ready           {result['start_s']:8.2f} s")
    click.echo(f"time to the first token   {result['ttft_ms']:8.1f} ms")
    click.echo(json.dumps(result))
