"""The step sizes of our optimizers, and what becomes of a learning rate that was written for Adam."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from transformers import TrainingArguments

logger = logging.getLogger(__name__)

#: Our `optim` names and the step size of a user who sets none. 1.0 is the step size a rule was meta-trained at, and
#: the paper's for SGD in the subspace (supplement, Table 1); 0.3 is what validation chose for AdamW in whitened units
#: (recipes/results).
OPTIMIZERS = {"sl2o": 1.0, "subspace_adamw": 0.3, "subspace_sgd": 1.0}
#: Below this share of the own step size a rate is one of Adam's scale, which counts in other units.
SMALLEST_SHARE = 1 / 20


class OwnStepSize(float):
    """A learning rate that nobody has set: it follows the optimizer, also where that is replaced by another one.

    Made by `of`. A search casts what it tries to the type of what was there before: that is set, and a plain number.
    """

    def __new__(cls, value: Any) -> Any:
        return float(value)

    @classmethod
    def of(cls, value: float) -> OwnStepSize:
        return float.__new__(cls, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OwnStepSize.of, (float(self),)


def step_size(optim: str, lr: float | None, *, momentum: float = 0.0) -> float:
    """Returns the step size that a learning rate means: itself, or the optimizer's own with a warning.

    A rate from a script for Adam (2e-5 to 1e-3) would move nothing, without a word. So every way in (arguments and
    their subclasses, search, `optim_args`, factory, command line) takes the own step size where the rate is below a
    twentieth of it (times 1 - momentum, which SGD's steps are divided by). Exactly 0 is taken as it is. The classes
    [`LearnedOptimizer`] and [`SubspaceOptimizer`] take any rate literally, as torch's do.

    Args:
        optim (`str`): `"sl2o"`, `"subspace_adamw"`, or `"subspace_sgd"`.
        lr (`float`, *optional*): What was given; None: nothing.
        momentum (`float`, *optional*, defaults to 0.0): Of subspace_sgd.

    Raises:
        `ValueError`: a rate that is negative, NaN or infinite.

    Example:

    ```python
    >>> from hf_sl2o.training.step_size import step_size
    >>> step_size("sl2o", 2e-5), step_size("sl2o", 0.5), step_size("subspace_adamw", None)
    (1.0, 0.5, 0.3)
    ```
    """
    own = OPTIMIZERS[optim]
    if lr is None:
        return own
    lr = float(lr)
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"the learning rate is {lr}, expected a finite number >= 0, or none for the optimizer's own")
    if lr == 0 or lr >= own * SMALLEST_SHARE * (1 - momentum):
        return lr
    logger.warning(
        'learning rate %g is one for Adam, and optim="%s" counts in other units. It takes its own instead, %g; '
        "to set it yourself give a rate near that, or build LearnedOptimizer or SubspaceOptimizer, which take any",
        lr,
        optim,
        own,
    )
    return own


def given_learning_rate(args: TrainingArguments) -> float | None:
    """Returns `args.learning_rate`, or None where it is the default of its class: then its user has set none."""
    if isinstance(args.learning_rate, OwnStepSize):
        return None
    for field in dataclasses.fields(args):
        if field.name == "learning_rate" and field.default is not None and args.learning_rate == field.default:
            return None
    return args.learning_rate


def check_range(name: str, value: Any, low: float, high: float = math.inf, *, expected: str) -> float:
    """Returns `value` (a number, or one as text) if it is in [low, high), so neither NaN nor infinite.

    Raises:
        `ValueError`: it is not.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (low <= number < high and math.isfinite(number)):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return number
