"""What a Trainer run records: snapshots for a basis, and what happens inside the subspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from ..optim import LearnedOptimizer, SubspaceOptimizer
from ..subspace import Trajectory
from ..subspace.shards import is_sharded, whole_parameters


def unwrap_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer behind Accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class TrajectoryCallback(TrainerCallback):
    """Writes a snapshot of the trainable parameters while any Trainer trains; the first one before step 1.

    With a running average it records where training is, the last step. A resumed run drops the snapshots after its
    checkpoint and records them again; so does one that `auto_find_batch_size` begins again after an out-of-memory.

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
        self._recording = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            if state.is_world_process_zero:
                self.trajectory.forget_after(state.global_step)
            return
        parameters = whole_parameters(kwargs["model"])  # all processes have to take part where they are sharded
        if not state.is_world_process_zero:
            return
        again = args.auto_find_batch_size and self._recording  # without an end: begun again with smaller batches
        self._recording = True
        if len(self.trajectory) and not (self.overwrite or again):
            raise ValueError(
                f"{self.trajectory.folder} holds {len(self.trajectory)} snapshots of an earlier run and this one "
                "starts anew; resume that run, choose another folder, or pass overwrite=True"
            )
        self.trajectory.clear()
        self.trajectory.write(0, parameters)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recording = False

    def _write(self, state: TrainerState, model: torch.nn.Module, optimizer: Any = None) -> None:
        wanted = state.is_world_process_zero and state.global_step not in self.trajectory.steps
        if not (wanted or is_sharded(model.parameters())):
            return
        optimizer = unwrap_optimizer(optimizer)
        published = isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer) and optimizer.at_average
        if published:
            optimizer.use_last()
        try:
            parameters = whole_parameters(model)
            if wanted:
                self.trajectory.write(state.global_step, parameters)
        finally:
            if published:
                optimizer.use_average()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_steps and state.global_step % self.every_steps == 0:
            self._write(state, kwargs["model"], kwargs.get("optimizer"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_epochs and round(state.epoch or 0) % self.every_epochs == 0:
            self._write(state, kwargs["model"], kwargs.get("optimizer"))


class SubspaceLogCallback(TrainerCallback):
    """Adds what happens in the subspace to the usual logs; [`SL2OTrainer`] has it, a Trainer gets it by `attach`.

    - `sl2o_coefficients_norm`: |c|
    - `sl2o_delta_norm`: |delta|, how far the last step moved c
    - `sl2o_gradient_share`: |U U^T grad|^2 / |grad|^2 over the covered parameters, 1.0 if the subspace holds it all;
      not with `stream_gradients`, which keeps the projected gradient alone
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
        if not isinstance(optimizer, SubspaceOptimizer) or optimizer.streamer is not None:
            return
        if step % every == 0 or (step == 1 and args.logging_first_step):
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
