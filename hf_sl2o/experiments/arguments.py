"""What a comparison is told beside the arguments of the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..rules import SHIPPED_RULES, Rule
from ..training import SL2OTrainingArguments
from ..training.build import refuse_sharding
from .arms import ARMS, Arm, rule_folder
from .command_line.flags import check_directions, check_flags, check_places, load_named
from .levels import meta_training_steps

#: What the runs of a comparison are given where nobody says otherwise.
TRAINER_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1.0,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_on_start": True,
    "lr_scheduler_type": "linear",  # for every arm: a baseline without decay would be a weak one
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def training_arguments(output_dir: str, *, max_steps: int, **changes: Any) -> SL2OTrainingArguments:
    """Returns [`SL2OTrainingArguments`] with the defaults of a comparison.

    Args:
        output_dir (`str`): Keeps the runs, the basis, and the result.
        max_steps (`int`): Of each run in the subspace.
        **changes: Any other argument of a Trainer; what a comparison sets itself has no effect.

    Example:

    ```python
    >>> from hf_sl2o.experiments import training_arguments
    >>> args = training_arguments("out", max_steps=200, per_device_train_batch_size=32)
    >>> args.max_steps, args.eval_steps
    (200, 10)

    ```
    """
    return SL2OTrainingArguments(output_dir, max_steps=max_steps, **{**TRAINER_DEFAULTS, **changes})


@dataclass
class ComparisonArguments:
    """Settings of a comparison beside the arguments of the Trainer; each field's `help` says what it is.

    Raises:
        `ValueError`: a value that cannot be right, or a rule that is both given and to be kept.

    Example:

    ```python
    >>> from hf_sl2o.experiments import ComparisonArguments
    >>> ComparisonArguments(dim=20, trajectory_steps=400, rule="default").snapshots
    60

    ```
    """

    subspace: str = field(
        default="pca-full",
        metadata={"help": "pca-full, pca-lora: of a recorded run; lora: each trainable scalar; random."},
    )
    dim: int = field(default=40, metadata={"help": "d (the paper: 40)."})
    seeds: int = field(default=3, metadata={"help": "Runs of each arm; they differ in the order of the data."})
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
    rule: str | None = field(
        default=None, metadata={"help": "A folder, or the name of one that ships, instead of meta-training one."}
    )
    save_rule: str | None = field(default=None, metadata={"help": "Keep the rule here, with how it was made."})
    arms: list[str] | None = field(default=None, metadata={"help": "Default: all that make sense."})
    quick_grid: bool = field(
        default=False, metadata={"help": "Two learning rates in each coordinates instead of up to four."}
    )

    #: The arms by name, of the recipe.
    known_arms: ClassVar[Mapping[str, Arm]] = ARMS

    def __post_init__(self) -> None:
        check_flags(vars(self))
        if self.rule is not None and self.save_rule is not None:
            raise ValueError(
                f"--save_rule {self.save_rule} keeps the rule that is meta-trained here, and --rule {self.rule} names "
                "one; leave one of them out"
            )
        if self.subspace not in ("pca-full", "pca-lora", "lora", "random"):
            raise ValueError(f"--subspace is {self.subspace!r}, expected pca-full, pca-lora, lora, or random")

    def given_rules(self) -> Mapping[str, Path]:
        """Folders of rules that are used unchanged, by arm."""
        return {}


@dataclass
class RecipeFlags(ComparisonArguments):
    """What the recipes add to the settings of a comparison."""

    lora_rank: int = field(default=4, metadata={"help": "r of pca-lora and lora (the paper: 4)."})
    train_rows: int | None = field(default=None, metadata={"help": "First so many rows; default: all."})
    eval_rows: int = field(default=256, metadata={"help": "Rows of the validation split."})
    demo: bool = field(default=False, metadata={"help": "Everything in a few minutes on two cores."})


def training_settings(args: SL2OTrainingArguments, *further: str) -> dict[str, Any]:
    """The flags of the Trainer that change what a run computes and keeps; each process has a batch of its own."""
    names = [
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps", "logging_steps",
        "seed", "bf16", "fp16", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2",
        "adam_epsilon", "weight_decay", "label_smoothing_factor", "data_seed", "lr_scheduler_kwargs",
    ]  # fmt: skip
    return {**{name: getattr(args, name) for name in (*names, *further)}, "processes": PartialState().num_processes}


def check_together(
    recipe: ComparisonArguments, args: SL2OTrainingArguments, arms: Mapping[str, Arm] | None = None
) -> None:
    """Raises where values that are right by themselves do not fit each other, a rule or a place is not there.

    `arms` are those that may run, by default the ones that the recipe knows.
    """
    known = {**recipe.known_arms, **dict.fromkeys(recipe.given_rules(), ARMS["sl2o"])} if arms is None else arms
    _check_arms(recipe, known)
    if args.eval_strategy != "steps":
        raise ValueError(
            f"eval_strategy is {getattr(args.eval_strategy, 'value', args.eval_strategy)!r}, expected 'steps': rates "
            "are chosen, and steps counted, by evaluations; make them by hf_sl2o.experiments.training_arguments"
        )
    if not (isinstance(args.eval_steps, int | float) and args.eval_steps >= 1):
        raise ValueError(f"eval_steps is {args.eval_steps}, expected a whole number of steps of at least 1")
    check_directions(recipe)
    refuse_sharding(fsdp=args.fsdp, deepspeed=args.deepspeed)
    chosen = set(recipe.arms or known)
    full = {name for name, arm in known.items() if arm.basis == "none" and name in chosen}
    lengths = {"max_steps": args.max_steps}
    if full or recipe.subspace.startswith("pca"):
        lengths["trajectory_steps"] = recipe.trajectory_steps
    for name, steps in lengths.items():
        for every in ("eval_steps", "logging_steps"):
            if (found := getattr(args, every)) > steps:
                raise ValueError(f"--{every} is {found:g}, expected at most --{name}, which is {steps}")
    if recipe.inner_steps < recipe.unroll_length:
        raise ValueError(
            f"--inner_steps is {recipe.inner_steps}, expected at least --unroll_length, which is "
            f"{recipe.unroll_length}"
        )
    if args.weight_decay and chosen - full:
        raise ValueError(
            f"--weight_decay is {args.weight_decay}, expected 0 beside arms in the subspace: there it would pull "
            "towards the starting weights instead of zero"
        )
    given = [("rules", folder) for folder in recipe.given_rules().values()]
    if recipe.rule is not None:
        given.append(("rule", rule_folder(recipe.rule)))
    for flag, folder in given:
        if not folder.exists() and "/" not in str(folder) and "\\" not in str(folder):
            shipped = sorted(path.name for path in SHIPPED_RULES.iterdir() if path.is_dir())
            raise FileNotFoundError(
                f"--{flag} is {str(folder)!r}, which is no folder here and no rule that ships: {', '.join(shipped)}"
            )
        load_named(flag, folder, functools.partial(_load_with_cost, folder))
    refused("lr_scheduler_kwargs" if args.lr_scheduler_kwargs else "lr_scheduler_type", args, schedule)
    refused("report_to", args, lambda args: get_reporting_integration_callbacks(args.report_to))
    check_places({**vars(recipe), "output_dir": args.output_dir})


def _check_arms(recipe: ComparisonArguments, known: Mapping[str, Arm]) -> None:
    """Raises where an arm is unknown, cannot be run, or is needed and not there."""
    if unknown := sorted(set(recipe.arms or ()) - set(known)):
        raise ValueError(f"--arms has {unknown[0]!r}, expected any of {sorted(known)}")
    for name, arm in known.items():
        arm.check(name)
    if not set(recipe.arms or known) - redundant_arms(recipe.subspace):
        raise ValueError(
            f"--subspace is {recipe.subspace!r} and --arms {recipe.arms}: of these none runs in it; give another arm"
        )


def redundant_arms(subspace: str) -> set[str]:
    """Arms that would do in a subspace what another one does."""
    return {"lora": {"subspace_adamw"}, "random": {"random"}}.get(subspace, set())


def refused(flag: str, args: SL2OTrainingArguments, make: Callable[[SL2OTrainingArguments], Any]) -> None:
    """Raises `ValueError` where what every Trainer makes from a flag cannot be made."""
    try:
        make(args)
    except Exception as error:  # whatever the library raises
        value = getattr(args, flag)
        raise ValueError(f"--{flag} is {getattr(value, 'value', value)!r}, which does not work: {error}") from error


def _load_with_cost(folder: Path) -> Any:
    return Rule.from_pretrained(folder), meta_training_steps(folder)


def schedule(args: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ValueError("arms are compared under a schedule that is known before")
    return get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
