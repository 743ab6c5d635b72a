"""What an optimizer did, step by step: gradients and coefficients of a run, and what is read off them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..meta import Task, train_on
from ..rules import Rule, RuleConfig
from ..rules.inputs import log_and_sign


@dataclass(frozen=True)
class Path:
    """A run of T steps in d coefficients.

    Args:
        gradients (`torch.Tensor` of shape `(T, d)`): Before each step.
        coefficients (`torch.Tensor` of shape `(T + 1, d)`): Before the first step, and after each.
        rates (`torch.Tensor` of shape `(T,)`): The learning rate of each step.
        train_loss (`torch.Tensor` of shape `(T,)`): Of the batch of each step, before it.
    """

    gradients: torch.Tensor
    coefficients: torch.Tensor
    rates: torch.Tensor
    train_loss: torch.Tensor

    @property
    def updates(self) -> torch.Tensor:
        """What was subtracted from the coefficients in each step, (T, d)."""
        return self.coefficients[:-1] - self.coefficients[1:]

    @property
    def lengths(self) -> torch.Tensor:
        """Norms of the updates, (T,)."""
        return self.updates.norm(dim=1)

    @property
    def shares(self) -> torch.Tensor:
        """The share of each direction in the square of the update's norm, (T, d); zeros where nothing moved."""
        squares = self.updates.square()
        return squares / squares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


class _Recording:
    """An optimizer of one tensor that keeps what it was given and what it did; all else is the optimizer's own."""

    def __init__(self, inner: torch.optim.Optimizer, c: torch.Tensor) -> None:
        self._inner, self._c = inner, c
        self.gradients: list[torch.Tensor] = []
        self.coefficients = [c.detach().clone()]
        self.rates: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self) -> None:
        assert self._c.grad is not None
        self.gradients.append(self._c.grad.detach().clone())
        self.rates.append(float(self._inner.param_groups[0]["lr"]))
        self._inner.step()
        self.coefficients.append(self._c.detach().clone())


def record_path(task: Task, optimizer: Any, steps: int, *, seed: int = 0, schedule: str = "constant") -> Path:
    """Trains a task in its subspace and keeps each gradient and each point.

    Args:
        task ([`~hf_sl2o.meta.Task`]): In a subspace: T (2 d + 1) numbers are kept.
        optimizer (`Callable`): As for [`~hf_sl2o.meta.train_on`].
        steps (`int`): T.
        seed, schedule (*optional*): As for [`~hf_sl2o.meta.train_on`].

    Raises:
        `ValueError`: the coordinates of the task are its weights.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, Task
    >>> from hf_sl2o.analysis.paths import record_path
    >>> def build():
    ...     torch.manual_seed(0)
    ...     return torch.nn.Linear(30, 20)
    >>> basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), dim=4)
    >>> data = [torch.ones(2, 30)] * 10
    >>> task = Task("regression", build, lambda seed: data, lambda model, x: model(x).square().mean(), basis, data[:1])
    >>> path = record_path(task, lambda c: torch.optim.SGD(c, lr=0.5), steps=10)
    >>> path.updates.shape, bool(torch.allclose(path.updates, 0.5 * path.gradients, atol=1e-6))
    (torch.Size([10, 4]), True)
    ```
    """
    made: list[_Recording] = []

    def recording(c: list[torch.Tensor]) -> Any:
        if len(c) != 1 or c[0].ndim != 1:
            raise ValueError(
                f"the coordinates of task {task.name!r} are its weights; a path is kept of one in a subspace"
            )
        made.append(_Recording(optimizer(c), c[0]))
        return made[0]

    losses = train_on(task, recording, steps, seed=seed, schedule=schedule)["train_loss"]
    (run,) = made
    return Path(
        torch.stack(run.gradients), torch.stack(run.coefficients), torch.tensor(run.rates), torch.tensor(losses)
    )


def seen(gradients: torch.Tensor, config: RuleConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns m~ and g~ of each step, both `(T, d)` in float64, for gradients of shape `(T, d)`."""
    g = gradients.double()
    m, v = torch.zeros_like(g[0]), torch.zeros_like(g[0])
    columns = []
    for step, gradient in enumerate(g, 1):
        m = torch.lerp(gradient, m, config.beta1)
        v = torch.lerp(gradient.square(), v, config.beta2)
        exponent = step + config.bias_correction_offset
        scale = (v / (1 - config.beta2**exponent)).sqrt() + config.eps
        columns.append(torch.stack([m / (1 - config.beta1**exponent), gradient]) / scale)
    both = torch.stack(columns, dim=1)  # (2, T, d)
    return both[0], both[1]


@dataclass(frozen=True)
class Samples:
    """What a rule saw and what it did, each of shape `(N,)` in float64: m~, g~ and its delta per unit of the rate."""

    m: torch.Tensor
    g: torch.Tensor
    delta: torch.Tensor

    def split(self, count: int) -> tuple[Samples, Samples]:
        """The first `count` of them, and the others."""
        parts = zip(*((x[:count], x[count:]) for x in (self.m, self.g, self.delta)), strict=True)
        first, second = (Samples(*part) for part in parts)
        return first, second


def check_sees_only_m_and_g(rule: Rule) -> None:
    """Raises `ValueError` where a rule sees more, or other things, than m~ and g~."""
    config = rule.config
    more = [name for name in ("progress", "tensor_scale", "agreement", "per_tensor") if getattr(config, name)]
    more += ["momenta"] * bool(config.momenta) + ["inputs 'gradient'"] * (config.inputs != "normalized")
    if more:
        raise ValueError(
            f"the rule sees more than m~ and g~: {', '.join(more)}; an expression of m~ and g~ cannot stand for it. "
            "Take a rule such as paper-cnn"
        )


def samples_of(paths: list[Path], rule: Rule, count: int, *, seed: int = 0) -> Samples:
    """Draws `count` of the (m~, g~, delta) of all steps and directions of runs of a rule.

    Raises:
        `ValueError`: the rule sees more than m~ and g~; the runs have fewer numbers than `count`.
    """
    check_sees_only_m_and_g(rule)
    columns: list[list[torch.Tensor]] = [[], [], []]
    for path in paths:
        delta = path.updates.double() / path.rates.double()[:, None]
        for column, values in zip(columns, (*seen(path.gradients, rule.config), delta), strict=True):
            column.append(values[path.rates > 0].flatten())
    m, g, delta = (torch.cat(column) for column in columns)
    if len(m) < count:
        raise ValueError(f"the runs have {len(m):,} numbers, expected at least {count:,}; record longer or more runs")
    chosen = torch.randperm(len(m), generator=torch.Generator().manual_seed(seed))[:count]
    return Samples(m[chosen], g[chosen], delta[chosen])


@torch.no_grad()
def response(rule: Rule, m: torch.Tensor, g: torch.Tensor, *, steps: int = 20) -> torch.Tensor:
    """What a rule answers where m~ and g~ stay the same for some steps: delta per unit of the rate, of m's shape.

    Args:
        rule ([`~hf_sl2o.rules.Rule`]): It sees m~ and g~ alone.
        m, g (`torch.Tensor`): m~ and g~, of one shape.
        steps (`int`, *optional*, defaults to 20): So many, from a fresh state: an LSTM has then come to rest.

    Raises:
        `ValueError`: the rule sees more than m~ and g~.
    """
    check_sees_only_m_and_g(rule)
    columns = torch.stack([m.flatten(), g.flatten()], dim=-1).float()  # (N, 2)
    if rule.config.log_sign is not None:
        columns = log_and_sign(columns, rule.config.log_sign)
    state = rule.init_state(len(columns))
    output, hidden, cell = torch.zeros(len(columns)), state.hidden, state.cell
    for _ in range(steps):
        output, hidden, cell = rule._output(columns, hidden, cell, torch.ones(1, 2))
    return (rule.config.output_scale * output).view(m.shape)
