"""Numbers and tensors that come from outside, checked for type and range in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_integer(name: str, value: Any, least: int = 0, most: int = 1 << 53) -> None:
    """Raises `ValueError` unless `value` is an `int` (no `bool`, no float) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, expected an integer from {least} to {most}")


def check_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> None:
    """Raises `ValueError` unless `value` is a finite `float` or `int` (no `bool`) in the range."""
    bounds = [("above", above), ("at least", least), ("at most", most)]
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    expected = f"expected a finite number {wanted}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {shown(value)}, {expected}")
    try:
        number = float(value)
    except OverflowError:  # an int of hundreds of digits
        number = math.inf
    inside = (above is None or number > above) and (least is None or number >= least)
    if not (math.isfinite(number) and inside and (most is None or number <= most)):
        raise ValueError(f"{name} is {shown(value)}, {expected}")


def check_flag(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a `bool`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, expected True or False")


def shown(value: Any) -> str:
    """Returns `repr(value)`, cut to a line."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a {type(value).__name__} of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_float(tensor: torch.Tensor, what: str) -> None:
    """Raises `ValueError` unless `tensor` is fp16, bf16, fp32 or fp64 and holds no NaN or Inf, in fp32 either.

    A row at a time, so that no copy of a large tensor is made.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{what} has dtype {tensor.dtype}, expected one of {FLOATS}; restore it from its source")
    for row in torch.atleast_2d(tensor):
        values = row if row.dtype == torch.float64 else row.float()
        if row.numel() and not bool(values.abs().max() <= torch.finfo(torch.float32).max):
            raise ValueError(f"{what} holds NaN or Inf; restore it from its source")


def check_shapes(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str, remedy: str
) -> None:
    """Raises `ValueError` unless `found` has the names and shapes of `expected`; names the first difference."""
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected:
            state = "lacks" if name in expected else "has an unknown"
            raise ValueError(f"{where} {state} tensor {name!r}; {remedy}")
        if found[name].shape != expected[name].shape:
            raise ValueError(
                f"{name!r} in {where} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}; "
                f"{remedy}"
            )
