"""From a user's words to an optimizer: the one place where strings become bases, rules and optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from ..foundation.ranks import check_same_on_all_ranks, optimizer_facts
from ..optim import Inner, LearnedOptimizer, SubspaceOptimizer
from ..rules import Rule, load_rule
from ..subspace import Basis
from .step_size import OPTIMIZERS, check_range, step_size


def _outside(outside: str) -> Inner | None:
    if outside == "freeze":
        return None
    if outside == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    raise ValueError(f'outside is {outside!r}, expected "freeze" or "adamw"')


def build_optimizer(
    params: nn.Module | Iterable[tuple[str, torch.Tensor]],
    optim: str = "sl2o",
    *,
    basis: str | Path | Basis | None = None,
    rule: str | Path | Rule | None = None,
    lr: float | None = None,
    units: str | None = None,
    momentum: float = 0.0,
    average: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    outside: str = "freeze",
    max_grad_norm: float = 0.0,
    stream_gradients: bool = False,
    total_steps: int | None = None,
) -> Optimizer:
    """Builds the optimizer of one of our names; strings are loaded here and nowhere else.

    Args:
        params: The model, or its `named_parameters()`. Give the model if you want the rule's running average: the
            weights then are where they are read, see [`LearnedOptimizer`].
        optim (`str`, *optional*, defaults to `"sl2o"`): Or `"subspace_adamw"`, `"subspace_sgd"`.
        basis (`str`, `Path` or [`Basis`], *optional*): Folder, Hub id or object. Without, all trainable scalars move.
        rule (`str`, `Path` or [`Rule`], *optional*): Folder, Hub id, name of a shipped one (the default), or object.
        lr (`float`, *optional*): Defaults to 1.0 (sl2o, subspace_sgd) or 0.3 (subspace_adamw); one of Adam's scale is
            replaced by that with a warning.
        units (`str`, *optional*): `"std"` or `"orthonormal"`; default: those the basis was saved with.
        momentum (`float`, *optional*, defaults to 0.0): Of subspace_sgd; the paper has 0.9.
        average (`float`, *optional*): eta of a running average of what is moved, see [`SubspaceOptimizer`]; 0: none.
            Default: the rule's own where the model is given, else none.
        betas, eps (*optional*, default to `(0.9, 0.999)` and 1e-8): Of subspace_adamw.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled, of matrices alone, where there is no basis; see
            [`LearnedOptimizer`] for how it scales.
        outside (`str`, *optional*, defaults to `"freeze"`): Of trainable parameters that the basis does not cover:
            `"freeze"`, or `"adamw"` (lr 1e-3) in a second param group.
        max_grad_norm (`float`, *optional*, defaults to 0.0): Clip the projected gradient; 0: no clipping.
        stream_gradients (`bool`, *optional*, defaults to `False`): Keep and send d numbers instead of n gradients;
            needs the model and a basis, see [`SubspaceOptimizer`].
        total_steps (`int`, *optional*): Steps of the run, for a rule that sees the share that is done.

    Raises:
        `ValueError`: an unknown name; a basis that is missing or does not fit the model; a number that is NaN,
            infinite or negative; weight decay in a basis; an argument that this `optim` has no use for.
        `NotImplementedError`: the run is one of FSDP1 or DeepSpeed, or of FSDP2 without a basis.
        `FileNotFoundError`: a basis or rule that is not there; says what was looked for where.
    """
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim is {optim!r}, expected one of {sorted(OPTIMIZERS)}")
    model = params if isinstance(params, nn.Module) else None
    named = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    momentum = check_range("momentum", momentum, 0, 1, expected="a number in [0, 1)")
    refuse_useless(
        optim, with_basis=basis is not None, rule=rule, momentum=momentum, units=units, outside=outside,
        max_grad_norm=max_grad_norm, weight_decay=weight_decay, stream_gradients=stream_gradients,
    )  # fmt: skip
    lr = step_size(optim, lr, momentum=momentum)
    if basis is None:
        _refuse_without_basis(optim)
        learned = load_rule(rule, with_basis=False)
        average, groups = _average(learned, average, model), _decay_groups(named, weight_decay)
        optimizer: Any = LearnedOptimizer(groups, learned, lr=lr, total_steps=total_steps, average=average)
    else:
        basis = basis if isinstance(basis, Basis) else Basis.from_pretrained(basis)
        basis = basis if units is None else basis.with_units(units)
        if optim == "sl2o":
            learned = load_rule(rule, with_basis=True)
            average = _average(learned, average, model)
            inner: Inner = partial(LearnedOptimizer, rule=learned, lr=lr, total_steps=total_steps)
        else:
            inner = _baseline(optim, lr, momentum, betas, eps)
        optimizer = SubspaceOptimizer(
            named if model is None else model, basis, inner, max_grad_norm=max_grad_norm, average=average or 0.0,
            outside=_outside(outside), stream_gradients=stream_gradients,
        )  # fmt: skip
        _send_once(optimizer)
    if model is not None:
        optimizer.attach(model)
    return optimizer  # type: ignore[no-any-return]


def _send_once(optimizer: SubspaceOptimizer) -> None:
    """Sums of an accumulated batch wait for its last part."""
    if optimizer.streamer is not None:
        optimizer.streamer.waits = lambda: not GradientState().sync_gradients


def _baseline(optim: str, lr: float, momentum: float, betas: tuple[float, float], eps: float) -> Inner:
    if optim == "subspace_adamw":
        return partial(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    return partial(torch.optim.SGD, lr=lr, momentum=momentum)


def _refuse_without_basis(optim: str) -> None:
    if optim != "sl2o":
        raise ValueError(
            f'optim="{optim}" needs a basis and got none; pass sl2o_basis=..., or optim_args="basis=PATH_OR_ID" '
            "(make one with TrajectoryCallback and fit_basis)"
        )


def _average(rule: Rule, average: float | None, model: nn.Module | None) -> float:
    """The rule's own average only where the optimizer knows the model: a loop that never asks would miss it."""
    return (rule.config.average if model is not None else 0.0) if average is None else average


def _decay_groups(named: list[tuple[str, torch.Tensor]], weight_decay: float) -> list[Any]:
    """The trainable parameters; with weight decay matrices and the rest apart, since biases and norms do not decay."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model is trainable; set requires_grad, or add an adapter")
    if not weight_decay:
        return trainable
    matrices = [(name, p) for name, p in trainable if p.ndim > 1]
    vectors = [(name, p) for name, p in trainable if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def refuse_useless(
    optim: str,
    *,
    with_basis: bool,
    rule: Any = None,
    momentum: float = 0.0,
    units: str | None = None,
    outside: str = "freeze",
    max_grad_norm: float = 0.0,
    weight_decay: float = 0.0,
    stream_gradients: bool = False,
    **others: Any,
) -> None:
    """Raises `ValueError` for an argument of [`build_optimizer`] that `optim` has no use for."""
    needs_basis = "it is a choice within a basis, and there is none"
    for name, given, why in (
        ("rule", rule is not None and optim != "sl2o", f"{optim} has no rule"),
        ("momentum", momentum and optim != "subspace_sgd", "of ours only subspace_sgd takes it"),
        ("units", units is not None and not with_basis, needs_basis),
        ("outside", outside != "freeze" and not with_basis, needs_basis),
        ("stream_gradients", stream_gradients and not with_basis, "there are no fewer numbers to keep or send"),
        ("max_grad_norm", max_grad_norm and not with_basis, "clip the gradients themselves, as a Trainer does"),
    ):
        if given:
            raise ValueError(f'{name} was given with optim="{optim}", which has no use for it: {why}; leave it out')
    check_range("weight_decay", weight_decay, 0, expected="a finite number >= 0")
    if weight_decay and with_basis:
        raise ValueError(
            f"weight_decay is {weight_decay}, and with a basis only the coefficients move: the weights cannot be "
            "pulled towards zero, which is not in the subspace, and pulling c there would pull them to the starting "
            "weights. Set weight_decay to 0 (without a basis it works), or give SubspaceOptimizer an inner optimizer "
            "that decays"
        )


class SubspaceOptimizerFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {...}))`, with no registration at all.

    The keyword arguments are those of [`build_optimizer`]; the first argument is the model.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        refuse_sharding(with_basis=kwargs.get("basis") is not None)
        optimizer = build_optimizer(model, **kwargs)
        check_same_on_all_ranks(optimizer_facts(optimizer), "optimizer")
        return optimizer


def refuse_sharding(*, fsdp: Any = None, deepspeed: Any = None, with_basis: bool = False) -> None:
    """Raises where parameters are sharded by other than FSDP2, or without a basis.

    What counts are the given flags, and what `accelerate launch` was told.
    """
    kind = AcceleratorState._shared_state.get("distributed_type")  # making one here would initialise it
    if deepspeed or kind == DistributedType.DEEPSPEED:
        raise NotImplementedError(
            "DeepSpeed flattens or replaces the optimizer's parameters, which a basis cannot follow; shard with FSDP2 "
            "(fsdp=True and a basis), or train with DDP and stream_gradients"
        )
    if not (fsdp or kind == DistributedType.FSDP):
        return
    if kind != DistributedType.FSDP:
        raise NotImplementedError(
            f"fsdp is set, but Accelerate does not run FSDP here (distributed type {kind or 'not known'}); start "
            "the processes on accelerators, by `accelerate launch` or torchrun, or leave fsdp out and train with DDP"
        )
    if getattr(AcceleratorState._shared_state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
        raise NotImplementedError(
            "FSDP1 flattens the parameters, which a basis cannot follow; use FSDP2 (fsdp_version: 2 in Accelerate's "
            'config, or fsdp_config={"version": 2}), or train with DDP'
        )
    if not with_basis:
        raise NotImplementedError(
            "FSDP2 shards the parameters; a learned rule without a basis looks at whole tensors, and a recipe trains "
            "several runs. Pass a basis (sl2o_basis) in a script of your own, or train with DDP"
        )
