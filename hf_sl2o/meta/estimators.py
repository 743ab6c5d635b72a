"""How the meta-gradient of a window of T inner steps is estimated: three ways behind one small interface.

theta_t = theta_0 + U c_t, g_t = U^T grad L(theta_t), delta_t = rule(g_t), c_{t+1} = c_t - lr delta_t. The meta-loss of
a window is sum_t L(theta_t), taken before each update as in the official code. What a run carries from one window to
the next is a dictionary of tensors, so that it can be saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ..rules.rule import Rule, RuleState
from ..subspace import Basis
from .task import InnerRun
from .unrolled import Stepped, factor, level, stepped, unroll

Carry = dict[str, torch.Tensor]


class Window(NamedTuple):
    """What one window gives."""

    gradients: list[torch.Tensor]  # one a weight of the rule: estimates the gradient of the summed losses
    losses: torch.Tensor  # (T,), before each update
    carry: Carry  # detached


class Estimator(ABC):
    """Estimates the gradient of a window's summed losses with respect to the rule's weights."""

    #: How many copies of the model one episode needs.
    runs: int = 1
    #: Whether the estimate of a window in which a run diverges is of use: it is bounded, with logarithms.
    bounded: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def begin(self, rule: Rule, runs: Sequence[InnerRun]) -> Carry:
        """Returns what is carried into the first window."""
        return _pack(*_fresh(rule, runs[0]))

    @abstractmethod
    def window(
        self,
        rule: Rule,
        runs: Sequence[InnerRun],
        carry: Carry,
        lrs: Sequence[float],
        *,
        total_steps: int,
        generator: torch.Generator,
        log: bool = False,
    ) -> Window:
        """Runs `len(lrs)` inner steps, one a learning rate, and returns their meta-gradient.

        Args:
            rule ([`Rule`]): The rule that is meta-trained.
            runs (`Sequence[InnerRun]`): `self.runs` models in training; they are moved.
            carry (`dict`): From `begin` or the previous window.
            lrs (`Sequence[float]`): Learning rate of each step, at least two.
            total_steps (`int`): Steps of the episode, for a rule that sees its progress.
            generator (`torch.Generator`): Of what is drawn for this window, on the CPU.
            log (`bool`, *optional*, defaults to `False`): Of the sum of the losses' logarithms.
        """


def _fresh(rule: Rule, run: InnerRun) -> tuple[torch.Tensor, RuleState]:
    dtype = run.basis.compute_dtype
    c = torch.zeros(run.basis.dim, device=run.device, dtype=dtype)
    return c, rule.init_state(run.basis.dim, device=run.device, dtype=dtype, weights=run.weights(), rate=run.gain)


def _pack(c: torch.Tensor, state: RuleState, head: str = "") -> Carry:
    kept = {name: value.detach() for name, value in state._asdict().items()}
    if not kept["tensors"].shape[1]:  # the rule keeps nothing of whole tensors
        del kept["tensors"]
    return {f"{head}c": c.detach(), **{f"{head}{name}": value for name, value in kept.items()}}


def _unpack(carry: Carry, head: str = "") -> tuple[torch.Tensor, RuleState]:
    c = carry[f"{head}c"]
    kept = {name: carry[f"{head}{name}"] for name in RuleState._fields if f"{head}{name}" in carry}
    return c, RuleState(**{"tensors": c.new_zeros(1, 0), **kept})


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """Truncated back-propagation with the rule's inputs detached: the official code's gradient, [`unroll`].

    Costs one ordinary `loss.backward()` an inner step; memory does not depend on n, and hardly on T.

    Args:
        coordinates (`int`, *optional*): Back-propagate through so many coordinates, drawn anew for each window, and
            scale by the inverse fraction: unbiased, with flat memory where d is a million (LoRA factors).
        imitation, imitation_lr (*optional*): As for [`unroll`].

    Example:

    ```python
    >>> from hf_sl2o.meta.estimators import FirstOrder
    >>> FirstOrder(coordinates=4000)
    FirstOrder(coordinates=4000, imitation=0.0, imitation_lr=0.1)
    ```
    """

    coordinates: int | None = None
    imitation: float = 0.0
    imitation_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.coordinates is not None and self.coordinates < 1:
            raise ValueError(f"coordinates is {self.coordinates}, expected at least 1, or None for all")

    def window(
        self,
        rule: Rule,
        runs: Sequence[InnerRun],
        carry: Carry,
        lrs: Sequence[float],
        *,
        total_steps: int,
        generator: torch.Generator,
        log: bool = False,
    ) -> Window:
        (run,), (c, state) = runs, _unpack(carry)
        chosen = None
        if self.coordinates is not None and self.coordinates < run.basis.dim:
            chosen = torch.randperm(run.basis.dim, generator=generator)[: self.coordinates].to(run.device)
        surrogate, c, state, losses = unroll(
            rule,
            run,
            c,
            state,
            steps=len(lrs),
            lr=lrs,
            coordinates=chosen,
            imitation=self.imitation,
            imitation_lr=self.imitation_lr,
            total_steps=total_steps,
            log=log,
        )
        return Window(_gradients(surrogate, rule), losses, _pack(c, state))


def _gradients(loss: torch.Tensor, rule: Rule) -> list[torch.Tensor]:
    """Of each weight of the rule; zeros of those that do not learn."""
    learning = [p for p in rule.parameters() if p.requires_grad]
    found = iter(torch.autograd.grad(loss, learning, allow_unused=True, materialize_grads=True))
    return [next(found) if p.requires_grad else torch.zeros_like(p) for p in rule.parameters()]


class _Lift(torch.autograd.Function):
    """`basis.lift` and, as its adjoint, `basis.project`: differentiable as often as needed."""

    @staticmethod
    def forward(ctx: Any, basis: Basis, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.basis = basis
        return tuple(basis.lift(c))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _Project.apply(ctx.basis, *gradients)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, basis: Basis, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.basis = basis
        return basis.project(tensors)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return None, *_Lift.apply(ctx.basis, gradient)


class _Loss(nn.Module):
    """The task's loss as a module's forward, so that its parameters can be replaced."""

    def __init__(self, run: InnerRun) -> None:
        super().__init__()
        self.model, self._of = run.model, run.loss

    def forward(self, batch: Any) -> torch.Tensor:
        return self._of(batch)


class SecondOrder(Estimator):
    """Back-propagation through the gradients too: the exact gradient of a window, for small networks.

    Keeps the graph of T forward and backward passes. With T = N there is no truncation, and the estimate is the
    meta-gradient itself; with less it is the reference for what [`FirstOrder`] drops.

    Example:

    ```python
    >>> from hf_sl2o import SecondOrder
    >>> SecondOrder()  # MetaTrainer(..., estimator=SecondOrder())
    SecondOrder()
    ```
    """

    def window(
        self,
        rule: Rule,
        runs: Sequence[InnerRun],
        carry: Carry,
        lrs: Sequence[float],
        *,
        total_steps: int,
        generator: torch.Generator,
        log: bool = False,
    ) -> Window:
        (run,), (c, state) = runs, _unpack(carry)
        names = [f"model.{name}" for name in run.basis.layout.names]
        start, anchors = c, [p.detach().clone() for p in run.parameters]
        objective, losses, total = _Loss(run), [], c.new_zeros(())
        for lr in lrs:
            moved = _Lift.apply(run.basis, run.scaled(c - start))
            weights = {
                name: (anchor + part.to(anchor.dtype)).requires_grad_()
                for name, anchor, part in zip(names, anchors, moved, strict=True)
            }
            with run.own_randomness():
                loss = functional_call(objective, weights, (run.next_batch(),))
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
            g = run.scaled(_Project.apply(run.basis, *gradients))
            delta, state = stepped(rule, run, g, state, lr, total_steps)
            c = c - factor(rule, lr) * delta
            losses.append(loss.detach())
            total = total + (loss / level(torch.stack(losses))[-1] if log else loss)
        run.move((c - start).detach())
        return Window(_gradients(total, rule), torch.stack(losses), _pack(c, state))

    def __repr__(self) -> str:
        return "SecondOrder()"


@dataclass(frozen=True)
class PES(Estimator):
    """Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein, ICML 2021): unbiased over many windows.

    Two runs see the same batches with the rule's weights perturbed by +e and -e, drawn anew for each window; xi is the
    sum of an episode's perturbations, and the estimate is xi (L+ - L-) / (2 sigma^2). No window is blind to what its
    steps do later, at the price of variance; no graph is kept.

    Args:
        sigma (`float`, *optional*, defaults to 0.1): Standard deviation of the perturbations (official code: 0.1).

    Example:

    ```python
    >>> from hf_sl2o.meta.estimators import PES
    >>> PES(sigma=0.03)
    PES(sigma=0.03)
    ```
    """

    sigma: float = 0.1
    runs = 2
    bounded = True

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma is {self.sigma}, expected a positive number")

    def begin(self, rule: Rule, runs: Sequence[InnerRun]) -> Carry:
        xi = {f"xi.{name}": torch.zeros_like(p) for name, p in rule.named_parameters()}
        return {**_pack(*_fresh(rule, runs[0]), "+"), **_pack(*_fresh(rule, runs[1]), "-"), **xi}

    @torch.no_grad()
    def window(
        self,
        rule: Rule,
        runs: Sequence[InnerRun],
        carry: Carry,
        lrs: Sequence[float],
        *,
        total_steps: int,
        generator: torch.Generator,
        log: bool = False,
    ) -> Window:
        noise = {
            name: self.sigma * p.requires_grad * torch.randn(p.shape, dtype=p.dtype, generator=generator).to(p.device)
            for name, p in rule.named_parameters()
        }
        following: Carry = {}
        losses = []
        for sign, head, run in ((1.0, "+", runs[0]), (-1.0, "-", runs[1])):
            weights = {f"rule.{name}": p + sign * noise[name] for name, p in rule.named_parameters()}
            (c, state), of_run = _unpack(carry, head), []
            for lr in lrs:
                with torch.enable_grad():
                    loss, g = run.gradient()
                delta, state = functional_call(Stepped(rule), weights, (run, g, state, lr, total_steps))
                moved = -factor(rule, lr) * delta
                c = c + moved
                run.move(moved)
                of_run.append(loss)
            following |= _pack(c, state, head)
            losses.append(torch.stack(of_run))
        xi = {name: carry[f"xi.{name}"] + noise[name] for name in noise}
        mean = (losses[0] + losses[1]) / 2
        if log:  # one that diverges is no more than bad
            difference = (level(losses[0]).log() - level(losses[1]).log()).nan_to_num(0.0).clamp(-1, 1).sum()
        else:
            difference = (losses[0] - losses[1]).sum()
        gradients = [difference / (2 * self.sigma**2) * value for value in xi.values()]
        following |= {f"xi.{name}": value for name, value in xi.items()}
        return Window(gradients, mean, following)
