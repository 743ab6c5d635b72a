"""The stage in which a recipe meta-trains a rule on its own task, and what is kept of how that rule was made."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..foundation.files import save_json
from ..meta import MetaTrainer, MetaTrainingArguments, Task
from ..rules import LSTMRule, RuleConfig
from ..training import SL2OTrainingArguments
from .arguments import ComparisonArguments
from .environment import environment, portable
from .levels import meta_training_steps


def meta_train(
    folder: Path,
    task: Task,
    config: RuleConfig,
    recipe: ComparisonArguments,
    args: SL2OTrainingArguments,
    data: dict[str, Any],
) -> dict[str, Any]:
    """Meta-trains a rule on one task, an episode on each process; all processes take part.

    Under a constant learning rate, as the paper's; the arms then have the schedule of the recipe.

    Args:
        folder (`Path`): The rule, its checkpoints, and provenance.json; goes on from what is there.
        task ([`Task`]): The recipe's problem.
        config ([`RuleConfig`]): Of the rule.
        recipe ([`ComparisonArguments`]): `meta_epochs`, `inner_steps`, `unroll_length`; kept in provenance.json.
        args ([`SL2OTrainingArguments`]): The seed, and whether on the CPU.
        data (`dict`): What identifies the data, for provenance.json.

    Returns:
        `steps`, training steps of networks, and `validation`, a list of `[meta_epoch, loss]`.
    """
    torch.manual_seed(args.seed)
    meta_args = MetaTrainingArguments(
        str(folder),
        unroll_length=recipe.unroll_length,
        inner_steps=recipe.inner_steps,
        meta_epochs=recipe.meta_epochs,
        eval_every=max(1, recipe.meta_epochs // 5),
        seed=args.seed,
        episodes_per_task=PartialState().num_processes,
        use_cpu=args.use_cpu,
    )
    trainer = MetaTrainer(LSTMRule(config), meta_args, [task])
    trainer.train()
    provenance = {
        "command": " ".join(["python", *portable(sys.argv)]),
        "recipe": portable(dataclasses.asdict(recipe)),
        "data": data,
        "tasks": [task.name],
        "settings": {**dataclasses.asdict(meta_args), "output_dir": None},
        "validation": [entry for entry in trainer.log_history if "score" in entry],
        "environment": environment(),
    }
    if PartialState().is_main_process:
        save_json(folder / "provenance.json", provenance)
    PartialState().wait_for_everyone()
    return {
        "steps": meta_training_steps(folder),
        "validation": [[e["meta_epoch"], e["validation_loss"]] for e in trainer.log_history if "best" in e],
    }


def copy_rule(folder: Path, to: Path) -> None:
    """Copies a rule with how it was made, on the first process."""
    if PartialState().is_main_process:
        to.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "README.md", "provenance.json"):
            shutil.copy(folder / name, to)
