"""What meta-training needs of a task: a model at its starting weights, batches, a loss, a basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .subspace import Basis


@dataclass(frozen=True)
class Task:
    """One training problem on which a rule is meta-trained or judged.

    Args:
        name (`str`): Appears in logs and errors.
        build_model (`Callable[[], nn.Module]`): Returns the model at theta_0, the same weights at each call.
        batches (`Callable[[int], Iterable]`): Maps a seed to training batches, at least as many as steps are made.
        loss (`Callable[[nn.Module, Any], torch.Tensor]`): Mean loss of a batch, 0-d.
        basis ([`Basis`]): The subspace; [`IdentityBasis`] for raw tensors such as LoRA factors.
        eval_batches (`Sequence`, *optional*): Held-out batches; they choose the best rule.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, Task
    >>> def build():
    ...     torch.manual_seed(0)
    ...     return torch.nn.Linear(30, 20)
    >>> basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), dim=4)
    >>> data = [torch.ones(2, 30)] * 10
    >>> task = Task("regression", build, lambda seed: data, lambda model, x: model(x).square().mean(), basis, data[:1])
    ```
    """

    name: str
    build_model: Callable[[], nn.Module]
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    basis: Basis
    eval_batches: Sequence[Any] = field(default=())


class InnerRun:
    """One run of a task's model: hands out (loss, projected gradient) and moves the weights along the basis.

    Raises:
        `ValueError`: the basis does not fit the model (task named).
    """

    def __init__(self, task: Task, seed: int, model: nn.Module | None = None) -> None:
        self.task = task
        self.model = task.build_model() if model is None else model
        try:
            self.parameters, _ = task.basis.layout.select(self.model.named_parameters())
        except ValueError as error:
            raise ValueError(f"task {task.name!r}: {error}") from error
        self.basis = task.basis.to(device=self.parameters[0].device)
        self._batches = iter(task.batches(seed))

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of the next batch and g of shape `(d,)`, both without a graph.

        Raises:
            `ValueError`: the batches ran out.
        """
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ValueError(
                f"task {self.task.name!r} ran out of batches; yield at least inner_steps of them"
            ) from None
        loss = self.task.loss(self.model, batch)
        for p in self.parameters:
            p.grad = None
        loss.backward()
        return loss.detach(), self.basis.project([p.grad for p in self.parameters])

    @torch.no_grad()
    def move(self, delta: torch.Tensor) -> None:
        """theta = theta + lift(delta)."""
        self.basis.add_(self.parameters, delta)

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """Returns the mean loss over the held-out batches, 0-d, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        losses = [self.task.loss(self.model, batch).float() for batch in self.task.eval_batches]
        self.model.train(training)
        return torch.stack(losses).mean()
