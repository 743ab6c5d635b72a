"""The command line of a recipe: its own flags beside those of the Trainer, checked before anything is begun."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from ...training import SL2OTrainingArguments
from ..arguments import ComparisonArguments, check_together
from ..comparison import Comparison
from .flags import check_flags, check_unused
from .script import leave_processes


def parse_recipe(
    arguments: type[ComparisonArguments], argv: list[str] | None, defaults: Mapping[str, Any]
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


def run_recipe(
    arguments: type[ComparisonArguments],
    recipe: Callable[[Any, SL2OTrainingArguments], Comparison],
    argv: list[str] | None,
    defaults: Mapping[str, Any],
    demo: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Reads the command line and runs every stage; `defaults` and, with --demo, `demo` are flags the user may set."""
    is_demo = "--demo" in (sys.argv if argv is None else argv)
    parsed = parse_recipe(arguments, argv, {**defaults, **(demo if is_demo else {})})
    check_together(*parsed)
    disable_progress_bar()
    comparison = recipe(*parsed).run()
    leave_processes()
    return comparison
