"""What a flag may be, said before any work begins: one table for all recipes and benchmarks.

A flag of one name means the same everywhere. A list is checked entry by entry; None is what stands for "not given".
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Expected(NamedTuple):
    """What is true of a good value, and how that is said."""

    holds: Callable[[Any], bool]
    text: str


def whole(least: int, most: int = 10**9) -> Expected:
    def holds(value: Any) -> bool:
        return is_number(value) and float(value).is_integer() and least <= value <= most

    return Expected(holds, f"a whole number of at least {least}, at most {most}")


def number(holds: Callable[[float], bool], text: str) -> Expected:
    return Expected(lambda value: is_number(value) and holds(value), text)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


POSITIVE = number(lambda value: value > 0, "a finite number above 0")
NOT_NEGATIVE = number(lambda value: value >= 0, "a finite number of at least 0")
SHARE = number(lambda value: 0 <= value < 1, "a number from 0 to below 1")
JSON_FILE = Expected(
    lambda value: Path(value).suffix == ".json" and not Path(value).is_dir(), "the name of a file that ends in .json"
)
NOT_EMPTY = Expected(lambda value: bool(str(value).strip()), "a name or path, not an empty one")

FLAGS: dict[str, Expected] = {
    **dict.fromkeys(
        (
            "seeds", "dim", "lora_rank", "lora_alpha", "rank", "train_rows", "eval_rows", "validation_rows",
            "trajectory_steps", "meta_epochs", "steps", "test_steps", "judge_steps", "draws", "base_steps",
            "generations", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "eval_steps", "logging_steps", "save_steps",
            "image_size", "shuffle_buffer", "processes", "threads", "coordinates", "rounds", "save_total_limit",
            "generate_rows", "generate_batch_size",
        ),
        whole(1),
    ),
    **dict.fromkeys(("snapshots", "inner_steps", "unroll_length", "unroll_lengths", "population"), whole(2)),
    "lengths": whole(10),
    **dict.fromkeys(("seed", "data_seed"), whole(0, 2**32 - 10_000)),  # numpy takes no others
    **dict.fromkeys(
        ("trajectory_learning_rates", "learning_rates", "output_scale", "meta_learning_rate", "max_seconds",
         "adam_epsilon"), POSITIVE,
    ),
    **dict.fromkeys(("random_scaling", "max_grad_norm", "weight_decay", "sl2o_average", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("momenta", "adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(
        ("data", "model", "tokenizer", "rule", "save_rule", "save_to", "output_dir", "tasks_dir", "runs_dir"),
        NOT_EMPTY,
    ),
    "json": JSON_FILE,
    "name": Expected(lambda value: bool(re.fullmatch(r"\w[\w.-]*", value)), "a name of letters, digits, - and ."),
    "eval_strategy": Expected(
        lambda value: getattr(value, "value", value) == "steps", "steps: rates are chosen by evaluations"
    ),
    "eval_delay": Expected(lambda value: value == 0, "0: rates are chosen by evaluations"),
    "stage": Expected(lambda value: value in ("compare", "generate"), "compare or generate"),
    "generate_split": Expected(lambda value: value in ("validation", "test"), "validation or test"),
    "meta_loss": Expected(lambda value: value in ("sum", "log"), "sum or log"),
}  # fmt: skip

#: Flags of the Trainer that a recipe sets itself, for each run, and what to do instead.
SET_BY_RECIPE = {
    "learning_rate": "each arm runs its grid; --trajectory_learning_rates gives those of the recorded arm",
    "optim": "each arm has its own; choose among them by --arms",
    "optim_args": "each arm has its own; choose among them by --arms",
    "num_train_epochs": "a run has --max_steps, one of the full space --trajectory_steps",
    "sl2o_basis": "the recipe makes it; --subspace says which",
    "sl2o_rule": "the recipe makes it, or takes --rule",
    "sl2o_units": "they are tuned with the rate",
    "sl2o_momentum": "each arm has its own; choose among them by --arms",
    "sl2o_outside": "the basis covers all that is trained",
    "sl2o_warmup_steps": "the recipe records its own run; see --trajectory_steps",
    "resume_from_checkpoint": "a recipe goes on by itself where it was killed",
    "load_best_model_at_end": "arms are compared at their last step",
}


def check_flags(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first flag whose value is not what [`FLAGS`] expects."""
    for name, value in options.items():
        if name not in FLAGS or value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, list) and not value and name in ("trajectory_learning_rates", "unroll_lengths"):
            raise ValueError(f"--{name} is empty, expected at least one value; leave it out for the default")
        for entry in values:
            if not FLAGS[name].holds(entry):
                raise ValueError(f"--{name} is {shown(entry)}, expected {FLAGS[name].text}")


def shown(value: Any) -> str:
    return str(value) if isinstance(value, int | float | Path) else repr(value)


def check_unused(options: Mapping[str, Any], defaults: Callable[[str], Any]) -> None:
    """Raises `ValueError` for a flag that would change nothing."""
    for name, why in SET_BY_RECIPE.items():
        if name in options and options[name] != defaults(name):
            raise ValueError(f"--{name} is {shown(options[name])}, which a recipe has no use for: {why}; leave it out")


def check_directions(recipe: Any, share: float = 1.0) -> None:
    """Raises `ValueError` where fewer snapshots are recorded, in this share of the run, than directions are wanted."""
    recorded = min(recipe.snapshots, int(share * recipe.trajectory_steps))
    if recipe.subspace.startswith("pca") and not 1 <= recipe.dim <= recorded:
        raise ValueError(
            f"--dim is {recipe.dim}, expected between 1 and the {recorded} snapshots that are recorded: "
            f"--snapshots {recipe.snapshots} in --trajectory_steps {recipe.trajectory_steps}"
        )


def check_writable(flag: str, folder: str | Path) -> None:
    """Raises `ValueError` where no folder can be made, or nothing written into it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        found = "a file" if folder.is_file() else f"a place where nothing can be written ({error.strerror or error})"
        raise ValueError(f"--{flag} is {folder}, {found}; give a folder that can be made or written to") from error


def check_places(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` where what is made at the end could not be written."""
    for name in ("output_dir", "tasks_dir", "runs_dir", "cache"):
        if options.get(name) is not None:
            check_writable(name, options[name])
    for name in ("json", "save_rule", "save_to"):
        if options.get(name) is not None:
            path = Path(options[name])
            check_writable(name, path.parent if name == "json" else path)


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, known: bool = False) -> Any:
    """The options of a script, with `known` also what is left; raises `ValueError` where a value cannot be right."""
    options, rest = parser.parse_known_args(argv) if known else (parser.parse_args(argv), [])
    check_flags(vars(options))
    check_places(vars(options))
    return (options, rest) if known else options


def load_named(flag: str, name: str | Path, load: Callable[[], Any]) -> Any:
    """Returns what `load` finds under a name that the user gave; raises in one sentence."""
    try:
        return load()
    except Exception as error:  # whatever the library raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"--{flag} is {str(name)!r}, which could not be loaded ({first}); give a folder that is there, or a name "
            "of the Hugging Face Hub while it can be reached"
        ) from error
