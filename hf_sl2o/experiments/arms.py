"""The arms of a comparison: an optimizer each, and the learning rates that it is tuned over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from ..rules import SHIPPED_RULES
from .kept.keys import source_of


@dataclass(frozen=True)
class Arm:
    """One line of the table; `grid` holds (units, learning rate), tuned on validation."""

    optim: str
    grid: tuple[tuple[str, float], ...]
    momentum: float = 0.0
    basis: str = "learned"  # "learned", "random", "none"
    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] | None = None  # of the full space
    decay_at: tuple[float, ...] = ()  # shares of the run after which the rate is a tenth; () is --lr_scheduler_type

    def check(self, name: str) -> None:
        """Raises `ValueError` where the arm cannot be run."""
        known = {"none": ("full",), "learned": ("std", "orthonormal"), "random": ("std", "orthonormal")}
        if self.basis not in known:
            raise ValueError(f"the arm {name!r} has basis={self.basis!r}, expected one of {', '.join(known)}")
        if self.make is None and self.optim not in [member.value for member in OptimizerNames] + ["p_bfgs"]:
            raise ValueError(f"the arm {name!r} has optim={self.optim!r}, which no Trainer knows; give make=")
        if not self.grid:
            raise ValueError(f"the arm {name!r} has an empty grid; give a learning rate, such as grid(std=(1.0,))")
        for units, lr in self.grid:
            if units not in known[self.basis] or not (lr > 0 and math.isfinite(lr)):
                raise ValueError(
                    f"the arm {name!r} has {(units, lr)} in its grid, expected units of "
                    f"{', '.join(known[self.basis])} and a finite rate above 0"
                )

    @property
    def key(self) -> list[Any]:
        """What its runs depend on beside units, rate and schedule."""
        return [self.optim, self.momentum, self.basis, None if self.make is None else source_of(self.make)]


def grid(**learning_rates: tuple[float, ...]) -> tuple[tuple[str, float], ...]:
    return tuple((units, lr) for units, values in learning_rates.items() for lr in values)


#: What is compared where nobody says otherwise. The paper does not say in which units its baselines move: they are
#: tuned in both.
ARMS: dict[str, Arm] = {
    "sl2o": Arm("sl2o", grid(std=(1.0,))),
    "subspace_adamw": Arm("subspace_adamw", grid(std=(0.1, 0.3, 0.03), orthonormal=(1.0, 0.3))),
    "subspace_momentum": Arm("subspace_sgd", grid(std=(0.1, 0.3, 0.03), orthonormal=(1.0, 0.3)), momentum=0.9),
    "subspace_sgd": Arm("subspace_sgd", grid(std=(1.0, 0.3, 3.0), orthonormal=(1.0, 10.0))),
    "adamw": Arm("adamw_torch", grid(full=(3e-3, 1e-2, 1e-3)), basis="none"),
    "random": Arm("subspace_adamw", grid(orthonormal=(1.0, 3.0, 0.3)), basis="random"),
}


def rule_folder(name: str) -> Path:
    """Where a rule is: a folder, or the name of one that ships; a folder of that name goes first."""
    shipped = SHIPPED_RULES / name
    return shipped if "/" not in name and shipped.is_dir() and not Path(name).is_dir() else Path(name)


def rule_arms(entries: Sequence[str]) -> dict[str, Path]:
    """Maps names of arms to folders of rules; an entry is a shipped rule's name, PATH, or NAME=PATH."""
    found: dict[str, Path] = {}
    for entry in entries:
        name, _, path = ("", "", entry) if Path(entry).exists() else entry.rpartition("=")
        arm = f"sl2o_{name or Path(path).name}"
        if arm in found:
            raise ValueError(f"--rules gives two rules the arm {arm!r}; name one of them by NAME=PATH")
        found[arm] = Path(path) if name or Path(path).exists() else SHIPPED_RULES / path
    return found
