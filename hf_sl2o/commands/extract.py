"""Fits a basis to a recorded run: trajectory folder in, basis folder out.

    hf-sl2o extract runs/gpt2/trajectory basis --dim 40 --storage auto --budget 2GB

TrajectoryCallback records a run, and SL2OTrainer its warm-up (OUTPUT/warmup/trajectory; of a run that is pushed
OUTPUT/_warmup/trajectory). The folder OUTPUT is what optim_args="basis=OUTPUT" and Basis.from_pretrained take.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..foundation.checked import check_integer
from ..subspace import Trajectory, fit_basis
from ..subspace.storage import STORAGES
from .folders import check_new, made_whole
from .words import byte_count, human_bytes, human_time, known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trajectory", type=Path, metavar="TRAJECTORY", help="the folder with trajectory.json")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder of the basis; a new one")
    parser.add_argument("--dim", type=int, default=40, metavar="D", help="directions (40)")
    parser.add_argument("--storage", default="fp32", metavar="S", help=f"{', '.join(STORAGES)}, auto (fp32)")
    parser.add_argument("--budget", type=byte_count, metavar="BYTES", help="the most, such as 800MB; auto needs it")
    parser.add_argument("--blocks", default="global", metavar="B", help="global, or layer: D directions of each layer")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where products are computed: cpu, cuda (cpu)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Fits the basis and saves it."""
    storage = known("--storage", arguments.storage, (*STORAGES, "auto"))
    blocks = known("--blocks", arguments.blocks, ("global", "layer"))
    if storage == "auto" and arguments.budget is None:
        raise ValueError("--storage auto takes the most exact storage that fits, and --budget is missing; give both")
    device = _device(arguments.device)
    check_integer("--dim", arguments.dim, 1)
    trajectory, output, start = arguments.trajectory, arguments.output, time.perf_counter()
    recorded = _recorded(trajectory)
    check_new("OUTPUT", output)
    basis = fit_basis(
        recorded, arguments.dim, storage=storage, budget_bytes=arguments.budget, blocks=blocks, device=device
    )
    with made_whole("OUTPUT", output) as folder:
        basis.save_pretrained(folder)
    share = basis.provenance["explained_variance"]
    facts = {
        "output": str(output), "trajectory": str(trajectory), "dim": basis.dim, "n": basis.layout.n,
        "storage": basis.provenance.get("storage", storage), "bytes": basis.nbytes, "explained_variance": share,
        "seconds": time.perf_counter() - start, "fingerprint": basis.fingerprint, "provenance": basis.provenance,
    }  # fmt: skip
    return facts, (
        f"{output}: {basis.dim} directions of {basis.layout.n:,} parameters in {facts['storage']}, "
        f"{human_bytes(basis.nbytes)}, after {human_time(facts['seconds'])}.\n"
        f"They hold {100 * share:.4g} % of the variance of {len(recorded)} snapshots "
        f"(steps {recorded.steps[0]} to {recorded.steps[-1]})."
    )


def _device(name: str) -> str:
    import torch

    known("--device", name.partition(":")[0], ("cpu", "cuda"))
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise ValueError(
            f"--device is {name!r}, which is not there ({str(error).splitlines()[0]}); use cpu"
        ) from error
    return name


def _recorded(folder: Path) -> Trajectory:
    """The trajectory; raises `ValueError` where the folder is none."""
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "not there"
        raise ValueError(f"TRAJECTORY is {folder}, which is {found}; give a folder that TrajectoryCallback wrote")
    recorded = Trajectory(folder)
    if not recorded.manifest.is_file():
        inner = next((path.parent for path in sorted(folder.glob("*/trajectory.json"))), None)
        hint = f"; did you mean {inner}?" if inner else "; give a folder that TrajectoryCallback wrote"
        raise ValueError(f"TRAJECTORY is {folder}, which has no {recorded.manifest.name}{hint}")
    return recorded
