"""Mathematics of a figure: limits, ticks, where a value lies, and what of a line is inside the frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .parts import Limits, Point


class Axis(NamedTuple):
    """Maps values from `low` to `high` to places from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value; a value that is not finite, or not above 0 on a logarithmic axis, has none: NaN."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def limits_of(values: Sequence[float], *, log: bool = False) -> Limits:
    """Limits around finite values with a margin of 4 %; (0, 1) where there are none."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.1
        return low / margin, high * margin
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def linear_ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """At most `most` round numbers from `low` to `high`, evenly spaced: 1, 2 or 5 times a power of ten apart.

    With `whole` they are whole numbers.

    Example:

    ```python
    >>> from hf_sl2o.experiments.report.axes import linear_ticks
    >>> linear_ticks(0, 250)
    [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]
    ```
    """
    power = math.floor(math.log10((high - low) / most))
    power = max(power, 0) if whole else power
    for apart in (factor * 10.0**exponent for exponent in range(power, power + 3) for factor in (1, 2, 5)):
        first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
        if last - first < most:
            return [float(f"{index * apart:.12g}") for index in range(first, last + 1)]
    raise ValueError(f"no ticks from {low} to {high}")  # not reached: three decades hold any spacing


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers for a logarithmic axis: 1, 2 and 5 times powers of ten, or fewer; within a decade even ones.

    Example:

    ```python
    >>> from hf_sl2o.experiments.report.axes import log_ticks
    >>> log_ticks(0.5, 60), log_ticks(1.6, 7)
    ([1.0, 3.0, 10.0, 30.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    ```
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [tick for power in powers for f in factors if low <= (tick := float(f"{f}e{power}")) <= high]
        if 3 <= len(found) <= most:
            return found
    if len(found) > most:
        return found[:: -(-len(found) // most)]
    return [tick for tick in linear_ticks(low, high, most) if tick > 0]


def tick_label(value: float) -> str:
    """`1,200`, `0.01`, `1e-06`."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:g}"


def thinned(count: int, values: Sequence[float], most: int) -> list[int]:
    """Which of `count` points are drawn: all, or of equal stretches the lowest and the highest, and both ends.

    So a spike is still seen. Points that are not finite are kept where a whole stretch has no other.
    """
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for index in range(stretches):
        part = range(index * count // stretches, (index + 1) * count // stretches)
        finite = [i for i in part if math.isfinite(values[i])] or list(part)
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def pieces(line: Sequence[Point]) -> list[list[Point]]:
    """The parts of a line between points that are not finite."""
    made: list[list[Point]] = [[]]
    for x, y in line:
        if math.isfinite(x) and math.isfinite(y):
            made[-1].append((x, y))
        elif made[-1]:
            made.append([])
    return [piece for piece in made if piece]


def with_crossings(line: Sequence[Point], *levels: float) -> list[Point]:
    """The line with a point added wherever it crosses one of the levels."""
    made = list(line[:1])
    for (x, y), (next_x, next_y) in zip(line, line[1:], strict=False):
        shares = [(level - y) / (next_y - y) for level in levels if min(y, next_y) < level < max(y, next_y)]
        made += [(x + share * (next_x - x), y + share * (next_y - y)) for share in sorted(shares)]
        made.append((next_x, next_y))
    return made


def inside(line: Sequence[Point], low: float, high: float) -> list[list[Point]]:
    """The parts of a line whose y is from `low` to `high`, cut where it leaves them.

    Example:

    ```python
    >>> from hf_sl2o.experiments.report.axes import inside
    >>> inside([(0, 0), (1, 4), (2, 0)], 0, 2)
    [[(0, 0), (0.5, 2.0)], [(1.5, 2.0), (2, 0)]]
    ```
    """
    slack = 1e-9 * max(abs(low), abs(high))
    made: list[list[Point]] = []
    for piece in pieces(line):
        points = [
            (x, y if low - slack <= y <= high + slack else math.nan) for x, y in with_crossings(piece, low, high)
        ]
        made += pieces(points)
    return made


def band(low: Sequence[Point], high: Sequence[Point], least: float, most: float) -> list[list[Point]]:
    """Closed polygons between two lines with the same x, cut at `least` and `most`; none where one is not finite."""
    finite = [math.isfinite(a) and math.isfinite(b) for (_, a), (_, b) in zip(low, high, strict=True)]
    made: list[list[Point]] = []
    for first in range(len(finite)):
        if not finite[first] or (first and finite[first - 1]):
            continue
        last = next((i for i in range(first, len(finite)) if not finite[i]), len(finite))
        edges = [
            [(x, min(max(y, least), most)) for x, y in with_crossings(line[first:last], least, most)]
            for line in (low, high)
        ]
        if last - first > 1:
            made.append([*edges[0], *reversed(edges[1])])
    return made
