"""Trains ViT-B on ImageNet from scratch in a PCA subspace (supplement, 2.4), beside Momentum there and AdamW.

    accelerate launch recipes/vit_imagenet.py --data PATH --bf16   # PATH/train/CLASS/*.jpg, PATH/validation/CLASS/*
    accelerate launch recipes/vit_imagenet.py --data hub --bf16    # streams ILSVRC/imagenet-1k (ask for access first)
    python recipes/vit_imagenet.py --data PATH --model small --image_size 32 --trajectory_steps 400   # two cores

The table is of --max_steps steps, 2,000 by default as in the supplement; its accuracies are on the validation images
that choose rates and rules. The Hub's stream is of a split that is not shuffled as a whole: a buffer of
--shuffle_buffer images is.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_sl2o import SL2OTrainingArguments
from hf_sl2o.experiments.arguments import RecipeFlags
from hf_sl2o.experiments.arms import Arm, grid, rule_arms
from hf_sl2o.experiments.command_line.flags import load_named
from hf_sl2o.experiments.command_line.recipe import run_recipe
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.comparison import Comparison
from hf_sl2o.experiments.data.image_folder import Pictures, image_folder, listing, pixels, stacked
from hf_sl2o.experiments.images import IMAGE_DEFAULTS, Epoch, accuracy

SIZES = {"vit-base": (768, 12, 12, 16), "small": (64, 4, 4, 4)}  # width, layers, heads, pixels of a patch

ARMS: dict[str, Arm] = {
    "sl2o": Arm("sl2o", grid(std=(1.0,))),
    "subspace_momentum": Arm("subspace_sgd", grid(orthonormal=(1.0, 0.3), std=(0.1, 0.03)), momentum=0.9),
    "subspace_adamw": Arm("subspace_adamw", grid(std=(0.1, 0.3, 0.03))),
    "adamw": Arm("adamw_torch", grid(full=(1e-3,)), basis="none"),
}


@dataclass
class RecipeArguments(RecipeFlags):
    """What the recipe adds to the flags of the Trainer."""

    data: str = field(default="hub", metadata={"help": "A folder with train/CLASS/* and validation/CLASS/*, or hub."})
    model: str = field(default="vit-base", metadata={"help": f"One of {', '.join(SIZES)}."})
    image_size: int = field(default=224, metadata={"help": "Pixels on a side."})
    trajectory_steps: int = field(default=100_000, metadata={"help": "Steps of the AdamW run that is recorded."})
    eval_rows: int = field(default=10_000, metadata={"help": "Rows of the validation split."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Images that are shuffled at a time, of a stream."})
    rules: list[str] = field(
        default_factory=lambda: ["default"], metadata={"help": "Further rules, unchanged: NAME=PATH, or shipped ones."}
    )

    known_arms: ClassVar[Mapping[str, Arm]] = ARMS

    def given_rules(self) -> Mapping[str, Path]:
        return rule_arms(self.rules)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.demo:
            raise ValueError("there is no --demo here: no generated images; see recipes/vit_cifar.py --demo")
        if self.model not in SIZES:
            raise ValueError(f"--model is {self.model!r}, expected one of {', '.join(SIZES)}")
        if self.subspace != "pca-full":
            raise ValueError(f"--subspace is {self.subspace!r}, expected pca-full: there are no adapters here")
        if self.image_size % SIZES[self.model][3]:
            raise ValueError(
                f"--image_size is {self.image_size}, expected a multiple of the patch, {SIZES[self.model][3]} pixels"
            )


class Recipe(Comparison):
    """ImageNet and ViT for the stages."""

    name, recorded_arm = "vit", "adamw"
    complete_key = False

    def __init__(self, recipe: RecipeArguments, args: SL2OTrainingArguments) -> None:
        self.size, self.seed = recipe.image_size, args.seed
        if recipe.data == "hub":
            import datasets

            name = "ILSVRC/imagenet-1k"
            stream = load_named("data", "hub", lambda: datasets.load_dataset(name, split="train", streaming=True))
            stream = stream.shuffle(seed=args.seed, buffer_size=recipe.shuffle_buffer)
            classes = stream.features["label"].num_classes
            held = load_named("data", "hub", lambda: datasets.load_dataset(name, split="validation", streaming=True))
            files = held.cast_column("image", datasets.Image(decode=False)).take(recipe.eval_rows)  # kept as they are
            self.train_set: Any = self.transformed(stream)
            self.validation_set = Pictures(list(files), self.size, None)
            train_rows = None
        else:
            splits = image_folder(recipe.data)
            rows = splits["train"]
            if recipe.train_rows is not None:
                rows = rows.shuffle(seed=0).select(range(min(recipe.train_rows, len(rows))))
            held = splits["validation"].shuffle(seed=0)
            held = held.select(range(min(recipe.eval_rows, len(held))))
            classes = rows.features["label"].num_classes
            self.train_set, train_rows = Pictures(rows, self.size, args.seed), len(rows)
            self.validation_set = Pictures(held, self.size, None)
        counts = {"train": train_rows, "validation": len(self.validation_set)}
        self.data = {**{split: {"rows": rows} for split, rows in counts.items()}, "classes": classes}
        if recipe.data != "hub":
            self.data["files"] = listing(recipe.data)
        width, layers, heads, patch = SIZES[recipe.model]
        torch.manual_seed(args.seed)
        self.start = ViTForImageClassification(
            ViTConfig(
                image_size=self.size, patch_size=patch, hidden_size=width, num_hidden_layers=layers,
                num_attention_heads=heads, intermediate_size=4 * width, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, num_labels=classes,
            )
        )  # fmt: skip
        self.rule_folders = rule_arms(recipe.rules)
        self.arms = {**ARMS, **{name: ARMS["sl2o"] for name in self.rule_folders}}
        self.begin(recipe, args, recipe.model, recipe.image_size, self.data)

    def transformed(self, stream: Any) -> Any:
        chance = random.Random(self.seed)

        def transform(row: Mapping[str, Any]) -> dict[str, Any]:
            return {"pixel_values": pixels(row["image"], self.size, chance), "labels": row["label"]}

        return stream.map(transform, remove_columns=["image", "label"])

    # What the stages ask for

    def trainer_objects(self) -> dict[str, Any]:
        return {
            "train_dataset": self.train_set,
            "eval_dataset": self.validation_set,
            "data_collator": stacked,
            "compute_metrics": accuracy,
            "callbacks": [Epoch(self.train_set)] if isinstance(self.train_set, Pictures) else [],
        }

    def full_space(self, name: str, folder: Path, lr: float, seed: int) -> SL2OTrainingArguments:
        steps = self.recipe.trajectory_steps
        every = max(self.args.eval_steps, steps // 60)
        every = max(1, self.args.max_steps // max(1, self.args.max_steps // every))  # so that one is at --max_steps
        return self.arguments(
            folder, "adamw_torch", learning_rate=lr, max_steps=steps, max_grad_norm=1.0, eval_steps=every,
            logging_steps=every, seed=self.args.seed + seed,
        )  # fmt: skip

    def batches(self, seed: int, size: int) -> Iterator[Any]:
        if not isinstance(self.train_set, Pictures):
            for epoch in itertools.count():
                self.train_set.set_epoch(seed + epoch)
                rows = iter(self.train_set)
                drawn = 0
                while len(chosen := list(itertools.islice(rows, size))) == size:
                    yield stacked(chosen)
                    drawn += 1
                if not drawn:
                    raise ValueError(f"a batch of {size} images (of all processes) was asked for, and there are fewer")
        if size > len(self.train_set):
            raise ValueError(
                f"a batch of {size} images (of all processes) was asked for, and there are {len(self.train_set)}"
            )
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            rows = copy.copy(self.train_set)  # with crops of its own
            rows.epoch = int(torch.randint(2**31, (), generator=generator))
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield stacked([rows[index] for index in order[start : start + size]])

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        device = self.args.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            return model(**{key: value.to(device) for key, value in batch.items()}).loss  # type: ignore[no-any-return]

    def eval_batches(self) -> Sequence[Any]:
        held = [self.validation_set[index] for index in range(min(512, len(self.validation_set)))]
        return [stacked(held[i : i + 128]) for i in range(0, len(held), 128)]

    def targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        """What Momentum in the subspace and AdamW have at the last step of the subspace runs."""
        found = {}
        for name in ("subspace_momentum", "adamw"):
            if name in runs:
                step, loss = [point for point in runs[name]["eval"] if point[0] <= self.args.max_steps][-1]
                found[f"{name}_at_{step}"] = loss
        return found


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    defaults = {
        "output_dir": "outputs/vit_imagenet",
        **IMAGE_DEFAULTS,
        "max_steps": 2000,
        "eval_steps": 100,
        "logging_steps": 100,
        "per_device_eval_batch_size": 128,
    }
    return run_recipe(RecipeArguments, Recipe, argv, defaults, {})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    run_script(main)
