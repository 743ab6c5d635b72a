"""Arithmetic on curves, lists of (step, loss)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def steps_to(evals: Sequence[Sequence[float]], target: float) -> int | None:
    """Returns the first evaluated step whose loss is at most `target`, or None; a target that is not finite has none.

    Args:
        evals (`Sequence[tuple[int, float]]`): (step, loss), ascending.

    Example:

    ```python
    >>> from hf_sl2o.experiments.curves import steps_to
    >>> steps_to([(0, 4.0), (10, 2.0), (20, 1.5)], 2.0)
    10
    ```
    """
    return next((int(step) for step, loss in evals if loss <= target < math.inf), None)


def mean_steps_to(curves: Sequence[Sequence[Sequence[float]]], target: float) -> float | None:
    """Mean over seeds of [`steps_to`]; None if one seed never gets there."""
    steps = [steps_to(curve, target) for curve in curves]
    found = [step for step in steps if step is not None]
    return sum(found) / len(found) if found and len(found) == len(steps) else None


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Averages (step, loss) curves over seeds, at the steps that all of them have."""
    values = [{step: loss for step, loss in curve} for curve in curves]
    steps = [step for step, _ in curves[0] if all(step in of for of in values)]
    return [[step, sum(of[step] for of in values) / len(values)] for step in steps]
