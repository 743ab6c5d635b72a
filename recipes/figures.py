"""Draws training loss and test accuracy of every arm from the JSON of a recipe (supplement, figures 1 and 3).

    python recipes/figures.py recipes/results/resnet8_cifar.json            # beside it: resnet8_cifar_arms.png
    python recipes/figures.py outputs/*/comparison.json --output_dir figures

One row a file: loss on training batches, accuracy on held-out images. Lines are means over seeds, bands reach from the
lowest to the highest seed; an arm in the subspace carries the paper's dagger.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.figures import plot_arms
from hf_sl2o.experiments.kept.files import read_object


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
        plot_arms({name: content}, target)
        print(f"written: {target}")
        written.append(target)
    return written


if __name__ == "__main__":
    run_script(main)
