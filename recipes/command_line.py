"""The command line of a recipe: its own flags beside those of the Trainer, checked before anything is begun."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from arms import PipelineArguments, leave_processes
from checks import check_directions, check_flags, check_places, check_unused, load_named
from levels import meta_training_steps
from pipeline import Pipeline
from transformers import HfArgumentParser, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils.logging import disable_progress_bar

from hf_sl2o import Rule, SL2OTrainingArguments
from hf_sl2o.registry import refuse_sharding


def parse_recipe(
    arguments: type[PipelineArguments], argv: list[str] | None, defaults: Mapping[str, Any]
) -> tuple[Any, SL2OTrainingArguments]:
    """Returns the recipe's and the Trainer's arguments.

    Raises:
        `ValueError`: a flag is unknown, would change nothing, or has a value that cannot be right.
    """
    parser = HfArgumentParser((arguments, SL2OTrainingArguments))  # type: ignore[arg-type]
    parser.set_defaults(**defaults)
    given = vars(parser.parse_known_args(argv)[0])  # as they were given: a Trainer takes some 0 for "not set"
    check_flags(given)
    check_unused(given, parser.get_default)
    try:
        recipe, args = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise ValueError(str(error)) from error  # a flag that nobody knows, or one that the Trainer refuses
    return recipe, args


def check_together(recipe: PipelineArguments, args: SL2OTrainingArguments) -> None:
    """Raises where values that are right by themselves do not fit each other, a rule or a place is not there."""
    check_directions(recipe)
    refuse_sharding(fsdp=args.fsdp, deepspeed=args.deepspeed)
    chosen = set(recipe.arms or recipe.arm_names())
    full = {name for name, arm in recipe.known_arms.items() if arm.basis == "none" and name in chosen}
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
    for flag, folder in [*given, *([] if recipe.rule is None else [("rule", Path(recipe.rule))])]:
        load_named(flag, folder, lambda where=folder: (Rule.from_pretrained(where), meta_training_steps(where)))
    refused("lr_scheduler_kwargs" if args.lr_scheduler_kwargs else "lr_scheduler_type", args, schedule)
    refused("report_to", args, lambda args: get_reporting_integration_callbacks(args.report_to))
    check_places({**vars(recipe), "output_dir": args.output_dir})


def refused(flag: str, args: SL2OTrainingArguments, make: Callable[[SL2OTrainingArguments], Any]) -> None:
    """Raises `ValueError` where what every Trainer makes from a flag cannot be made."""
    try:
        make(args)
    except Exception as error:  # whatever the library raises
        value = getattr(args, flag)
        raise ValueError(f"--{flag} is {getattr(value, 'value', value)!r}, which does not work: {error}") from error


def schedule(args: SL2OTrainingArguments) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ValueError("arms are compared under a schedule that is known before")
    return get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs)


def run_recipe(
    arguments: type[PipelineArguments],
    recipe: Callable[[Any, SL2OTrainingArguments], Pipeline],
    argv: list[str] | None,
    defaults: Mapping[str, Any],
    demo: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Reads the command line and runs every stage; `defaults` and, with --demo, `demo` are flags the user may set."""
    is_demo = "--demo" in (sys.argv if argv is None else argv)
    parsed = parse_recipe(arguments, argv, {**defaults, **(demo if is_demo else {})})
    check_together(*parsed)
    disable_progress_bar()
    comparison = recipe(*parsed).main()
    leave_processes()
    return comparison
