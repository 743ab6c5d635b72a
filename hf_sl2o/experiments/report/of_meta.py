"""The report of a meta-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...foundation.checked import shown
from ...foundation.files import check_seal, load_json
from .parts import Chart, Curve, Point, Report, Table, number, sections
from .reading import entries, is_number, last_part, mapping, series, settings

LOG, MANIFEST, PROVENANCE = "log.json", "checkpoint.json", "provenance.json"
_MOST_TASKS = 24


def meta_report(folder: Path) -> Report | None:
    """Reports on the folder of a [`MetaTrainer`]; None if it is none.

    Raises:
        `ValueError`: what is there cannot be read.
    """
    path = folder / LOG
    if not path.is_file():
        return None
    log = entries(load_json(path), str(path))
    stamp: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        manifest = load_json(folder / MANIFEST, dict)
        check_seal(folder / MANIFEST, manifest)
        stamp = mapping(manifest, "stamp", str(folder / MANIFEST))
    made_of = load_json(folder / PROVENANCE, dict) if (folder / PROVENANCE).is_file() else {}
    tasks = {key: value for key, value in stamp.items() if key == "tasks" and isinstance(value, list)}
    names = ", ".join(str(task[0]) for task in tasks.get("tasks", []) if isinstance(task, list) and task)
    config: list[str | Table] = [
        *([f"Tasks: {names}."] if names else []),
        *settings({"estimator": stamp.get("estimator"), **mapping(stamp, "args", str(folder / MANIFEST))}, "Settings"),
        *settings(mapping(stamp, "rule", str(folder / MANIFEST)), "The rule"),
        *settings({key: made_of[key] for key in made_of if key != "environment"}, "Provenance"),
    ]
    environment = settings(made_of.get("environment"))
    nothing = "The folder does not say on which machine and with which versions it was made."
    made = sections(
        ("Summary", _summary(log, path)),
        ("Held-out losses", _held_out(log)),
        ("Episodes", _episodes(log)),
        ("Cost", [_cost(log)]),
        ("Config", config),
        ("Environment", environment or [nothing]),
    )
    return Report("a meta-training", last_part(folder.resolve()), made)


def _summary(log: Sequence[Mapping[str, Any]], path: Path) -> list[str | Table]:
    scores = series(log, "score", "meta_epoch")
    if not scores and not any("task" in entry for entry in log):
        raise ValueError(f"{path} is {shown(log)}, expected the log of a meta-training; give the folder of a run")
    if not scores:
        return ["The rule was not validated yet."]
    epoch, best = min(scores, key=lambda point: (not math.isfinite(point[1]), point[1], point[0]))
    return [
        f"Best score {number(best)}, of the rule after {number(epoch)} meta-epochs of {number(scores[-1][0])}. The "
        "score is the geometric mean, over tasks and over points of a run, of the held-out loss over that before "
        "training: 1 is a rule that learns nothing, and the lower the better."
    ]


def _held_out(log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    losses: dict[str, list[Point]] = {}
    for entry in log:
        of = entry.get("validation")
        for task, loss in of.items() if isinstance(of, dict) else ():
            if is_number(loss) and is_number(entry.get("meta_epoch")):
                losses.setdefault(str(task), []).append((float(entry["meta_epoch"]), float(loss)))
    scores = series(log, "score", "meta_epoch")
    charts = [Chart("Score", "meta-epoch", "score", [Curve("score", scores, ours=True)], log=True)] if scores else []
    if losses:
        charts.append(_by_task("Held-out loss, mean over a run", "held-out loss", losses))
    return charts


def _episodes(log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Mean loss of the last window of each meta-epoch's episodes, with the range over them."""
    ends: dict[str, dict[float, list[float]]] = {}
    for entry in log:
        if "task" in entry and is_number(entry.get("last_loss")) and is_number(entry.get("meta_epoch")):
            of = ends.setdefault(str(entry["task"]), {})
            of.setdefault(float(entry["meta_epoch"]), []).append(float(entry["last_loss"]))
    if not ends:
        return []
    curves = []
    for style, (task, of) in enumerate(ends.items()):
        several = max(map(len, of.values())) > 1
        low, high = ([side(values) for values in of.values()] if several else [] for side in (min, max))
        points = [(epoch, sum(values) / len(values)) for epoch, values in of.items()]
        curves.append(Curve(task, points, low, high, style=style))
    title = "Training loss at the end of an episode"
    return [Chart(title, "meta-epoch", "loss", curves[:_MOST_TASKS], log=True, note=_left(len(curves)))]


def _by_task(title: str, y: str, of: Mapping[str, list[Point]]) -> Chart:
    curves = [Curve(task, points, style=style) for style, (task, points) in enumerate(of.items())]
    return Chart(title, "meta-epoch", y, curves[:_MOST_TASKS], log=True, note=_left(len(curves)))


def _left(count: int) -> str:
    return f"The first {_MOST_TASKS} of {count} tasks." if count > _MOST_TASKS else ""


def _cost(log: Sequence[Mapping[str, Any]]) -> Table:
    episodes = [entry for entry in log if "task" in entry]

    def total(key: str) -> str:
        return number(sum(float(entry[key]) for entry in episodes if is_number(entry.get(key))))

    rows = [
        ("episodes", number(len(episodes))),
        ("training steps in them", total("steps")),
        ("seconds in them, all processes together", total("seconds")),
        ("episodes that diverged", number(sum(entry.get("diverged") is True for entry in episodes))),
    ]
    return Table((), rows)
