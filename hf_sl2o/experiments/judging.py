"""Steps of a rule to what tuned optimizers reach on the same tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .curves import mean_steps_to, steps_to

OURS = ("sl2o", "sl2o_last")  # the rule as a Trainer has it, and without the running average
TOLERANCE = 1.01  # a level counts as reached within 1 %, as in recipes/gpt2_e2e.py: single losses are noisy


def judge(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of each arm to the final mean loss of each baseline: within the tolerance, exactly, and of mean curves."""
    curves = {name: [[point[:2] for point in curve] for curve in run["eval_per_seed"]] for name, run in runs.items()}
    levels = {name: run["final_eval_loss"] for name, run in runs.items() if name not in OURS}
    return {
        name: {
            "loss": level,
            "steps": {arm: mean_steps_to(of, TOLERANCE * level) for arm, of in curves.items()},
            "steps_exact": {arm: mean_steps_to(of, level) for arm, of in curves.items()},
            # of the mean over seeds: defined where one noisy seed ends just above the level
            "steps_of_mean": {arm: steps_to(run["eval"], TOLERANCE * level) for arm, run in runs.items()},
        }
        for name, level in levels.items()
    }


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Per baseline: steps of each of ours over its own (of mean curves), and their means; None where one never is."""
    first = next(iter(results.values()))["levels"]
    out = {}
    for level in first:
        ratios: dict[str, dict[str, float | None]] = {arm: {} for arm in OURS if arm in first[level]["steps_of_mean"]}
        for name, entry in results.items():
            steps = entry["levels"][level]["steps_of_mean"]
            for arm, of_arm in ratios.items():
                of_arm[name] = None if steps[arm] is None or not steps[level] else steps[arm] / steps[level]
        means = {}
        for arm, of_arm in ratios.items():
            known = [ratio for ratio in of_arm.values() if ratio is not None]
            means[arm] = sum(known) / len(known) if len(known) == len(of_arm) else None
        out[level] = {"ratios": ratios, "mean_ratios": means}
    return out


def beside(runs: Mapping[str, Any], tuned: str) -> dict[str, dict[str, float | None]]:
    """Final loss of each arm, its ratio to a tuned baseline's, and after which share of the steps it is as low.

    None where an arm diverged, or never gets within the tolerance of the baseline's final loss (of mean curves).
    """
    losses = {arm: run["final_eval_loss"] for arm, run in runs.items()}
    level, steps = losses[tuned], runs[tuned]["eval"][-1][0]
    reached = {arm: steps_to(run["eval"], TOLERANCE * level) for arm, run in runs.items()}
    return {
        "loss": {arm: loss if math.isfinite(loss) else None for arm, loss in losses.items()},
        "ratio": {arm: loss / level if math.isfinite(loss) else None for arm, loss in losses.items()},
        "share_of_steps": {arm: None if step is None else step / steps for arm, step in reached.items()},
    }


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """None if a value is None."""
    known = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known and len(known) == len(values) else None


def over_cells(cells: Mapping[str, Mapping[str, Any]], tuned: str, variants: Collection[str] = ()) -> dict[str, Any]:
    """Of each arm over what [`beside`] says of several tasks: mean ratio to the tuned baseline, worst task, ranks.

    Args:
        cells (`Mapping`): By the name of a task.
        tuned (`str`): The baseline; it has no rank.
        variants (`Collection[str]`, *optional*): Arms that no other is ranked against, such as one at further rates.

    Returns:
        Per arm `geometric_mean` and `worst` (task, ratio; None: it diverged there), and `rank`, the mean over tasks of
        its place by final loss among the untuned; ours are not ranked against each other.
    """
    arms = list(next(iter(cells.values()))["loss"])
    rivals = [arm for arm in arms if arm != tuned and arm not in variants]
    out: dict[str, Any] = {}
    for arm in arms:
        ratios = {name: cell["ratio"][arm] for name, cell in cells.items()}
        worst = max(ratios, key=lambda name: math.inf if ratios[name] is None else ratios[name])  # noqa: B023
        out[arm] = {"geometric_mean": geometric_mean(list(ratios.values())), "worst": [worst, ratios[worst]]}
        if arm != tuned:
            others = [other for other in rivals if other != arm and not (other in OURS and arm in (*OURS, *variants))]
            places = [1 + sum(_lower(cell["loss"], other, arm) for other in others) for cell in cells.values()]
            out[arm]["rank"] = sum(places) / len(places)
    return out


def _lower(losses: Mapping[str, float | None], arm: str, than: str) -> bool:
    mine, other = losses[arm], losses[than]
    return mine is not None and (other is None or mine < other)


def spread(losses: Sequence[float | None]) -> float | None:
    """The largest final loss over the smallest; None if a run diverged."""
    known = [loss for loss in losses if loss is not None]
    return max(known) / min(known) if len(known) == len(losses) else None
