"""`loraserve version`: what a bug report should say."""

import importlib.metadata
import json
import platform

import click

import loraserve
from loraserve.cli.commands import LoraserveCommand

PACKAGES = ("torch", "safetensors", "tokenizers", "sentencepiece", "flask")


@click.command(cls=LoraserveCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Print the versions of loraserve and what it runs on."""
    versions = {"loraserve": loraserve.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["platform"] = platform.platform()
    if as_json:
        click.echo(json.dumps(versions))
    else:
        for name, version in versions.items():
            click.echo(f"{name:14} {version}")
