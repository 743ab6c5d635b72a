"""What a Trainer run records: snapshots for a basis, and what happens inside the subspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from .batch_norm import BatchNormCallback, about_to_be_read
from .optim import LearnedOptimizer, SubspaceOptimizer
from .subspace import Trajectory


def unwrap_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer behind Accelerate's wrapper."""
    while not isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class TrajectoryCallback(TrainerCallback):
    """Writes a snapshot of the trainable parameters while any Trainer trains; the first one before step 1.

    A resumed run drops the snapshots after its checkpoint and records them again.

    Args:
        folder (`str` or `Path`): Where the snapshots go.
        every_steps (`int`, *optional*): A snapshot each so many optimizer steps.
        every_epochs (`int`, *optional*): Or each so many epochs; without either, each epoch (the paper).
        overwrite (`bool`, *optional*, defaults to `False`): Delete the snapshots of an earlier run when a new one
            starts. Otherwise they are an error.

    Example:

    ```python
    >>> from hf_sl2o import TrajectoryCallback
    >>> callback = TrajectoryCallback("trajectory", every_steps=20)  # Trainer(..., callbacks=[callback])
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        overwrite: bool = False,
    ) -> None:
        if every_steps is not None and every_epochs is not None:
            raise ValueError("give every_steps or every_epochs, not both")
        if min(1 if every is None else every for every in (every_steps, every_epochs)) < 1:
            raise ValueError("every_steps and every_epochs must be at least 1")
        self.trajectory = Trajectory(folder)
        self.every_steps = every_steps
        self.every_epochs = every_epochs or (None if every_steps else 1)
        self.overwrite = overwrite

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if state.global_step > 0:
            self.trajectory.forget_after(state.global_step)
            return
        if len(self.trajectory) and not self.overwrite:
            raise ValueError(
                f"{self.trajectory.folder} holds {len(self.trajectory)} snapshots of an earlier run and this one "
                "starts anew; resume that run, choose another folder, or pass overwrite=True"
            )
        self.trajectory.clear()
        self.trajectory.write(0, kwargs["model"].named_parameters())

    def _write(self, state: TrainerState, model: torch.nn.Module) -> None:
        if state.is_world_process_zero and state.global_step not in self.trajectory.steps:
            self.trajectory.write(state.global_step, model.named_parameters())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_steps and state.global_step % self.every_steps == 0:
            self._write(state, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_epochs and round(state.epoch or 0) % self.every_epochs == 0:
            self._write(state, kwargs["model"])


class SubspaceLogCallback(TrainerCallback):
    """Adds what happens in the subspace to the usual logs; [`SL2OTrainer`] has it, a Trainer gets it by `attach`.

    - `sl2o_coefficients_norm`: |c|
    - `sl2o_delta_norm`: |delta|, how far the last step moved c
    - `sl2o_gradient_share`: |U U^T grad|^2 / |grad|^2 over the covered parameters, 1.0 if the subspace holds it all
    - `sl2o_skipped_steps`: steps skipped since a gradient held NaN or Inf
    """

    def __init__(self) -> None:
        self._share: torch.Tensor | None = None

    @classmethod
    def attach(cls, trainer: Trainer) -> SubspaceLogCallback:
        """Puts one in front of the trainer's callbacks, so that its tensorboard, wandb or trackio sees the values."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer, step = unwrap_optimizer(kwargs.get("optimizer")), state.global_step + 1
        if args.logging_strategy == IntervalStrategy.EPOCH:
            every: float = state.max_steps / max(state.num_train_epochs, 1)
        else:
            every = max(state.logging_steps, 1)
        if isinstance(optimizer, SubspaceOptimizer) and (step % every == 0 or (step == 1 and args.logging_first_step)):
            self._share = optimizer.gradient_share()  # a pass over n numbers, in logged steps only

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer, logs = unwrap_optimizer(kwargs.get("optimizer")), kwargs.get("logs")
        if logs is None or "loss" not in logs or not isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
            return
        values: dict[str, float] = {"sl2o_skipped_steps": optimizer.skipped_steps}
        if isinstance(optimizer, SubspaceOptimizer):
            values["sl2o_coefficients_norm"] = float(torch.linalg.vector_norm(optimizer.coefficients))
            values["sl2o_delta_norm"] = float(torch.linalg.vector_norm(optimizer.last_delta))
            if self._share is not None:
                values["sl2o_gradient_share"] = float(self._share)
                self._share = None
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


class AverageCallback(TrainerCallback):
    """Evaluates and saves at the running average of what the optimizer moves; every Trainer gets one where it is kept.

    After a step the weights go there behind all other callbacks, which may still ask for a checkpoint or the end, or
    record where training is ([`TrajectoryCallback`]); only [`BatchNormCallback`] comes later. Before a step they go
    back to where training goes on, ahead of all others. A run ends at the average.

    Example:

    ```python
    >>> from hf_sl2o import SL2OTrainingArguments
    >>> args = SL2OTrainingArguments("out", sl2o_basis="user/basis", sl2o_average=9.0, use_cpu=True)  # that is all
    ```
    """

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Adds it to a trainer that has none: one part before, and one behind the callbacks, then BatchNorm's."""
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(one, cls) for one in callbacks):
            last = [one for one in callbacks if isinstance(one, BatchNormCallback)]
            others = [one for one in callbacks if not isinstance(one, BatchNormCallback)]
            callbacks[:] = [cls(), *others, _ToTheAverage(), *last]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
            optimizer.use_last()


class _ToTheAverage(TrainerCallback):
    """The part of [`AverageCallback`] after a step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if about_to_be_read(state, control) and isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer):
            optimizer.use_average()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control, **kwargs)
