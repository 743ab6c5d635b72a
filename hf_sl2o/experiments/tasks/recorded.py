"""The subspace of a run of AdamW on a task whose coordinates are its weights, or LoRA factors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...foundation.files import checksum_of
from ...foundation.hub import WEIGHTS
from ...meta import Task
from ...subspace import Basis, Trajectory, fit_basis
from ..kept.files import made_once
from ..kept.keys import stamp

SNAPSHOTS = 60  # the paper's number


def recorded_task(task: Task, learning_rate: float, folder: Path, *, steps: int = 300, dim: int = 40) -> Task:
    """Records a run of AdamW with linear decay, once, and returns the task in its first `dim` directions.

    Args:
        task ([`Task`]): With an identity basis: what is trained there moves in the recorded run.
        learning_rate (`float`): Of that run.
        folder (`Path`): Where the basis is kept.
        steps, dim (*optional*): Of the run and the basis.
    """
    where = place_of(task.name, learning_rate, folder, steps, dim)

    def work() -> dict[str, Any]:
        trajectory = Trajectory(where / "trajectory")
        trajectory.clear()
        torch.manual_seed(12_345)
        model = task.build_model()
        model.train()
        moved = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        trajectory.write(0, moved)
        optimizer = torch.optim.AdamW([p for _, p in moved], lr=learning_rate, weight_decay=0.0)
        batches = iter(task.batches(12_345))
        for step in tqdm(range(1, steps + 1), desc=where.name, mininterval=5):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
            optimizer.zero_grad()
            task.loss(model, next(batches)).backward()
            nn.utils.clip_grad_norm_([p for _, p in moved], 1.0)
            optimizer.step()
            if step % (steps // (SNAPSHOTS - 1)) == 0:
                trajectory.write(step, moved)
        basis = fit_basis(trajectory, dim, progress=False)
        basis.save_pretrained(where / "basis")
        trajectory.delete()
        model.eval()
        with torch.no_grad():
            losses = [float(task.loss(model, batch)) for batch in task.eval_batches]
        made = {"full_space_loss": sum(losses) / len(losses), "basis": checksum_of(where / "basis" / WEIGHTS)}
        return {**made, **basis.provenance}

    known = made_once(where / "done.json", where.name, work, where / "basis")
    if known["basis"] != checksum_of(where / "basis" / WEIGHTS):
        raise ValueError(f"{where / 'basis'} holds another basis than the one that was fitted there; delete {where}")
    return dataclasses.replace(task, name=f"{task.name}-pca", basis=Basis.from_pretrained(where / "basis"))


def place_of(name: str, learning_rate: float, folder: Path, steps: int = 300, dim: int = 40) -> Path:
    return folder / f"{name}-pca-{stamp(learning_rate, steps, dim)}"
