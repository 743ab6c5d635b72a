"""One training run within a budget of steps: schedules, averages of its weights, and how it is gone on with."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..foundation.files import load_tensors
from ..meta import Task
from ..meta.task import InnerRun
from ..subspace import Basis, Trajectory
from .tuning import Choice, Run

Weights = dict[str, torch.Tensor]  # by the names of a layout
MOMENTS = ("exp_avg", "exp_avg_sq")


def rate_factor(schedule: str, step: int, steps: int, warm_up: int = 0) -> float:
    """Returns what the peak rate is multiplied by at `step`, counted from 0, of `steps`.

    Args:
        schedule (`str`): After the warm-up: `"constant"`, `"linear"` or `"cosine"`, these two to zero at the end.
        step, steps (`int`): Where the run is, and its length.
        warm_up (`int`, *optional*, defaults to 0): Steps in which the rate grows linearly to its peak.

    Raises:
        `ValueError`: an unknown schedule.

    Example:

    ```python
    >>> from hf_sl2o.experiments.one_run import rate_factor
    >>> [rate_factor("linear", step, 6, warm_up=2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    ```
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"the schedule is {schedule!r}, expected constant, linear or cosine")
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / (steps - warm_up)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def ema_weight(step: int, decay: float) -> float:
    """Returns what step t, counted from 1, weighs in an exponential moving average without bias to its start.

    The average after t steps weighs step i as decay^(t - i).
    """
    return (1 - decay) / (1 - decay**step)


def mean_of(trajectory: Trajectory, steps: Sequence[int]) -> Weights:
    """Returns the mean of these snapshots."""
    snapshots = [load_tensors(trajectory.path(step)) for step in steps]
    return {name: torch.stack([snapshot[name] for snapshot in snapshots]).mean(dim=0) for name in snapshots[0]}


def going_on(task: Task, weights: Mapping[str, torch.Tensor], after: int, basis: Basis | None = None) -> Task:
    """Returns the task as it is after so many steps: at these weights, with the batches that come then.

    Args:
        task ([`Task`]): In its full space.
        weights (`Mapping[str, torch.Tensor]`): Of all that the task trains.
        after (`int`): Batches that were used.
        basis ([`Basis`], *optional*): In which it goes on; by default that of the task.
    """

    def build() -> nn.Module:
        model = task.build_model()
        parameters, _ = task.basis.layout.select(model.named_parameters())
        with torch.no_grad():
            for name, parameter in zip(task.basis.layout.names, parameters, strict=True):
                parameter.copy_(weights[name])
        return model

    return dataclasses.replace(
        task, build_model=build, batches=lambda seed: itertools.islice(task.batches(seed), after, None),
        basis=task.basis if basis is None else basis,
    )  # fmt: skip


def loss_at(task: Task, weights: Mapping[str, torch.Tensor]) -> float:
    """Returns the held-out loss at these weights."""
    return float(InnerRun(going_on(task, weights, 0), 0).evaluate())


def moments_of(run: InnerRun, optimizer: torch.optim.Optimizer) -> Weights:
    """Returns the two moments of AdamW by parameter, as [`train_full`] takes them."""
    pairs = list(zip(run.basis.layout.names, run.parameters, strict=True))
    return {f"{name}.{moment}": optimizer.state[p][moment] for name, p in pairs for moment in MOMENTS}


def train_full(
    task: Task,
    rate: float,
    steps: int,
    *,
    seed: int,
    schedule: str,
    warm_up: int = 0,
    after: int = 0,
    moments: Mapping[str, torch.Tensor] | None = None,
    evaluate_at: Collection[int] = (),
    each: Callable[[int, InnerRun, torch.optim.Optimizer], None] = lambda step, run, optimizer: None,
) -> dict[str, Any]:
    """Trains all weights of a task with AdamW.

    Args:
        task ([`Task`]): In its full space; after some steps it is that of [`going_on`].
        rate (`float`): The peak rate.
        steps (`int`): That are made.
        seed (`int`): Of batches and dropout.
        schedule (`str`), warm_up (`int`, *optional*): As for [`rate_factor`].
        after (`int`, *optional*, defaults to 0): Steps that AdamW has made before.
        moments (`Mapping[str, torch.Tensor]`, *optional*): Its moments then, of [`moments_of`].
        evaluate_at (`Collection[int]`, *optional*): Steps of the whole run at which the held-out loss is taken.
        each (`Callable`, *optional*): Called after each step with the step of the whole run.

    Raises:
        `FloatingPointError`: the training loss is no finite number.

    Returns:
        `eval`, a list of `[step, loss]`, and `seconds` without evaluation.
    """
    run = InnerRun(task, seed)
    optimizer = torch.optim.AdamW(run.parameters, lr=rate, weight_decay=0.0)
    if moments is not None:
        for name, p in zip(run.basis.layout.names, run.parameters, strict=True):
            of = {moment: moments[f"{name}.{moment}"].clone() for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(after)), **of}
    evals, spent = [], 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * rate_factor(schedule, step - 1, steps, warm_up)
        optimizer.zero_grad()
        with run.own_randomness():
            loss = run.loss(run.next_batch())
            loss.backward()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"task {task.name!r}, rate {rate:g}: the loss is {loss:g} at step {after + step}")
        optimizer.step()
        spent += time.perf_counter() - start
        each(after + step, run, optimizer)
        if after + step in evaluate_at:
            evals.append([after + step, float(run.evaluate())])
    return {"eval": evals, "seconds": spent}


def _number(loss: float) -> float | None:
    return float(f"{loss:.6g}") if math.isfinite(loss) else None


def described(
    kind: str, peak: float, tuned: dict[str, Any], runs: list[Run], grids: list[dict[Choice, Run]], *,
    full: int, subspace: int = 0, extra: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What the result says of an arm."""
    finals = [_number(run["eval"][-1][1]) for run in runs]
    return {
        "kind": kind, "peak_rate": peak, **tuned, "full_steps": full, "subspace_steps": subspace,
        "final_per_seed": finals,
        "final_eval_loss": None if None in finals else sum(finals) / len(finals),  # type: ignore[arg-type]
        "curve": [[step, _number(loss)] for step, loss in runs[0]["eval"]],
        "grids": [[[*choice, _number(run["eval"][-1][1])] for choice, run in grid.items()] for grid in grids],
        "seconds": round(sum(run["seconds"] for run in runs) / len(runs), 2),
        "extra_bytes": extra,
    }  # fmt: skip


def verdict(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Says which kind of arm ends lower, and whether by more than the spread over seeds.

    Args:
        arms (`Mapping`): Per arm `kind` (`"ours"`, `"rival"`, or another one, which does not count),
            `final_per_seed` and their mean `final_eval_loss`, None where it diverged.

    Returns:
        `best_rival`, `best_ours`, `ratio` (ours / rival), `spread` (the larger max - min over seeds of the two; None
        with one seed) and `verdict`, a sentence.
    """
    best = {}
    for kind in ("ours", "rival"):
        losses = {name: arm["final_eval_loss"] for name, arm in arms.items() if arm["kind"] == kind}
        finite = {name: loss for name, loss in losses.items() if loss is not None}
        if not finite:
            raise ValueError(f"all {len(losses)} arms of kind {kind!r} diverged; give lower rates")
        best[kind] = min(finite, key=lambda name: finite[name])
    ours, rival = arms[best["ours"]], arms[best["rival"]]
    a, b = ours["final_eval_loss"], rival["final_eval_loss"]
    spread = max(max(arm["final_per_seed"]) - min(arm["final_per_seed"]) for arm in (ours, rival))
    counts = {kind: sum(arm["kind"] == kind for arm in arms.values()) for kind in best}
    said = f"best of {counts['ours']} variants: {best['ours']!r} with {a:.4f}; "
    said += f"best of {counts['rival']} rivals: {best['rival']!r} with {b:.4f}; "
    known = min(len(arm["final_per_seed"]) for arm in (ours, rival)) > 1
    if not known:
        said += "one seed, so the spread is not known: no verdict"
    elif abs(a - b) <= spread:
        said += f"they differ by no more than the spread over seeds, {spread:.4f}: no variant wins"
    else:
        said += f"they differ by more than the spread over seeds, {spread:.4f}: "
        said += "a variant wins" if a < b else "no variant wins, the rival does"
    return {
        "best_rival": best["rival"], "best_ours": best["ours"], "ratio": a / b, "spread": spread if known else None,
        "verdict": said,
    }  # fmt: skip
