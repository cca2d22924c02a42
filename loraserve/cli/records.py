"""An adapter's record as tables and JSON show it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from loraserve.cli.tables import count, size

if TYPE_CHECKING:
    from loraserve.registry import Record


def figures(record: "Record") -> tuple[object, ...]:
    created = datetime.fromtimestamp(record.created, UTC).astimezone()
    return record.rank, count(record.num_parameters), size(record.size_bytes), f"{created:%Y-%m-%d %H:%M}"


def facts_of(record: "Record") -> dict[str, Any]:
    """A record as JSON has it."""
    manifest, config = record.manifest, record.config
    return {
        "name": record.name,
        "version": record.version,
        "path": str(record.path),
        "created": datetime.fromtimestamp(record.created, UTC).isoformat(),
        "description": manifest.description,
        "rank": record.rank,
        "config": config.to_peft(),
        "targets": list(record.targets),
        "num_parameters": record.num_parameters,
        "size_bytes": record.size_bytes,
        "base_name": manifest.base_name,
        "base_fingerprint": manifest.base_fingerprint,
        "sha256": manifest.sha256,
        "parents": list(manifest.parents),
        "data_sha256": manifest.data_sha256,
        "recipe": dict(manifest.recipe),
        "metrics": dict(manifest.metrics),
        "warnings": record.warnings,
    }


def some_names(names: Sequence[str] | str) -> str:
    if isinstance(names, str):
        return names
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def report(done: str, record: "Record") -> None:
    what = f"rank {record.rank}, {count(record.num_parameters)} parameters"
    click.echo(f"adapter {record.name!r} {done} as version {record.version}: {what}")
    for warning in record.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)


def print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
