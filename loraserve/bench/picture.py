"""Results as pictures: tokens a second and time to the first token by case and contestant, and curves of scaling."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "loraserve": "#08519c",
    "loraserve-http": "#6baed6",
    "peft": "#d94801",
    "vllm": "#31a354",
    "vllm-http": "#a1d99b",
    "llama-http": "#bcaed8",
}
"""Ours in blues; an engine and its server in two shades."""


def serve_picture(result: Mapping[str, Any]) -> bytes:
    """Draw what `serve.run` returned as a PNG: a bar per case and contestant on a logarithmic scale, with its value."""
    from matplotlib.figure import Figure

    cases = list(result["cases"].values())
    names = [name for name in COLORS if any(name in case["figures"] for case in cases)]
    width = 2.5 + max(len(cases), 2) * (0.55 + 0.36 * len(names))
    figure = Figure(figsize=(width, 8), dpi=120, layout="constrained")
    speed, wait = figure.subplots(2)
    batches = [case for case in cases if case["kind"] == "batch"]
    _bars(speed, batches, names, "tokens_per_s", "output tokens/s", "more is better")
    _bars(wait, cases, names, "ttft_ms", "time to first token, ms", "less is better")
    figure.legend(*wait.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    _footer(figure, result)
    return _png(figure)


def _bars(
    axes: "Axes", cases: Sequence[Mapping[str, Any]], names: Sequence[str], key: str, label: str, hint: str
) -> None:
    """A group of bars per case, one place per contestant: a gap is a contestant that was skipped."""
    step = 0.84 / len(names)
    for i, name in enumerate(names):
        places = [at + (i - (len(names) - 1) / 2) * step for at, case in enumerate(cases) if name in case["figures"]]
        values = [case["figures"][name][key] for case in cases if name in case["figures"]]
        bars = axes.bar(places, values, step * 0.92, color=COLORS[name], label=name)
        axes.bar_label(bars, [_short(value) for value in values], fontsize=7, padding=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [_title(case) for case in cases])
    axes.set_xlim(-0.5, max(len(cases), 1) - 0.5)
    axes.margins(y=0.12)
    axes.set_ylabel(label)
    axes.set_title(hint, loc="right", fontsize=9, color="#555555")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _title(case: Mapping[str, Any]) -> str:
    first, _, rest = case["name"].partition(", ")
    return f"{first}\n{rest}" if rest else f"{first}\n{DETAILS.get(case['kind'], '{prompt} tokens').format(**case)}"


DETAILS = {"cold": "never touched before", "conversation": "second turn"}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def curve_picture(sweep: Mapping[str, Any], about: Mapping[str, Any]) -> bytes:
    """Draw one sweep of what `scaling.run` returned as `about` as a PNG: its figure over x, a line per series."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines = {label: (line["points"], line["figure"]) for label, line in sweep["lines"].items()}
    heights = [point[key] for points, key in lines.values() for point in points]
    for (label, (points, key)), color in zip(lines.items(), SHADES, strict=False):
        xs, ys = [point["x"] for point in points], [point[key] for point in points]
        axes.plot(xs, ys, marker="o", color=color, linewidth=1.8, label=label)
        for x, y in zip(xs, ys, strict=True):
            axes.annotate(_short(y), (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=7, color=color)
    axes.set_xscale("log", base=2)
    ticks = sorted({point["x"] for points, _ in lines.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if max(heights) > 10 * min(heights) and len(lines) > 1:  # lines far apart
        axes.set_yscale("log")
        axes.set_ylim(min(heights) / 2, max(heights) * 2)
    else:
        axes.set_ylim(0, max(heights) * 1.15)
    axes.set_xlabel(sweep["x"])
    axes.set_ylabel(sweep["y"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any(lines):
        axes.legend(frameon=False)
    _footer(figure, about)
    return _png(figure)


SHADES = ("#08519c", "#d94801")


def _footer(figure: "Figure", about: Mapping[str, Any]) -> None:
    machine = about["machine"]
    text = (
        f"random minimind-3, {about['dtype']}, rank {about['r']} · {machine['cores']} cores of {machine['cpu']} · "
        f"medians of {about['repeats']}"
    )
    figure.supxlabel(text, fontsize=8, color="#555555")


def _png(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
