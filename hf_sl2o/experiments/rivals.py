"""Optimizers that promise to need no tuning, each at its published defaults, and AdamW tuned as their goal.

Prodigy, D-Adaptation, DoG with its average, schedule-free AdamW, Muon beside AdamW, and AdamW at two usual rates. What
is no part of torch comes with `pip install "hf-sl2o[judge]"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import torch

from .environment import import_package
from .on_task import TaskArm

#: Module and package of an arm that is no part of torch.
PACKAGES = {
    "prodigy": ("prodigyopt", "prodigyopt"),
    "dadapt_adam": ("dadaptation", "dadaptation"),
    "dog": ("dog", "dog-optimizer"),
    "schedule_free": ("schedulefree", "schedulefree"),
}
TUNED = "adamw"

Optimizer = torch.optim.Optimizer


def packaged(arm: str, name: str, **settings: Any) -> Callable[[float], Callable[[list[torch.Tensor]], Optimizer]]:
    """Makes the optimizer `name` of the package of an arm; it is imported when it is first made."""

    def of_rate(lr: float) -> Callable[[list[torch.Tensor]], Optimizer]:
        return lambda c: getattr(_module(arm), name)(c, lr=lr, **settings)

    return of_rate


def _module(arm: str) -> Any:
    return import_package(*PACKAGES[arm], f"the arm {arm}")


def adamw(lr: float) -> Callable[[list[torch.Tensor]], Optimizer]:
    """AdamW without weight decay, as in a Trainer."""
    return lambda c: torch.optim.AdamW(c, lr=lr, weight_decay=0.0)


class MuonBesideAdamW(Optimizer):
    """Muon for matrices, AdamW for vectors; factors of convolutions of shape (out, in, 1, 1) are matrices to Muon.

    Args:
        params (`Iterable[torch.Tensor]`): What is trained.
        lr (`float`): Of both.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        # (tensor, the same memory as a matrix)
        self._matrices = [(p, torch.nn.Parameter(p.detach().flatten(1))) for p in params if p.ndim > 1]
        vectors = [p for p in params if p.ndim < 2]
        parts: list[Optimizer] = []
        if self._matrices:
            parts.append(torch.optim.Muon([matrix for _, matrix in self._matrices], lr=lr))
        if vectors:
            parts.append(torch.optim.AdamW(vectors, lr=lr))
        self._parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for p, matrix in self._matrices:
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self._parts:
            part.step()


def muon(lr: float) -> Callable[[list[torch.Tensor]], Optimizer]:
    return lambda c: MuonBesideAdamW(c, lr)


#: By name; of each but the last one a single rate, that of its authors. AdamW's runs at the same rate are one run.
RIVALS: dict[str, TaskArm] = {
    "prodigy": TaskArm(packaged("prodigy", "Prodigy"), (1.0,)),
    "dadapt_adam": TaskArm(packaged("dadapt_adam", "DAdaptAdam"), (1.0,)),
    "dog": TaskArm(packaged("dog", "DoG"), (1.0,), schedule="constant", average=8.0),  # gamma of its averager
    "schedule_free": TaskArm(packaged("schedule_free", "AdamWScheduleFree"), (0.0025,), schedule="constant"),
    "muon": TaskArm(muon, (1e-3,)),
    "adamw_2e-4": TaskArm(adamw, (2e-4,), key="adamw"),
    "adamw_1e-3": TaskArm(adamw, (1e-3,), key="adamw"),
    TUNED: TaskArm(adamw, (1e-3, 3e-3, 1e-2)),  # it grows at its edges
}


def check_rivals(arms: Iterable[str]) -> None:
    """Raises `ImportError` where the package of an arm is not installed."""
    for arm in arms:
        if arm in PACKAGES:
            _module(arm)


def versions() -> dict[str, str]:
    """Versions of the rivals' packages that are installed."""
    installed = {}
    for _, package in PACKAGES.values():
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed
