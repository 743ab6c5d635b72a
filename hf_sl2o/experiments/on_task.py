"""Optimizers beside each other on one task, in a plain loop, tuned on held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ..foundation.files import load_json, save_json
from ..meta import Task, train_on
from ..subspace import Basis
from .curves import mean_curve
from .kept.keys import key_of_batches, model_key
from .tuning import final_loss, over_seeds, search


@dataclass(frozen=True)
class TaskArm:
    """An optimizer in a comparison.

    Args:
        make (`Callable`): Maps a learning rate to what makes the optimizer of `[c]`.
        learning_rates (`tuple[float, ...]`): Its grid; one rate is taken as it is.
        units (`str`, *optional*, defaults to `"std"`): Coordinates of the basis.
        basis ([`Basis`], *optional*): Instead of the task's: a random one, or the identity for the full space.
        key (`str`, *optional*, defaults to the arm's name): Tells its kept runs from those of others, such as a
            rule's fingerprint.
        average (`float`, *optional*, defaults to 0.0): eta of the running average of the coefficients at which it is
            evaluated; 0: none.
        schedule (`str`, *optional*): Of its rate; by default that of the comparison.
    """

    make: Callable[[float], Callable[[list[torch.Tensor]], torch.optim.Optimizer]]
    learning_rates: tuple[float, ...]
    units: str = "std"
    key: str = ""
    basis: Basis | None = None
    average: float = 0.0
    schedule: str = ""


def compare_on(
    task: Task,
    arms: Mapping[str, TaskArm],
    steps: int,
    *,
    seeds: int = 3,
    schedule: str = "linear",
    eval_every: int = 10,
    cache: Path,
    finalists: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """Runs every arm on a task; learning rates by held-out loss: a grid with one seed, its best over all seeds.

    While the best rate lies at an edge, the grid grows by factors of 10^0.5, up to eight rates. Each run is kept in
    `cache`, so that a killed comparison goes on; one of another start or other data is made again.

    Args:
        task ([`Task`]): What is trained.
        arms (`Mapping[str, TaskArm]`): The optimizers.
        steps (`int`): Of each run.
        seeds (`int`, *optional*, defaults to 3): Runs of each arm; they differ in batches and dropout.
        schedule (`str`, *optional*, defaults to `"linear"`): Of the learning rate of each arm without its own.
        eval_every (`int`, *optional*, defaults to 10): Steps between held-out losses.
        cache (`Path`): A folder.
        finalists (`int`, *optional*, defaults to 2): Rates that are run with all seeds.
        **options: For [`~hf_sl2o.meta.task.train_on`].

    Returns:
        Per arm: `learning_rate`, `grid` (rate, curve), `finalists` (rate, mean final loss), `eval_per_seed`, `eval`
        (mean curve), `final_eval_loss`, `seconds`.
    """
    results = {}
    # a basis of all weights is the same at any start and with any data
    of_task = model_key(task.build_model()), key_of_batches(next(iter(task.batches(0)), None), *task.eval_batches)
    for name, arm in arms.items():
        points = {*range(0, steps + 1, eval_every), steps}
        of_rate = arm.schedule or schedule
        given = {"schedule": of_rate, "evaluate_at": points, "average": arm.average, **options}
        run = _kept_runs(task, arm, arm.key or name, steps, [steps, of_rate, eval_every, *of_task], cache, given)
        tuned = search(run, [(arm.units, lr) for lr in arm.learning_rates], grow=True)
        means, runs = over_seeds(run, tuned, seeds, finalists)
        best = next(iter(means))
        curves = [result["eval"] for result in runs]
        results[name] = {
            "learning_rate": best[1],
            "units": arm.units,
            # JSON has no NaN: where a rate diverged the loss is None
            "grid": [
                [lr, [[p[0], p[1] if isfinite(p[1]) else None] for p in result["eval"]]]
                for (_, lr), result in sorted(tuned.items(), key=lambda entry: entry[0][1])
            ],
            "finalists": [
                [choice[1], means[choice] if means[choice] < float("inf") else None]
                for choice in sorted(means, key=lambda choice: final_loss(tuned[choice]))  # noqa: B023
            ],
            "eval_per_seed": curves,
            "eval": mean_curve([[point[:2] for point in curve] for curve in curves]),
            "final_eval_loss": means[best],
            "seconds": sum(result["seconds"] for result in runs) / seeds,
        }
    return results


def _kept_runs(
    task: Task, arm: TaskArm, name: str, steps: int, settings: list[Any], cache: Path, given: dict[str, Any]
) -> Callable[..., dict[str, Any]]:
    """Returns what runs an arm with a choice of (units, rate) and a seed, unless `cache` has its result."""
    basis = task.basis if arm.basis is None else arm.basis
    at = dataclasses.replace(task, basis=basis.with_units(arm.units))
    key = [basis.fingerprint, arm.units, *settings]
    at_mean = f"-average-{arm.average:g}" if arm.average else ""

    def run(choice: tuple[str, float], seed: int = 0) -> dict[str, Any]:
        path = cache / task.name / f"{name}{at_mean}-{choice[1]:g}-seed-{seed}.json"
        known = load_json(path) if path.is_file() else {}
        if known.get("key") != key:
            result = train_on(at, arm.make(choice[1]), steps, seed=seed, **given)
            known = {"key": key, "eval": result["eval"], "seconds": result["seconds"]}
            save_json(path, known)
        return known

    return run
