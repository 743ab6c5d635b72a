"""Checked values from files: whatever is not there is left out, whatever is wrong is refused in a sentence."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeGuard

from ...foundation.checked import shown
from ..environment import portable
from .parts import Point, Table, number


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number; true and false are none, nor is an integer that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def curve(value: Any, where: str) -> list[Point]:
    """Returns (x, y) pairs from JSON, of longer entries the first two; null, as NaN, is a value that is not finite.

    Raises:
        `ValueError`: it is no list of pairs of numbers, or x is not finite or does not ascend.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where} is {shown(value)}, expected a list of [step, value]; restore the file")
    made: list[Point] = []
    for pair in value:
        whole = isinstance(pair, list) and len(pair) > 1 and is_number(pair[0])
        if not whole or not (pair[1] is None or is_number(pair[1])):
            raise ValueError(f"{where} has the entry {shown(pair)}, expected [step, value]; restore the file")
        x, y = float(pair[0]), math.nan if pair[1] is None else float(pair[1])
        if not math.isfinite(x) or (made and x <= made[-1][0]):
            raise ValueError(f"{where} has the step {shown(pair[0])} after {shown(made[-1:])}; restore the file")
        made.append((x, y))
    return made


def curves(value: Any, where: str) -> list[list[Point]]:
    """Returns one curve a seed; none of a value that is not there."""
    if not value:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{where} is {shown(value)}, expected a list with a curve for each seed; restore the file")
    return [curve(entry, f"{where}[{index}]") for index, entry in enumerate(value) if entry]


def mapping(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Returns an object, empty where there is none; raises `ValueError` where it is something else."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} has {key!r}: {shown(value)}, expected an object; restore the file")
    return value


def numbers(values: Any) -> list[float]:
    """Returns a list of finite numbers, empty if it is something else."""
    if not isinstance(values, list) or not all(is_number(value) and math.isfinite(value) for value in values):
        return []
    return [float(value) for value in values]


def flat(data: Any, head: str = "") -> Iterable[tuple[str, Any]]:
    """Yields each value of nested objects with the keys that lead to it; a short list is one value."""
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from flat(value, f"{head}.{key}" if head else str(key))
    else:
        yield head, data


def said(value: Any) -> str:
    """A value of a setting as text; of a path its last part alone, as results name no folder of a machine."""
    value = portable(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if is_number(value):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(said, value[:12])) + (f" and {len(value) - 12:,} more" if len(value) > 12 else "")
    return str(value)


def settings(data: Any, folded: str = "") -> list[Table]:
    """A table of names and values; none of nothing."""
    rows = [(key, said(value)) for key, value in flat(data) if key]
    return [Table((), rows, folded)] if rows else []


def last_part(path: Any) -> str:
    """Of a path its last part."""
    return PurePath(str(path)).name or "output"


def entries(log: Any, where: str) -> list[dict[str, Any]]:
    """Returns a log, a list of objects; raises `ValueError` if it is something else."""
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{where} is {shown(log)}, expected a list of objects; restore the file")
    return log


def series(log: Sequence[Mapping[str, Any]], key: str, x: str = "step") -> list[Point]:
    """(x, value) of all entries of a log that have both; of two at the same x the later one, as a resumed run logs."""
    found: dict[float, float] = {}
    for entry in log:
        if is_number(entry.get(x)) and is_number(entry.get(key)) and math.isfinite(entry[x]):
            found[float(entry[x])] = float(entry[key])
    return sorted(found.items())
