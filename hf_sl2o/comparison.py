"""Runs beside each other: steps to a target, the printed table, the figure, and the environment they ran in."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from .files import load_json, save_json
from .subspace import Basis
from .tasks import Task, train_on

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "hf_sl2o")


def environment(folder: str | Path = ".") -> dict[str, Any]:
    """Returns versions, device, threads, and commit (with `dirty`) of the checkout at `folder`: JSON values."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def reset_peak() -> None:
    """Starts measuring the peak anew (Linux resets a process' high-water mark by writing 5 here)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def peak_bytes() -> int | None:
    """Peak of device memory, or of the process' resident memory on a CPU; None where it cannot be had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def steps_to(evals: Sequence[Sequence[float]], target: float) -> int | None:
    """Returns the first evaluated step whose loss is at most `target`, or None.

    Args:
        evals (`Sequence[tuple[int, float]]`): (step, loss), ascending.

    Example:

    ```python
    >>> from hf_sl2o.comparison import steps_to
    >>> steps_to([(0, 4.0), (10, 2.0), (20, 1.5)], 2.0)
    10
    ```
    """
    return next((int(step) for step, loss in evals if loss <= target), None)


def mean_steps_to(curves: Sequence[Sequence[Sequence[float]]], target: float) -> float | None:
    """Mean over seeds of [`steps_to`]; None if one seed never gets there."""
    steps = [steps_to(curve, target) for curve in curves]
    found = [step for step in steps if step is not None]
    return sum(found) / len(found) if found and len(found) == len(steps) else None


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Averages (step, loss) curves of equal steps over seeds."""
    return [[points[0][0], sum(loss for _, loss in points) / len(points)] for points in zip(*curves, strict=True)]


@dataclass(frozen=True)
class Arm:
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
    """

    make: Callable[[float], Callable[[list[torch.Tensor]], torch.optim.Optimizer]]
    learning_rates: tuple[float, ...]
    units: str = "std"
    key: str = ""
    basis: Basis | None = None
    average: float = 0.0


def compare_on(
    task: Task,
    arms: Mapping[str, Arm],
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
    `cache`, so that a killed comparison goes on.

    Args:
        task ([`Task`]): What is trained.
        arms (`Mapping[str, Arm]`): The optimizers.
        steps (`int`): Of each run.
        seeds (`int`, *optional*, defaults to 3): Runs of each arm; they differ in batches and dropout.
        schedule (`str`, *optional*, defaults to `"linear"`): Of every arm's learning rate.
        eval_every (`int`, *optional*, defaults to 10): Steps between held-out losses.
        cache (`Path`): A folder.
        finalists (`int`, *optional*, defaults to 2): Rates that are run with all seeds.
        **options: For [`~hf_sl2o.tasks.train_on`].

    Returns:
        Per arm: `learning_rate`, `grid` (rate, curve), `finalists` (rate, mean final loss), `eval_per_seed`, `eval`
        (mean curve), `final_eval_loss`, `seconds`.
    """
    points = {*range(0, steps + 1, eval_every), steps}

    def run(name: str, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
        basis = task.basis if arm.basis is None else arm.basis
        where = basis.fingerprint, arm.units, steps, schedule, eval_every
        at_mean = f"-average-{arm.average:g}" if arm.average else ""
        path = cache / task.name / f"{arm.key or name}{at_mean}-{lr:g}-seed-{seed}.json"
        known = load_json(path) if path.is_file() else {}
        if known.get("key") != list(where):
            at = dataclasses.replace(task, basis=basis.with_units(arm.units))
            given = {"seed": seed, "schedule": schedule, "evaluate_at": points, "average": arm.average, **options}
            result = train_on(at, arm.make(lr), steps, **given)
            known = {"key": list(where), "eval": result["eval"], "seconds": result["seconds"]}
            save_json(path, known)
        return known

    def final(result: dict[str, Any]) -> float:
        loss = float(result["eval"][-1][1])
        return loss if loss == loss else float("inf")

    results = {}
    for name, arm in arms.items():
        tuned = {lr: run(name, arm, lr, 0) for lr in arm.learning_rates}
        while True:
            ranked = sorted(tuned, key=lambda lr: final(tuned[lr]))  # noqa: B023
            rates = sorted(tuned)
            if not 1 < len(rates) < 8 or rates[0] < ranked[0] < rates[-1]:
                break
            lr = float(f"{ranked[0] * 10 ** (0.5 if ranked[0] == rates[-1] else -0.5):.1g}")
            tuned[lr] = run(name, arm, lr, 0)
        per_rate = {
            lr: [tuned[lr], *(run(name, arm, lr, seed) for seed in range(1, seeds))] for lr in ranked[:finalists]
        }
        means = {lr: sum(map(final, runs)) / len(runs) for lr, runs in per_rate.items()}
        best = min(means, key=lambda lr: means[lr])  # noqa: B023
        curves = [result["eval"] for result in per_rate[best]]
        results[name] = {
            "learning_rate": best,
            "units": arm.units,
            # JSON has no NaN: where a rate diverged the loss is None
            "grid": [
                [lr, [[p[0], p[1] if isfinite(p[1]) else None] for p in tuned[lr]["eval"]]] for lr in sorted(tuned)
            ],
            "finalists": [[lr, mean if mean < float("inf") else None] for lr, mean in means.items()],
            "eval_per_seed": curves,
            "eval": mean_curve([[point[:2] for point in curve] for curve in curves]),
            "final_eval_loss": means[best],
            "seconds": sum(result["seconds"] for result in per_rate[best]) / seeds,
        }
    return results


def table(comparison: Mapping[str, Any]) -> str:
    """Returns the comparison as a Markdown table, fastest to the first target (or lowest loss) first."""
    names, accuracies = list(comparison["steps_to"]), list(comparison.get("steps_to_accuracy", ()))
    tested = all("test_accuracy_per_seed" in run for run in comparison["runs"].values())
    heads = ["arm", "learning rate", "validation loss", *["test accuracy"] * tested]
    heads += [f"steps to {name}" for name in (*names, *accuracies)]
    rows = [[*heads, "seconds", "state (kB)"]]

    def order(item: tuple[str, Any]) -> tuple[float, float]:
        steps = comparison["steps_to"][names[0]]["steps"].get(item[0]) if names else None
        return (float("inf") if steps is None else steps, item[1]["final_eval_loss"])

    for arm, run in sorted(comparison["runs"].items(), key=order):
        steps = [comparison["steps_to"][name]["steps"].get(arm) for name in names]
        steps += [comparison["steps_to_accuracy"][name]["steps"].get(arm) for name in accuracies]
        tests = run["test_accuracy_per_seed"] if tested else []
        rows.append(
            [
                arm,
                f"{run['learning_rate']:g}",
                f"{run['final_eval_loss']:.3f}",
                *([f"{100 * sum(tests) / len(tests):.2f} %"] if tested else []),
                *("never" if value is None else f"{value:.0f}" for value in steps),
                f"{run['seconds']:.0f}",
                f"{run['state_bytes'] / 1e3:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def plot(comparison: Mapping[str, Any], path: str | Path, *, early: int = 250) -> None:
    """Draws training and validation loss, the first `early` steps and the full range.

    Raises:
        `ImportError`: matplotlib is missing (`pip install "hf-sl2o[analysis]"`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "hf-sl2o[analysis]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = comparison["runs"]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7.5), layout="constrained", squeeze=False)
    last = max(run["eval"][-1][0] for run in runs.values())
    lowest = min(loss for run in runs.values() for key in ("train_loss", "eval") for _, loss in run[key])
    highest = max(run["eval"][0][1] for run in runs.values())
    for row, (key, title) in enumerate((("train_loss", "training loss"), ("eval", "validation loss"))):
        for column, limit in enumerate((min(early, last), last)):
            axis = axes[row][column]
            for arm, run in runs.items():
                points = [(step, loss) for step, loss in run[key] if step <= limit]
                ours = arm == "sl2o"
                axis.plot(
                    *zip(*points, strict=True), label=arm, linewidth=2.4 if ours else 1.2, zorder=9 if ours else 2
                )
            axis.set(xlabel="step", ylabel=title, xlim=(0, limit), ylim=(lowest * 0.95, highest * 1.03))
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
            axis.grid(alpha=0.3, which="both")
            axis.set_title(f"{title}, {'first ' if limit < last else ''}{limit} steps")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_tasks(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draws a panel a task: mean held-out loss of every arm over its steps, seeds thin.

    Args:
        results (`Mapping`): Per task what [`compare_on`] returned.
        path (`str` or `Path`): The image.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5.4 * len(results), 5.6), layout="constrained", squeeze=False
    )
    pairs = pyplot.get_cmap("tab20")  # a dark and a light one each
    colours = [pairs(index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
    for axis, (task, runs) in zip(axes[0], results.items(), strict=True):
        floor = min(point[1] for run in runs.values() for point in run["eval"])
        start = max(run["eval"][0][1] for run in runs.values())
        for index, (arm, run) in enumerate(runs.items()):
            ours, colour = arm == "sl2o", colours[index % len(colours)]
            for curve in run["eval_per_seed"]:
                axis.plot([p[0] for p in curve], [p[1] for p in curve], color=colour, linewidth=0.5, alpha=0.5)
            label = f"{arm} (lr {run['learning_rate']:g})"
            axis.plot(*zip(*run["eval"], strict=True), color=colour, linewidth=2.4 if ours else 1.3, label=label)
        axis.set(title=task, xlabel="step", ylabel="held-out loss", ylim=(floor * 0.97, start * 1.05))
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
