"""What may move the coefficients of a basis, what they may move, and from which start."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..subspace import Basis
from ..subspace.basis import start_sample
from ..subspace.sharded import ShardedBasis
from ..subspace.shards import is_sharded
from ._common import check_group

logger = logging.getLogger(__name__)


def check_inner(inner: Optimizer) -> None:
    """Raises where an optimizer does not step one list of tensors from their gradients alone."""
    name = type(inner).__name__
    if not isinstance(inner, Optimizer):
        raise TypeError(f"inner returned a {name}, expected a torch.optim.Optimizer over the list it was given")
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if isinstance(inner, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise NotImplementedError(
            f"{name} evaluates a closure several times a step, which a basis cannot do; use SGD, AdamW or a rule"
        )
    if inner.defaults.get("differentiable"):
        raise NotImplementedError("differentiable=True is not supported here; meta-train with hf_sl2o.unroll")
    if len(inner.param_groups) != 1:
        raise ValueError("inner must have exactly one param group, the list it was given")
    check_group(inner.param_groups[0])


def covered_by(
    basis: Basis, params: list[Any]
) -> tuple[list[str] | None, list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """Finds what a basis moves among (name, parameter) pairs, or takes plain tensors in its order.

    Returns:
        Their names (None: tensors were given), the parameters in the order of the basis, and trainable others.
    """
    if params and isinstance(params[0], dict):
        raise ValueError(
            "SubspaceOptimizer takes a model, or its named_parameters(), not param groups: one basis, one group"
        )
    if not (params and isinstance(params[0], tuple)):
        basis.layout.check_tensors([p for _, p in _stand_ins([("", p) for p in params])[0]])
        return None, params, []
    pairs, sharded = _stand_ins(params)
    found, rest = basis.layout.select(pairs)
    covered = [sharded.get(id(p), p) for p in found]
    names = list(basis.layout.names)
    _check_trainable(names, covered)
    return names, covered, [(name, sharded.get(id(p), p)) for name, p in rest]


def _check_trainable(names: Sequence[str], covered: Sequence[torch.Tensor]) -> None:
    """Raises `ValueError` where the basis would move a parameter that its user has frozen."""
    if frozen := [name for name, p in zip(names, covered, strict=True) if not p.requires_grad]:
        raise ValueError(
            f"the basis moves {frozen[0]!r}, which is frozen ({len(frozen)} such parameters); fit a basis without it, "
            "or set requires_grad"
        )


def _stand_ins(
    named: list[tuple[str, torch.Tensor]],
) -> tuple[list[tuple[str, torch.Tensor]], dict[int, torch.Tensor]]:
    """What a layout compares by name and shape in the place of sharded parameters.

    Returns:
        The pairs, with a tensor of the whole shape and no memory of its own for each `DTensor`; and by `id` of each
        stand-in the parameter.
    """
    of: dict[int, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}  # one for a tied parameter
    for _, p in named:
        if is_sharded([p]) and id(p) not in made:
            stand_in = torch.empty((), dtype=p.dtype, device="meta" if p.is_meta else "cpu").expand(p.shape)
            made[id(p)] = stand_in.requires_grad_(p.requires_grad)
            of[id(stand_in)] = p
    return [(name, made.get(id(p), p)) for name, p in named], of


def warn_of_another_start(basis: Basis, covered: Sequence[torch.Tensor]) -> None:
    """Warns where the weights are neither at the start nor at the end of the run that the basis was made from."""
    if basis.start is None:
        return
    from_run = basis.start.to(covered[0].device)  # (2, k, 16)
    sample = basis.shards.start_sample if isinstance(basis, ShardedBasis) else start_sample
    now = sample(covered).to(from_run.device)  # (k, 16)
    # A start in bf16 or fp16 is the same one: a unit in the last place of the largest of a tensor's numbers.
    tolerance = 2.0**-7 * from_run.abs().amax(dim=(0, 2)).clamp_min(1e-30)  # (k,)
    away = ((now - from_run).abs().amax(dim=2) > tolerance).any(dim=1)  # (2,)
    if bool(away.all()):
        index = int(((now - from_run[0]).abs().amax(dim=1) > tolerance).nonzero()[0])
        logger.warning(
            "the weights are not those that the basis was made from (first difference: %s): a subspace of another "
            "start holds little of what this run needs. Load the model with the weights of the recorded run's start",
            basis.layout.names[index],
        )
