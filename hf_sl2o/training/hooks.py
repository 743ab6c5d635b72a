"""What is changed in transformers: the one place, each with its reason and what happens without it.

`OptimizerNames`, `_OPTIMIZER_HANDLERS` (registration.py)
    Three more names, which pickle by the name of a function here, and what makes their optimizers. Without:
    `optim="sl2o"` is refused; a Trainer still takes `optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {...})`.
`Trainer._prepare_for_training`
    Before the optimizer is made: reads `optim_args` in words that help, and compares the arguments of the processes.
    After it is made and resumed: tells it the length of the run and the model, begins anew where a Trainer trains
    again, keeps DDP from sending what is streamed, and warns of what changes the result. Without: where the user gave
    epochs, a rule that sees the share of the run that is done (`default`) raises at its first step; an optimizer that
    was made of named parameters does not publish its average; ranks with other arguments train apart, or wait for
    ever.
`Trainer._run_epoch`
    Leaves a finished run as it is; lets the optimizer listen to forward passes, and publishes the average where an
    epoch ends by an exception; with several processes says which rank is missing where a collective fails. Without:
    resuming a finished run takes a step too many; Ctrl-C between a forward pass and the end of its step leaves the
    weights at the last step instead of the average; torch names an address instead of a rank, often a wrong one.
`Trainer._clip_grad_norm`
    Leaves clipping to an optimizer that clips the projected gradient. Without: the n-sized gradient is clipped too,
    mostly by far more.

Each method calls the one it stands in front of, and does nothing else where neither `optim` nor the optimizer is ours.

Less does not do it. The handler of a name, and the factory, see neither the length of a run of epochs nor what a
resume loads into the optimizer. A callback has to be given to each Trainer, or (`DEFAULT_CALLBACKS`) to those of all
other runs; without gradient accumulation it cannot end a run before its first step, and it is not called when an epoch
raises. The optimizer's own hooks run after clipping, and cannot undo it. Methods set on one Trainer object instead of
the class would hide those of a user's subclass.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import trainer

from ..foundation.ranks import check_same_on_all_ranks
from ..foundation.watch import watched_ranks
from ..optim import LearnedOptimizer, SubspaceOptimizer, send_nothing
from .arguments import check_optim_args
from .batch_norm import BatchNormCallback, has_running_statistics
from .callbacks import unwrap_optimizer
from .facts import patience, training_facts
from .step_size import OPTIMIZERS

logger = logging.getLogger(__name__)


def _prepare_for_training(self: trainer.Trainer, max_steps: int, *args: Any, **kwargs: Any) -> Any:
    if self.args.optim in OPTIMIZERS:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            check_optim_args(self.args.optim_args)
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
        if isinstance(optimizer, SubspaceOptimizer) and optimizer.streamer is not None:
            send_nothing(self.model_wrapped, optimizer.streamer.carrier)
        if self.args.optim in OPTIMIZERS:
            begun = {"global_step": self.state.global_step, "optimizer_steps": done}
            check_same_on_all_ranks(begun, "resumed training", patience(self.args))
        _say_what_changes_the_result(self, model, optimizer)
    return prepared


def _run_epoch(self: trainer.Trainer, *args: Any, **kwargs: Any) -> Any:
    optimizer = unwrap_optimizer(self.optimizer)
    if not isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
        return _theirs["_run_epoch"](self, *args, **kwargs)
    if self.state.global_step >= self.state.max_steps:  # a finished run that was resumed
        self.control.should_training_stop = True
        return None
    optimizer.listens = True
    try:
        with watched_ranks(self.args.ddp_timeout):
            return _theirs["_run_epoch"](self, *args, **kwargs)
    finally:
        optimizer.listens = False  # to forward passes of another Trainer
        optimizer.publish()


def _clip_grad_norm(self: trainer.Trainer, model: nn.Module) -> Any:
    optimizer = unwrap_optimizer(self.optimizer)
    if isinstance(optimizer, SubspaceOptimizer) and optimizer.max_grad_norm > 0:
        return None  # its step clips the projected gradient
    return _theirs["_clip_grad_norm"](self, model)


_OURS = {function.__name__: function for function in (_prepare_for_training, _run_epoch, _clip_grad_norm)}
_theirs: dict[str, Any] = {}


def hook_into_trainer() -> None:
    """Puts the methods above in front of Trainer's; doing it again changes nothing.

    Raises:
        `ImportError`: transformers has moved one of them.
    """
    for name in _OURS:
        check_there(trainer.Trainer, name)
    for name, ours in _OURS.items():
        if name not in _theirs:  # what others have put in front of ours since stays
            _theirs[name] = getattr(trainer.Trainer, name)
            setattr(trainer.Trainer, name, functools.update_wrapper(ours, _theirs[name]))


def check_there(owner: Any, name: str) -> None:
    """Raises `ImportError` where `owner`, of transformers, no longer has what we hook into."""
    if not hasattr(owner, name):
        raise ImportError(
            f"{owner.__name__} of transformers {transformers.__version__} no longer has {name}, which "
            'optim="sl2o" is hooked into: this version is newer than this hf_sl2o knows; upgrade hf_sl2o, or use '
            "Trainer(optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {...}))"
        )


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
