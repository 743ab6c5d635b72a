"""P-BFGS (Li et al., "Low Dimensional Landscape Hypothesis is True", 2022): quasi-Newton steps in the subspace.

H approximates the inverse Hessian over the d coefficients from gradients of successive batches; each step goes along
-H g, with a line search that halves on the same batch. A step costs one gradient and some forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from ..meta import Task
from ..meta.task import InnerRun

SHRINK, SUFFICIENT, TRIALS = 0.55, 0.4, 20  # of the authors' line search


def bfgs_update(h: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns (I - rho s y^T) H (I - rho y s^T) + rho s s^T with rho = 1 / (y^T s); H itself where y^T s <= 0.

    Args:
        h (`torch.Tensor` of shape `(d, d)`): The inverse Hessian so far.
        s, y (`torch.Tensor` of shape `(d,)`): The last movement, and the change of the gradient.
    """
    curvature = torch.dot(y, s)
    if curvature <= 1e-10 * torch.dot(y, y):
        return h
    left = torch.eye(len(s), dtype=h.dtype, device=h.device) - torch.outer(s, y) / curvature
    return left @ h @ left.T + torch.outer(s, s) / curvature


def p_bfgs(
    task: Task,
    steps: int,
    *,
    seed: int = 0,
    evaluate_at: Collection[int] = (),
    evaluate: Callable[[torch.nn.Module], Any] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Trains a task's model by P-BFGS.

    Args:
        task ([`Task`]): What is trained; its basis in orthonormal units is the authors' setting.
        steps (`int`): Gradients taken.
        seed (`int`, *optional*, defaults to 0): Of the batches and of dropout.
        evaluate_at (`Collection[int]`, *optional*): Steps after which `evaluate(model)` is taken; 0: before training.
        evaluate (`Callable`, *optional*): By default the task's held-out loss.
        device (`torch.device`, *optional*): Where the model goes.

    Returns:
        `train_loss` (`steps` floats), `eval` (a list of `[step, value]`), `forward_passes`, and the trained `model`.
    """
    run = InnerRun(task, seed, device=device)
    d = run.basis.dim
    h = torch.eye(d, dtype=run.basis.compute_dtype, device=run.device)
    last: tuple[torch.Tensor, torch.Tensor] | None = None  # movement and gradient before it
    losses: list[float] = []
    evals: list[Any] = []
    forward_passes = 0

    def take(step: int) -> None:
        if step in evaluate_at:
            evals.append([step, float(run.evaluate()) if evaluate is None else evaluate(run.model)])

    take(0)
    for step in range(1, steps + 1):
        batch = run.next_batch()
        with run.own_randomness():
            loss = run.loss(batch)
        run.model.zero_grad(set_to_none=True)
        loss.backward()
        g = run.basis.project([p.grad for p in run.parameters])  # (d,)
        if last is not None:
            h = bfgs_update(h, last[0], g - last[1])
        direction = -(h @ g)
        slope = torch.dot(g, direction)
        if slope >= 0:  # noise has made H useless
            h, direction = torch.eye(d, dtype=h.dtype, device=h.device), -g
            slope = -torch.dot(g, g)
        length, moved = 1.0, torch.zeros_like(g)
        for _ in range(TRIALS):
            run.move(length * direction - moved)
            moved = length * direction
            with torch.no_grad(), run.own_randomness():
                there = run.loss(batch)
            forward_passes += 1
            if there <= loss + SUFFICIENT * length * slope:
                break
            length *= SHRINK
        last = moved, g
        losses.append(loss.item())
        take(step)
    return {"train_loss": losses, "eval": evals, "forward_passes": forward_passes, "model": run.model}
