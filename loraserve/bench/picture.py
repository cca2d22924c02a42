"""Results as pictures: tokens a second and time to the first token by case and contestant, and curves of scaling."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "loraserve": "#08519c",
    "peft": "#8c8c8c",
    "vllm": "#b3b3b3",
    "loraserve-http": "#4292c6",
    "vllm-http": "#b3b3b3",
    "llama-http": "#d0d0d0",
}
"""In the order in which they stand: in process, then over HTTP. Ours in blue, the others in greys."""
ROWS = {
    "batch": (
        ("tokens_per_s", "output tokens/s, more is better"),
        ("ttft_ms", "time to first token, ms, less is better"),
    ),
    "cold": (("warm_ttft_ms", "first token, adapter in use, ms"), ("ttft_ms", "first token, cold adapter, ms")),
    "conversation": (("first_ttft_ms", "first token, first turn, ms"), ("ttft_ms", "first token, second turn, ms")),
}
"""Per kind of case: what stands on the left and on the right."""
OWN_SCALE = ("batch",)
"""Kinds whose two figures are not of one unit."""


def serve_picture(result: Mapping[str, Any]) -> bytes:
    """Draw what `serve.run` returned as a PNG: a row per case, a bar per contestant, speed left and waiting right."""
    from matplotlib.figure import Figure

    cases = list(result["cases"].values())
    names = [name for name in COLORS if any(name in case["figures"] for case in cases)]
    places = [i + (0.5 if name.endswith("-http") else 0.0) for i, name in enumerate(names)]
    figure = Figure(figsize=(11, 0.9 + len(cases) * (0.5 + 0.19 * len(names))), dpi=120, layout="constrained")
    for case, panels in zip(cases, figure.subplots(len(cases), 2, squeeze=False), strict=True):
        rows = {name: case["figures"].get(name) for name in names}
        for axes, (key, title) in zip(panels, ROWS[case["kind"]], strict=True):
            _bars(axes, rows, places, key)
            axes.set_title(title, loc="left", fontsize=8, color="#555555", pad=3)
        panels[0].set_ylabel(_title(case), rotation=0, ha="right", va="center", labelpad=8, fontsize=9, weight="bold")
        panels[1].set_yticklabels([])
        if case["kind"] not in OWN_SCALE:
            furthest = max(axes.get_xlim()[1] for axes in panels)
            for axes in panels:
                axes.set_xlim(0, furthest)
    _footer(figure, result)
    return _png(figure)


def _bars(axes: "Axes", rows: Mapping[str, Mapping[str, float] | None], places: Sequence[float], key: str) -> None:
    """A horizontal bar per contestant with its value; the word `skipped` for one that has none."""
    most = max((row[key] for row in rows.values() if row), default=1.0)
    for place, (name, row) in zip(places, rows.items(), strict=True):
        if row:
            axes.barh(place, row[key], 0.82, color=COLORS[name])
        text, at = (_short(row[key]), row[key]) if row else ("skipped", 0.0)
        style: dict[str, Any] = {"weight": "bold"} if name.startswith("loraserve") else {}
        style |= {"fontsize": 8, "va": "center", "color": "black" if row else "#999999"}
        axes.annotate(text, (at, place), (3, 0), textcoords="offset points", **style)
    axes.set_yticks(places, list(rows), fontsize=8)
    axes.set_ylim(max(places) + 0.6, -0.6)
    axes.set_xlim(0, most * 1.12)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _title(case: Mapping[str, Any]) -> str:
    return str(case["name"]).replace(", ", "\n").replace(" ", "\u00a0")


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
    for (label, (points, key)), color, above in zip(lines.items(), SHADES, (7, -13), strict=False):
        xs, ys = [point["x"] for point in points], [point[key] for point in points]
        axes.plot(xs, ys, marker="o", color=color, linewidth=1.8, label=label)
        for x, y in zip(xs, ys, strict=True):
            axes.annotate(
                _short(y), (x, y), (0, above), textcoords="offset points", ha="center", fontsize=7, color=color
            )
    axes.set_xscale("log", base=2)
    ticks = sorted({point["x"] for points, _ in lines.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    middles = [statistics.median(point[key] for point in points) for points, key in lines.values()]
    if max(middles) > 4 * min(middles):  # lines far apart
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
