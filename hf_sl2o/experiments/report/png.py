"""The figures of a report as PNG files, drawn by matplotlib."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..figures import canvas
from .parts import Bars, Chart, Report
from .svg import COLOURS, DASHES, axes_of

# Those of the page, in the light.
_COLOURS = ("#c2410c", "#0072b2", "#00805a", "#b0508c", "#a87400", "#3a9bd9", "#7a4b2a", "#6b7280")


def write_figures(report: Report, folder: str | Path) -> list[Path]:
    """Writes each figure as NUMBER-TITLE.png, and returns the files.

    Raises:
        `ImportError`: matplotlib is missing (`pip install "hf-sl2o[analysis]"`).
    """
    made = []
    for index, part in enumerate(report.figures(), 1):
        name = re.sub(r"[^a-z0-9]+", "-", part.title.lower()).strip("-")[:60]
        path = Path(folder) / f"{index:02d}-{name}.png"
        height = 4.6 if isinstance(part, Chart) else 1.4 + 0.34 * len(part.bars)
        with canvas(path, figsize=(7.2, height)) as (_, axes):
            (_bars if isinstance(part, Bars) else _chart)(axes[0][0], part)  # type: ignore[arg-type]
        made.append(path)
    return made


def _dashes(style: int) -> Any:
    dashes = DASHES[style % len(DASHES)]
    return (0, tuple(map(float, dashes.split()))) if dashes else "-"


def _chart(axis: Any, chart: Chart) -> None:
    x_axis, y_axis = axes_of(chart)
    for line in chart.faint:
        axis.plot([x for x, _ in line], [y for _, y in line], color="#999999", linewidth=0.6)
    for curve in chart.curves:
        xs, colour = [x for x, _ in curve.points], _COLOURS[curve.style % COLOURS]
        look = {
            "linestyle": "" if chart.dots else _dashes(curve.style),
            "marker": "o" if chart.dots else "",
            "linewidth": 2.4 if curve.ours else 1.2,
            "color": colour,
        }
        axis.plot(xs, [y for _, y in curve.points], label=_plain(curve.name), zorder=3 + curve.ours, **look)
        if curve.low:
            axis.fill_between(xs, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
    axis.set(title=_plain(chart.title), xlabel=_plain(chart.x), ylabel=_plain(chart.y))
    axis.set(xlim=(x_axis.low, x_axis.high), yscale="log" if y_axis.log else "linear", ylim=(y_axis.low, y_axis.high))
    if y_axis.log:
        axis.yaxis.set_major_formatter("{x:.2g}")
        axis.yaxis.set_minor_formatter("{x:.2g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.grid(alpha=0.3, which="both")
    if len(chart.curves) > 1:
        axis.legend(fontsize=8)


def _bars(axis: Any, bars: Bars) -> None:
    names = [_plain(bar.name) for bar in bars.bars]
    for place, bar in enumerate(bars.bars):
        if bar.value is None:
            axis.text(0, place, f" {bar.nothing}", va="center")
            continue
        ranged = bar.low is not None and bar.high is not None
        error = [[bar.value - (bar.low or 0.0)], [(bar.high or 0.0) - bar.value]] if ranged else None
        axis.barh(place, bar.value, 0.6, xerr=error, color=_COLOURS[bar.style % COLOURS])
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set(title=_plain(bars.title), xlabel=_plain(bars.x))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3, axis="x")


def _plain(text: str) -> str:
    """Text from a file: a dollar sign would begin a formula, an underscore hide a name from the legend."""
    words = (text if len(text) <= 60 else f"{text[:57]}...").replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words
