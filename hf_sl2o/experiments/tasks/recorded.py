"""Runs of AdamW with linear decay: what makes a base, and what a subspace is taken from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...foundation.files import checksum_of
from ...foundation.hub import WEIGHTS
from ...subspace import Basis, Trajectory, fit_basis
from ..kept.files import made_once

SNAPSHOTS = 60  # the paper's number
SEED = 12_345  # of batches and dropout; the comparisons count from 0

Loss = Callable[[nn.Module, Any], torch.Tensor]


def train(
    model: nn.Module,
    loss: Loss,
    batches: Iterator[Any],
    *,
    learning_rate: float,
    steps: int,
    name: str,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains what is trainable with AdamW and linear decay; `each(step)` runs after every step."""
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=learning_rate, weight_decay=0.0)
    for step in tqdm(range(1, steps + 1), desc=name, mininterval=5):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss(model, next(batches)).backward()
        nn.utils.clip_grad_norm_(moved, 1.0)
        optimizer.step()
        each(step)


def record(
    trajectory: Trajectory,
    build_model: Callable[[], nn.Module],
    loss: Loss,
    batches: Callable[[int], Iterable[Any]],
    *,
    learning_rate: float,
    steps: int,
    name: str,
    after: int = 0,
) -> nn.Module:
    """Trains a new model and writes its start and [`SNAPSHOTS`] of it; steps count from `after`. Returns the model."""
    torch.manual_seed(SEED)
    model = build_model()
    model.train()
    moved = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trajectory.write(after, moved)

    def each(step: int) -> None:
        if step % max(steps // (SNAPSHOTS - 1), 1) == 0:
            trajectory.write(after + step, moved)

    train(model, loss, iter(batches(SEED)), learning_rate=learning_rate, steps=steps, name=name, each=each)
    return model


def recorded_basis(
    where: Path,
    build_model: Callable[[], nn.Module],
    loss: Loss,
    batches: Callable[[int], Iterable[Any]],
    eval_batches: Sequence[Any],
    *,
    learning_rate: float,
    steps: int,
    dim: int,
) -> Basis:
    """Records such a run, once, and returns the basis of its first `dim` directions.

    Args:
        where (`Path`): The folder where the basis is kept.
        build_model, loss, batches, eval_batches: As of a task; the trainable parameters are recorded.
        learning_rate, steps, dim: Of the run and the basis.

    Raises:
        `ValueError`: the kept basis is not the one that was fitted there.
    """

    def work() -> dict[str, Any]:
        trajectory = Trajectory(where / "trajectory")
        trajectory.clear()
        model = record(
            trajectory, build_model, loss, batches, learning_rate=learning_rate, steps=steps, name=where.name
        )
        basis = fit_basis(trajectory, dim, progress=False)
        basis.save_pretrained(where / "basis")
        trajectory.delete()
        model.eval()
        with torch.no_grad():
            losses = [float(loss(model, batch)) for batch in eval_batches]
        made = {"full_space_loss": sum(losses) / len(losses), "basis": checksum_of(where / "basis" / WEIGHTS)}
        return {**made, **basis.provenance}

    known = made_once(where / "done.json", where.name, work, where / "basis")
    if known["basis"] != checksum_of(where / "basis" / WEIGHTS):
        raise ValueError(f"{where / 'basis'} holds another basis than the one that was fitted there; delete {where}")
    return Basis.from_pretrained(where / "basis")
