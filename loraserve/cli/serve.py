"""`loraserve serve`: the HTTP server with the chat page."""

import contextlib
import gc
import os
import sys
from typing import TYPE_CHECKING

import click

from loraserve.cli.options import BaseOptions, LoraserveCommand, base_options, mismatch_option, open_service, parse_size

if TYPE_CHECKING:
    from loraserve.registry import Registry

COUNT = click.IntRange(1)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_SHOWN, MAX_CHECKED = 10, 200


@click.command(cls=LoraserveCommand)
@base_options
@mismatch_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--default-adapter", metavar="SPEC", help="Answers requests that name neither model nor adapter.")
@click.option(
    "--max-model-len",
    type=COUNT,
    metavar="TOKENS",
    help="Prompt and answer together.  [default: the base's limit, at most 2048]",
)
@click.option(
    "--max-num-seqs", type=COUNT, default=32, show_default=True, metavar="N", help="Answers generated at once."
)
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    metavar="N",
    help="Requests that may wait; beyond, clients are told to come back.",
)
@click.option(
    "--kv-memory",
    callback=parse_size,
    metavar="SIZE",
    help="Memory for keys and values, such as 2G; lowers --max-num-seqs to what fits.",
)
@click.option(
    "--adapter-memory",
    callback=parse_size,
    default="1G",
    show_default=True,
    metavar="SIZE",
    help="Memory for adapters in use; more are loaded and dropped as requests ask for them.",
)
@click.option(
    "--merge-memory",
    callback=parse_size,
    default="1G",
    show_default=True,
    metavar="SIZE",
    help="Memory for adapters merged by POST /v1/adapters/NAME/merge; 0 allows none.",
)
@click.option(
    "--prefix-memory",
    callback=parse_size,
    default="512M",
    show_default=True,
    metavar="SIZE",
    help="Memory for keys and values of past requests, from which later ones go on; 0 turns that off.",
)
@click.option(
    "--speculate",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="Tokens that an answer may guess from its own text in a step, on a CPU; 0 turns that off.",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="Make a request's tokens independent of what else is in the batch, bit for bit.",
)
@click.option(
    "--training/--no-training",
    default=None,
    help="Let clients train adapters.  [default: if only this machine can reach --host]",
)
@click.option(
    "--max-file-size",
    callback=parse_size,
    default="100M",
    show_default=True,
    metavar="SIZE",
    help="The largest training file that clients may upload.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the chat page in the browser.")
def command(
    options: BaseOptions,
    allow_base_mismatch: bool,
    host: str,
    port: int,
    default_adapter: str | None,
    max_model_len: int | None,
    max_num_seqs: int,
    max_queue: int,
    kv_memory: int | None,
    adapter_memory: int,
    prefix_memory: int,
    speculate: int,
    deterministic: bool,
    merge_memory: int,
    training: bool | None,
    max_file_size: int,
    open_page: bool,
) -> None:
    """Serve the base with all adapters: OpenAI's API and a chat page.

    Each request picks its adapter by the field `adapter` or `model`. Adapters that appear in --adapters-dir are served
    without a restart. Ctrl-C ends it.
    """
    limits = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_queue": max_queue,
        "kv_memory": kv_memory,
        "adapter_memory": adapter_memory,
        "prefix_memory": prefix_memory,
        "speculate": speculate,
        "deterministic": deterministic,
        "merge_memory": merge_memory,
    }
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(open_service(options, allow_base_mismatch=allow_base_mismatch, **limits))
        from loraserve.jobs import JobQueue
        from loraserve.server import Server, create_app

        queue = None
        if training or (training is None and host in LOOPBACK):
            queue = stack.enter_context(JobQueue(service.registry, _base_options(options)))
        app = create_app(service, default_adapter=default_adapter, queue=queue, max_file_bytes=max_file_size)
        server = Server(app, host, port)
        adapters = _describe(service.registry)
        click.echo(f"serving {service.base.name} with {adapters} at {server.url} (Ctrl-C stops)")
        if host not in LOOPBACK:
            what = "use it" if queue is None else "use it and train on it"
            click.echo(f"warning: no keys are asked for, so whoever can reach this address can {what}", err=True)
        if open_page and _has_desktop():
            click.launch(server.url)
        gc.freeze()  # what is there now stays: collections need not look through it, which takes milliseconds
        server.run_until_signal()


def _base_options(options: BaseOptions) -> list[str]:
    """The options by which `loraserve train` gets the same base; 8-bit weights are for serving only."""
    given = {
        "base": options.base,
        "device": options.device,
        "dtype": "auto" if options.dtype == "int8" else options.dtype,
        "tokenizer": options.tokenizer,
        "num-attention-heads": options.num_attention_heads,
    }
    return [f"--{option}={value}" for option, value in given.items() if value is not None]


def _has_desktop() -> bool:
    """Whether a browser can show itself; without one, Linux would look for text browsers and complain."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _describe(registry: "Registry") -> str:
    """The adapters found, in words, and how many cannot be used; of very many, the first ones are looked at."""
    from loraserve.errors import LoraserveError

    names = registry.names()
    refused = set()
    for name in names[:MAX_CHECKED]:
        try:
            registry.get(name)
        except LoraserveError:
            refused.add(name)
    usable = [name for name in names if name not in refused]
    shown = ", ".join(usable[:MAX_SHOWN]) + (f" and {len(usable) - MAX_SHOWN} more" if len(usable) > MAX_SHOWN else "")
    words = {0: "no adapters yet", 1: f"adapter {shown}"}.get(len(usable), f"{len(usable)} adapters ({shown})")
    return f"{words}; {len(refused)} more cannot be used, see `loraserve adapters verify`;" if refused else words
