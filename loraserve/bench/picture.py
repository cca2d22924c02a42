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
LINE_COLORS = ("#08519c", "#d94801")
FAR_APART = 4
"""Times the one line that the other is, from which on they share no scale."""


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
    """Draw one sweep of what `scaling.run` returned as `about` as a PNG: its figure over x, a line per series.

    Lines that are far apart get a panel each, for every scale begins at 0.
    """
    from matplotlib.figure import Figure

    lines = {
        label: [(point["x"], point[line["figure"]]) for point in line["points"]]
        for label, line in sweep["lines"].items()
    }
    middles = [statistics.median(y for _, y in points) for points in lines.values()]
    apart = max(middles) > FAR_APART * min(middles)
    panels = [{label: points} for label, points in lines.items()] if apart else [lines]
    figure = Figure(figsize=(7, 4.4 if len(panels) == 1 else 2.7 * len(panels)), dpi=120, layout="constrained")
    colors = dict(zip(lines, LINE_COLORS, strict=False))
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0], panels, strict=True):
        _curves(axes, panel, colors)
        axes.set_ylabel(sweep["y"])
    axes.set_xlabel(sweep["x"])
    _footer(figure, {**about, "r": sweep["r"]})
    return _png(figure)


def _curves(axes: "Axes", lines: Mapping[str, Sequence[tuple[int, float]]], colors: Mapping[str, str]) -> None:
    """Lines over a logarithmic x; values stand above the first line, and below the second where there is room."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import NullLocator

    top = 1.15 * max(y for points in lines.values() for _, y in points)
    for (label, points), above in zip(lines.items(), (7, -13), strict=False):
        axes.plot(*zip(*points, strict=True), marker="o", color=colors[label], linewidth=1.8, label=label)
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "color": colors[label]}
        for x, y in points:
            if above > 0 or y > top / 12:
                text = axes.annotate(_short(y), (x, y), (0, above), **style)
                text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axes.set_xscale("log", base=2)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any(lines):
        axes.legend(frameon=False, loc="best")


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
