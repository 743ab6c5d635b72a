"""`TrainingArguments(optim="sl2o")`: our names inside transformers, and what a Trainer does otherwise for them."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import unquote

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from .arguments import SL2OTrainingArguments
from .batch_norm import BatchNormCallback, has_running_statistics
from .build import (
    SHIPPED_RULES,
    SubspaceOptimizerFactory,
    build_optimizer,
    load_rule,
    refuse_sharding,
    refuse_useless,
)
from .callbacks import unwrap_optimizer
from .optim import LearnedOptimizer, SubspaceOptimizer
from .ranks import check_same_on_all_ranks, patience, training_facts
from .startup.sitecustomize import add_member
from .step_size import OPTIMIZERS, check_range, given_learning_rate

__all__ = [
    "SHIPPED_RULES",
    "SubspaceOptimizerFactory",
    "build_optimizer",
    "load_rule",
    "refuse_sharding",
    "refuse_useless",
    "register",
]

logger = logging.getLogger(__name__)

_OPTIM_ARGS = ("basis", "rule", "lr", "units", "momentum", "average", "outside")


def _handler(context: trainer_optimizer.OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Turns a user's arguments into those of [`build_optimizer`]; `optim_args` win over the `sl2o_` fields."""
    args, given = context.args, {key: unquote(value) for key, value in context.optim_args.items()}
    refuse_sharding(fsdp=args.fsdp, deepspeed=args.deepspeed)
    if unknown := sorted(set(given) - set(_OPTIM_ARGS)):
        raise ValueError(f"optim_args has an unknown key {unknown[0]!r}; expected any of {', '.join(_OPTIM_ARGS)}")
    if empty := [key for key, value in given.items() if not value]:
        raise ValueError(f"optim_args has nothing after {empty[0]}=; give a value, or leave the key out")
    options: dict[str, Any] = {"optim": OptimizerNames(args.optim).value, "weight_decay": args.weight_decay}
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
        options["lr"] = given_learning_rate(args)
        if options["lr"] is None:
            logger.warning(
                'learning_rate is not set (or the default of %s): optim="%s" takes its own step size, %g',
                type(args).__name__,
                options["optim"],
                OPTIMIZERS[options["optim"]],
            )
    if args.max_steps > 0:
        options["total_steps"] = args.max_steps
    if options["optim"] == "subspace_adamw":
        options["betas"], options["eps"] = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    check_range("adam_epsilon", args.adam_epsilon, 0, expected="a finite number >= 0")
    if args.max_grad_norm is not None:
        check_range("max_grad_norm", args.max_grad_norm, 0, expected="a finite number >= 0 (0: no clipping)")
        if options.get("basis") is not None:
            options["max_grad_norm"] = args.max_grad_norm
    return SubspaceOptimizerFactory, options


def _optimizer_name(value: str) -> OptimizerNames:
    return OptimizerNames(value)


def _reduce(member: OptimizerNames, protocol: Any) -> tuple[Any, ...]:
    # Unpickling training_args.bin in another process imports hf_sl2o, and with it the name.
    if member.value in OPTIMIZERS:
        return _optimizer_name, (member.value,)
    return OptimizerNames, (member.value,)


def _parse_optim_args(optim_args_str: str | None) -> dict[str, str]:
    try:
        return _theirs["_parse_optim_args"](optim_args_str)  # type: ignore[no-any-return]
    except (AttributeError, ValueError):
        raise ValueError(
            f"optim_args is {optim_args_str!r}, expected key=value pairs joined by commas, such as "
            '"basis=user/name,rule=path"; write a comma, an equals sign or a space inside a value as %2C, %3D or %20'
        ) from None


def _prepare_for_training(self: trainer.Trainer, max_steps: int, *args: Any, **kwargs: Any) -> Any:
    if self.args.optim in OPTIMIZERS:
        check_same_on_all_ranks(training_facts(self.args), "training", patience(self.args))
    known = unwrap_optimizer(self.optimizer)
    prepared = _theirs["_prepare_for_training"](self, max_steps, *args, **kwargs)
    optimizer = unwrap_optimizer(self.optimizer)
    if isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
        # Here a Trainer knows how long its run is, also where the user gave epochs; a second one comes on top.
        done = next((int(entry["step"]) for entry in optimizer.state.values() if "step" in entry), 0)
        for group in optimizer.param_groups:
            if "rule_fingerprint" in group:
                group["total_steps"] = done + max(max_steps - self.state.global_step, 0)
        model: Any = self.model
        if optimizer is known and done and not self.state.global_step:
            optimizer.begin_anew()  # a further run of this Trainer goes on from the weights that its user sees
        optimizer.attach(model)
        if self.args.optim in OPTIMIZERS:
            begun = {"global_step": self.state.global_step, "optimizer_steps": done}
            check_same_on_all_ranks(begun, "resumed training", patience(self.args))
        _say_what_changes_the_result(self, model, optimizer)
    return prepared


# Image models of transformers that accept the number of items of a batch, and do not divide by it.
_DROPS_THE_COUNT = {"resnet", "regnet", "mobilenet_v2", "beit", "poolformer", "data2vec-vision"}


def _say_what_changes_the_result(self: trainer.Trainer, model: nn.Module, optimizer: Optimizer) -> None:
    """Warns of what a run goes on with, to another result than its user would expect."""
    callbacks = self.callback_handler.callbacks
    if has_running_statistics(model) and not any(isinstance(one, BatchNormCallback) for one in callbacks):
        logger.warning(
            "the model has running statistics (BatchNorm), which no optimizer moves and which lag behind its steps; "
            "add callbacks=[BatchNormCallback(batches)], or evaluations and checkpoints are of stale ones"
        )
    accumulated = self.args.gradient_accumulation_steps
    of_scale = isinstance(optimizer, SubspaceOptimizer) and isinstance(optimizer.inner, torch.optim.SGD)
    if (
        accumulated > 1
        and getattr(getattr(model, "config", None), "model_type", None) in _DROPS_THE_COUNT
        and self.model_accepts_loss_kwargs
        and (of_scale or (self.args.max_grad_norm or 0) > 0)
    ):
        logger.warning(
            "%s drops the number of items of a batch, so that with gradient_accumulation_steps=%d its gradient is %d "
            "times as large, which %s feels; divide the learning rate (and multiply max_grad_norm) by it, or pass "
            "compute_loss_func",
            type(model).__name__,
            accumulated,
            accumulated,
            "SGD" if of_scale else "clipping",
        )


def _run_epoch(self: trainer.Trainer, *args: Any, **kwargs: Any) -> Any:
    optimizer = unwrap_optimizer(self.optimizer)
    if not isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
        return _theirs["_run_epoch"](self, *args, **kwargs)
    if self.state.global_step >= self.state.max_steps:  # a finished run that was resumed
        self.control.should_training_stop = True
        return None
    optimizer.listens = True
    try:
        return _theirs["_run_epoch"](self, *args, **kwargs)
    finally:
        optimizer.listens = False  # to forward passes of another Trainer
        optimizer.publish()


def _clip_grad_norm(self: trainer.Trainer, model: nn.Module) -> Any:
    optimizer = unwrap_optimizer(self.optimizer)
    if isinstance(optimizer, SubspaceOptimizer) and optimizer.max_grad_norm > 0:
        return None  # its step clips the projected gradient; a Trainer would clip the n-sized one before
    return _theirs["_clip_grad_norm"](self, model)


#: Where in transformers what is ours goes, and by which name it is kept as it was.
_HOOKS = (
    (trainer, "_parse_optim_args", _parse_optim_args),
    (trainer.Trainer, "_prepare_for_training", _prepare_for_training),
    (trainer.Trainer, "_run_epoch", _run_epoch),
    (trainer.Trainer, "_clip_grad_norm", _clip_grad_norm),
)
_theirs: dict[str, Any] = {}


def register() -> None:
    """Adds our names to transformers; importing hf_sl2o does it, and doing it again changes nothing.

    Also makes Trainer's parser of `optim_args` say what it could not read; `_prepare_for_training` tell a rule that
    sees the share of the run that is done how many steps the run has, and an optimizer that keeps an average the
    model; `_run_epoch` leave a finished run that is resumed as it is; and `_clip_grad_norm` leave clipping to one
    that clips the projected gradient. All but the parser leave runs without our optimizers as they are.

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
        trainer_optimizer._OPTIMIZER_HANDLERS[add_member(OptimizerNames, value)] = _handler
    OptimizerNames.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]
    for owner, name, ours in _HOOKS:
        _theirs.setdefault(name, getattr(owner, name))
        setattr(owner, name, ours)
