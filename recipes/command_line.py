"""The command line of a recipe: its own flags beside those of the Trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from arms import PipelineArguments, leave_processes
from pipeline import Pipeline
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from hf_sl2o import SL2OTrainingArguments


def run_recipe(
    arguments: type[PipelineArguments],
    recipe: Callable[[Any, SL2OTrainingArguments], Pipeline],
    argv: list[str] | None,
    defaults: Mapping[str, Any],
    demo: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Reads the command line and runs every stage; `defaults` and, with --demo, `demo` are flags the user may set."""
    parser = HfArgumentParser((arguments, SL2OTrainingArguments))  # type: ignore[arg-type]
    parser.set_defaults(**defaults)
    if "--demo" in (sys.argv if argv is None else argv):
        parser.set_defaults(**demo)
    disable_progress_bar()
    comparison = recipe(*parser.parse_args_into_dataclasses(argv)).main()
    leave_processes()
    return comparison
