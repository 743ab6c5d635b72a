"""What a report consists of: sections of text, tables and figures. The page and PNG files are made from the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line, with a band around it where there are several seeds.

    Args:
        name (`str`): For the legend.
        points (`Sequence[Point]`): (x, y), x ascending. The line has a gap where y is not finite.
        low, high (`Sequence[float]`, *optional*): The band's limits, one for each point.
        style (`int`, *optional*, defaults to 0): Which colour and dashes.
        ours (`bool`, *optional*, defaults to `False`): Drawn thicker.
    """

    name: str
    points: Sequence[Point]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0
    ours: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves in a frame.

    Args:
        title, x, y (`str`): Heading, and the labels of the axes with their units.
        curves (`Sequence[Curve]`): With their names in the legend.
        limits (`Limits`, *optional*): Of y; by default all finite values fit.
        x_limits (`Limits`, *optional*): Of x, likewise.
        log (`bool`, *optional*, defaults to `False`): A logarithmic y axis, where all of y is above 0.
        faint (`Sequence[Sequence[Point]]`, *optional*): Lines without a name behind the others.
        dots (`bool`, *optional*, defaults to `False`): Points alone, not joined by a line.
        note (`str`, *optional*): Stands below.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    limits: Limits | None = None
    x_limits: Limits | None = None
    log: bool = False
    faint: Sequence[Sequence[Point]] = ()
    dots: bool = False
    note: str = ""

    def lines(self) -> Iterator[Sequence[Point]]:
        yield from (curve.points for curve in self.curves)
        yield from self.faint

    def spread(self) -> list[float]:
        """All finite y, those of the bands too."""
        values = [y for line in self.lines() for _, y in line]
        values += [y for curve in self.curves for y in (*curve.low, *curve.high)]
        return [y for y in values if math.isfinite(y)]


@dataclass(frozen=True)
class Bar:
    """A value with the range over seeds; None: there is no value, and `nothing` says why."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    style: int = 0
    nothing: str = "never"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0; `x` is their label with its unit."""

    title: str
    x: str
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column is left-aligned. A `folded` one is opened by a click."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[str | Chart | Bars | Table]


@dataclass(frozen=True)
class Report:
    """All of a page: which kind of output it shows, its name, and what is said of it."""

    kind: str
    title: str
    sections: Sequence[Section]

    def figures(self) -> list[Chart | Bars]:
        """The figures in their order."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Chart | Bars)]


def sections(*made: tuple[str, Iterable[str | Chart | Bars | Table]]) -> list[Section]:
    """Sections from (title, parts); those without parts are left out."""
    kept = [Section(title, list(parts)) for title, parts in made]
    return [section for section in kept if section.parts]


# Text


def number(value: float | None) -> str:
    """Four digits, with commas between thousands.

    Example:

    ```python
    >>> from hf_sl2o.experiments.report.parts import number
    >>> number(1.68341), number(5200), number(12345.6), number(0.00001), number(None)
    ('1.683', '5,200', '12,346', '1e-05', '-')
    ```
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share of 1 as per cent with two digits after the point."""
    return f"{100 * share:.2f}\u00a0%"


def size(count: float | None) -> str:
    """Bytes in three digits; 1 MB is 1e6."""
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def with_range(mean: float, values: Sequence[float]) -> str:
    """A mean, and behind it the lowest and the highest value, where they differ: `1.670 (1.666 to 1.677)`."""
    if not all(map(math.isfinite, (mean, *values))):
        return "not finite"
    places = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 3
    low, high = (f"{value:,.{places}f}" for value in (min(values), max(values)))
    return f"{mean:,.{places}f}" + (f" ({low} to {high})" if low != high else "")
