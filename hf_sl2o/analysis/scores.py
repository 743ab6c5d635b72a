"""How near an expression comes to the updates of a rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..rules.config import EXPRESSIONS
from ..rules.expressions import Node, parse


def values_of(node: Node, m: torch.Tensor, g: torch.Tensor) -> np.ndarray:
    """Values `(N,)`; `(k, N)` of a node whose numbers are tensors `(k, 1)`, which stands for k expressions."""
    value = torch.as_tensor(node._of(m, g), dtype=m.dtype).numpy()
    return value if value.shape[-1:] == m.shape else np.broadcast_to(value, (*value.shape[:-1], len(m)))


@dataclass(frozen=True)
class Fitted:
    """An expression for `RuleConfig(expression=text)`, its complexity, and its error on what it was fitted to."""

    text: str
    complexity: int
    mse: float

    def score(self, m: Any, g: Any, delta: Any) -> dict[str, float | None]:
        """Its mean squared error and Pearson's R on other samples, as [`score_expression`]."""
        return score_expression(self.text, m, g, delta)


def score_expression(text: str, m: Any, g: Any, delta: Any) -> dict[str, float | None]:
    """Scores an expression on samples of a rule.

    Args:
        text (`str`): The expression, or the name of one of Table 2 ([`EXPRESSIONS`]).
        m, g, delta (`np.ndarray` of shape `(N,)`, or what becomes one): m~, g~ and the update.

    Returns:
        `mse`, and `pearson_r`: None where the expression or delta is the same everywhere.

    Raises:
        `ValueError`: the text is no expression, the samples are not finite or of different lengths, or the expression
            is not finite at one of them.
    """
    samples = checked_samples(m, g, delta, least=1)
    node = parse(EXPRESSIONS.get(text, text))
    values = values_of(node, *map(torch.from_numpy, samples[:2]))
    wrong = ~np.isfinite(values)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"the expression {node} is {values[i]} at sample {i}, where m = {samples[0][i]:g} and g = "
            f"{samples[1][i]:g} ({wrong.sum():,} such in all); leave those out, or bound it, with tanh say"
        )
    with np.errstate(over="ignore"):  # an error of more than float64 holds is inf
        mse = float(np.square(values - samples[2]).mean())
    r = (
        None
        if 0 in (np.ptp(values), np.ptp(samples[2]))
        else float(np.corrcoef(values / np.abs(values).max(), samples[2])[0, 1])
    )
    return {"mse": mse, "pearson_r": r}


def checked_samples(m: Any, g: Any, delta: Any, least: int) -> list[np.ndarray]:
    """Returns float64 copies; raises `ValueError` on what is no sample of a rule."""
    arrays = []
    for name, given in (("m", m), ("g", g), ("delta", delta)):
        array = np.array(given.detach().cpu().double().numpy() if torch.is_tensor(given) else given, dtype=np.float64)
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}, expected (N,): a number a sample; flatten it")
        wrong = ~(np.abs(array) <= np.finfo(np.float32).max)
        if wrong.any():
            raise ValueError(f"{name} holds {array[wrong][0]}, expected finite numbers of fp32; leave out such")
        arrays.append(array)
    sizes = [len(array) for array in arrays]
    if len(set(sizes)) > 1:
        raise ValueError(f"m, g and delta have {sizes} numbers, expected as many of each: sample them together")
    if sizes[0] < least:
        raise ValueError(f"there are {sizes[0]} samples, expected at least {least}; the paper takes 10,000")
    return arrays
