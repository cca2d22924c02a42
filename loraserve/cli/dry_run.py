"""What `loraserve train --dry-run` prints: the data, what is wrong with it, a run's steps and the memory they take."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from loraserve.cli.options import BaseOptions, open_base, open_registry
from loraserve.cli.records import print_json
from loraserve.cli.tables import pairs, size
from loraserve.errors import InvalidRequest, LoraserveError

if TYPE_CHECKING:
    from loraserve.train.options import TrainOptions

BAR, LABEL = 40, 14
"""Columns of a bar, and of what stands before it; a line has 80."""


def survey(options: BaseOptions, train_options: "TrainOptions", *, as_json: bool) -> None:
    """Print what is in the data and what training would make of it.

    Raises:
        DataError: training would refuse the data; everything is printed before.
        InvalidRequest: no plan fits the memory budget; everything else is printed before.
    """
    from loraserve.train.data import Encoder
    from loraserve.train.initial import start
    from loraserve.train.memory import plan_for
    from loraserve.train.rows import DataFile
    from loraserve.train.survey import Survey, planned_steps
    from loraserve.train.tokens import refusal

    base = open_base(options, weights=False)
    data = DataFile(train_options.data)
    encoder = Encoder(base.tokenizer, base.template, base.config.max_position_embeddings, train_options.max_seq_len)
    found = Survey().read(
        data, encoder, lambda text: click.echo(text, err=True), pairs=train_options.objective == "dpo"
    )
    error: LoraserveError | None = refusal(data.name, found.rejections, found.accepted, train_options.on_bad_row)
    memory = None
    if found.accepted:
        try:
            adapter = start(train_options, base, open_registry(options, base))
            batch = found.longest(train_options.batch_size)
            memory = plan_for(base, [adapter.weights], batch, train_options.memory_budget, train_options.quantize)
        except InvalidRequest as refused:
            error = error or refused
    facts = {
        "data": data.name,
        "num_bytes": data.num_bytes,
        "sha256": data.sha256,
        "base": base.name,
        "survey": found.facts(),
        "run": planned_steps(train_options, found.accepted),
        "memory": dataclasses.asdict(memory) if memory else None,
    }
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    if error:
        raise error


def _show(facts: dict[str, Any]) -> None:
    """Print the facts of a dry run, at most 80 columns wide."""
    click.secho(f"{facts['data']}, {size(facts['num_bytes'])}, for {facts['base']}", bold=True)
    pairs(_rows(facts["survey"]))
    _histogram(facts["survey"]["histogram"])
    _reasons(facts["survey"])
    _section("Run")
    pairs([*_steps(facts["run"]), *_memory(facts["memory"])])


def _rows(survey: dict[str, Any]) -> list[tuple[str, object]]:
    accepted, tokens, supervised = survey["accepted"], survey["tokens"], survey["supervised_tokens"]
    entries: list[tuple[str, object]] = [("rows", f"{accepted:,} accepted, {survey['rejected']:,} rejected")]
    if not accepted:
        return entries
    turns = {int(answers): rows for answers, rows in survey["answers_per_row"].items()}
    more = sum(rows for answers, rows in turns.items() if answers > 2)
    counts = [(turns.get(1, 0), "with one answer"), (turns.get(2, 0), "with two"), (more, "with more")]
    lengths = survey["lengths"]
    entries += [
        ("formats", ", ".join(f"{name} {rows:,}" for name, rows in survey["formats"].items())),
        ("turns", ", ".join(f"{rows:,} {what}" for rows, what in counts if rows)),
        ("tokens", f"{tokens:,}, {supervised:,} of them supervised ({100 * supervised / tokens:.1f}%)"),
        (
            "per row",
            f"{lengths['median']:,} in the middle, 95% up to {lengths['p95']:,}, longest {lengths['longest']:,}",
        ),
        ("truncated", f"{survey['truncated']:,} rows, {survey['tokens_cut']:,} tokens cut off"),
        ("duplicates", f"{survey['duplicates']:,} rows repeat an earlier one"),
        (
            "ambiguous",
            f"{survey['ambiguous_prompts']:,} prompts have different answers, in {survey['ambiguous_rows']:,} rows",
        ),
    ]
    entries += [
        ("not shown", f"{name!r} of {rows:,} rows, by the chat template")
        for name, rows in survey["not_in_template"].items()
    ]
    return entries


def _histogram(bins: list[dict[str, int]]) -> None:
    if not bins:
        return
    _section("Tokens per row")
    most = max(each["rows"] for each in bins)
    for each in bins:
        bar = "█" * (BAR * each["rows"] // most) or ("▏" if each["rows"] else "")
        label = f"{each['from']:,}-{each['to']:,}"
        click.echo(f"  {label:>{LABEL}}  {bar}{' ' * bool(bar)}{each['rows']:,}")


def _reasons(survey: dict[str, Any]) -> None:
    if not survey["rejected"]:
        return
    _section("Rejected")
    for reason in survey["reasons"]:
        lines = ", ".join(map(str, reason["first_lines"]))
        more = (
            f" and {reason['rows'] - len(reason['first_lines']):,} more"
            if reason["rows"] > len(reason["first_lines"])
            else ""
        )
        text = f"{'line' if reason['rows'] == 1 else 'lines'} {lines}{more}: {reason['reason']}"
        click.echo(click.wrap_text(text, width=80, initial_indent="  ", subsequent_indent="    "))
    if survey["rejected_otherwise"]:
        click.echo(f"  {survey['rejected_otherwise']:,} more with other problems")


def _steps(run: dict[str, Any]) -> list[tuple[str, object]]:
    held_out = f", {run['val_rows']:,} for validation" if run["val_rows"] else ""
    window = run["accumulation_steps"]
    each = "one a step" if window == 1 else f"of {window:,} steps each"
    return [
        ("rows", f"{run['train_rows']:,} to train on{held_out}"),
        ("batch", f"{run['batch_size']:,} rows a step"),
        ("steps", f"{run['steps_per_epoch']:,} an epoch, {run['steps']:,} in {run['epochs']:,} epochs"),
        ("updates", f"{run['updates']:,}, {each}"),
    ]


def _memory(plan: dict[str, Any] | None) -> list[tuple[str, object]]:
    if plan is None:
        return []
    passes = f"in passes of up to {plan['max_rows']:,} tokens" if plan["max_rows"] else "in whole batches"
    again = ", with checkpointing" if plan["checkpointing"] else ""
    bits = f", the base in {plan['quantize']}" if plan["quantize"] else ""
    return [("memory", f"about {size(plan['peak'])} at the peak, {passes}{again}{bits}")]


def _section(title: str) -> None:
    click.secho(f"\n{title}", bold=True)
