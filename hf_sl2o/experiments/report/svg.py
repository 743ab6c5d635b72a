"""Figures as SVG: text that stands in a page, without scripts. Places are in units of the viewBox."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from .axes import Axis, band, inside, limits_of, linear_ticks, log_ticks, thinned, tick_label
from .parts import Bar, Bars, Chart, Curve, Point, number

# As wide as a small phone, so that text has there the size that it says.
WIDTH, HEIGHT = 360.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 16.0, 8.0, 36.0
ROW = 26.0  # of a bar
# Dashes tell curves apart in print, colours (the page's classes c0 to c7) on a screen: together 40 styles.
COLOURS = 8
DASHES = ("", "6 3", "2 2", "8 3 2 3", "4 2 1 2")
MOST_TIPS = 400
_FARTHEST = 1e300


def escaped(text: object, most: int = 120) -> str:
    """Text from a file as HTML: no tag, no attribute, and not without end."""
    words = str(text)
    return html.escape(words if len(words) <= most else f"{words[: most - 3]}...", quote=True)


def style_of(style: int) -> str:
    """The attributes of a line of a style."""
    dashes = DASHES[style % len(DASHES)]
    return f'class="l c{style % COLOURS}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def width_of(ours: bool) -> str:
    return ' stroke-width="2.6"' if ours else ' stroke-width="1.4"'


def sample(curve: Curve) -> str:
    """A short piece of a curve, for the legend."""
    line = f'<line x1="1" y1="6" x2="29" y2="6" {style_of(curve.style)}{width_of(curve.ours)}/>'
    return f'<svg class="s" viewBox="0 0 30 12" aria-hidden="true">{line}</svg>'


def axes_of(chart: Chart) -> tuple[Axis, Axis]:
    """The axes x and y of a chart."""
    xs = [x for line in chart.lines() for x, _ in line if math.isfinite(x)]
    left, right = chart.x_limits or (min(xs, default=0.0), max(xs, default=1.0))
    if right <= left:
        left, right = left - 1.0, right + 1.0
    values = chart.spread()
    low, high = chart.limits or (0.0, 0.0)
    log = chart.log and (low > 0 if chart.limits else min(values, default=0.0) > 0)
    if chart.limits is None or not low < high:
        low, high = limits_of(values, log=log)
    # a range of more than all floats has no ticks
    left, right, low, high = (min(max(limit, -_FARTHEST), _FARTHEST) for limit in (left, right, low, high))
    return (Axis(left, right, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP, log))


def line_chart(chart: Chart, most: int = 240, *, tips: bool = True) -> str:
    """Draws a chart.

    Args:
        chart ([`Chart`]): The curves; each becomes one path with the class `l`, its band one with the class `b`.
        most (`int`, *optional*, defaults to 240): Points of a curve; of more, each stretch's lowest and highest.
        tips (`bool`, *optional*, defaults to `True`): Say the numbers of a point when the pointer is on it.
    """
    x_axis, y_axis = axes_of(chart)
    drawn = [*_grid(x_axis, y_axis, chart.x, chart.y)]
    short = [[line[i] for i in thinned(len(line), [y for _, y in line], most)] for line in chart.faint]
    faint = [_path(_placed(line, x_axis, y_axis)) for line in short]
    if any(faint):
        drawn.append(f'<path class="f" d="{"".join(faint)}"/>')
    behind, lines, points = [], [], []
    shown = 0
    for curve in chart.curves:
        kept = [i for i, (x, _) in enumerate(curve.points) if x_axis.low <= x <= x_axis.high]
        kept = [kept[i] for i in thinned(len(kept), [curve.points[i][1] for i in kept], most)]
        shown += len(kept)
        behind.append(_band(curve, kept, x_axis, y_axis))
        lines.append(_line(curve, kept, x_axis, y_axis, dots=chart.dots))
        points += [_tip(chart, curve, i, x_axis, y_axis) for i in kept]
    tipped = points if tips and shown <= MOST_TIPS * max(1, len(chart.curves) // 4) else []
    return _svg(chart.title, HEIGHT, [*drawn, *behind, *lines, *tipped])


def bar_chart(bars: Bars) -> str:
    """Draws bars; each is one rectangle with the class `r`, its range over seeds a thin line."""
    height = ROW * len(bars.bars) + 36.0
    values = [v for bar in bars.bars for v in (bar.value, bar.high) if v is not None and math.isfinite(v)]
    top = max(values, default=1.0) or 1.0
    axis = Axis(0.0, 1.12 * top, 10.0, WIDTH - RIGHT)
    bottom = ROW * len(bars.bars) + 4.0
    drawn = []
    for tick in linear_ticks(0.0, 1.12 * top, 5, whole=True):
        x = axis.at(tick)
        drawn.append(f'<line class="g" x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{bottom:.1f}"/>')
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 12:.1f}" text-anchor="middle">{tick_label(tick)}</text>')
    drawn.append(f'<text x="{WIDTH / 2:.0f}" y="{bottom + 27:.1f}" text-anchor="middle">{escaped(bars.x)}</text>')
    for index, bar in enumerate(bars.bars):
        drawn += _bar(bar, ROW * index + 2.0, axis)
    return _svg(bars.title, height, drawn)


def _bar(bar: Bar, y: float, axis: Axis) -> Iterable[str]:
    said = f"{bar.name}: {bar.nothing if bar.value is None else number(round(bar.value, 1))}"
    yield f'<text x="{axis.start:.1f}" y="{y + 10:.1f}">{escaped(said, 60)}</text>'
    if bar.value is None:
        return
    stop = axis.at(bar.value)
    tip = said if bar.low is None or bar.high is None else f"{said} ({number(bar.low)} to {number(bar.high)})"
    yield (
        f'<rect class="r c{bar.style % COLOURS}" x="{axis.start:.1f}" y="{y + 13:.1f}" '
        f'width="{max(stop - axis.start, 0.5):.1f}" height="7"><title>{escaped(tip)}</title></rect>'
    )
    if bar.low is not None and bar.high is not None and bar.low < bar.high:
        low, high, middle = axis.at(bar.low), axis.at(bar.high), y + 16.5
        yield f'<path class="w" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 3:.1f}v6M{high:.1f} '
        yield f'{middle - 3:.1f}v6"/>'


def _svg(title: str, height: float, drawn: Iterable[str]) -> str:
    name = escaped(title)
    return f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{name}">{"".join(drawn)}</svg>'


def _grid(x_axis: Axis, y_axis: Axis, x: str, y: str) -> Iterable[str]:
    """Frame, ticks and labels."""
    bottom, middle = y_axis.start, (y_axis.start + y_axis.stop) / 2
    for tick in linear_ticks(x_axis.low, x_axis.high, whole=True):
        place = x_axis.at(tick)
        yield f'<line class="g" x1="{place:.1f}" y1="{TOP}" x2="{place:.1f}" y2="{bottom}"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 14}" text-anchor="middle">{tick_label(tick)}</text>'
    for tick in log_ticks(y_axis.low, y_axis.high) if y_axis.log else linear_ticks(y_axis.low, y_axis.high):
        place = y_axis.at(tick)
        yield f'<line class="g" x1="{LEFT}" y1="{place:.1f}" x2="{x_axis.stop}" y2="{place:.1f}"/>'
        yield f'<text x="{LEFT - 4}" y="{place + 3.5:.1f}" text-anchor="end">{tick_label(tick)}</text>'
    yield f'<path class="a" d="M{LEFT} {TOP}V{bottom}H{x_axis.stop}"/>'
    yield f'<text x="{(LEFT + x_axis.stop) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escaped(x)}</text>'
    yield f'<text transform="translate(10 {middle:.0f}) rotate(-90)" text-anchor="middle">{escaped(y)}</text>'


def _placed(points: Iterable[Point], x_axis: Axis, y_axis: Axis) -> list[list[Point]]:
    """The parts of a line that are in the frame, in units of the viewBox."""
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in points if x_axis.low <= x <= x_axis.high]
    return inside(places, y_axis.stop, y_axis.start)


def _path(parts: Iterable[Sequence[Point]], close: str = "") -> str:
    """What a path's `d` says of lines; a point alone becomes a dot."""
    made = []
    for part in parts:
        places = [f"{x:.1f} {y:.1f}" for x, y in part]
        made.append(f"M{places[0]}" + ("".join(f"L{place}" for place in places[1:]) or "h0.1") + close)
    return "".join(made)


def _line(curve: Curve, kept: Sequence[int], x_axis: Axis, y_axis: Axis, *, dots: bool) -> str:
    parts = _placed((curve.points[i] for i in kept), x_axis, y_axis)
    d = _path([point] for part in parts for point in part) if dots else _path(parts)
    look = 'class="l c0" stroke-width="5"' if dots else f"{style_of(curve.style)}{width_of(curve.ours)}"
    return f'<path {look} d="{d}"><title>{escaped(curve.name)}</title></path>'


def _band(curve: Curve, kept: Sequence[int], x_axis: Axis, y_axis: Axis) -> str:
    if not curve.low:
        return ""
    xs = [x_axis.at(curve.points[i][0]) for i in kept]
    low, high = ([(x, y_axis.at(side[i])) for x, i in zip(xs, kept, strict=True)] for side in (curve.low, curve.high))
    d = _path(band(low, high, y_axis.stop, y_axis.start), "Z")
    return f'<path class="b c{curve.style % COLOURS}" d="{d}"/>' if d else ""


def _tip(chart: Chart, curve: Curve, index: int, x_axis: Axis, y_axis: Axis) -> str:
    """An unseen dot that says its numbers when the pointer is on it."""
    x, y = curve.points[index]
    place = y_axis.at(y)
    if not y_axis.stop <= place <= y_axis.start:  # NaN, too
        return ""
    said = f"{curve.name}, {chart.x} {number(x)}: {number(y)}"
    if curve.low and curve.low[index] < curve.high[index]:
        said += f" ({number(curve.low[index])} to {number(curve.high[index])})"
    return f'<circle cx="{x_axis.at(x):.1f}" cy="{place:.1f}" r="3"><title>{escaped(said)}</title></circle>'
