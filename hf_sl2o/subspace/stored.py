"""Layouts and spans that come from a file: JSON of any shape becomes what it should be, or one sentence."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..foundation.checked import check_float, shown
from .layout import Layout

# The most scalars of a model: what is counted of them fits in 64 bits.
_MOST = 1 << 48
# Columns that are checked at a time: tensors may be views of a file that memory does not hold.
CHECKED_COLUMNS = 1 << 20


def stored_layout(data: Any, where: str) -> Layout:
    """Returns the layout that JSON `data` describes.

    Raises:
        `ValueError`: it describes none; says what is wrong with the layout in `where`.
    """

    def malformed(what: str) -> ValueError:
        return ValueError(f"the layout in {where} is malformed: {what}; restore it from its source")

    if not isinstance(data, dict) or set(data) != {"names", "shapes"}:
        raise malformed(f'it is {shown(data)}, expected an object with "names" and "shapes"')
    names, shapes = data["names"], data["shapes"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise malformed(f"names are {shown(names)}, expected a list of strings")
    if not isinstance(shapes, list) or not all(_is_shape(shape) for shape in shapes):
        raise malformed(f"shapes are {shown(shapes)}, expected a list of lists of integers of at least 0")
    if sum(math.prod(shape) for shape in shapes) > _MOST:
        raise malformed(f"its shapes have more than {_MOST} scalars")
    try:
        return Layout(tuple(names), tuple(map(tuple, shapes)))
    except (ValueError, TypeError) as error:
        raise malformed(str(error)) from error


def stored_spans(data: Any, dim: int, where: str) -> list[tuple[int, int]]:
    """Returns the ranges of coefficients that JSON `data` lists; raises `ValueError` as above."""
    if isinstance(data, list) and all(_is_shape(pair) and len(pair) == 2 for pair in data):
        spans = [(start, stop) for start, stop in data]
        if all(start < stop <= dim for start, stop in spans):
            return spans
    raise ValueError(
        f"config.json in {where} is malformed: spans are {shown(data)}, expected pairs of integers within (0, {dim}); "
        "restore it from its source"
    )


def check_names(found: dict[str, torch.Tensor], expected: set[str], optional: set[str], where: str) -> None:
    """Raises `ValueError` unless a file has the tensors `expected`, and none besides those and `optional`."""
    if different := sorted((set(found) ^ expected) - optional):
        state = "lacks" if different[0] in expected else "has an unknown"
        raise ValueError(f"model.safetensors in {where} {state} tensor {different[0]!r}; restore it from its source")


def check_directions(tensor: torch.Tensor, what: str) -> None:
    """Raises `ValueError` unless `tensor` is of floats, and finite ones; of a large one some columns at a time."""
    for part in torch.atleast_1d(tensor).split(CHECKED_COLUMNS, dim=-1):
        check_float(part, what)


def _is_shape(data: Any) -> bool:
    return isinstance(data, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= _MOST for size in data
    )
