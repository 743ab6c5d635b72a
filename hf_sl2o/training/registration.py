"""`TrainingArguments(optim="sl2o")`: our names in transformers, and from a Trainer's arguments to an optimizer's."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import unquote

from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from .arguments import SL2OTrainingArguments
from .build import SubspaceOptimizerFactory, refuse_sharding
from .hooks import check_there, hook_into_trainer
from .startup.sitecustomize import add_member
from .step_size import OPTIMIZERS, check_range, given_learning_rate

logger = logging.getLogger(__name__)

_OPTIM_ARGS = ("basis", "rule", "lr", "units", "momentum", "average", "outside", "stream_gradients")


def _handler(context: trainer_optimizer.OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Turns a user's arguments into those of [`build_optimizer`]; `optim_args` win over the `sl2o_` fields."""
    args, given = context.args, {key: unquote(value) for key, value in context.optim_args.items()}
    refuse_sharding(
        fsdp=args.fsdp, deepspeed=args.deepspeed, with_basis=True
    )  # whether there is one, the factory asks
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
            stream_gradients=args.sl2o_stream_gradients,
        )
    options.update(given)
    if "stream_gradients" in given:
        if given["stream_gradients"].lower() not in ("true", "false"):
            raise ValueError(f"optim_args has stream_gradients={given['stream_gradients']!r}, expected true or false")
        options["stream_gradients"] = given["stream_gradients"].lower() == "true"
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


def register() -> None:
    """Adds our names to transformers; importing hf_sl2o does it, and doing it again changes nothing.

    What is changed, and why, is listed in `hf_sl2o.training.hooks`. Runs with other optimizers stay as they are.

    Raises:
        `ImportError`: transformers has moved what this hooks into.
    """
    check_there(trainer_optimizer, "_OPTIMIZER_HANDLERS")
    hook_into_trainer()
    for value in OPTIMIZERS:
        member = add_member(OptimizerNames, value)
        # Unpickling training_args.bin in another process imports hf_sl2o, and with it the name.
        member.__reduce_ex__ = lambda protocol, value=value: (_optimizer_name, (value,))
        trainer_optimizer._OPTIMIZER_HANDLERS[member] = _handler


def _optimizer_name(value: str) -> OptimizerNames:
    return OptimizerNames(value)
