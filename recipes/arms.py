"""The arms of a recipe: their flags, optimizers and schedules, and how one stage or one run is kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_sl2o import (
    SL2OTrainer,
    SL2OTrainingArguments,
)
from hf_sl2o.files import load_json, save_json


@dataclass
class PipelineArguments:
    """What a recipe adds to the flags of the Trainer."""

    subspace: str = field(default="pca-full", metadata={"help": "pca-full, pca-lora, lora, or random."})
    dim: int = field(default=40, metadata={"help": "d (the paper: 40)."})
    lora_rank: int = field(default=4, metadata={"help": "r of pca-lora and lora (the paper: 4)."})
    seeds: int = field(default=3, metadata={"help": "Runs of each arm; they differ in the order of the data."})
    train_rows: int | None = field(default=None, metadata={"help": "First so many rows; default: all."})
    eval_rows: int = field(default=256, metadata={"help": "Rows of the validation split."})
    trajectory_steps: int = field(default=1200, metadata={"help": "Steps of the AdamW run that is recorded."})
    snapshots: int = field(default=60, metadata={"help": "Recorded at even distances (the paper: 60)."})
    trajectory_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "The best one on validation is recorded."}
    )
    meta_epochs: int = field(default=20, metadata={"help": "Episodes of meta-training."})
    inner_steps: int = field(default=200, metadata={"help": "N, steps of an episode."})
    unroll_length: int = field(default=10, metadata={"help": "T."})
    output_scale: float | None = field(
        default=None,
        metadata={"help": "Of the rule, in units of the coordinates; default: 1 in a basis, the recipe's in lora."},
    )
    rule: str | None = field(default=None, metadata={"help": "Use this rule instead of meta-training one."})
    save_rule: str | None = field(default=None, metadata={"help": "Keep the rule here, with how it was made."})
    arms: list[str] | None = field(default=None, metadata={"help": "Default: all that make sense."})
    quick_grid: bool = field(
        default=False, metadata={"help": "Two learning rates in each coordinates instead of up to four."}
    )
    demo: bool = field(default=False, metadata={"help": "Everything in a few minutes on two cores."})

    #: The arms by name, of the recipe.
    known_arms: ClassVar[Mapping[str, Arm]] = {}

    def __post_init__(self) -> None:
        if self.subspace not in ("pca-full", "pca-lora", "lora", "random"):
            raise ValueError(f"--subspace is {self.subspace!r}, expected pca-full, pca-lora, lora, or random")
        if unknown := sorted(set(self.arms or []) - self.arm_names()):
            raise ValueError(f"--arms has {unknown[0]!r}, expected any of {sorted(self.arm_names())}")

    def arm_names(self) -> set[str]:
        return set(self.known_arms)


@dataclass(frozen=True)
class Arm:
    """One line of the table; `grid` holds (units, learning rate), tuned on validation."""

    optim: str
    grid: tuple[tuple[str, float], ...]
    momentum: float = 0.0
    basis: str = "learned"  # "learned", "random", "none"
    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] | None = None  # of the full space
    decay_at: tuple[float, ...] = ()  # shares of the run after which the rate is a tenth; () is --lr_scheduler_type


def grid(**learning_rates: tuple[float, ...]) -> tuple[tuple[str, float], ...]:
    return tuple((units, lr) for units, values in learning_rates.items() for lr in values)


def stamp(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def training_settings(args: SL2OTrainingArguments) -> dict[str, Any]:
    """The flags of the Trainer that change what a run computes."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps", "seed", "bf16")
    names += ("fp16", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")
    return {name: getattr(args, name) for name in names}


def stage(
    folder: Path, name: str, key: str, work: Callable[[], dict[str, Any]], *, collective: bool = False
) -> dict[str, Any]:
    """Runs `work` unless its result of the same key is there: on the first process, or on all if it is collective."""
    path = folder / "stages" / f"{name}.json"
    state = PartialState()
    done = path.is_file() and load_json(path)["key"] == key
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"[{name}] done before, same settings" if done else f"[{name}] ...", flush=True)
    if not done and (collective or state.is_main_process):
        start = time.perf_counter()
        result = work()
        if state.is_main_process:
            save_json(path, {"key": key, "seconds": time.perf_counter() - start, **result})
    state.wait_for_everyone()
    return load_json(path)  # type: ignore[no-any-return]


def leave_processes() -> None:
    """Waits until gloo's threads are done with the last collective; call it as the last thing in a process.

    They take the GIL to free its tensors. A process that ends in that moment aborts ("terminate called without an
    active exception"), and one that destroys its group in that moment waits for ever.
    """
    if PartialState().num_processes > 1:
        time.sleep(0.5)


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


def portable(value: Any) -> Any:
    """Absolute paths, also in NAME=PATH, become their last part: results name no folder of the machine."""
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry) for entry in value]
    if not isinstance(value, str):
        return value
    head, equals, path = value.rpartition("=")
    return f"{head}{equals}{Path(path).name}" if Path(path).is_absolute() else value


class RecipeTrainer(SL2OTrainer):
    """Makes its optimizer and schedule as an [`Arm`] says."""

    arm = Arm("", ())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.arm.make is None:
            return super().create_optimizer(*args, **kwargs)  # type: ignore[no-any-return]
        if self.optimizer is None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = self.arm.make(parameters, self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self.arm.decay_at:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            milestones = [round(share * num_training_steps) for share in self.arm.decay_at]
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer or self.optimizer, milestones)
        return self.lr_scheduler
