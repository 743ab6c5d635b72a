"""Figures of comparisons; each opens its image by [`canvas`]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .curves import mean_curve

# The paper's names.
NAMES = {
    "sl2o": "SL2O", "sl2o_default": "SL2O (shipped rule)", "sl2o_default-lora": "SL2O (shipped rule)",
    "sl2o_gpt2": "SL2O (rule of GPT-2)",
    "sgd": "SGD", "momentum": "Momentum", "adam": "Adam", "rmsprop": "RMSProp", "adamw": "AdamW",
    "adamw_2e-4": "AdamW, 2e-4", "subspace_sgd": "SGD†", "subspace_momentum": "Momentum†",
    "subspace_adamw": "AdamW†", "subspace_adamw_orthonormal": "AdamW† (orthonormal)", "p_bfgs": "P-BFGS†",
    "symbolic": "symbolic rule", "random": "AdamW, random subspace",
}  # fmt: skip


@contextmanager
def canvas(path: str | Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Gives a figure and its axes, `(rows, columns)` of them, and writes the image at the end of the block.

    Args:
        path (`str` or `Path`): The image; its folder is made.
        rows, columns (`int`, *optional*, default to 1): Panels.
        **options: For `matplotlib.pyplot.subplots`.

    Raises:
        `ImportError`: matplotlib is missing (`pip install "hf-sl2o[analysis]"`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "hf-sl2o[analysis]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    try:
        yield figure, axes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def plot(comparison: Mapping[str, Any], path: str | Path) -> None:
    """Draws training and validation loss: as many steps as the shortest run has (at most 250), and all of them.

    Raises:
        `ImportError`: matplotlib is missing (`pip install "hf-sl2o[analysis]"`).
    """
    runs = comparison["runs"]
    ends = [run["eval"][-1][0] for run in runs.values()]
    shown = sorted({min(250, *ends, max(ends)), max(ends)})
    losses = [loss for run in runs.values() for key in ("train_loss", "eval") for _, loss in run[key]]
    lowest = min(filter(math.isfinite, losses), default=0.0)
    highest = max(filter(math.isfinite, (run["eval"][0][1] for run in runs.values())), default=1.0)
    margin = 0.03 * (highest - lowest)
    limits = (lowest * 0.95, highest * 1.03) if lowest > 0 else (lowest - margin, highest + margin)
    with canvas(path, 2, len(shown), figsize=(6 * len(shown), 7.5)) as (_, axes):
        for row, (key, title) in enumerate((("train_loss", "training loss"), ("eval", "validation loss"))):
            for column, limit in enumerate(shown):
                axis = axes[row][column]
                for arm, run in runs.items():
                    points = [(step, loss) for step, loss in run[key] if step <= limit]
                    ours = arm == "sl2o"
                    axis.plot(
                        *zip(*points, strict=True), label=arm, linewidth=2.4 if ours else 1.2, zorder=9 if ours else 2
                    )
                axis.set(xlabel="step", ylabel=title, xlim=(0, limit), ylim=limits)
                if lowest > 0:
                    axis.set_yscale("log")
                    axis.yaxis.set_minor_formatter("{x:.2g}")
                axis.yaxis.set_major_formatter("{x:.2g}")
                axis.grid(alpha=0.3, which="both")
                axis.set_title(f"{title}, {'first ' if limit < shown[-1] else ''}{limit} steps")
        axes[0][0].legend(fontsize=8)


def plot_tasks(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draws a panel a task: mean held-out loss of every arm over its steps, seeds thin.

    Args:
        results (`Mapping`): Per task what [`compare_on`] returned.
        path (`str` or `Path`): The image.
    """
    with canvas(path, 1, len(results), figsize=(5.4 * len(results), 5.6)) as (_, axes):
        from matplotlib import colormaps

        pairs = colormaps["tab20"]  # a dark and a light one each
        colours = [pairs(index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
        for axis, (task, runs) in zip(axes[0], results.items(), strict=True):
            seen = [point[1] for run in runs.values() for point in run["eval"] if math.isfinite(point[1])]
            begun = [run["eval"][0][1] for run in runs.values() if math.isfinite(run["eval"][0][1])]
            for index, (arm, run) in enumerate(runs.items()):
                ours, colour = arm == "sl2o", colours[index % len(colours)]
                for curve in run["eval_per_seed"]:
                    axis.plot([p[0] for p in curve], [p[1] for p in curve], color=colour, linewidth=0.5, alpha=0.5)
                label = f"{arm} (lr {run['learning_rate']:g})"
                axis.plot(*zip(*run["eval"], strict=True), color=colour, linewidth=2.4 if ours else 1.3, label=label)
            axis.set(title=task, xlabel="step", ylabel="held-out loss")
            if begun:
                axis.set_ylim(min(seen) * 0.97, max(begun) * 1.05)
            axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def plot_cells(cells: Mapping[str, Mapping[str, Any]], columns: int, path: str | Path) -> None:
    """Draws small panels: mean held-out loss of every arm over its steps, the rule's thicker, one legend for all.

    Args:
        cells (`Mapping`): Per panel its title and what [`compare_on`] returned.
        columns (`int`): Panels beside each other.
        path (`str` or `Path`): The image.
    """
    rows = -(-len(cells) // columns)
    with canvas(path, rows, columns, figsize=(4.6 * columns, 3.1 * rows + 0.8)) as (figure, axes):
        from matplotlib import colormaps

        arms = list(dict.fromkeys(arm for runs in cells.values() for arm in runs))
        colours = {arm: colormaps["tab20"](index % 10 * 2 + index // 10) for index, arm in enumerate(arms)}
        for axis in axes.flat[len(cells) :]:
            axis.set_axis_off()
        for axis, (title, runs) in zip(axes.flat, cells.items(), strict=False):
            losses = [loss for run in runs.values() for _, loss in run["eval"] if math.isfinite(loss)]
            start = next(iter(runs.values()))["eval"][0][1]
            for arm, run in runs.items():
                ours, further = arm.startswith("sl2o"), arm.startswith("sl2o_")
                look = {"linewidth": 2.6 if ours else 1.3, "linestyle": "--" if further else "-", "zorder": 3 + ours}
                axis.plot(*zip(*run["eval"], strict=True), color=colours[arm], label=arm, **look)
            axis.set(title=title, xlabel="step", ylabel="held-out loss", yscale="log")
            axis.set_ylim(0.97 * min(losses), 1.15 * start)
            axis.yaxis.set_major_formatter("{x:.2g}")
            axis.yaxis.set_minor_formatter("{x:.2g}")
            axis.tick_params(which="both", labelsize=7)
            axis.grid(alpha=0.3, which="both")
        lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside lower center",
            ncols=min(len(lines), 2 * columns + 1, 6),
            fontsize=8,
        )


def draw(axis: Any, curves: Sequence[Sequence[Sequence[float]]], label: str, colour: str, ours: bool) -> None:
    mean = mean_curve(curves)
    steps, values = [point[0] for point in mean], [point[1] for point in mean]
    axis.plot(steps, values, color=colour, linewidth=2.4 if ours else 1.2, label=label, zorder=9 if ours else 2)
    if len(curves) > 1:
        columns = [[point[1] for point in points] for points in zip(*curves, strict=True)]
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def plot_arms(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws one row of two panels for each comparison.

    Args:
        results (`Mapping`): Contents of comparison.json by title.
        path (`Path`): The image.

    Raises:
        `ValueError`: a comparison has no accuracies or no seeds: it is not of a vision recipe.
    """
    with canvas(path, len(results), 2, figsize=(13.5, 4.2 * len(results))) as (_, axes):
        for row, (title, result) in zip(axes, results.items(), strict=True):
            for index, (arm, run) in enumerate(result["runs"].items()):
                if not run.get("accuracy_per_seed") or not run["accuracy_per_seed"][0]:
                    raise ValueError(
                        f"{title}: the arm {arm!r} has no accuracies; give the comparison.json of a vision recipe"
                    )
                label, colour, ours = NAMES.get(arm, arm), f"C{index % 10}", arm.startswith("sl2o")
                draw(row[0], run["train_loss_per_seed"], label, colour, ours)
                accuracies = [[[step, 100 * value] for step, value in curve] for curve in run["accuracy_per_seed"]]
                draw(row[1], accuracies, label, colour, ours)
            row[0].set(title=f"{title}: training loss", xlabel="step", ylabel="loss", yscale="log")
            row[1].set(title=f"{title}: accuracy on held-out images", xlabel="step", ylabel="%")
            for axis in row:
                axis.set_xscale("symlog", linthresh=20)
                axis.set_xlim(left=0)
                axis.grid(alpha=0.3, which="both")
            row[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
