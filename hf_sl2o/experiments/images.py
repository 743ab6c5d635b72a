"""What the recipes on CIFAR share: the split into training, validation and test, accuracies, a rule for each name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..training import SL2OTrainer, SL2OTrainingArguments
from .arguments import TRAINER_DEFAULTS, RecipeFlags
from .arms import rule_arms
from .comparison import Comparison
from .data.cifar import ImageSet, as_is, crop_and_flip, load_cifar, normalize
from .kept.keys import digest

#: What the recipes' command lines set where the user does not.
IMAGE_DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "max_steps": 1000,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 500,
    "eval_steps": 20,
    "logging_steps": 20,
    "save_steps": 500,
    "remove_unused_columns": False,
    "label_names": ["labels"],
}


@dataclass
class CifarArguments(RecipeFlags):
    """What these recipes add to the flags of the Trainer."""

    data: str = field(default="embedded", metadata={"help": "embedded, hub, or a folder with the parquet files."})
    num_classes: int = field(default=10, metadata={"help": "10 (CIFAR-10) or 100 (CIFAR-100)."})
    rules: list[str] = field(
        default_factory=lambda: ["default"],
        metadata={"help": "Further rules, unchanged: names of shipped ones, or NAME=PATH; an arm sl2o_NAME each."},
    )
    validation_rows: int = field(default=5000, metadata={"help": "Last so many rows of the training split."})
    eval_rows: int = field(default=10_000, metadata={"help": "Rows of the test split."})

    def given_rules(self) -> Mapping[str, Path]:
        return rule_arms(self.rules)


class Epoch(TrainerCallback):
    """Tells a training set which epoch it is, on which its crops depend."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.images.epoch = int(state.epoch or 0)


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # a distilled model has more outputs
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


class CifarComparison(Comparison):
    """CIFAR for the stages; a recipe adds the model and the arms."""

    complete_key = False
    peak_of: str  # the full-space arm whose best accuracy is the target
    prepare: Callable[[torch.Tensor], torch.Tensor]  # uint8 images to the model's input

    def load(
        self,
        recipe: CifarArguments,
        args: SL2OTrainingArguments,
        prepare: Callable[[torch.Tensor], torch.Tensor] = normalize,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Reads the data; the last rows of the training split are for validation, the test split for the end."""
        rows = None if recipe.train_rows is None else recipe.train_rows + recipe.validation_rows
        images, labels = load_cifar(recipe.data, "train", rows, classes, num_classes=recipe.num_classes)
        cut, self.prepare = len(images) - recipe.validation_rows, prepare
        if cut < args.per_device_train_batch_size:
            raise ValueError(
                f"the training split has {len(images)} rows and --validation_rows takes {recipe.validation_rows}: "
                f"{max(cut, 0)} are left, fewer than a batch of {args.per_device_train_batch_size}"
            )
        self.images, self.labels = images[:cut], labels[:cut]
        self.train_set = ImageSet(self.images, self.labels, augment=True, seed=args.seed, prepare=prepare)
        self.validation_set = ImageSet(images[cut:], labels[cut:], augment=False, prepare=prepare)
        test = load_cifar(recipe.data, "test", recipe.eval_rows, classes, num_classes=recipe.num_classes)
        self.test_set = ImageSet(*test, augment=False, prepare=prepare)
        self.data = {
            "train": {"rows": cut, "fingerprint": digest(images[:cut], labels[:cut])},
            "validation": {"rows": recipe.validation_rows, "fingerprint": digest(images[cut:], labels[cut:])},
            "test": {"rows": len(self.test_set), "fingerprint": digest(*test)},
        }
        self.rule_folders = rule_arms(recipe.rules)

    def trainer_objects(self) -> dict[str, Any]:
        return {
            "train_dataset": self.train_set,
            "eval_dataset": self.validation_set,
            "data_collator": as_is,
            "compute_metrics": accuracy,
            "callbacks": [Epoch(self.train_set)],
        }

    def full_space(self, name: str, folder: Path, lr: float, seed: int) -> SL2OTrainingArguments:
        steps = self.recipe.trajectory_steps
        every: Any = max(self.args.eval_steps, steps // 30)  # type: ignore[type-var]
        return self.arguments(
            folder, self.arms[name].optim, learning_rate=lr, max_steps=steps, eval_steps=every,
            logging_steps=every, seed=self.args.seed + seed,
        )  # fmt: skip

    def judge(self, trainer: SL2OTrainer) -> dict[str, Any]:
        metrics = trainer.evaluate(self.test_set, metric_key_prefix="test")  # type: ignore[arg-type]
        return {"test_accuracy": metrics["test_accuracy"]}

    def batches(self, seed: int, size: int) -> Iterator[Any]:
        if size > len(self.labels):
            raise ValueError(
                f"a batch of {size} images (of all processes) was asked for, and there are {len(self.labels)}"
            )
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                chosen = order[start : start + size]
                yield self.prepare(crop_and_flip(self.images[chosen], generator)), self.labels[chosen]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        pixels, labels = (part.to(self.args.device) for part in batch)
        with torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            out = model(pixel_values=pixels)
            logits = out["logits"] if isinstance(out, dict) else out.logits
            return nn.functional.cross_entropy(logits, labels)

    def eval_batches(self) -> Sequence[Any]:
        held = self.validation_set
        starts = range(0, min(1000, len(held)), 250)
        batches = [held.__getitems__(range(i, min(i + 250, len(held)))) for i in starts]
        return [(batch["pixel_values"], batch["labels"]) for batch in batches]

    def targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        losses = [run["final_eval_loss"] for name, run in runs.items() if name.startswith("subspace_")]
        finite = [loss for loss in losses if math.isfinite(loss)]  # an arm may have diverged
        return {"best_in_subspace": 1.01 * min(finite)} if finite else {}

    def accuracy_targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        if self.peak_of not in runs:
            return {}
        peaks = [max(value for _, value in curve) for curve in runs[self.peak_of]["accuracy_per_seed"]]
        best = sum(peaks) / len(peaks)
        return {f"{self.peak_of}_best": best, f"{self.peak_of}_best_less_0.1_points": best - 0.001}
