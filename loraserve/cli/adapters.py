"""`loraserve adapters`: what is in the registry, and bringing adapters in, out and back."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraserve.cli.compare import compare_adapters
from loraserve.cli.options import LoraserveGroup, adapters_dir_option, mismatch_option
from loraserve.cli.records import facts_of, figures, print_json, report, some_names
from loraserve.cli.tables import count, pairs, shorten, size, table

if TYPE_CHECKING:
    from loraserve.registry import Registry

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
base_option = click.option(
    "--base",
    envvar="LORASERVE_BASE",
    show_envvar=True,
    metavar="REF",
    help="The base to check adapters against: bundled, a directory, a .pth, or a hub id.",
)


@click.group(cls=LoraserveGroup)
def command() -> None:
    """List, inspect, import, export and version adapters.

    A PEFT directory copied into --adapters-dir is an adapter; importing is for those that lie elsewhere.
    """


@command.command("list")
@adapters_dir_option
@json_option
def list_adapters(adapters_dir: Path, as_json: bool) -> None:
    """List the adapters, and why one cannot be used."""
    from loraserve.errors import LoraserveError
    from loraserve.registry import Registry

    registry = Registry(adapters_dir)
    records, refused = [], []
    for name in registry.names():
        try:
            records.append(registry.get(name))
        except LoraserveError as error:
            refused.append((name, error))
    if as_json:
        problems = [{"name": name, "problems": getattr(e, "problems", [str(e)])} for name, e in refused]
        entries = [facts_of(record) for record in records] + problems
        print_json(sorted(entries, key=lambda entry: str(entry["name"])))
        return
    if not records and not refused:
        click.echo(f"no adapters in {adapters_dir}; `loraserve train --data FILE --name NAME` makes one")
    if records:
        header = ("ADAPTER", "VERSION", "RANK", "PARAMETERS", "SIZE", "CREATED", "DESCRIPTION")
        table(header, [(r.name, r.version or "-", *figures(r), r.manifest.description) for r in records])
    for _, reason in refused:
        click.secho(str(reason), fg="yellow", err=True)


@command.command("show")
@click.argument("name")
@adapters_dir_option
@json_option
def show_adapter(name: str, adapters_dir: Path, as_json: bool) -> None:
    """Show all that is known of an adapter."""
    from loraserve.registry import Registry

    record = Registry(adapters_dir).get(name)
    facts = facts_of(record)
    if as_json:
        print_json(facts)
        return
    click.secho(record.name, bold=True)
    fingerprint = shorten(facts["base_fingerprint"]) if facts["base_fingerprint"] else None
    shown = {
        "description": facts["description"],
        "version": record.version or "not published, a PEFT directory that was dropped in",
        "created": facts["created"],
        "base": " ".join(filter(None, (facts["base_name"], fingerprint))),
        "rank": record.rank,
        "alpha": f"{record.config.lora_alpha:g}",
        "targets": some_names(record.config.target_modules),
        "parameters": f"{count(record.num_parameters)} ({record.num_parameters:,})",
        "size": size(record.size_bytes),
        "path": record.path,
        "sha256": facts["sha256"],
        "parents": ", ".join(facts["parents"]),
        "data": facts["data_sha256"],
    }
    pairs((key, value) for key, value in shown.items() if value not in ("", None))
    for title in ("metrics", "recipe"):
        if facts[title]:
            click.secho(f"\n{title}", bold=True)
            pairs((key, value) for key, value in facts[title].items() if value is not None)
    for warning in record.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)


command.add_command(compare_adapters)


@command.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", help="By default that of the directory or file.")
@base_option
@mismatch_option
@adapters_dir_option
def import_adapter(
    source: Path, name: str | None, base: str | None, allow_base_mismatch: bool, adapters_dir: Path
) -> None:
    """Publish a PEFT directory or a MiniMind .pth.

    Under a name that exists it becomes a new version.

    \b
    loraserve adapters import ~/checkpoints/my-lora --name mine
    loraserve adapters import ../out/lora/lora_identity_768.pth --name identity
    """
    report("imported", _open(adapters_dir, base, allow_base_mismatch).import_(source, name))


@command.command("export")
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["peft", "minimind", "minimind2"]),
    help="peft: a directory for PEFT and vLLM; minimind, minimind2: a .pth for that generation's eval_llm.py, with "
    "--base. By default minimind if OUT ends in .pth, else peft.",
)
@base_option
@adapters_dir_option
def export_adapter(name: str, out: Path, form: str | None, base: str | None, adapters_dir: Path) -> None:
    """Write an adapter to OUT, which must not exist.

    \b
    loraserve adapters export pirate pirate-lora
    loraserve adapters export pirate ../out/lora/pirate_768.pth --base jingyaogong/minimind-3
    """
    form = form or ("minimind" if out.suffix == ".pth" else "peft")
    if (form == "peft") == (out.suffix == ".pth"):
        wanted = "a directory's name" if form == "peft" else "a file name that ends in .pth"
        raise click.UsageError(f"--format {form} needs {wanted}, not {out}", click.get_current_context())
    written = _open(adapters_dir, base if form != "peft" else None).export(name, out, form)
    click.echo(f"adapter {name!r} written to {written}")


@command.command("remove")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@adapters_dir_option
def remove_adapters(names: tuple[str, ...], yes: bool, adapters_dir: Path) -> None:
    """Remove adapters with all their versions."""
    from loraserve.registry import Registry

    registry = Registry(adapters_dir)
    for name in names:
        registry.history(name)  # all of them exist before the first is removed
    if not yes and sys.stdin.isatty():
        click.confirm(f"Remove {', '.join(names)} with all versions?", abort=True, err=True)
    for name in names:
        registry.remove(name)
        click.echo(f"adapter {name!r} removed")


@command.command("rename")
@click.argument("old")
@click.argument("new")
@adapters_dir_option
def rename_adapter(old: str, new: str, adapters_dir: Path) -> None:
    """Give an adapter another name; its versions come along."""
    from loraserve.registry import Registry

    Registry(adapters_dir).rename(old, new)
    click.echo(f"adapter {old!r} is now {new!r}")


@command.command("history")
@click.argument("name")
@adapters_dir_option
@json_option
def show_history(name: str, adapters_dir: Path, as_json: bool) -> None:
    """List an adapter's versions; * marks the one in use."""
    from loraserve.registry import Registry

    registry = Registry(adapters_dir)
    current = registry.get(name).version
    records = registry.history(name)[::-1]
    if as_json:
        print_json([facts_of(record) | {"current": record.version == current} for record in records])
        return
    header = ("", "VERSION", "RANK", "PARAMETERS", "SIZE", "CREATED", "DESCRIPTION")
    marks = ["*" if record.version == current else "" for record in records]
    rows = [
        (mark, r.version or "-", *figures(r), r.manifest.description) for mark, r in zip(marks, records, strict=True)
    ]
    table(header, rows)


@command.command("rollback")
@click.argument("name")
@click.argument("version", type=click.IntRange(1), required=False)
@adapters_dir_option
def roll_back(name: str, version: int | None, adapters_dir: Path) -> None:
    """Use an older version again.

    By default it is the one before. Newer ones stay and can be named to go forward.
    """
    from loraserve.registry import Registry

    record = Registry(adapters_dir).rollback(name, version)
    click.echo(f"adapter {name!r} is back at version {record.version}")


@command.command("blend")
@click.argument("spec")
@click.argument("name")
@adapters_dir_option
def blend_adapters(spec: str, name: str, adapters_dir: Path) -> None:
    """Publish the exact blend of several adapters as one.

    \b
    loraserve adapters blend pirate:0.7+poet:0.3 bard
    """
    from loraserve.registry import Registry

    report("published", Registry(adapters_dir).blend(spec, name))


@command.command("verify")
@click.argument("name", required=False)
@base_option
@mismatch_option
@adapters_dir_option
def verify_adapters(name: str | None, base: str | None, allow_base_mismatch: bool, adapters_dir: Path) -> int:
    """Check adapters and all their versions for damage.

    Without NAME it checks all of them. The exit code is 1 if anything is wrong.
    """
    registry = _open(adapters_dir, base, allow_base_mismatch)
    problems = registry.verify(name)
    for problem in problems:
        click.echo(str(problem))
    checked = 1 if name else len(registry.names())
    adapters = "1 adapter" if checked == 1 else f"{checked} adapters"
    found = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "no problems"
    click.echo(f"{adapters} checked, {found}")
    return 1 if problems else 0


@command.command("pull")
@click.argument("hub_id", metavar="OWNER/NAME[@REVISION]")
@click.option("--name", help="By default the repository's.")
@base_option
@mismatch_option
@adapters_dir_option
def pull_adapter(
    hub_id: str, name: str | None, base: str | None, allow_base_mismatch: bool, adapters_dir: Path
) -> None:
    """Fetch an adapter from the Hugging Face hub.

    \b
    loraserve adapters pull someone/minimind-3-pirate --name pirate
    """
    from loraserve.base.hub import split_hub_id
    from loraserve.lora.spec import check_name
    from loraserve.registry.hub import download

    repo, own_name, revision = split_hub_id(hub_id)
    name = check_name(name or own_name)
    registry = _open(adapters_dir, base, allow_base_mismatch)
    report(f"pulled from {repo}", registry.import_(download(repo, revision), name))


@command.command("push")
@click.argument("name")
@click.argument("hub_id", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="If the repository does not exist yet, make it private.")
@adapters_dir_option
def push_adapter(name: str, hub_id: str, private: bool, adapters_dir: Path) -> None:
    """Upload an adapter to the Hugging Face hub.

    The version in use goes there; the hub wants you to have run `hf auth login`.
    """
    from loraserve.base.hub import split_hub_id
    from loraserve.registry import Registry
    from loraserve.registry.hub import upload

    repo, _, revision = split_hub_id(hub_id)
    if revision:
        raise click.UsageError(f"{hub_id!r} names a revision; a push goes to owner/name", click.get_current_context())
    registry = Registry(adapters_dir)
    registry.load(name)  # nothing broken goes out
    record = registry.get(name)
    message = f"{name} version {record.version}" if record.version else name
    click.echo(f"adapter {name!r} pushed to {upload(record.path, repo, private=private, message=message)}")


def _open(adapters_dir: Path, base: str | None, allow_base_mismatch: bool = False) -> "Registry":
    """The registry, which checks adapters against a base where one is given."""
    from loraserve.registry import Registry

    if base is None:
        return Registry(adapters_dir)
    from loraserve.base.checkpoint import read_checkpoint
    from loraserve.base.fingerprint import fingerprint
    from loraserve.base.resolve import resolve_base

    checkpoint = read_checkpoint(resolve_base(base))
    return Registry(adapters_dir, checkpoint.config.linear_shapes(), fingerprint(checkpoint), allow_base_mismatch)
