"""Which learning rate an arm gets: a grid on validation with one seed, then its two best over all seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .curves import mean_curve

Choice = tuple[str, float]  # units of the coordinates, learning rate
Run = dict[str, Any]  # "eval" holds (step, validation loss)


def final_loss(run: Run) -> float:
    """The last validation loss of a run; infinite if it diverged."""
    loss = float(run["eval"][-1][1])
    return loss if loss == loss else float("inf")


def best_of(tuned: Mapping[Choice, Run]) -> Choice:
    return min(tuned, key=lambda choice: final_loss(tuned[choice]))


def choices(grid: Sequence[Choice], *, quick: bool = False, one_unit: bool = False) -> tuple[Choice, ...]:
    """The grid that is run: `quick` keeps two rates in each units; with `one_unit` the units are all the same."""
    if quick:
        units = dict.fromkeys(unit for unit, _ in grid)
        grid = [choice for unit in units for choice in [c for c in grid if c[0] == unit][:2]]
    if one_unit:
        grid = [("orthonormal", lr) for _, lr in grid]
    return tuple(dict.fromkeys(grid))


def search(run: Callable[..., Run], grid: Sequence[Choice], *, grow: bool) -> dict[Choice, Run]:
    """Runs the grid; with `grow` it gets further rates while the best one is at an edge, up to eight in its units."""
    tuned = {choice: run(choice) for choice in grid}
    while grow:
        best = best_of(tuned)
        rates = sorted(lr for units, lr in tuned if units == best[0])
        if not 1 < len(rates) < 8 or rates[0] < best[1] < rates[-1]:
            break
        wider = best[1] * 10 ** (0.5 if best[1] == rates[-1] else -0.5)
        choice = best[0], float(f"{wider:.1g}")
        tuned[choice] = run(choice)
    return tuned


def over_seeds(
    run: Callable[..., Run], tuned: Mapping[Choice, Run], seeds: int, finalists: int = 2
) -> tuple[dict[Choice, float], list[Run]]:
    """Runs the best choices with every seed: one seed may flatter a rate at the edge of stability.

    Returns:
        The mean final loss of each finalist, and the runs of the best one, a seed each; `tuned` holds those of seed 0.
    """
    chosen = sorted(tuned, key=lambda choice: final_loss(tuned[choice]))[:finalists]
    runs = {choice: [tuned[choice], *(run(choice, seed) for seed in range(1, seeds))] for choice in chosen}
    means = {choice: sum(map(final_loss, of)) / len(of) for choice, of in runs.items()}
    best = min(means, key=lambda choice: means[choice])
    return {best: means[best], **means}, runs[best]


def summary(tuned: Mapping[Choice, Run], means: Mapping[Choice, float], seeds: Sequence[Run]) -> dict[str, Any]:
    """What a comparison says of an arm; the first of `means` is the one that was chosen."""
    units, lr = next(iter(means))
    evals = [run["eval"] for run in seeds]
    result = {
        "units": units,
        "learning_rate": lr,
        "grid": [[*choice, run["eval"]] for choice, run in tuned.items()],
        "finalists": [[*choice, mean if mean < float("inf") else None] for choice, mean in means.items()],
        "train_loss": mean_curve([run["train_loss"] for run in seeds]),
        "train_loss_per_seed": [run["train_loss"] for run in seeds],
        "eval": mean_curve(evals),
        "eval_per_seed": evals,
        "accuracy_per_seed": [run["accuracy"] for run in seeds],
        "final_eval_loss": sum(curve[-1][1] for curve in evals) / len(evals),
        "seconds": sum(run["seconds"] for run in seeds) / len(seeds),
        "peak_bytes": max(run["peak_bytes"] or 0 for run in seeds) or None,
        "state_bytes": seeds[0]["state_bytes"],
    }
    if "test_accuracy" in seeds[0]:
        result["test_accuracy_per_seed"] = [run["test_accuracy"] for run in seeds]
    return result
