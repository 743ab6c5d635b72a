"""What a comparison is about: a model at its start, data, a loss, arms. A recipe overrides what differs from this."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.training_args import OptimizerNames

from ..foundation.ranks import check_same_on_all_ranks
from ..meta import Task
from ..rules import Rule, RuleConfig
from ..subspace import Basis, Layout
from ..training import SL2OTrainer, SL2OTrainingArguments
from .arguments import ComparisonArguments, check_together, training_settings
from .arms import ARMS, Arm
from .command_line.flags import check_directions
from .kept.files import sweep
from .kept.keys import digest, fingerprint_of, model_key, source_of, stamp
from .kept.run import kept_run

Loss = Callable[[nn.Module, Any], torch.Tensor]


class Subject:
    """Model, data, loss and arms of a [`Comparison`], which says what the arguments are.

    Without an `__init__` of its own a recipe gives all of it here; one that makes its data in another way sets `name`,
    `arms`, `recorded_arm` and `start`, calls `begin`, and overrides the methods below.
    """

    name = "comparison"  # in logs
    recipe: ComparisonArguments
    args: SL2OTrainingArguments
    folder: Path
    data: dict[str, Any]  # what identifies it, for the keys and the JSON
    start: nn.Module  # at theta_0
    key: str  # of everything that the stages depend on
    arms: Mapping[str, Arm] = ARMS
    recorded_arm = "adamw"  # of the full space; its best run is the trajectory
    rule_folders: Mapping[str, Path] = {}  # of arms that use a rule as it is instead of the meta stage's
    recorded_share = 1.0  # of that run: snapshots are taken in it
    own_loss: Loss | None = None  # instead of the model's
    complete_key = True  # False: model, arms and the Trainer's other flags follow from `identity`, as in a recipe

    def __init__(
        self,
        model: nn.Module,
        args: SL2OTrainingArguments,
        settings: ComparisonArguments | None = None,
        *,
        train_dataset: Any,
        eval_dataset: Any,
        loss: Loss | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        arms: Mapping[str, Arm] | None = None,
        identity: Sequence[Any] | None = None,
    ) -> None:
        if loss is not None and compute_metrics is not None:
            raise ValueError("compute_metrics needs the model's outputs, of which a loss of your own tells nothing; "
                             "leave one of them out")  # fmt: skip
        if loss is not None and args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}, which a loss of your own does "
                             "not know; leave one of them out")  # fmt: skip
        self.start, self.own_loss = model, loss
        self.arms = self.arms if arms is None else arms
        sets = {"train": train_dataset, "validation": eval_dataset}
        for name, rows in sets.items():
            if isinstance(rows, Mapping) or not hasattr(rows, "__len__") or not len(rows):
                raise ValueError(
                    f"the {name} data has no rows that can be counted; give a list or a Dataset (it is of the type "
                    f"{type(rows).__name__})"
                )
            sets[name] = used_columns(rows, model, args) if loss is None else rows
        self.train_set, self.eval_set = sets["train"], sets["validation"]
        if data_collator is None:
            data_collator = default_collator(processing_class, self.train_set[0])
        self.collate = data_collator
        self.objects = {
            "train_dataset": self.train_set,
            "eval_dataset": self.eval_set,
            "data_collator": data_collator,
            "processing_class": processing_class,
            "compute_metrics": compute_metrics,
            "callbacks": list(callbacks or ()),
        }
        self.data = {name: {"rows": len(rows)} for name, rows in sets.items()}
        if identity is None:
            for name, rows in sets.items():
                self.data[name]["fingerprint"] = fingerprint_of(rows)
            functions = (loss, data_collator, compute_metrics, *self.objects["callbacks"])
            identity = (self.data, [None if function is None else source_of(function) for function in functions])
        self.begin(settings or ComparisonArguments(), args, *identity)

    def begin(self, recipe: ComparisonArguments, args: SL2OTrainingArguments, *identity: Any) -> None:
        """Takes what the stages' keys hold: `identity` tells recipes, models and data apart."""
        self.recipe, self.args, self.folder = recipe, args, Path(args.output_dir or "outputs")
        self.recorded: dict[Path, tuple[float, float]] = {}  # validation loss and seconds
        check_together(recipe, args, self.arms)
        check_directions(recipe, self.recorded_share)
        if recipe.subspace.startswith("pca") and self.recorded_arm not in self.arms:
            raise ValueError(
                f"the arms are {sorted(self.arms)}, expected {self.recorded_arm!r} among them: its run is recorded "
                "(recorded_arm of a subclass names another one)"
            )
        n = Layout.from_named_parameters(self.start.named_parameters()).n
        if recipe.subspace != "lora" and recipe.dim > n:
            raise ValueError(f"--dim is {recipe.dim}, expected at most the {n} parameters that are trained")
        if PartialState().is_main_process:
            sweep(self.folder)
        self.rules_as_they_are = {arm: Rule.from_pretrained(folder) for arm, folder in self.rule_folders.items()}
        names = ("subspace", "dim", "lora_rank", "trajectory_steps", "snapshots")
        self.key = stamp(
            [getattr(recipe, name, None) for name in names],
            identity,
            {**self.settings_key(args), "max_steps": None},
            model_key(self.start) if self.complete_key else digest(*self.start.parameters()),
        )
        check_same_on_all_ranks({"key": self.key}, "comparison")

    def settings_key(self, args: SL2OTrainingArguments) -> dict[str, Any]:
        """What of the Trainer's arguments a run depends on."""
        further = ("dataloader_drop_last", "neftune_noise_alpha", "label_names", "remove_unused_columns")
        return training_settings(args, *(further if self.complete_key else ()))

    def arm_key(self, name: str, arm: Arm) -> list[Any]:
        """What of an arm a run depends on, beside units, rate and schedule."""
        return [name, *(arm.key if self.complete_key else ())]

    # What the stages ask for

    def trainer_objects(self) -> dict[str, Any]:
        """What the Trainer is given beside the model: data, collator, processing class, metrics, callbacks."""
        return {name: value for name, value in self.objects.items() if value is not None}

    def full_space(self, name: str, folder: Path, lr: float, seed: int) -> SL2OTrainingArguments:
        """Arguments of a run of a full-space arm."""
        every: Any = max(self.args.eval_steps, self.recipe.trajectory_steps // 60)  # type: ignore[type-var]
        arm = self.arms[name]
        return self.arguments(
            folder,
            arm.optim if arm.make is None else "adamw_torch",  # the arm makes its own
            learning_rate=lr,
            max_steps=self.recipe.trajectory_steps,
            max_grad_norm=1.0,
            eval_steps=every,
            logging_steps=every,
            seed=self.args.seed + seed,
        )

    def batches(self, seed: int, size: int) -> Iterator[Any]:
        """Training batches for meta-training, endless: each row once, in an order of its own, then again."""
        rows = self.train_set
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, max(len(order) - size + 1, 1), size):
                yield self.collate([rows[index] for index in order[start : start + size]])

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean loss of a batch, in meta-training."""
        device = self.args.device
        batch = send_to_device(batch, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            if self.own_loss is not None:
                return self.own_loss(model, batch)
            out = model(**batch)
            return out["loss"] if isinstance(out, Mapping) else out[0]  # type: ignore[no-any-return]

    def eval_batches(self) -> Sequence[Any]:
        """Held-out batches that choose the rule."""
        held = [self.eval_set[index] for index in range(min(256, len(self.eval_set)))]
        return [self.collate(held[start : start + 64]) for start in range(0, len(held), 64)]

    def targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        """Validation losses by name, each with its 1 %: the table says how many steps each arm needs to them."""
        ends = {name: run["final_eval_loss"] for name, run in runs.items()}
        tuned = [loss for name, loss in ends.items() if name.startswith("subspace_") and math.isfinite(loss)]
        found = {"best_in_subspace": min(tuned)} if tuned else {}
        if math.isfinite(ends.get(self.recorded_arm, math.inf)):
            found[f"{self.recorded_arm}_final"] = ends[self.recorded_arm]
        return {name: loss + 0.01 * abs(loss) for name, loss in found.items()}

    def accuracy_targets(self, runs: Mapping[str, Any]) -> dict[str, float]:
        """Accuracies by name, likewise."""
        return {}

    def meta_model(self) -> nn.Module:
        """The model at theta_0, for meta-training."""
        return self.build_model()

    def rule_config(self) -> RuleConfig:
        """Of the rule that the meta stage trains."""
        if self.recipe.subspace == "lora":
            return dataclasses.replace(RuleConfig.preset("paper-transformer"), output_scale=0.01)
        return RuleConfig.preset("paper-cnn")

    def judge(self, trainer: SL2OTrainer) -> dict[str, Any]:
        """What is measured once, after a run."""
        return {}

    # Made of these

    def build_model(self) -> nn.Module:
        return copy.deepcopy(self.start)

    def arguments(self, folder: Path, optim: str, **changes: Any) -> SL2OTrainingArguments:
        args = copy.copy(self.args)
        args.output_dir, args.optim, args.optim_args = str(folder), OptimizerNames(optim), None
        for name, value in changes.items():
            setattr(args, name, value)
        if self.own_loss is not None:
            args.remove_unused_columns = False
        if self.complete_key:
            args.logging_nan_inf_filter = False  # a run that diverged is not shown with a loss of 0
        return args

    def train_once(
        self, folder: Path, args: SL2OTrainingArguments, key: str, arm: Arm, callbacks: Any = (), **objects: Any
    ) -> Any:
        """Trains unless `folder` has the result of the same settings; goes on from its last checkpoint otherwise."""
        given = {**self.trainer_objects(), **objects}
        given["callbacks"] = [*callbacks, *given.get("callbacks", ())]
        return kept_run(folder, args, key, arm, self.build_model, self.judge, loss=self.own_loss, **given)

    def task(self, basis: Basis, processes: int = 1) -> Task:
        """The problem for meta-training, and with the batches of all processes for what runs on one alone."""
        device = self.args.device
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * processes
        return Task(
            self.name,
            build_model=lambda: self.meta_model().to(device),
            batches=lambda seed: self.batches(10_000 + seed, size),
            loss=self.loss,
            basis=basis,
            eval_batches=self.eval_batches(),
        )


def used_columns(rows: Any, model: nn.Module, args: SL2OTrainingArguments) -> Any:
    """A `datasets.Dataset` without the columns that the model does not take, as a Trainer would; others unchanged."""
    columns = getattr(rows, "column_names", None)
    if columns is None or not args.remove_unused_columns:
        return rows
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    known = {*inspect.signature(inner.forward).parameters, "label", "label_ids", "labels", *(args.label_names or ())}
    if not set(columns) & known:
        raise ValueError(
            f"the data has the columns {columns}, of which the model takes none; it takes "
            f"{sorted(inspect.signature(inner.forward).parameters)}"
        )
    return rows.remove_columns([column for column in columns if column not in known])


def default_collator(processing_class: Any, example: Any) -> Callable[[list[Any]], Any]:
    """The collator that a Trainer would take; of rows that are no mappings, such as (input, target), torch's."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    if isinstance(example, Mapping):
        return default_data_collator
    return torch.utils.data.default_collate
