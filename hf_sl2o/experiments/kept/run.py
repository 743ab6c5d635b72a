"""One run of the Trainer, and what is kept of it: made once, gone on with after a kill, read from then on."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState

from ...optim import LearnedOptimizer, SubspaceOptimizer
from ...rules import Rule, load_rule
from ...subspace import Basis, Trajectory
from ...training import SL2OTrainer, SL2OTrainingArguments, TrajectoryCallback
from ...training.callbacks import unwrap_optimizer
from ...training.resume import CheckpointCallback, first_fault, last_complete_checkpoint, steps_done
from ..arms import Arm
from ..environment import peak_bytes, reset_peak
from .files import keep, kept, only_run


class Bar(TrainerCallback):
    """One progress bar a run, instead of a line a log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        where = "/".join(Path(args.output_dir).parts[-3:])
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=where, leave=False, mininterval=2)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.bar.set_postfix({key: f"{logs[key]:.3f}" for key in ("loss", "eval_loss") if key in (logs or {})})
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class Clock(TrainerCallback):
    """Seconds of a run over all the times that it was gone on with; what was lost by a kill does not count."""

    def __init__(self, path: Path, key: str, before: float) -> None:
        self.path, self.key, self.start = path, key, time.perf_counter() - before

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.start

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            keep(self.path, {"key": self.key, "spent": self.spent})


class Recorder(TrajectoryCallback):
    """Records until a run diverges: it ends with a loss that no other run is behind, instead of an error."""

    def _write(self, state: TrainerState, model: nn.Module, *further: Any) -> None:
        if all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
            super()._write(state, model, *further)


def subspace_optimizer(model: nn.Module, args: Any, basis: Basis, rule: Rule | None) -> SubspaceOptimizer:
    """The optimizer of an arm in the subspace, at exactly the rate of `args`: a grid may go below what a user means.

    Args:
        model (`nn.Module`): At theta_0.
        args ([`SL2OTrainingArguments`]): `optim`, `learning_rate`, `sl2o_momentum`, `sl2o_average`, `max_grad_norm`
            and Adam's constants.
        basis ([`Basis`]): With the units of the arm.
        rule ([`Rule`], *optional*): With `optim="sl2o"`; default: the shipped one.
    """
    optim, lr = str(getattr(args.optim, "value", args.optim)), float(args.learning_rate)  # type: ignore[arg-type]
    average = args.sl2o_average
    inner: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    if optim == "sl2o":
        learned = load_rule(rule, with_basis=True)
        average = learned.config.average if average is None else average
        steps = args.max_steps if args.max_steps > 0 else None
        inner = lambda c: LearnedOptimizer(c, learned, lr=lr, total_steps=steps)  # noqa: E731
    elif optim == "subspace_adamw":
        betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
        inner = lambda c: torch.optim.AdamW(c, lr=lr, betas=betas, eps=eps, weight_decay=0.0)  # noqa: E731
    else:
        inner = lambda c: torch.optim.SGD(c, lr=lr, momentum=args.sl2o_momentum)  # noqa: E731
    return SubspaceOptimizer(
        model.named_parameters(), basis, inner, max_grad_norm=args.max_grad_norm, average=average or 0.0
    )


def lost_snapshots(trajectory: Path, steps: Iterable[int]) -> list[int]:
    """Which of the snapshots that a run recorded are not there any more."""
    known = Trajectory(trajectory)
    return [step for step in steps if step not in known.steps or not known.path(step).is_file()]


class ArmTrainer(SL2OTrainer):
    """Makes its optimizer and schedule as an [`Arm`] says; may have a loss (model, batch) instead of the model's."""

    arm = Arm("", ())
    own_loss: Callable[[nn.Module, Any], torch.Tensor] | None = None

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self.own_loss is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss = self._checked(self.own_loss(model, inputs))
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.own_loss is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._checked(self.own_loss(model, inputs)).detach(), None, None

    def _checked(self, loss: Any) -> torch.Tensor:
        if not torch.is_tensor(loss) or loss.ndim:
            found = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise ValueError(f"the loss of a batch is a {found}, expected a 0-d tensor: the mean over the batch")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not self.state.global_step and not math.isfinite(loss):
            raise ValueError(f"the validation loss at the start is {loss}; check the data, the loss and the model")
        return metrics

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model: Any = self.model
        if self.optimizer is None and self.arm.make is not None:
            parameters = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = self.arm.make(parameters, self.args.learning_rate)
        elif (
            self.optimizer is None and self.basis is not None and (self.rule is not None or self.args.optim != "sl2o")
        ):
            self.optimizer = subspace_optimizer(model, self.args, self.basis, self.rule)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[no-any-return]  # keeps one that is there

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.arm.decay_at and self.lr_scheduler is None:
            milestones = [round(share * num_training_steps) for share in self.arm.decay_at]
            of: Any = optimizer or self.optimizer
            steps: Any = torch.optim.lr_scheduler.MultiStepLR(of, milestones)
            self.lr_scheduler = steps
        return super().create_scheduler(num_training_steps, optimizer)  # keeps a scheduler that is there


def kept_run(
    folder: Path,
    args: SL2OTrainingArguments,
    key: str,
    arm: Arm,
    build_model: Callable[[], nn.Module],
    judge: Callable[[SL2OTrainer], dict[str, Any]],
    callbacks: Any = (),
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    **objects: Any,
) -> dict[str, Any]:
    """Trains unless `folder` has the result of the same `key`; goes on from its last checkpoint otherwise.

    Args:
        folder (`Path`): Checkpoints, and run.json.
        args ([`SL2OTrainingArguments`]): Of the run; `output_dir` is `folder`.
        key (`str`): Of everything the result depends on; a folder of another key is emptied.
        arm ([`Arm`]): Its optimizer and schedule.
        build_model (`Callable`): The model at theta_0.
        judge (`Callable`): What is measured once, at the end.
        callbacks, **objects: For [`SL2OTrainer`].

    Returns:
        `train_loss`, `eval` and `accuracy` (lists of `[step, value]`; NaN from where the optimizer gave up on
        gradients that are not finite), `seconds` without loading, `average`, `peak_bytes`,
        `state_bytes` of the optimizer, and what `judge` found.
    """
    path, state = folder / "run.json", PartialState()
    known = kept(path)
    state.wait_for_everyone()  # all have read it
    if known.get("key") == key and "eval" in known:
        return known
    with only_run(folder):
        if known.get("key") != key:
            known = {"key": key}
            if state.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                keep(path, known)
        state.wait_for_everyone()
        checkpoint = unfinished_checkpoint(folder, args.max_steps)
        clock = Clock(path, key, known.get("spent", 0.0) if checkpoint else 0.0)
        own = [*callbacks, Bar(), CheckpointCallback(), clock]
        trainer = ArmTrainer(build_model(), args, callbacks=own, **objects)
        trainer.arm = arm
        if loss is not None:
            trainer.own_loss, trainer.model_accepts_loss_kwargs = loss, False  # so that accumulation divides by steps
        trainer.remove_callback(PrinterCallback)
        reset_peak()
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            diverged = False
        except FloatingPointError as error:  # on all processes: they have the same gradients
            print(f"  {folder.name} diverged at step {trainer.state.global_step}: {error}", flush=True)
            diverged = True
        result = {"key": key, **curves(trainer, diverged), "seconds": clock.spent, **judge(trainer)}
        if state.is_main_process:
            keep(path, result)
        state.wait_for_everyone()
    return result


def unfinished_checkpoint(folder: Path, max_steps: int) -> str | None:
    """The last complete checkpoint before the last step; Trainer would add a step to a finished run.

    What is later, or was half-written or half-deleted by a kill, is removed: no later start takes it, and a Trainer
    that counts checkpoints would delete a good one for it.
    """
    state, found = PartialState(), last_complete_checkpoint(folder)
    finished = found is not None and steps_done(found) >= max_steps
    state.wait_for_everyone()
    if state.is_main_process:
        last = max_steps - 1 if found is None or finished else steps_done(found)
        for path in folder.glob("checkpoint-*"):
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and (int(match[1]) > last or first_fault(path) is not None):
                shutil.rmtree(path)
    state.wait_for_everyone()
    return last_complete_checkpoint(folder) if finished else found


def curves(trainer: SL2OTrainer, diverged: bool = False) -> dict[str, Any]:
    """The curves of a run that has ended, and what its optimizer took; NaN from where it diverged to its last step."""
    history, state = trainer.state.log_history, trainer.state

    def curve(name: str, every: float | None) -> list[list[float]]:
        points = {entry["step"]: entry[name] for entry in history if name in entry}
        steps = int(every or state.max_steps)
        missing = {*range(steps, state.max_steps + 1, steps), state.max_steps} if diverged and points else ()
        return [[step, points.get(step, math.nan)] for step in sorted({*points, *missing})]

    optimizer: Any = trainer.optimizer
    tensors = [value for entry in optimizer.state.values() for value in entry.values()]
    sizes = {value.data_ptr(): value.nbytes for value in tensors if torch.is_tensor(value)}
    return {
        "train_loss": curve("loss", state.logging_steps),
        "eval": curve("eval_loss", state.eval_steps),
        "accuracy": curve("eval_accuracy", state.eval_steps),
        "average": getattr(unwrap_optimizer(trainer.optimizer), "average", 0.0),  # what it was evaluated at
        "peak_bytes": peak_bytes(),
        "state_bytes": sum(sizes.values()),
    }
