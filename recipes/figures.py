"""Draws training loss and test accuracy of every arm from the JSON of a recipe (supplement, figures 1 and 3).

    python recipes/figures.py recipes/results/resnet8_cifar.json            # beside it: resnet8_cifar_arms.png
    python recipes/figures.py outputs/*/comparison.json --output_dir figures

One row a file: loss on training batches, accuracy on held-out images. Lines are means over seeds, bands reach from the
lowest to the highest seed; an arm in the subspace carries the paper's dagger.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checks import parse_options, run_script
from kept_files import read_object

from hf_sl2o.comparison import mean_curve

# The paper's names.
NAMES = {
    "sl2o": "SL2O", "sl2o_default": "SL2O (shipped rule)", "sl2o_default-lora": "SL2O (shipped rule)",
    "sl2o_gpt2": "SL2O (rule of GPT-2)",
    "sgd": "SGD", "momentum": "Momentum", "adam": "Adam", "rmsprop": "RMSProp", "adamw": "AdamW",
    "adamw_2e-4": "AdamW, 2e-4", "subspace_sgd": "SGD†", "subspace_momentum": "Momentum†",
    "subspace_adamw": "AdamW†", "subspace_adamw_orthonormal": "AdamW† (orthonormal)", "p_bfgs": "P-BFGS†",
    "symbolic": "symbolic rule", "random": "AdamW, random subspace",
}  # fmt: skip


def draw(axis: Any, curves: Sequence[Sequence[Sequence[float]]], label: str, colour: str, ours: bool) -> None:
    mean = mean_curve(curves)
    steps, values = [point[0] for point in mean], [point[1] for point in mean]
    axis.plot(steps, values, color=colour, linewidth=2.4 if ours else 1.2, label=label, zorder=9 if ours else 2)
    if len(curves) > 1:
        columns = [[point[1] for point in points] for points in zip(*curves, strict=True)]
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def figure(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws one row of two panels for each comparison.

    Args:
        results (`Mapping`): Contents of comparison.json by title.
        path (`Path`): The image.

    Raises:
        `ValueError`: a comparison has no accuracies or no seeds: it is not of a vision recipe.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(
        len(results), 2, figsize=(13.5, 4.2 * len(results)), layout="constrained", squeeze=False
    )
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
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    pyplot.close(canvas)


def read_comparison(path: Path) -> dict[str, Any]:
    """Returns the comparison of a recipe; raises `ValueError` if the file is none."""
    runs = (content := read_object(path, "runs", remedy="give the comparison.json of a vision recipe"))["runs"]
    curves = ("accuracy_per_seed", "train_loss_per_seed")
    if not isinstance(runs, dict) or not runs:
        raise ValueError(f"{path} holds no runs; give the comparison.json of a vision recipe")
    for arm, run in runs.items():
        for name in curves:
            if not isinstance(run, dict) or not is_curves(run.get(name)):
                raise ValueError(
                    f"{path}: the arm {arm!r} has no {name} (lists of [step, value] for each seed); give the "
                    "comparison.json of a vision recipe"
                )
    return content


def is_curves(value: Any) -> bool:
    """Whether it holds (step, value) pairs for each seed, all at the same steps; there may be none of them."""
    if not isinstance(value, list) or not all(isinstance(curve, list) for curve in value):
        return False
    pairs = [point for curve in value for point in curve]
    good = all(isinstance(p, list) and len(p) == 2 and all(isinstance(x, int | float) for x in p) for p in pairs)
    return good and len({tuple(point[0] for point in curve) for curve in value}) <= 1


def main(argv: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="comparison.json files")
    parser.add_argument("--output_dir", type=Path, help="default: beside each file")
    options = parse_options(parser, argv)
    contents = {path: read_comparison(path) for path in options.results}
    written = []
    for path, content in contents.items():
        name = path.parent.name if path.stem == "comparison" else path.stem
        target = (options.output_dir or path.parent) / f"{name}_arms.png"
        figure({name: content}, target)
        print(f"written: {target}")
        written.append(target)
    return written


if __name__ == "__main__":
    run_script(main)
