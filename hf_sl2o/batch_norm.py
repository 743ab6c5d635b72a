"""Running statistics of BatchNorm after the weights have moved in a subspace, and a guard for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Sets the running statistics of every BatchNorm to the averages over `batches`, at the weights as they are.

    Running statistics are buffers: a basis does not hold them, and a learned optimizer moves the weights so far in a
    step that an exponential average lags behind. Only BatchNorm runs in train mode here, so dropout draws nothing.

    Args:
        model (`nn.Module`): Changed in place; its train or evaluation modes stay.
        batches (`Iterable`): Training batches, each a mapping (`model(**batch)`), a tuple whose first entry is the
            input, or the input itself. All count the same.

    Returns:
        How many BatchNorm modules have running statistics.

    Raises:
        `ValueError`: `batches` is empty and there is something to set; the statistics are as they were.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import recalibrate_batch_norm
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    >>> recalibrate_batch_norm(model, [torch.randn(8, 2)])
    1
    ```
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    device, batches = next(model.parameters()).device, iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no batches to recalibrate BatchNorm with; give at least one of the training data")
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    try:
        for batch in itertools.chain([first], batches):
            batch = send_to_device(batch, device)
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return len(norms)


def about_to_be_read(state: TrainerState, control: TrainerControl) -> bool:
    """Whether a Trainer will evaluate or save the weights after this step, or leave them to its user."""
    ends = control.should_training_stop or state.global_step >= state.max_steps
    return bool(ends or control.should_evaluate or control.should_save)


class BatchNormCallback(TrainerCallback):
    """Recalibrates BatchNorm before each evaluation and each checkpoint, and at the end of training.

    Args:
        batches (`Sequence`): As for [`recalibrate_batch_norm`]; the same ones each time and on every process.

    Raises:
        `ValueError`: no batches; or, during evaluation, a BatchNorm in train mode, whose outputs depend on what else
            is in the batch.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import BatchNormCallback
    >>> callback = BatchNormCallback([{"pixel_values": torch.randn(8, 3, 32, 32)}])  # Trainer(..., callbacks=[...])
    ```
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        if not len(batches):
            raise ValueError("there are no batches to recalibrate BatchNorm with; give at least one")
        self.batches = batches

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_on_start:
            recalibrate_batch_norm(kwargs["model"], self.batches)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if about_to_be_read(state, control):
            recalibrate_batch_norm(kwargs["model"], self.batches)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_batch_norm(kwargs["model"])


def check_batch_norm(model: nn.Module) -> None:
    """Raises `ValueError` if a BatchNorm of a model under evaluation takes its statistics from the batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a BatchNorm that uses the statistics of the batch during evaluation, so "
                "the result depends on the batch size; call model.eval(), and keep track_running_stats=True"
            )
