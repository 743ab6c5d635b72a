"""How many steps the arms of a recipe need to given losses and accuracies, and what was paid before they began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..foundation.files import load_json
from ..meta import MetaTrainingArguments
from .curves import mean_steps_to, steps_to


def fastest(grid: list[Any], target: float) -> list[Any] | None:
    """(units, learning rate, steps) of the run of a grid that reaches `target` first."""
    reached = [[units, lr, steps_to(curve, target)] for units, lr, curve in grid]
    return min((entry for entry in reached if entry[2] is not None), key=lambda entry: entry[2], default=None)


def negated(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    """(step, -value): an accuracy as something to bring down."""
    return [[step, -value] for step, value in curve]


def to_losses(runs: Mapping[str, Any], targets: Mapping[str, float]) -> dict[str, Any]:
    """Per target: every arm's mean steps over its seeds, None if one of them never gets there."""
    return {
        name: {
            "target": target,
            "steps": {arm: mean_steps_to(run["eval_per_seed"], target) for arm, run in runs.items()},
            # each arm at the learning rate of its grid that gets there first (first seed), not the chosen one
            "fastest_of_grid": {arm: fastest(run["grid"], target) for arm, run in runs.items()},
        }
        for name, target in targets.items()
    }


def to_accuracies(runs: Mapping[str, Any], levels: Mapping[str, float]) -> dict[str, Any]:
    """Likewise for accuracies."""
    return {
        name: {
            "target": level,
            "steps": {
                arm: mean_steps_to([negated(curve) for curve in run["accuracy_per_seed"]], -level)
                for arm, run in runs.items()
            },
        }
        for name, level in levels.items()
    }


def meta_training_steps(folder: Path) -> int | None:
    """Training steps of networks behind a rule that meta_train.py made, those of its validations too.

    None: the folder does not say how its rule was made. An episode that diverged and ended early counts whole.
    """
    if not (folder / "provenance.json").is_file():
        return None
    path = folder / "provenance.json"
    made, total = load_json(path, dict), 0
    try:
        for stage in made.get("stages", [made]):
            if "settings" not in stage:
                return None
            args = MetaTrainingArguments(**{**stage["settings"], "output_dir": str(folder)})
            episodes = len(stage["tasks"]) * args.episodes_per_task
            total += episodes * sum(map(args.steps_at, range(args.meta_epochs)))
            total += len(stage["tasks"]) * len(stage["validation"]) * args.inner_steps
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say how the rule was made ({type(error).__name__}: {error}); restore it, or remove it"
        ) from error
    return total


def paid_for_rules(cost: Mapping[str, Any]) -> str:
    """A sentence that goes on below the table; empty if there are none."""
    known = [f"{arm} {'unknown' if steps is None else f'{steps:,}'}" for arm, steps in cost["rules"].items()]
    return f" Meta-training of rules used unchanged, once for every task: {', '.join(known)}." if known else ""


def at_edge(run: Mapping[str, Any]) -> bool:
    """Whether a better learning rate may lie outside the grid that was run."""
    rates = sorted(lr for units, lr, _ in run["grid"] if units == run["units"])
    return len(rates) > 1 and run["learning_rate"] in (rates[0], rates[-1])


def paid_once(comparison: Mapping[str, Any], dim: int) -> str:
    """What stands below the table of a recipe."""
    cost, edge = comparison["amortised"], [arm for arm, run in comparison["runs"].items() if at_edge(run)]
    return (
        f"{comparison['n']:,} parameters, d = {dim}. Paid once, in training steps: trajectory {cost['trajectory']}, "
        f"meta-training {cost['meta_training']}; extraction {cost['seconds'].get('extract', 0):.1f} s."
        f"{paid_for_rules(cost)}"
        + (f" At the edge of its grid, a better rate may lie outside: {', '.join(edge)}." if edge else "")
    )


def amortised(
    stages: Mapping[str, Any], trajectory_steps: int, recorded_runs: int, rules: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """What was paid once, in training steps, and the seconds of each stage.

    `rules` holds the folders of rules that were used unchanged, by arm: what they cost is paid once for every task
    and is not in the total.
    """
    cost = {
        "trajectory": trajectory_steps if "sample" in stages else 0,
        "meta_training": stages["meta"]["steps"] if "meta" in stages else 0,
    }
    return {
        "unit": "training steps",
        **cost,
        "total": sum(cost.values()),
        "rules": {arm: meta_training_steps(folder) for arm, folder in (rules or {}).items()},
        # learning rates and seeds the trajectory was chosen from
        "other_recorded_runs": max(0, recorded_runs - 1) * trajectory_steps,
        "seconds": {name: entry["seconds"] for name, entry in stages.items()},
    }
