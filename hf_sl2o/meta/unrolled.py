"""A window of a run that a rule drives, and the scalar whose gradient is the first-order meta-gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..rules.inputs import tensor_index
from ..rules.rule import Rule, RuleState
from .task import InnerRun

_WORST = 1e30  # the largest loss, which fp32 can still average


def unroll(
    rule: Rule,
    run: InnerRun,
    c: torch.Tensor,
    state: RuleState,
    *,
    steps: int,
    lr: float | Sequence[float] = 1.0,
    coordinates: torch.Tensor | None = None,
    imitation: float = 0.0,
    imitation_lr: float = 0.1,
    total_steps: int | None = None,
    log: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, RuleState, torch.Tensor]:
    """Runs `steps` inner steps with `rule`, moving the weights of `run`; the graph holds coefficients only.

    With the rule's inputs detached (the second-order term is dropped, as in the official code) the gradient of
    sum_t L(theta_0 + U c_t) equals that of sum_t <g_t, c_t>, and g_t is what `loss.backward()` gives anyway.

    Args:
        rule ([`Rule`]): The rule that is meta-trained.
        run ([`~hf_sl2o.meta.task.InnerRun`]): A model in training.
        c (`torch.Tensor` of shape `(d,)`): Its coefficients, detached.
        state ([`RuleState`]): The rule's state, detached.
        steps (`int`): T, at least 2.
        lr (`float` or `Sequence[float]`, *optional*, defaults to 1.0): Multiplies the rule's output, at each step.
        coordinates (`torch.Tensor` of shape `(K,)`, int64, *optional*): Back-propagate through these coordinates only,
            scaled by d / K; the others run without a graph. An unbiased estimate if they were drawn uniformly.
        imitation (`float`, *optional*, defaults to 0.0): Adds this times the mean over coordinates of
            (lr delta - imitation_lr m~)^2 / 2, the distance to Adam's step (official code, `--il`, 1e-3).
        imitation_lr (`float`, *optional*, defaults to 0.1): Adam's learning rate there.
        total_steps (`int`, *optional*): Steps of the episode, for a rule that sees its progress.
        log (`bool`, *optional*, defaults to `False`): Divide what each step contributes by the level of the losses
            there: the meta-gradient of the sum of their logarithms.

    Returns:
        A scalar whose gradient is the meta-gradient; c and state after the window (with graph, unless `coordinates`
        are given); `(steps,)` losses before each update.

    Raises:
        `ValueError`: `steps` is below 2, or imitation of a rule that has no m~.
    """
    if steps < 2:
        raise ValueError(f"an unroll of {steps} steps has no meta-gradient; use at least 2")
    if imitation and rule.config.inputs != "normalized":
        raise ValueError(f'imitation compares with m~, which a rule with inputs "{rule.config.inputs}" does not have')
    lrs = [float(lr)] * steps if isinstance(lr, int | float) else [float(value) for value in lr]
    # First the run, without a graph and in place; then the rule alone is replayed on the gradients it saw, with its
    # graph. No step leaves a tensor behind: small ones would split up the memory that the next step reuses, and the
    # heap would grow with T.
    whole, whole_c = RuleState(*(tensor.detach().clone() for tensor in state)), c.detach().clone()
    seen, inputs, losses = _run(rule, run, whole_c, whole, lrs, coordinates, total_steps)
    sizes = run.basis.tensor_sizes
    inverse_fraction = 1.0
    if coordinates is not None:
        inverse_fraction = c.numel() / coordinates.numel()
        c, state = c[coordinates], state.at(coordinates)
    positions = torch.arange(len(whole_c), device=c.device) if coordinates is None else coordinates
    tensor = tensor_index(positions, sizes)  # (d,), or (K,)
    surrogate = c.new_zeros(())
    weights = 1 / level(losses) if log else torch.ones_like(losses)
    for step, (lr_of_step, g) in enumerate(zip(lrs, seen, strict=True)):
        surrogate = surrogate + weights[step] * torch.dot(g, c)  # g at c_t with c_t, not with c_{t+1}
        of_tensors, kept = rule.tensor_step(inputs[step], state.tensors, lr_of_step)
        delta, state = rule(g, state, total_steps=total_steps, of_tensor=of_tensors[tensor])
        state = state._replace(tensors=kept)
        lr_of_step = factor(rule, lr_of_step)
        c = c - lr_of_step * delta
        if imitation:
            adam = imitation_lr * _adam_direction(rule, state)
            surrogate = surrogate + imitation * (lr_of_step * delta - adam).square().sum() / 2 / run.basis.dim
    if coordinates is not None:
        return inverse_fraction * surrogate, whole_c, whole, losses
    return surrogate, c, state, losses


def _run(
    rule: Rule,
    run: InnerRun,
    c: torch.Tensor,
    state: RuleState,
    lrs: Sequence[float],
    coordinates: torch.Tensor | None,
    total_steps: int | None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Moves a run, `c` and `state` in place; returns what was seen.

    Returns:
        Gradients of the chosen coordinates, (T, K) or (T, d); what was seen of whole tensors, T times (k, c); losses
        before each update, (T,).
    """
    seen = c.new_empty(len(lrs), c.numel() if coordinates is None else coordinates.numel())
    losses, inputs, sizes = c.new_empty(len(lrs)), [], run.basis.tensor_sizes
    for step, rate in enumerate(lrs):
        losses[step], g = run.gradient()
        seen[step] = g if coordinates is None else g[coordinates]
        inputs.append(rule.tensor_inputs(g, state, sizes))
        of_tensors = rule.tensor_step(inputs[-1], state.tensors, rate)
        delta = rule.update_(g, state, sizes=sizes, of_tensors=of_tensors, total_steps=total_steps)
        moved = delta.mul_(-factor(rule, rate))
        c += moved
        run.move(moved)
    return seen, inputs, losses


def level(losses: torch.Tensor) -> torch.Tensor:
    """A running mean of (T,) losses that one noisy batch hardly moves, (T,); for logarithms of losses."""
    losses = losses.abs().nan_to_num(nan=_WORST, posinf=_WORST).clamp_max(_WORST)  # NaN is no better than Inf
    mean, means = losses[0], []
    for step, loss in enumerate(losses):
        mean = torch.lerp(mean, loss, max(1 / (step + 1), 0.1))
        means.append(mean)
    return torch.stack(means).clamp_min(1e-12)


def factor(rule: Rule, lr: float) -> float:
    """What delta is multiplied by."""
    return 1.0 if rule.own_scale else lr


def stepped(
    rule: Rule, run: InnerRun, g: torch.Tensor, state: RuleState, lr: float, total_steps: int
) -> tuple[torch.Tensor, RuleState]:
    """A step of the rule over the tensors of a run, with its graph: delta of shape (d,) and the next state."""
    inputs = rule.tensor_inputs(g, state, run.basis.tensor_sizes)
    of_tensors, kept = rule.tensor_step(inputs, state.tensors, lr)
    index = tensor_index(torch.arange(len(g), device=g.device), run.basis.tensor_sizes)
    delta, state = rule(g, state, total_steps=total_steps, of_tensor=of_tensors[index])
    return delta, state._replace(tensors=kept)


class Stepped(nn.Module):
    """`stepped` as a module's forward, so that the rule's weights can be replaced."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *of_step: Any) -> tuple[torch.Tensor, RuleState]:
        return stepped(self.rule, *of_step)


def _adam_direction(rule: Rule, state: RuleState) -> torch.Tensor:
    """m^ / (sqrt(v^) + eps) of the state after a step, detached: Adam with the rule's betas."""
    config = rule.config
    exponent = state.step + config.bias_correction_offset
    m = state.exp_avg.to(state.exp_avg_sq.dtype) / (1 - config.beta1**exponent)
    v = state.exp_avg_sq / (1 - config.beta2**exponent)
    return (m / (v.sqrt() + config.eps)).detach()
