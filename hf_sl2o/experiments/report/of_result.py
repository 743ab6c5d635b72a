"""The report of a result of a study, or of `hf-sl2o compare`: its curves, and the rest as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..judging import TOLERANCE
from .of_comparison import Arms, Part, arms_table, seeds_said, steps_bars
from .parts import Bars, Report, number, sections
from .reading import is_number, settings

_MOST_GROUPS = 16


def groups(data: Any, head: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields the places in a result that hold runs of arms with their curves."""
    if not isinstance(data, dict):
        return
    runs = data.get("runs")
    if isinstance(runs, dict) and any(isinstance(run, dict) and run.get("eval") for run in runs.values()):
        yield head, data
        return
    for key, value in data.items():
        yield from groups(value, f"{head} / {key}" if head else str(key))


def _lowest_level(arms: Arms, levels: Any) -> list[tuple[dict[str, float | None], Bars]]:
    """Steps to the lowest final loss of a baseline, within the tolerance of [`judge`]."""
    losses = {
        name: level["loss"]
        for name, level in (levels.items() if isinstance(levels, dict) else ())
        if isinstance(level, dict) and is_number(level.get("loss")) and math.isfinite(level["loss"])
    }
    if not losses:
        return []
    name = min(losses, key=losses.__getitem__)
    target = TOLERANCE * losses[name]
    return [
        steps_bars(
            arms, arms.eval, target, f"Steps to the final loss of {arms.name(name)} and 1\u00a0% ({number(target)})"
        )
    ]


def result_report(data: Mapping[str, Any], where: str, title: str) -> Report:
    """Reports on a result of a study or of `hf-sl2o compare`: its curves, and a table of the rest."""
    found = list(groups(data))
    parts: list[tuple[str, Iterable[Part]]] = []
    for head, entry in found[:_MOST_GROUPS]:
        arms = Arms(entry["runs"], f"{where}: {head}")
        levels = _lowest_level(arms, entry.get("levels"))
        drawn: list[Part] = [*arms.loss_charts(), *arms.accuracy_charts(), *(bars for _, bars in levels)]
        parts.append((head or "Curves", [*drawn, arms_table(arms, levels), *seeds_said(arms)]))
    left = [f"{len(found) - _MOST_GROUPS} further groups of arms are not shown."] if len(found) > _MOST_GROUPS else []
    known = {head.partition(" / ")[0] for head, _ in found} | {"environment", "runs"}
    rest = {key: value for key, value in data.items() if key not in known}
    made = sections(
        *parts,
        ("What else is in the file", [*left, *settings(rest, "Names and values" if found else "")]),
        ("Environment", settings(data.get("environment"))),
    )
    return Report("a comparison of optimizers" if found else "a result", title, made)
