"""What may move the coefficients of a basis, what they may move, and from where the weights follow them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from ..subspace import Basis


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
        raise NotImplementedError("differentiable=True is not supported here; meta-train with hf_sl2o.meta.unroll")
    if len(inner.param_groups) != 1:
        raise ValueError("inner must have exactly one param group, the list it was given")


def check_trainable(names: Sequence[str], covered: Sequence[torch.Tensor]) -> None:
    """Raises `ValueError` where the basis would move a parameter that its user has frozen."""
    if frozen := [name for name, p in zip(names, covered, strict=True) if not p.requires_grad]:
        raise ValueError(
            f"the basis moves {frozen[0]!r}, which is frozen ({len(frozen)} such parameters); fit a basis without it, "
            "or set requires_grad"
        )


def anchors_of(params: Sequence[torch.Tensor], basis: Basis, coefficients: torch.Tensor) -> list[torch.Tensor]:
    """Returns theta_0: the weights less what `coefficients` have moved; empty if all are moved in place (fp32)."""
    if all(p.dtype == basis.compute_dtype for p in params):
        return []
    anchors = [p.detach().clone() for p in params]
    basis.assign_(anchors, anchors, -coefficients)
    return anchors
