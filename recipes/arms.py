"""The arms of a recipe: their flags, optimizers and schedules, and how a stage is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from checks import check_flags
from kept_files import keep, kept, made_files, only_run, say, whole
from torch import nn

from hf_sl2o import SL2OTrainingArguments


@dataclass
class PipelineArguments:
    """What a recipe adds to the flags of the Trainer."""

    subspace: str = field(default="pca-full", metadata={"help": "pca-full, pca-lora, lora, or random."})
    dim: int = field(default=40, metadata={"help": "d (the paper: 40)."})
    lora_rank: int = field(default=4, metadata={"help": "r of pca-lora and lora (the paper: 4)."})
    seeds: int = field(default=3, metadata={"help": "Runs of each arm; they differ in the order of the data."})
    train_rows: int | None = field(default=None, metadata={"help": "First so many rows; default: all."})
    eval_rows: int = field(default=256, metadata={"help": "Rows of the validation split."})
    trajectory_steps: int = field(default=1200, metadata={"help": "Steps of the full-space run that is recorded."})
    snapshots: int = field(default=60, metadata={"help": "Recorded at even distances (the paper: 60)."})
    trajectory_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Of the runs of which the best is recorded; default: the arm's grid."}
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
        check_flags(vars(self))
        if self.rule is not None and self.save_rule is not None:
            raise ValueError(
                f"--save_rule {self.save_rule} keeps the rule that is meta-trained here, and --rule {self.rule} names "
                "one; leave one of them out"
            )
        if self.subspace not in ("pca-full", "pca-lora", "lora", "random"):
            raise ValueError(f"--subspace is {self.subspace!r}, expected pca-full, pca-lora, lora, or random")
        if unknown := sorted(set(self.arms or []) - self.arm_names()):
            raise ValueError(f"--arms has {unknown[0]!r}, expected any of {sorted(self.arm_names())}")

    def given_rules(self) -> Mapping[str, Path]:
        """Folders of rules that are used unchanged, by arm."""
        return {}

    def arm_names(self) -> set[str]:
        return {*self.known_arms, *self.given_rules()}


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


def digest(*tensors: torch.Tensor) -> str:
    """Of their bytes, so that it is the same on any number of threads."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def training_settings(args: SL2OTrainingArguments) -> dict[str, Any]:
    """The flags of the Trainer that change what a run computes and keeps; each process has a batch of its own."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps", "logging_steps")
    names += ("seed", "bf16", "fp16", "lr_scheduler_type", "warmup_steps", "max_grad_norm")
    names += ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "label_smoothing_factor", "data_seed")
    names += ("lr_scheduler_kwargs",)
    return {**{name: getattr(args, name) for name in names}, "processes": PartialState().num_processes}


def stage(
    folder: Path,
    name: str,
    key: str,
    work: Callable[[], dict[str, Any]],
    *,
    collective: bool = False,
    made: Path | None = None,
) -> dict[str, Any]:
    """Runs `work` unless its result of the same key is there: on the first process, or on all if it is collective.

    Args:
        folder (`Path`): Holds the results of stages.
        name, key (`str`): Of the stage, and of everything its result depends on.
        work (`Callable`): The stage.
        collective (`bool`, *optional*, defaults to `False`): All processes take part.
        made (`Path`, *optional*): The folder that `work` fills; if one of its files is gone, the stage is done again.
    """
    path, state = folder / "stages" / f"{name}.json", PartialState()
    known = kept(path)
    done = whole(known, path, key, made)
    state.wait_for_everyone()
    say(f"[{name}] done before, same settings" if done else f"[{name}] ...")
    if done:
        return known
    with only_run(path):
        start = time.perf_counter()
        if state.is_main_process and made is not None and known.get("key") == key:
            shutil.rmtree(made, ignore_errors=True)  # what is left of it is not gone on with
        state.wait_for_everyone()
        result = work() if collective or state.is_main_process else {}
        if state.is_main_process:
            seconds = time.perf_counter() - start
            keep(path, {"key": key, "seconds": seconds, **result, "files": made_files(made)})
        state.wait_for_everyone()
    return kept(path)


def leave_processes() -> None:
    """Waits until gloo's threads are done with the last collective; call it as the last thing in a process.

    They take the GIL to free its tensors. A process that ends in that moment aborts ("terminate called without an
    active exception"), and one that destroys its group in that moment waits for ever.
    """
    if PartialState().num_processes > 1:
        time.sleep(0.5)


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
