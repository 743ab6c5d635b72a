"""What the optimizers share: checks of numbers, a guard against non-finite gradients, the weight of an average."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ..subspace.shards import is_sharded, own_part

logger = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 3
_NON_FINITE = "held NaN or Inf (or numbers whose squares add up to it)"

Step = TypeVar("Step", float, torch.Tensor)


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a complex tensor as real and imaginary parts, (..., 2); a real tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def trains(parameter: torch.Tensor) -> bool:
    """Whether an optimizer may move it: a `nn.Parameter` may have been frozen since."""
    return not isinstance(parameter, nn.Parameter) or parameter.requires_grad


# Checks


def check_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    """Raises `ValueError` unless `value` is finite and at least (or above) 0."""
    number = float(value)
    if not (math.isfinite(number) and (number > 0 if above_zero else number >= 0)):
        raise ValueError(f"{name} is {number:g}, expected a finite number {'>' if above_zero else '>='} 0")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the numbers of a param group with which a step would be NaN or uphill."""
    for name in ("lr", "initial_lr", "weight_decay", "momentum", "dampening"):
        if group.get(name) is not None:
            check_number(name, group[name])
    if group.get("eps") is not None:
        # Adafactor and the like have several, or none
        for eps in group["eps"] if isinstance(group["eps"], tuple | list) else (group["eps"],):
            if eps is not None:
                check_number("eps", eps)
    if group.get("total_steps") is not None:
        check_number("total_steps", group["total_steps"], above_zero=True)
    for name, value in group.items():
        numbers = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} is {value}, expected finite numbers")
    if (betas := group.get("betas")) is not None and not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas are {tuple(betas)}, expected numbers in [0, 1)")


def check_one_device(params: Sequence[torch.Tensor]) -> None:
    """Raises `NotImplementedError` where parameters are on several devices."""
    if len(devices := {str(p.device) for p in params}) > 1:
        raise NotImplementedError(
            f"the parameters are on several devices ({', '.join(sorted(devices))}), and are moved together on one; "
            "put the trainable ones on one device, or train with DDP"
        )


def refuse_meta(params: Iterable[torch.Tensor]) -> None:
    if any(p.is_meta for p in params):
        raise ValueError(
            "a parameter is on the meta device, so it has no values yet, and is another one when it is made; make "
            "the model first (to_empty and load_state_dict, or from_pretrained), then its optimizer"
        )


def refuse_sharded(params: Iterable[torch.Tensor]) -> None:
    """Raises `NotImplementedError` for parameters of FSDP2: a rule without a basis computes over whole tensors."""
    if is_sharded(params):
        raise NotImplementedError(
            "the parameters are sharded (FSDP2), and a learned rule without a basis looks at whole tensors; move them "
            "in a basis (SubspaceOptimizer, sl2o_basis=...), or train with DDP"
        )


# Gradients that are not finite


class NonFiniteGuard:
    """Counts steps whose gradient was not finite, without a host sync: a GPU's counter is read when it has arrived."""

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None  # (2,) int64: skipped in all, skipped in a row
        self._host: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._warned = 0

    def record(self, finite: torch.Tensor) -> None:
        """Adds one step; `finite` is a 0-d bool tensor."""
        if self.counts is None or self.counts.device != finite.device:
            self.counts = torch.tensor([self.total, 0], dtype=torch.int64, device=finite.device)
            self._arrived = None
        bad = (~finite).long()  # ()
        self.counts.copy_(torch.stack([self.counts[0] + bad, (self.counts[1] + bad) * bad]))
        if self.counts.is_cuda and self._arrived is None and not torch.cuda.is_current_stream_capturing():
            self._host = torch.empty(2, dtype=torch.int64, pin_memory=True) if self._host is None else self._host
            self._host.copy_(self.counts, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def check(self) -> None:
        """Warns of skipped steps; raises `FloatingPointError` after three in a row (on a GPU some steps later)."""
        counts = self.counts
        if counts is not None and counts.is_cuda:
            if self._arrived is None or torch.cuda.is_current_stream_capturing() or not self._arrived.query():
                return
            counts, self._arrived = self._host, None
        if counts is None:
            return
        total, row = counts.tolist()
        if total > self._warned:
            self._warned = total
            logger.warning("the gradient %s: step skipped (%d in all, %d in a row)", _NON_FINITE, total, row)
        if row >= _MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient {_NON_FINITE} in {row} steps in a row; weights and state are those before the first of "
                "them. Check the loss and the data, or lower the learning rate"
            )

    @property
    def total(self) -> int:
        return 0 if self.counts is None else int(self.counts[0])


def is_finite(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Whether all are finite, and their squares add up to a finite number, which second moments need: 0-d, bool.

    Of sharded ones, of the parts that are here.
    """
    parts = map(own_part, gradients)
    dense = [real(gradient.coalesce().values() if gradient.is_sparse else gradient) for gradient in parts]
    device = dense[0].device
    norms = [torch.linalg.vector_norm(gradient, dtype=_at_least_fp32(gradient)).to(device) for gradient in dense]
    return torch.stack(norms).square().isfinite().all()


def _at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def refuse_sparse(gradients: Iterable[torch.Tensor | None]) -> None:
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        raise NotImplementedError("the gradient is sparse; set sparse=False on the embedding")


class GuardedStep:
    """Steps a torch optimizer, and undoes that on the device where a 0-d `finite` is false.

    The first step of a parameter reads `finite` on the host: before it there is no state to go back to.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._begun: set[int] = set()

    @torch.no_grad()
    def __call__(self, finite: torch.Tensor) -> bool:
        """Returns whether there was a step, undone or not."""
        state = self.optimizer.state
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        first = [p for p in params if id(p) not in self._begun and not state[p]]
        if first and not bool(finite):
            return False
        tensors = [value for p in params for value in state[p].values() if torch.is_tensor(value)]
        parts = [own_part(tensor) for tensor in (*params, *tensors)]
        before = [(part, part.detach().clone()) for part in parts]
        self.optimizer.step()
        for tensor, value in before:
            tensor.detach().copy_(torch.where(finite.to(value.device), tensor, value))
        self._begun.update(map(id, first))
        return True


# The average


def average_weight(step: Step, eta: float) -> Step:
    """Returns what step t, counted from 1, weighs in the running average: (eta + 1) / (t + eta).

    The average over t steps then weighs step i about as i^eta: 0 is the plain mean, larger values forget the beginning
    (polynomial-decay averaging, Shamir and Zhang, 2013). It needs no length of the run.

    Args:
        step (`float` or 0-d `torch.Tensor`): t; the result is a number or a tensor likewise.
        eta (`float`): At least 0.

    Example:

    ```python
    >>> from hf_sl2o.optim import average_weight
    >>> [average_weight(t, 0.0) for t in (1, 2, 4)]
    [1.0, 0.5, 0.25]
    ```
    """
    return (eta + 1) / (step + eta)
