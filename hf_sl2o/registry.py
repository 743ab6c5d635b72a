"""`TrainingArguments(optim="sl2o")`: our names inside transformers, and the one place where strings become objects."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from transformers import trainer, trainer_optimizer
from transformers.training_args import OptimizerNames, TrainingArguments

from .arguments import OPTIMIZERS, SL2OTrainingArguments
from .callbacks import AverageCallback, unwrap_optimizer
from .optim import Inner, LearnedOptimizer, SubspaceOptimizer
from .rule import Rule
from .subspace import Basis

logger = logging.getLogger(__name__)

SHIPPED_RULES = Path(__file__).parent / "pretrained"

_OPTIM_ARGS = ("basis", "rule", "lr", "units", "momentum", "average", "outside")


def load_rule(rule: str | Path | Rule | None, *, with_basis: bool) -> Rule:
    """Returns the rule itself, from a folder or the Hub, or the one that ships with the package.

    Args:
        rule (`str`, `Path`, [`Rule`], *optional*): A path, a Hub id, a rule, or None for the shipped one.
        with_basis (`bool`): Which shipped rule: `default` for coefficients of a basis, `default-lora` for raw tensors.
    """
    if isinstance(rule, Rule):
        return rule
    if rule is None:
        name = "default" if with_basis else "default-lora"
        logger.info("no rule given: using %r, which ships with hf_sl2o", name)
        return Rule.from_pretrained(SHIPPED_RULES / name)
    return Rule.from_pretrained(rule)


def _outside(outside: str) -> Inner | None:
    if outside == "freeze":
        return None
    if outside == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    raise ValueError(f'outside is {outside!r}, expected "freeze" or "adamw"')


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
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
    outside: str = "freeze",
    max_grad_norm: float = 0.0,
    total_steps: int | None = None,
) -> Optimizer:
    """Builds the optimizer of one of our names; strings are loaded here and nowhere else.

    Args:
        named_parameters: As `model.named_parameters()`.
        optim (`str`, *optional*, defaults to `"sl2o"`): `"sl2o"`, `"subspace_adamw"`, or `"subspace_sgd"`.
        basis (`str`, `Path` or [`Basis`], *optional*): Folder, Hub id or object. Without one, `"sl2o"` applies the
            rule to every trainable scalar (LoRA factors); the other two need one.
        rule (`str`, `Path` or [`Rule`], *optional*): Folder, Hub id or object; defaults to the shipped rule.
        lr (`float`, *optional*): Defaults to 1.0 (sl2o, subspace_sgd) or 0.3 (subspace_adamw).
        units (`str`, *optional*): `"std"` or `"orthonormal"`; defaults to the units the basis was saved with.
        momentum (`float`, *optional*, defaults to 0.0): Of subspace_sgd; the paper's Momentum has 0.9.
        average (`float`, *optional*): eta of a running average of what is moved, see [`SubspaceOptimizer`]; 0: none.
            Defaults to the rule's own, and to none without a rule.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Of subspace_adamw.
        eps (`float`, *optional*, defaults to 1e-8): Of subspace_adamw.
        outside (`str`, *optional*, defaults to `"freeze"`): What happens to trainable parameters the basis does not
            cover: `"freeze"`, or `"adamw"` (lr 1e-3) in a second param group.
        max_grad_norm (`float`, *optional*, defaults to 0.0): Clip the projected gradient; 0: no clipping.
        total_steps (`int`, *optional*): Steps of the run, for a rule that sees the share that is done.

    Raises:
        `ValueError`: an unknown name; a basis that is missing or does not fit the model; a negative average; an
            argument that this `optim` has no use for.
        `NotImplementedError`: the run is one of FSDP or DeepSpeed.
        `FileNotFoundError`: a basis or rule that is not there; says what was looked for where.
    """
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim is {optim!r}, expected one of {sorted(OPTIMIZERS)}")
    named_parameters = list(named_parameters)
    lr = OPTIMIZERS[optim] if lr is None else lr
    refuse_useless(
        optim, with_basis=basis is not None, rule=rule, momentum=momentum, units=units, outside=outside,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    if basis is None:
        if optim != "sl2o":
            raise ValueError(
                f'optim="{optim}" needs a basis and got none; pass sl2o_basis=..., or optim_args="basis=PATH_OR_ID" '
                "(make one with TrajectoryCallback and fit_basis)"
            )
        learned = load_rule(rule, with_basis=False)
        average = learned.config.average if average is None else average
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        return LearnedOptimizer(trainable, learned, lr=lr, total_steps=total_steps, average=average)
    basis = basis if isinstance(basis, Basis) else Basis.from_pretrained(basis)
    if units is not None:
        basis = basis.with_units(units)
    inner: Inner
    if optim == "sl2o":
        learned = load_rule(rule, with_basis=True)
        average = learned.config.average if average is None else average
        inner = lambda c: LearnedOptimizer(c, learned, lr=lr, total_steps=total_steps)  # noqa: E731
    elif optim == "subspace_adamw":
        inner = lambda c: torch.optim.AdamW(c, lr=lr, betas=betas, eps=eps, weight_decay=0.0)  # noqa: E731
    else:
        inner = lambda c: torch.optim.SGD(c, lr=lr, momentum=momentum)  # noqa: E731
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "average": average or 0.0, "outside": _outside(outside)}
    return SubspaceOptimizer(named_parameters, basis, inner, **options)


def refuse_useless(
    optim: str,
    *,
    with_basis: bool,
    rule: Any = None,
    momentum: float = 0.0,
    units: str | None = None,
    outside: str = "freeze",
    max_grad_norm: float = 0.0,
    **others: Any,
) -> None:
    """Raises `ValueError` for an argument of [`build_optimizer`] that `optim` has no use for."""
    needs_basis = "it is a choice within a basis, and there is none"
    for name, given, why in (
        ("rule", rule is not None and optim != "sl2o", f"{optim} has no rule"),
        ("momentum", momentum and optim != "subspace_sgd", "of ours only subspace_sgd takes it"),
        ("units", units is not None and not with_basis, needs_basis),
        ("outside", outside != "freeze" and not with_basis, needs_basis),
        ("max_grad_norm", max_grad_norm and not with_basis, "clip the gradients themselves, as a Trainer does"),
    ):
        if given:
            raise ValueError(f'{name} was given with optim="{optim}", which has no use for it: {why}; leave it out')


class SubspaceOptimizerFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {...}))`, with no registration at all.

    The keyword arguments are those of [`build_optimizer`]; the first argument is the model.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        refuse_sharding()
        return build_optimizer(model.named_parameters(), **kwargs)


def refuse_sharding(*, fsdp: Any = None, deepspeed: Any = None) -> None:
    """Raises where parameters are sharded: by the given flags, or by what `accelerate launch` was told."""
    kind = AcceleratorState._shared_state.get("distributed_type")  # making one here would initialise it
    if deepspeed or kind == DistributedType.DEEPSPEED:
        raise NotImplementedError(
            "DeepSpeed flattens or replaces the optimizer's parameters, which a basis cannot follow; train with DDP"
        )
    if fsdp or kind == DistributedType.FSDP:
        raise NotImplementedError("FSDP shards the parameters, which a basis does not support yet; train with DDP")


def refuse_unsupported(args: TrainingArguments) -> None:
    """Raises where the way of training cannot hold what our optimizers promise."""
    refuse_sharding(fsdp=args.fsdp, deepspeed=args.deepspeed)
    if args.weight_decay:
        raise ValueError(
            f"weight_decay is {args.weight_decay}; in the subspace it would pull towards the starting weights instead "
            "of zero; set it to 0, or build SubspaceOptimizer yourself with an inner optimizer that decays"
        )


def _handler(context: trainer_optimizer.OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Turns a user's arguments into those of [`build_optimizer`]; `optim_args` win over the `sl2o_` fields."""
    args, given = context.args, {key: unquote(value) for key, value in context.optim_args.items()}
    refuse_unsupported(args)
    if unknown := sorted(set(given) - set(_OPTIM_ARGS)):
        raise ValueError(f"optim_args has an unknown key {unknown[0]!r}; expected any of {', '.join(_OPTIM_ARGS)}")
    options: dict[str, Any] = {"optim": OptimizerNames(args.optim).value}
    if isinstance(args, SL2OTrainingArguments):
        options.update(
            basis=args.sl2o_basis,
            rule=args.sl2o_rule,
            units=args.sl2o_units,
            momentum=args.sl2o_momentum,
            average=args.sl2o_average,
            outside=args.sl2o_outside,
        )
    options.update(given)
    for key in ("lr", "momentum", "average"):
        if key in given:
            try:
                options[key] = float(given[key])
            except ValueError:
                raise ValueError(f"optim_args has {key}={given[key]!r}, expected a number") from None
    if "lr" not in options:
        if not isinstance(args, SL2OTrainingArguments) and args.learning_rate == TrainingArguments.learning_rate:
            logger.warning(
                'learning_rate is not set (or Trainer\'s own %g): optim="%s" takes its own step size, %g; '
                'for another pass learning_rate, or optim_args="lr=%g" for that very value',
                args.learning_rate,
                options["optim"],
                OPTIMIZERS[options["optim"]],
                args.learning_rate,
            )
        else:
            options["lr"] = args.learning_rate
    if args.max_steps > 0:
        options["total_steps"] = args.max_steps
    if options["optim"] == "subspace_adamw":
        options["betas"], options["eps"] = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    if options.get("basis") is not None:
        options["max_grad_norm"] = args.max_grad_norm
    return SubspaceOptimizerFactory, options


def _optimizer_name(value: str) -> OptimizerNames:
    return OptimizerNames(value)


def _add_member(value: str) -> OptimizerNames:
    """Adds a member to `OptimizerNames`, or returns the one that is there."""
    if value in OptimizerNames._value2member_map_:
        return OptimizerNames(value)
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = OptimizerNames  # type: ignore[attr-defined]
    member._sort_order_ = len(OptimizerNames._member_names_)  # type: ignore[attr-defined]
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    type.__setattr__(OptimizerNames, name, member)
    return member


def _reduce(member: OptimizerNames, protocol: Any) -> tuple[Any, ...]:
    # Unpickling training_args.bin in another process imports hf_sl2o, and with it the name.
    if member.value in OPTIMIZERS:
        return _optimizer_name, (member.value,)
    return OptimizerNames, (member.value,)


def _parse_optim_args(optim_args_str: str | None) -> dict[str, str]:
    try:
        return _theirs["_parse_optim_args"](optim_args_str)  # type: ignore[no-any-return]
    except ValueError:
        raise ValueError(
            f"optim_args is {optim_args_str!r}, expected key=value pairs joined by commas, such as "
            '"basis=user/name,rule=path"; write a comma, an equals sign or a space inside a value as %2C, %3D or %20'
        ) from None


def _create_scheduler(self: trainer.Trainer, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
    optimizer = unwrap_optimizer(self.optimizer)
    if isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
        # Here a Trainer knows how long its run is, also where the user gave epochs; a second one comes on top.
        done = next((int(entry["step"]) for entry in optimizer.state.values() if "step" in entry), 0)
        for group in optimizer.param_groups:
            if "rule_fingerprint" in group and (done or group["total_steps"] is None):
                group["total_steps"] = done + num_training_steps
        if optimizer.average:
            AverageCallback.attach(self)
    return _theirs["create_scheduler"](self, num_training_steps, *args, **kwargs)


def _clip_grad_norm(self: trainer.Trainer, model: nn.Module) -> Any:
    optimizer = unwrap_optimizer(self.optimizer)
    if isinstance(optimizer, SubspaceOptimizer) and optimizer.max_grad_norm > 0:
        return None  # its step clips the projected gradient; a Trainer would clip the n-sized one before
    return _theirs["_clip_grad_norm"](self, model)


#: Where in transformers what is ours goes, and by which name it is kept as it was.
_HOOKS = (
    (trainer, "_parse_optim_args", _parse_optim_args),
    (trainer.Trainer, "create_scheduler", _create_scheduler),
    (trainer.Trainer, "_clip_grad_norm", _clip_grad_norm),
)
_theirs: dict[str, Any] = {}


def register() -> None:
    """Adds our names to transformers; importing hf_sl2o does it, and doing it again changes nothing.

    Also makes Trainer's parser of `optim_args` say what it could not read; `create_scheduler` tell a rule that sees
    the share of the run that is done how many steps the run has, and add an [`AverageCallback`] where the optimizer
    keeps an average; and `_clip_grad_norm` leave clipping to an optimizer that clips the projected gradient.

    Raises:
        `ImportError`: transformers has moved what this hooks into.
    """
    needed = [*((owner, name) for owner, name, _ in _HOOKS), (trainer_optimizer, "_OPTIMIZER_HANDLERS")]
    for owner, name in needed:
        if not hasattr(owner, name):
            raise ImportError(
                f"{owner.__name__} of transformers {transformers.__version__} no longer has {name}, which "
                'optim="sl2o" is hooked into: this version is newer than this hf_sl2o knows; upgrade hf_sl2o, or use '
                "Trainer(optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {...}))"
            )
    for value in OPTIMIZERS:
        trainer_optimizer._OPTIMIZER_HANDLERS[_add_member(value)] = _handler
    OptimizerNames.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]
    for owner, name, ours in _HOOKS:
        _theirs.setdefault(name, getattr(owner, name))
        setattr(owner, name, ours)
