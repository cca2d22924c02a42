"""Several runs on one `train` command line: pairs of --data and --name, or --runs FILE.toml.

    [[run]]                  # one table for each adapter
    name = "pirate"          # the data file's stem by default
    data = "pirate.jsonl"    # beside this file
    rank = 4                 # any option that is one adapter's own, named and checked as on the command line

What a table does not say is the command line's.
"""

import difflib
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loraserve.cli.exits import FAILED
from loraserve.errors import InvalidRequest

if TYPE_CHECKING:
    from loraserve.base.load import Base
    from loraserve.registry import Record, Registry
    from loraserve.train.options import TrainOptions
    from loraserve.train.ranks import Ranks

OWN = {
    "data",
    "name",
    "objective",
    "dpo_beta",
    "targets",
    "rank",
    "alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_from",
    "lora_plus_ratio",
    "epochs",
    "batch_size",
    "learning_rate",
    "accumulation_steps",
    "grad_clip",
    "loss_reduction",
    "max_seq_len",
    "val_split",
    "val_data",
    "patience",
    "publish",
    "on_bad_row",
    "random_system_prompt",
    "drop_empty_think",
    "seed",
}
"""The parameters that each run may have for itself; all others are the process's or the set's."""
FILES = ("data", "val_data")


def runs_of(
    ctx: click.Context, data: tuple[Path, ...], name: tuple[str, ...], file: Path | None
) -> list[dict[str, Any]]:
    """What each run has for itself, at least `data` and `name`.

    Raises:
        UsageError: --data and --name do not pair up, there is neither --data nor --runs, or both.
        InvalidRequest: the file cannot be read, or a table in it has what no run can have.
    """
    if file is not None:
        if data or name:
            raise click.UsageError("--runs names data and adapters itself; leave out --data and --name", ctx)
        return _read(ctx, file)
    if not data:
        raise click.MissingParameter(ctx=ctx, param=_parameters(ctx)["data"])
    if name and len(name) != len(data):
        raise click.UsageError(
            f"there are {len(data)} --data and {len(name)} --name; give each --data its --name, in the same order", ctx
        )
    return [{"data": d, "name": n} for d, n in zip(data, name or [d.stem for d in data], strict=True)]


def _parameters(ctx: click.Context) -> dict[str, click.Parameter]:
    """By option, `--rank-pattern` as rank_pattern."""
    return {
        option.removeprefix("--").replace("-", "_"): parameter
        for parameter in ctx.command.params
        if parameter.name in OWN
        for option in parameter.opts
        if option.startswith("--")
    }


def _read(ctx: click.Context, file: Path) -> list[dict[str, Any]]:
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}", param="runs") from None
    except ValueError as error:
        raise InvalidRequest(f"{file} is not TOML: {error}", param="runs") from None
    runs = tables.pop("run", None)
    if tables or not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise InvalidRequest(f"{file} must hold [[run]] tables and nothing else, one for each adapter", param="runs")
    return [_run(ctx, f"{file}, run {number}", file.parent, run) for number, run in enumerate(runs, 1)]


def _run(ctx: click.Context, where: str, folder: Path, table: dict[str, Any]) -> dict[str, Any]:
    parameters, found = _parameters(ctx), {}
    for key, value in table.items():
        parameter = parameters.get(key.replace("-", "_"))
        if parameter is None or parameter.name is None:
            near = difflib.get_close_matches(key.replace("-", "_"), parameters, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(sorted(parameters))}"
            raise InvalidRequest(f"{where} has {key!r}; {hint}", param="runs")
        try:
            found[parameter.name] = _convert(ctx, parameter, value)
        except click.BadParameter as error:
            raise InvalidRequest(f"{where}: {key} cannot be {value!r}: {error.message}", param="runs") from None
    if "data" not in found:
        raise InvalidRequest(f'{where} has no data; add data = "FILE.jsonl"', param="runs")
    found |= {key: folder / found[key] for key in FILES if key in found}
    return {"name": found["data"].stem} | found


def _convert(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A value of TOML as the command line would have it."""
    if isinstance(value, bool) is not getattr(parameter, "is_flag", False):
        raise click.BadParameter("true and false are for switches, and switches take nothing else")
    if isinstance(value, bool):
        return value
    if parameter.name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value, dict):
            raise click.BadParameter("it takes a table such as {q_proj = 4}")
        return parameter.process_value(ctx, tuple(f"{pattern}={number}" for pattern, number in value.items()))
    if parameter.name == "targets" and isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(value, list | dict):
        raise click.BadParameter("it takes one value")
    return parameter.type.convert(str(value), parameter, ctx)


def check_together(
    ctx: click.Context, num_runs: int, lr_sweep: tuple[float, ...], dry_run: bool, as_json: bool
) -> None:
    """Raise UsageError for options that do not go together."""
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run", ctx)
    if dry_run and num_runs > 1:
        raise click.UsageError("--dry-run takes one run; check the files one by one", ctx)
    if lr_sweep and num_runs > 1:
        raise click.UsageError("--lr-sweep takes one run; sweep the adapters one by one", ctx)
    if lr_sweep and ctx.get_parameter_source("learning_rate") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--learning-rate and --lr-sweep both say the rate; give one of them", ctx)


def train_all_of(base: "Base", registry: "Registry", each: list["TrainOptions"], ranks: "Ranks") -> int:
    """Train them at once and say what came of each; the exit code is 1 unless all are published."""
    from loraserve.errors import LoraserveError, NotBetter
    from loraserve.train.trainer import train_all

    outcomes = train_all(base, registry, each, sys.stderr, ranks)
    failed = 0
    for options, outcome in zip(each, outcomes, strict=True):
        if isinstance(outcome, LoraserveError):
            failed += 1
            who = "" if isinstance(outcome, NotBetter) else f"{options.name!r}: "  # which says its name itself
            click.echo(f"error: {who}{outcome}", err=True)
        elif outcome is not None:
            say_published(outcome.record)
    if failed:
        click.echo(f"{failed} of {len(each)} adapters were not published", err=True)
    return min(failed, FAILED)


def say_published(record: "Record") -> None:
    click.echo(f"published {record.name!r} version {record.version} in {record.path}")
