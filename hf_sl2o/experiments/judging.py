"""Steps of a rule to what tuned optimizers reach on the same tasks."""

from __future__ import annotations

from collections.abc import Mapping
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
