"""Running statistics of BatchNorm after the weights have moved in a subspace, and a guard for evaluation."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


def has_running_statistics(model: nn.Module) -> bool:
    """Whether a model keeps averages over batches (BatchNorm, its lazy and synchronised kinds, InstanceNorm).

    Such a model wants a [`BatchNormCallback`].

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.training.batch_norm import has_running_statistics
    >>> [has_running_statistics(layer) for layer in (torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3))]
    [True, False]
    ```
    """
    return any(True for _ in _norms(model))


def _norms(model: nn.Module) -> Iterable[_NormBase]:
    return (m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None)


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Sets running statistics, of BatchNorm mostly, to the averages over `batches` at the weights as they are.

    Running statistics are buffers: a basis does not hold them, and a learned optimizer moves the weights so far in a
    step that an exponential average lags behind. Only BatchNorm runs in train mode here, so dropout draws nothing.

    Args:
        model (`nn.Module`): Changed in place; its train or evaluation modes stay.
        batches (`Iterable`): Training batches, each a mapping (`model(**batch)`), a tuple whose first entry is the
            input, or the input itself. All count the same.

    Returns:
        How many modules have running statistics.

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
    norms = list(_norms(model))
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
        if not is_lazy(norm.running_mean):  # type: ignore[arg-type]
            norm.reset_running_stats()
        norm.train()
    try:
        for count, batch in enumerate(itertools.chain([first], batches), 1):
            for norm in norms:
                norm.momentum = 1 / count  # the plain average (None stands for it in BatchNorm only)
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
    """Recalibrates BatchNorm before the model is evaluated or saved, whoever asks for it, and at the end of training.

    While a Trainer trains, a forward pass in train mode makes the statistics stale; the next one in evaluation mode,
    or the next `state_dict()`, sets them right first. So they are right also where a callback evaluates or saves by
    itself. A model with SyncBatchNorm, whose processes have to recalibrate together, and the evaluation of a compiled
    model rely on what is asked for by the end of a step or a log.

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
        self._keeper: _Keeper | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._keeper is not None:
            self._keeper.detach()
        self._keeper = _Keeper(kwargs["model"], self.batches)
        if args.eval_on_start:
            self._keeper.refresh()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._keeper is not None:
            self._keeper.stale = True
        self.on_epoch_end(args, state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._keeper is not None and about_to_be_read(state, control):
            self._keeper.refresh_if_stale()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_epoch_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._keeper is not None:
            self._keeper.refresh_if_stale()
            self._keeper.detach()
            self._keeper = None

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


class _Keeper:
    """Knows whether a model's statistics are stale, and sets them right before anybody reads them."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.model, self.batches = weakref.ref(model), batches
        self.stale = self._refreshing = False
        self._handles: list[Any] = []
        if not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            self._handles = [
                model.register_forward_pre_hook(_Hook(self._before_forward)),
                model.register_state_dict_pre_hook(_Hook(self._before_state_dict)),  # type: ignore[no-untyped-call]
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def refresh(self) -> None:
        model = self.model()
        if model is None or self._refreshing:
            return
        self._refreshing = True
        try:
            recalibrate_batch_norm(model, self.batches)
            self.stale = False
        finally:
            self._refreshing = False

    def refresh_if_stale(self) -> None:
        if self.stale:
            self.refresh()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._refreshing or module is not self.model():  # a replica of DataParallel
            return
        if module.training:
            self.stale = True
        else:
            self.refresh_if_stale()

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if module is self.model():
            self.refresh_if_stale()


class _Hook:
    """Calls a method while its object lives; in a copy of the model, or a pickled one, it does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        if self.method is not None and not torch.compiler.is_compiling() and (method := self.method()) is not None:
            method(*args)

    def __reduce__(self) -> Any:
        return _Hook, ()
