"""Fine-tunes DeiT or ViT on CIFAR through LoRA factors, or in a PCA subspace, with a learned optimizer.

    python recipes/vit_cifar.py --demo                                              # 2 cores, minutes, no download
    python recipes/vit_cifar.py --data PATH --model small --max_steps 300           # 2 cores
    accelerate launch recipes/vit_cifar.py --data hub --model deit-base --bf16      # the paper's: LoRA r16 on q, v
    accelerate launch recipes/vit_cifar.py --data hub --model vit-base --bf16       # LoRA r16 on q, k, v, and the head

Without pretrained weights (small, deit-tiny) a base is trained first, on the first seven tenths of the classes; the
adapters then learn the others. --subspace lora: the rule moves each scalar of the factors (the official code);
pca-lora: directions of a recorded run of the factors; pca-full: of all weights, from scratch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
)

from hf_sl2o import RuleConfig, SL2OTrainingArguments
from hf_sl2o.experiments.arms import Arm, grid
from hf_sl2o.experiments.command_line.flags import load_named
from hf_sl2o.experiments.command_line.recipe import run_recipe
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.data.cifar import batches, load_cifar, normalize
from hf_sl2o.experiments.images import IMAGE_DEFAULTS, CifarArguments, CifarComparison
from hf_sl2o.experiments.kept.files import tensors_once
from hf_sl2o.experiments.kept.keys import digest, stamp
from hf_sl2o.experiments.tasks.named import train_full
from hf_sl2o.experiments.tasks.problems import Problem

HUB = {"deit-base": "facebook/deit-base-distilled-patch16-224", "vit-base": "google/vit-base-patch16-224-in21k"}
SIZES = {"small": (64, 4, 4), "deit-tiny": (192, 12, 3)}  # width, layers, heads; 4 x 4 patches of 32 x 32 pixels

ARMS: dict[str, Arm] = {
    "sl2o": Arm("sl2o", grid(std=(1.0,))),
    "subspace_adamw": Arm("subspace_adamw", grid(std=(0.1, 0.03, 0.3))),
    "subspace_momentum": Arm("subspace_sgd", grid(orthonormal=(0.1, 0.03, 0.3), std=(0.1, 0.03)), momentum=0.9),
    "subspace_sgd": Arm("subspace_sgd", grid(orthonormal=(1.0, 0.3, 3.0), std=(1.0, 0.3))),
    "adamw": Arm("adamw_torch", grid(full=(3e-3, 1e-3, 1e-2)), basis="none"),  # of all that is trained
    "adamw_2e-4": Arm("adamw_torch", grid(full=(2e-4,)), basis="none"),  # what people take for LoRA
    "random": Arm("subspace_adamw", grid(orthonormal=(1.0, 0.3)), basis="random"),
}

#: Of the command line, where the user sets nothing else.
DEFAULTS = {"output_dir": "outputs/vit_cifar", **IMAGE_DEFAULTS, "per_device_train_batch_size": 64}


@dataclass
class RecipeArguments(CifarArguments):
    """What the recipe adds to the flags of the Trainer."""

    model: str = field(
        default="small",
        metadata={"help": f"{', '.join([*SIZES, *HUB])}, or the path or Hub id of an image classifier."},
    )
    subspace: str = field(default="lora", metadata={"help": "lora, pca-lora, or pca-full."})
    lora_rank: int = field(default=16, metadata={"help": "r (the official code: 16)."})
    lora_alpha: int = field(default=32, metadata={"help": "alpha (the official code: 32)."})
    train_head: bool | None = field(
        default=None,
        metadata={"help": "With LoRA train the head too; default as in the official code: ViT yes, DeiT no."},
    )
    base_steps: int = field(default=1500, metadata={"help": "Of the base, where there are no pretrained weights."})
    rules: list[str] = field(
        default_factory=list,
        metadata={"help": "Further rules, unchanged: NAME=PATH, or shipped ones; default: the one for the subspace."},
    )

    known_arms: ClassVar[Mapping[str, Arm]] = ARMS

    def __post_init__(self) -> None:
        self.rules = self.rules or ["default-lora" if self.subspace == "lora" else "default"]
        super().__post_init__()
        if self.subspace == "random":
            raise ValueError("--subspace is 'random', expected lora, pca-lora, or pca-full")
        if self.demo:
            self.seeds, self.trajectory_steps, self.snapshots, self.quick_grid = 1, 100, 50, True
            self.meta_epochs, self.inner_steps, self.base_steps = 2, 40, 200
            self.eval_rows, self.validation_rows, self.train_rows = 500, 500, self.train_rows or 4000


class Recipe(CifarComparison):
    """Vision transformers for the stages."""

    recorded_arm = peak_of = "adamw"

    def __init__(self, recipe: RecipeArguments, args: SL2OTrainingArguments) -> None:
        self.folder = Path(args.output_dir or "outputs/vit_cifar")
        self.lora = recipe.subspace in ("lora", "pca-lora")
        offline = recipe.model in SIZES
        first_new = recipe.num_classes * 7 // 10
        new = list(range(first_new, recipe.num_classes)) if offline and self.lora else None
        torch.manual_seed(args.seed)
        model = self.from_config(recipe) if offline else self.from_hub(recipe)
        self.load(recipe, args, self.preparation(recipe, model), new)
        if new is not None:
            self.train_base(recipe, args, model, list(range(first_new)))
        if self.lora:
            torch.manual_seed(args.seed)  # whoever trained the base has drawn more
            model = self.with_lora(recipe, model)
        self.start, self.name = model, Path(recipe.model).name
        self.arms = {**ARMS, **{name: ARMS["sl2o"] for name in self.rule_folders}}
        names = ("model", "num_classes", "lora_alpha", "train_head", "base_steps")
        self.begin(recipe, args, [getattr(recipe, name) for name in names], self.data)

    # The model at theta_0

    def from_config(self, recipe: RecipeArguments) -> Any:
        width, layers, heads = SIZES[recipe.model]
        config = DeiTConfig(
            image_size=32, patch_size=4, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            num_labels=recipe.num_classes, architectures=["DeiTForImageClassificationWithTeacher"],
        )  # fmt: skip
        # With its distillation token, as the published checkpoint: the mean of the two heads' logits.
        return DeiTForImageClassificationWithTeacher(config)

    def from_hub(self, recipe: RecipeArguments) -> Any:
        name = HUB.get(recipe.model, recipe.model)
        config = load_named("model", name, lambda: AutoConfig.from_pretrained(name))
        if config.num_labels != recipe.num_classes and PartialState().is_main_process:
            frozen = self.lora and not self.trains_head(recipe, config)
            print(
                f"the head of {recipe.model} has {config.num_labels} classes, the data {recipe.num_classes}: it is "
                f"drawn anew{' and stays as drawn (--train_head true trains it)' if frozen else ''}",
                flush=True,
            )
        options = {"num_labels": recipe.num_classes, "ignore_mismatched_sizes": True}
        return load_named("model", name, lambda: AutoModelForImageClassification.from_pretrained(name, **options))

    def preparation(self, recipe: RecipeArguments, model: Any) -> Any:
        """Maps uint8 images of 32 x 32 to what the model takes: its size, its mean and standard deviation."""
        size = model.config.image_size
        if recipe.model in SIZES:
            return normalize
        name = HUB.get(recipe.model, recipe.model)
        processor = load_named("model", name, lambda: AutoImageProcessor.from_pretrained(name))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))

        def prepare(images: torch.Tensor) -> torch.Tensor:
            larger = F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", antialias=True)
            return (larger - mean) / std

        return prepare

    def train_base(self, recipe: RecipeArguments, args: SL2OTrainingArguments, model: Any, classes: list[int]) -> None:
        """Trains all weights on the classes that the adapters do not see, once and on one process."""
        images, labels = load_cifar(recipe.data, "train", None, classes, num_classes=recipe.num_classes)
        key = stamp(recipe.model, digest(images, labels), recipe.num_classes, recipe.base_steps, args.seed)
        path, state = self.folder / f"base-{key}.safetensors", PartialState()

        def make() -> dict[str, torch.Tensor]:
            def loss(network: nn.Module, batch: Any) -> torch.Tensor:
                pixels, target = (part.to(args.device) for part in batch)
                return F.cross_entropy(network(pixel_values=pixels).logits, target)

            problem = Problem(
                lambda: model, lambda part, seed: batches(images, labels, 64, seed), loss, lambda part: [], 1e-3,
                recipe.base_steps,
            )  # fmt: skip
            train_full(problem, "base", model.to(args.device), "base")
            return {name: tensor.contiguous() for name, tensor in model.cpu().state_dict().items()}

        if state.is_main_process:
            tensors_once(path, make)
        state.wait_for_everyone()
        model.load_state_dict(tensors_once(path, make))

    def is_deit(self, config: Any) -> bool:
        return str(config.model_type) == "deit"

    def trains_head(self, recipe: RecipeArguments, config: Any) -> bool:
        return not self.is_deit(config) if recipe.train_head is None else recipe.train_head

    def with_lora(self, recipe: RecipeArguments, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        heads = [
            name
            for name, _ in model.named_modules()
            if name in ("classifier", "cls_classifier", "distillation_classifier")
        ]
        config = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules=r".*\.(query|value|q_proj|v_proj)"
            if self.is_deit(model.config)
            else r".*\.(query|key|value|[qkv]_proj)",
            modules_to_save=heads if self.trains_head(recipe, model.config) else None,
        )
        return get_peft_model(model, config)

    # What the stages ask for

    def trainer_objects(self) -> dict[str, Any]:
        # The distilled model has no loss of its own; for the others this is the same one.
        return {**super().trainer_objects(), "compute_loss_func": classification_loss}

    def rule_config(self) -> RuleConfig:
        if self.recipe.model in SIZES or self.recipe.subspace != "lora":
            return super().rule_config()
        deit = "deit" in self.start.config.model_type  # type: ignore[union-attr, operator]
        return RuleConfig.preset("paper-transformer") if deit else RuleConfig(output_scale=1e-4)  # for 20 epochs

    def full_space(self, name: str, folder: Path, lr: float, seed: int) -> SL2OTrainingArguments:
        args = super().full_space(name, folder, lr, seed)
        if self.recipe.subspace == "lora":  # nothing is extracted: as many steps as the others, on the same factors
            args.max_steps, args.eval_steps, args.logging_steps = (
                self.args.max_steps, self.args.eval_steps, self.args.logging_steps,
            )  # fmt: skip
        args.max_grad_norm = 1.0
        return args


def classification_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean over all images of a step: with `num_items_in_batch` a Trainer sums over accumulated and other batches."""
    if num_items_in_batch is None:
        return F.cross_entropy(outputs.logits, labels)
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    return run_recipe(
        RecipeArguments, Recipe, argv, DEFAULTS, {"max_steps": 40, "eval_steps": 10, "logging_steps": 10}
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    run_script(main)
