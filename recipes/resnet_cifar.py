"""Trains ResNet, VGG or MobileNet on CIFAR in a learned subspace, beside the paper's baselines; stages: pipeline.py.

    python recipes/resnet_cifar.py --demo                                      # 2 cores, minutes, no download
    python recipes/resnet_cifar.py --data PATH --model resnet8 --trajectory_steps 2000 --max_steps 400   # 2 cores
    accelerate launch recipes/resnet_cifar.py --data hub --model resnet18 --baselines paper     # the paper's size

--baselines paper: the printed rates and schedules (supplement, Table 1); tuned: a grid on validation, linear decay.
The last --validation_rows rows of the training split choose rates, snapshots and rules; the test split is used once,
at the end of each run.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from cifar_data import ImageSet, as_is, batches, load_cifar, normalize
from networks import Classifier, mobilenet_v2, resnet8, resnet18, resnet20, vgg16
from p_bfgs import p_bfgs
from pipeline import Arm, Pipeline, PipelineArguments, grid, stamp
from problems import with_batch_statistics
from torch import nn
from transformers import HfArgumentParser, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from hf_sl2o import Basis, BatchNormCallback, Rule, SL2OTrainer, SL2OTrainingArguments, recalibrate_batch_norm
from hf_sl2o.files import load_json, save_json
from hf_sl2o.registry import SHIPPED_RULES

MODELS = {
    "resnet8": resnet8, "resnet18": resnet18, "resnet20": resnet20, "vgg16": vgg16, "mobilenetv2": mobilenet_v2,
}  # fmt: skip


def sgd(momentum: float) -> Any:
    return lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=1e-4)


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)


def rmsprop(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=lr, weight_decay=1e-4)


# Supplement, Table 1: rates, and a tenth of them after epochs 50 and 75 of 100; in the subspace after 30 and 50.
FULL, SUBSPACE, CONSTANT = (0.5, 0.75), (0.3, 0.5), (1.0,)
PAPER: dict[str, Arm] = {
    "sgd": Arm("sgd", grid(full=(0.1,)), basis="none", make=sgd(0.0), decay_at=FULL),
    "momentum": Arm("sgd", grid(full=(0.1,)), basis="none", make=sgd(0.9), decay_at=FULL),
    "adam": Arm("adamw_torch", grid(full=(1e-3,)), basis="none", make=adam, decay_at=FULL),
    "rmsprop": Arm("rmsprop", grid(full=(0.01,)), basis="none", make=rmsprop, decay_at=FULL),
    "sl2o": Arm("sl2o", grid(std=(1.0,)), decay_at=CONSTANT),
    "subspace_sgd": Arm("subspace_sgd", grid(orthonormal=(1.0,)), decay_at=SUBSPACE),
    "subspace_momentum": Arm("subspace_sgd", grid(orthonormal=(1.0,)), momentum=0.9, decay_at=SUBSPACE),
    "subspace_adamw": Arm("subspace_adamw", grid(std=(0.1,))),  # not in the table
    "p_bfgs": Arm("p_bfgs", grid(orthonormal=(1.0,))),
    "random": Arm("subspace_adamw", grid(orthonormal=(1.0,)), basis="random"),
}
TUNED: dict[str, Arm] = {
    "sgd": Arm("sgd", grid(full=(0.1, 0.3)), basis="none", make=sgd(0.0)),
    "momentum": Arm("sgd", grid(full=(0.1, 0.03)), basis="none", make=sgd(0.9)),
    "adam": Arm("adamw_torch", grid(full=(3e-3, 1e-3)), basis="none", make=adam),
    "rmsprop": Arm("rmsprop", grid(full=(3e-3, 1e-3)), basis="none", make=rmsprop),
    "sl2o": Arm("sl2o", grid(std=(1.0,))),
    "subspace_sgd": Arm("subspace_sgd", grid(std=(1.0, 0.3, 3.0), orthonormal=(1.0, 10.0))),
    "subspace_momentum": Arm("subspace_sgd", grid(std=(0.1, 0.3, 0.03), orthonormal=(1.0, 0.3)), momentum=0.9),
    "subspace_adamw": Arm("subspace_adamw", grid(std=(0.1, 0.03, 0.3))),
    "p_bfgs": Arm("p_bfgs", grid(orthonormal=(1.0,))),
    "random": Arm("subspace_adamw", grid(orthonormal=(1.0, 3.0)), basis="random"),
}
IN_SUBSPACE = ("subspace_sgd", "subspace_momentum", "subspace_adamw")


@dataclass
class RecipeArguments(PipelineArguments):
    """What the recipe adds to the flags of the Trainer."""

    data: str = field(default="embedded", metadata={"help": "embedded, hub, or a folder with the parquet files."})
    model: str = field(default="resnet8", metadata={"help": f"One of {', '.join(MODELS)}."})
    num_classes: int = field(default=10, metadata={"help": "10 (CIFAR-10) or 100 (CIFAR-100)."})
    baselines: str = field(default="tuned", metadata={"help": "tuned, or paper: the printed rates and schedules."})
    rules: list[str] = field(
        default_factory=lambda: ["default"],
        metadata={"help": "Further rules, unchanged: names of shipped ones, or NAME=PATH; an arm sl2o_NAME each."},
    )
    trajectory_steps: int = field(default=39_100, metadata={"help": "Of the full space (the paper: 100 epochs)."})
    validation_rows: int = field(default=5000, metadata={"help": "Last so many rows of the training split."})
    eval_rows: int = field(default=10_000, metadata={"help": "Rows of the test split."})

    known_arms: ClassVar[Mapping[str, Arm]] = {**PAPER, "sl2o_default": PAPER["sl2o"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in MODELS:
            raise ValueError(f"--model is {self.model!r}, expected one of {', '.join(MODELS)}")
        if self.baselines not in ("paper", "tuned"):
            raise ValueError(f"--baselines is {self.baselines!r}, expected paper or tuned")
        if self.subspace not in ("pca-full", "random"):
            raise ValueError(f"--subspace is {self.subspace!r}, expected pca-full or random: LoRA has no convolutions")
        if self.demo:
            self.seeds, self.trajectory_steps, self.snapshots, self.quick_grid = 1, 200, 50, True
            self.meta_epochs, self.inner_steps, self.eval_rows, self.validation_rows = 4, 40, 500, 500
            self.train_rows = self.train_rows or 5000


class Epoch(TrainerCallback):
    """Tells the training set which epoch it is, on which its crops depend."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.images.epoch = int(state.epoch or 0)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Recipe(Pipeline):
    """CIFAR and its networks for the stages."""

    recorded_arm, recorded_share = "sgd", 0.6  # 60 epochs of 100

    def __init__(self, recipe: RecipeArguments, args: SL2OTrainingArguments) -> None:
        rows = None if recipe.train_rows is None else recipe.train_rows + recipe.validation_rows
        images, labels = load_cifar(recipe.data, "train", rows, num_classes=recipe.num_classes)
        cut = len(images) - recipe.validation_rows
        if cut < args.per_device_train_batch_size:
            raise ValueError(
                f"the training split has {len(images)} rows and --validation_rows takes {recipe.validation_rows}: "
                f"{max(cut, 0)} are left, fewer than a batch of {args.per_device_train_batch_size}"
            )
        self.train_rows = images[:cut], labels[:cut]
        self.train_set = ImageSet(*self.train_rows, augment=True, seed=args.seed)
        self.validation_set = ImageSet(images[cut:], labels[cut:], augment=False)
        self.test_rows = load_cifar(recipe.data, "test", recipe.eval_rows, num_classes=recipe.num_classes)
        self.test_set = ImageSet(*self.test_rows, augment=False)
        self.data = {
            "train": {"rows": cut, "fingerprint": stamp(images.sum().item(), labels.sum().item())},
            "validation": {"rows": recipe.validation_rows},
            "test": {"rows": len(self.test_set)},
        }
        torch.manual_seed(args.seed)
        self.start = Classifier(MODELS[recipe.model](recipe.num_classes))
        self.name = recipe.model
        self.extra_rules = {}
        for given in recipe.rules:
            name, _, path = given.rpartition("=")
            self.extra_rules[f"sl2o_{name or path}"] = Rule.from_pretrained(
                path if name or Path(path).exists() else SHIPPED_RULES / path
            )
        arms = PAPER if recipe.baselines == "paper" else TUNED
        self.arms = {**arms, **{name: arms["sl2o"] for name in self.extra_rules}}
        size = args.per_device_train_batch_size
        still = [
            self.train_set.__getitems__(range(i, i + size)) for i in range(0, min(10 * size, cut - size + 1), size)
        ]
        self.still = [{"pixel_values": batch["pixel_values"]} for batch in still]
        self.begin(recipe, args, recipe.model, recipe.num_classes, recipe.baselines, self.data)

    # What the stages ask for

    def trainer_objects(self) -> dict[str, Any]:
        return {
            "train_dataset": self.train_set,
            "eval_dataset": self.validation_set,
            "data_collator": as_is,
            "compute_metrics": accuracy,
            "callbacks": [Epoch(self.train_set), BatchNormCallback(self.still)],
        }

    def full_space(self, name: str, folder: Path, lr: float, seed: int) -> SL2OTrainingArguments:
        steps = self.recipe.trajectory_steps
        every = max(self.args.eval_steps, steps // 60)
        return self.arguments(
            folder, self.arms[name].optim, learning_rate=lr, max_steps=steps, eval_steps=every,
            logging_steps=every, seed=self.args.seed + seed,
        )  # fmt: skip

    def judge(self, trainer: SL2OTrainer) -> dict[str, Any]:
        metrics = trainer.evaluate(self.test_set, metric_key_prefix="test")  # type: ignore[arg-type]
        return {"test_accuracy": metrics["test_accuracy"]}

    def meta_model(self) -> nn.Module:
        return with_batch_statistics(self.build_model)()

    def batches(self, seed: int, size: int) -> Iterator[Any]:
        return batches(*self.train_rows, size, seed)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        pixels, labels = (part.to(self.args.device) for part in batch)
        with torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            return model(pixels, labels)["loss"]  # type: ignore[no-any-return]

    def eval_batches(self) -> Sequence[Any]:
        held = self.validation_set
        return [
            (normalize(held.images[i : i + 500]), held.labels[i : i + 500])
            for i in range(0, min(1000, len(held)), 500)
        ]

    def targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        best = [runs[name]["final_eval_loss"] for name in IN_SUBSPACE if name in runs]
        return {"best_in_subspace": 1.01 * min(best)} if best else {}

    def accuracy_targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        if "momentum" not in runs:
            return {}
        peaks = [max(value for _, value in curve) for curve in runs["momentum"]["accuracy_per_seed"]]
        best = sum(peaks) / len(peaks)
        return {"momentum_best": best, "momentum_best_less_0.1_points": best - 0.001}

    # P-BFGS does not fit into a Trainer: its line search evaluates a batch several times

    def one(
        self, name: str, arm: Arm, choice: tuple[str, float], seed: int, basis: Basis | None = None, rule: Any = None
    ) -> Any:
        if arm.optim != "p_bfgs":
            return super().one(name, arm, choice, seed, basis, rule)
        assert basis is not None
        basis, steps, every = basis.with_units(choice[0]), self.args.max_steps, int(self.args.eval_steps)
        path = self.folder / name / "runs" / f"{choice[0]}-{choice[1]:g}-seed-{seed}" / "run.json"
        key = stamp(self.key, name, steps, every, seed, basis.fingerprint)
        if path.is_file() and load_json(path)["key"] == key:
            return load_json(path)
        device = self.args.device

        def evaluate(model: nn.Module, split: ImageSet = self.validation_set) -> tuple[float, float]:
            own = self.build_model().to(device)  # with running statistics
            own.load_state_dict(model.state_dict(), strict=False)
            recalibrate_batch_norm(own, self.still)
            own.eval()
            loss = right = 0.0
            with torch.no_grad():
                for i in range(0, len(split), 500):
                    batch = split.__getitems__(range(i, min(i + 500, len(split))))
                    out = own(**{k: v.to(device) for k, v in batch.items()})
                    loss += out["loss"].item() * len(batch["labels"])
                    right += (out["logits"].argmax(-1).cpu() == batch["labels"]).sum().item()
            return loss / len(split), right / len(split)

        start = time.perf_counter()
        points = {*range(0, steps + 1, every), steps}
        task = self.task(basis)
        found = p_bfgs(task, steps, seed=self.args.seed + seed, evaluate_at=points, evaluate=evaluate, device=device)
        result = {
            "key": key,
            "train_loss": [
                [i + 1, loss] for i, loss in enumerate(found["train_loss"]) if (i + 1) % every == 0 or i == 0
            ],
            "eval": [[step, loss] for step, (loss, _) in found["eval"]],
            "accuracy": [[step, value] for step, (_, value) in found["eval"]],
            "seconds": time.perf_counter() - start,  # with its evaluations
            "peak_bytes": None,
            "state_bytes": 4 * basis.dim * (basis.dim + 2),
            "forward_passes": found["forward_passes"],
            "test_accuracy": evaluate(found["model"], self.test_set)[1],
        }
        save_json(path, result)
        return result


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = HfArgumentParser((RecipeArguments, SL2OTrainingArguments))  # type: ignore[arg-type]
    parser.set_defaults(
        output_dir="outputs/resnet_cifar",
        max_steps=1000,
        learning_rate=1.0,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=500,
        eval_strategy="steps",
        eval_steps=20,
        logging_steps=20,
        logging_first_step=True,
        eval_on_start=True,
        lr_scheduler_type="linear",
        save_total_limit=1,
        save_steps=500,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    if "--demo" in (argv or sys.argv):
        parser.set_defaults(max_steps=60, eval_steps=10, logging_steps=10)
    disable_progress_bar()
    recipe, args = parser.parse_args_into_dataclasses(argv)
    return Recipe(recipe, args).main()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
