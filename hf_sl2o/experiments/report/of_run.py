"""The report of one run of a Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...foundation.files import load_json
from .parts import Chart, Curve, Limits, Report, Table, number, sections
from .reading import entries, is_number, last_part, said, series, settings
from .subspace import checkpoints, explained, paths_of_coefficients

STATE = "trainer_state.json"
# What SubspaceLogCallback logs, and others that have a name of their own.
_LABELS = {
    "grad_norm": ("Norm of the gradient", "|gradient|"),
    "learning_rate": ("Learning rate", "learning rate"),
    "sl2o_coefficients_norm": ("Distance from the start", "|c|"),
    "sl2o_delta_norm": ("Length of a step", "|delta|"),
    "sl2o_gradient_share": ("Share of the gradient in the subspace", "share"),
}
_SPEED = ("_runtime", "_per_second", "_flos", "train_loss")
_UNDRAWN = ("step", "epoch", "total_flos", "sl2o_skipped_steps", "num_input_tokens_seen")
# A log is at most drawn in so many charts.
_MOST_CHARTS = 24


def state_of(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """The state of a Trainer with the most steps in a folder or its checkpoints, its file, and what was left out."""
    found: list[tuple[int, dict[str, Any], Path]] = []
    faults: list[str] = []
    for path in [folder / STATE, *(path / STATE for _, path in reversed(checkpoints(folder)))]:
        if not path.is_file():
            continue
        where = f"{last_part(path.parent.resolve())}/{STATE}"  # of "." too, and no folder of the machine
        try:
            state = load_json(path, dict)
            entries(state.get("log_history"), f"'log_history' in {where}")
        except (OSError, ValueError) as error:
            faults.append(f"Left out: {str(error).replace(str(path), where)}")
            continue
        steps = state.get("global_step")
        found.append((steps if isinstance(steps, int) else 0, state, path))
        if path.parent != folder:
            break  # the others are older
    if not found and faults:
        raise ValueError(faults[0].removeprefix("Left out: "))
    if not found:
        return None
    _, state, path = max(found, key=lambda entry: entry[0])
    return state, path, faults


def run_report(folder: Path) -> Report | None:
    """Reports on a Trainer's output folder; None if it is none.

    Raises:
        `ValueError`: what is there cannot be read.
    """
    found = state_of(folder)
    if found is None:
        return None
    state, path, faults = found
    log = state["log_history"]
    basis = next((explained(at) for at in (folder / "basis", folder) if explained(at)), [])
    model = next((at for at in (path.parent, folder) if (at / "config.json").is_file()), None)
    adapter = next((at for at in (path.parent, folder) if (at / "adapter_config.json").is_file()), None)
    config = [
        *settings({key: value for key, value in state.items() if not isinstance(value, list | dict)}, f"In {STATE}"),
        *(settings(load_json(model / "config.json", dict), "The model") if model and not basis_is(model) else []),
        *(settings(load_json(adapter / "adapter_config.json", dict), "The adapter") if adapter else []),
    ]
    made = sections(
        ("Summary", [summary(state, log), *faults]),
        ("Loss", loss_charts(log)),
        ("Inside the subspace and the optimizer", [*metric_charts(log), *paths_of_coefficients(folder)]),
        ("Explained variance", basis),
        ("Cost", _cost(log)),
        ("Config", config),
        ("Environment", ["A Trainer does not record on which machine and with which versions it ran."]),
    )
    return Report("a run of a Trainer", last_part(folder.resolve()), made)


def basis_is(folder: Path) -> bool:
    return "basis" in load_json(folder / "config.json", dict)


def summary(state: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Table:
    """Steps, and the last and the best losses."""
    steps = state.get("global_step")
    rows = [("steps done", number(steps) if is_number(steps) else "-")]
    if is_number(state.get("max_steps")):
        rows.append(("steps planned", number(state["max_steps"])))
    for key in _keys(log):
        if (key == "loss" or key.startswith("eval_")) and not key.endswith(_SPEED):
            points = series(log, key)
            rows.append((f"{key}, last", f"{number(points[-1][1])} at step {number(points[-1][0])}"))
            finite = [(y, x) for x, y in points if math.isfinite(y)]
            if key.endswith("loss") and finite:
                rows.append((f"{key}, lowest", f"{number(min(finite)[0])} at step {number(min(finite)[1])}"))
    skipped = series(log, "sl2o_skipped_steps")
    if skipped:
        rows.append(("steps skipped for NaN or Inf", number(skipped[-1][1])))
    if state.get("best_model_checkpoint"):
        rows.append(("best checkpoint", last_part(state["best_model_checkpoint"])))
    return Table((), rows)


def loss_charts(log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Training and evaluation losses in one chart."""
    keys = [key for key in _keys(log) if key == "loss" or (key.startswith("eval_") and key.endswith("loss"))]
    keys.sort(key=lambda key: (key != "eval_loss", key != "loss"))
    names = {"loss": "training loss", "eval_loss": "validation loss"}
    curves = [Curve(names.get(key, key), series(log, key), style=i, ours=i == 0) for i, key in enumerate(keys)]
    return [Chart("Loss", "step", "loss", curves, x_limits=_steps(log), log=True)] if curves else []


def metric_charts(log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each further number in a log that changes."""
    charts = []
    for key in _keys(log):
        points = series(log, key)
        drawn = key == "loss" or (key.startswith("eval_") and key.endswith("loss")) or key in _UNDRAWN
        if (
            drawn
            or key.endswith(_SPEED)
            or len(points) < 2
            or (key == "learning_rate" and len({y for _, y in points}) < 2)
        ):
            continue
        title, label = _LABELS.get(key, (key, key))
        share = key == "sl2o_gradient_share"
        note = "1 if the subspace holds all of the gradient." if share else ""
        log_y = key in ("grad_norm", "sl2o_delta_norm")
        charts.append(Chart(title, "step", label, [Curve(label, points)], x_limits=_steps(log), log=log_y, note=note))
    return charts[:_MOST_CHARTS]


def _steps(log: Sequence[Mapping[str, Any]]) -> Limits:
    """From 0 to the last step of a log."""
    return 0.0, max((float(entry["step"]) for entry in log if is_number(entry.get("step"))), default=1.0)


def _keys(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of numbers in a log, as they come."""
    return list(dict.fromkeys(key for entry in log for key, value in entry.items() if is_number(value)))


def _cost(log: Sequence[Mapping[str, Any]]) -> list[str | Table]:
    rows = [(key, said(value)) for entry in log for key, value in entry.items() if "train_runtime" in entry]
    evaluations = sum(
        y for key in _keys(log) if key.endswith("_runtime") for _, y in series(log, key) if key != "train_runtime"
    )
    if evaluations:
        rows.append(("seconds of evaluations", number(evaluations)))
    return [Table((), rows)] if rows else []
