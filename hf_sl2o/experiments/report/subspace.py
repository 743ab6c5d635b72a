"""What a folder tells of a subspace: the variance its directions hold, and the paths of the coefficients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ...foundation.files import check_seal, load_json, load_tensors
from ..tasks.subspaces import walk_shares
from .parts import Chart, Curve, Table, percent
from .reading import is_number, mapping, numbers, settings

COEFFICIENTS = "coefficients.safetensors"
# Coefficients that get a name in the legend, and those that are grey lines.
_NAMED, _GREY = 8, 200

Part = str | Chart | Table


def is_basis(folder: Path) -> bool:
    """Whether a folder holds a basis."""
    path = folder / "config.json"
    return path.is_file() and "basis" in load_json(path, dict)


def explained(folder: Path) -> list[Part]:
    """Explained variance of a basis in a folder, direction by direction, beside that of a random walk.

    Only config.json is read. A random walk of T snapshots, its steps of one length, tells how much a share means.

    Raises:
        `ValueError`: config.json is damaged.
    """
    path = folder / "config.json"
    if not is_basis(folder):
        return []
    config = load_json(path, dict)
    check_seal(path, config)
    made = mapping(config, "provenance", str(path))
    shares, parts = numbers(made.get("explained_variance_ratio")), list[Part]()
    if not shares:
        kind = config.get("basis")
        return [
            f"The basis ({kind}) was not fitted to a recorded run: there is no explained variance.",
            *settings(made),
        ]
    per, snapshots = ("layer" if made.get("blocks") == "layer" else "direction"), made.get("snapshots")
    whole = made.get("explained_variance")
    walk: list[float] = []
    if per == "direction" and made.get("center") is True and isinstance(snapshots, int) and 1 < snapshots < 5000:
        walk = walk_shares(torch.ones(snapshots - 1)).tolist()[: len(shares)]
    if is_number(whole):
        parts.append(
            f"The basis holds {percent(whole)} of the variance of the {snapshots} snapshots that it was fitted to."
            + (
                f" A random walk of as many snapshots has {percent(sum(walk))} in as many directions: explained "
                "variance alone proves nothing."
                if walk
                else ""
            )
        )
    parts += _shares(shares, walk, per)
    return [*parts, *settings({key: value for key, value in made.items() if not isinstance(value, list)}, "The basis")]


def _shares(shares: Sequence[float], walk: Sequence[float], per: str) -> list[Chart]:
    def lines(basis: Sequence[float], control: Sequence[float]) -> list[Curve]:
        both = [("basis", basis, True), *([("random walk", control, False)] if control else [])]
        return [
            Curve(name, [(i, 100 * share) for i, share in enumerate(values, 1)], style=style, ours=ours)
            for style, (name, values, ours) in enumerate(both)
        ]

    charts = [Chart(f"Explained variance of each {per}", per, "% of the variance", lines(shares, walk), log=True)]
    if per == "direction":
        sums = lines(list(accumulate(shares)), list(accumulate(walk)))
        charts.append(Chart("Explained variance, cumulated", "directions", "% of the variance", sums))
    return charts


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a Trainer, ascending."""
    found = [(re.fullmatch(r"checkpoint-(\d{1,12})", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def paths_of_coefficients(folder: Path, name: str = "") -> list[Part]:
    """Charts of the coefficients in the checkpoints of a run, and of those that were saved alone.

    Raises:
        `ValueError`: a file is damaged, or two hold different numbers of coefficients.
    """
    found = {
        step: _coefficients(path / COEFFICIENTS)
        for step, path in checkpoints(folder)
        if (path / COEFFICIENTS).is_file()
    }
    of = f", {name}" if name else ""
    if not found and (folder / COEFFICIENTS).is_file():
        return [_values(_coefficients(folder / COEFFICIENTS), f"Coefficients{of}")]
    if not found:
        return []
    if len({len(values) for values in found.values()}) > 1:
        raise ValueError(
            f"the checkpoints in {folder} hold different numbers of coefficients; report on one run alone"
        )
    steps, last = list(found), list(found.values())[-1]
    if len(found) == 1:
        return [_values(last, f"Coefficients at step {steps[0]:,}{of}")]
    order = sorted(range(len(last)), key=lambda i: -abs(last[i]))
    lines = [[(float(step), values[i]) for step, values in found.items()] for i in order]
    named = [
        Curve(f"direction {i + 1}", line, style=s)
        for s, (i, line) in enumerate(zip(order[:_NAMED], lines, strict=False))
    ]
    more = len(order) - len(named)
    grey = f"the other {more}" if more <= _GREY else f"the next {_GREY} of the other {more:,}"
    note = f"From {len(found)} checkpoints. Named: the {len(named)} largest at the end; grey: {grey}."
    return [
        Chart(
            f"Paths of the coefficients{of}",
            "step",
            "coefficient",
            named,
            x_limits=(0.0, float(steps[-1])),
            faint=lines[_NAMED : _NAMED + _GREY],
            note=note,
        )
    ]


def _values(values: Sequence[float], title: str) -> Chart:
    points = [(float(i), value) for i, value in enumerate(values, 1)]
    return Chart(title, "direction", "coefficient", [Curve("coefficient", points)], dots=True)


def _coefficients(path: Path) -> list[float]:
    values: Any = load_tensors(path).get("coefficients")
    if values is None or values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"{path} holds no 'coefficients' of shape (d,); restore it, or delete it")
    return [float(value) for value in values]
