"""How fast a basis moves bytes, beside what the memory does; and what fitting one costs, beside scikit-learn.

    python benchmarks/basis.py --json benchmarks/results/basis.json

Project and lift read U once each. Their share of the memory's bandwidth is 2 x bytes of U a second, over the better of
a copy and a sum of the same run. The fit is of 60 snapshots of a random walk, each in a process of its own, whose peak
memory counts from before it begins. On a CUDA device the products are of 124 million numbers, and nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import Basis, DenseBasis, Layout, Trajectory
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.timing import alternating, row
from hf_sl2o.foundation.files import save_json
from hf_sl2o.subspace import QuantizedBasis

ROOT = Path(__file__).resolve().parent.parent
DIM, SNAPSHOTS = 40, 60
WIDTH = 1024  # of the square matrices that n is made of


def layout_of(n: int) -> Layout:
    """About n numbers in matrices of 1,024 x 1,024, and the rest."""
    count, rest = divmod(n, WIDTH * WIDTH)
    shapes = [(WIDTH, WIDTH)] * count + ([(rest,)] if rest else [])
    return Layout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))


def bases_of(layout: Layout, device: str) -> dict[str, Basis]:
    """Random directions, which are nearly orthonormal, in each storage."""
    generator = torch.Generator(device).manual_seed(0)
    scale = layout.n**-0.5
    matrices = [torch.randn(DIM, n, generator=generator, device=device) * scale for n in layout.numels]
    dense = DenseBasis(layout, matrices)
    return {"fp32": dense, "bf16": dense.to(dtype=torch.bfloat16), "int8": QuantizedBasis.from_dense(dense, bits=8),
            "int4": QuantizedBasis.from_dense(dense, bits=4)}  # fmt: skip


def products(n: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Rows of seconds of project + lift per storage, as a share of the bandwidth, and beside fp32."""
    bases = bases_of(layout_of(n), device)
    shapes = bases["fp32"].layout.shapes
    gradients = [torch.randn(shape, device=device) for shape in shapes]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    source = torch.ones(max(n, 50_000_000), device=device)
    target = torch.empty_like(source)
    c = torch.full((DIM,), 1e-6, device=device)

    def both(basis: Basis) -> None:
        basis.project(gradients)
        basis.add_(weights, c)

    works: dict[str, Any] = {"copy": lambda: target.copy_(source), "sum": lambda: source.sum()}
    works |= {name: lambda basis=basis: both(basis) for name, basis in bases.items()}
    times = alternating(works, rounds, warmup=2)
    rates = {"copy": [2 * source.nbytes / 1e9 / t for t in times["copy"]],
             "sum": [source.nbytes / 1e9 / t for t in times["sum"]]}  # fmt: skip
    rows = [row(f"{name}_bandwidth", of, "GB/s") for name, of in rates.items()]
    best = max(entry["value"] for entry in rows)
    for name, basis in bases.items():
        entry = row(f"project_and_lift_{name}", times[name])
        rows += [
            entry,
            row(f"bandwidth_fraction_{name}", [2 * basis.nbytes / 1e9 / t / best for t in times[name]], "1"),
        ]
    fp32 = next(entry["value"] for entry in rows if entry["name"] == "project_and_lift_fp32")
    for name in bases:
        if name != "fp32":
            rows.append(row(f"{name}_vs_fp32_time", times[name], baseline=fp32))
    return [{**entry, "n": n, "dim": DIM, "threads": torch.get_num_threads()} for entry in rows]


# The fit, in processes of its own


def record(folder: Path, n: int) -> None:
    """Snapshots of a random walk."""
    layout, generator = layout_of(n), torch.Generator().manual_seed(0)
    model = [(name, torch.nn.Parameter(torch.zeros(s))) for name, s in zip(layout.names, layout.shapes, strict=True)]
    trajectory = Trajectory(folder)
    for step in range(SNAPSHOTS):
        with torch.no_grad():
            for _, p in model:
                p.add_(torch.randn(p.shape, generator=generator))
        trajectory.write(step, model)


def peak() -> int:
    """Bytes that were resident at most since [`forget_peak`]; `ru_maxrss` would count the parent's, too."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise RuntimeError(f"the peak of memory cannot be measured here ({error}); it needs Linux") from error


def fit_here(folder: Path, how: str) -> dict[str, float]:
    """Seconds and bytes of memory above the start, of one fit in this process."""
    if how == "ours":
        from hf_sl2o import fit_basis

        def fit() -> None:
            fit_basis(folder, DIM, progress=False)
    else:
        import numpy as np
        from sklearn.decomposition import PCA

        from hf_sl2o.foundation.files import load_tensors

        def fit() -> None:
            trajectory = Trajectory(folder)
            assert trajectory.layout is not None
            rows = np.empty((len(trajectory), trajectory.layout.n), dtype=np.float32)
            for row, step in zip(rows, trajectory.steps, strict=True):
                tensors = load_tensors(trajectory.path(step))
                np.concatenate([tensors[name].numpy().ravel() for name in trajectory.layout.names], out=row)
            PCA(DIM).fit(rows)

    before, start = peak(), time.perf_counter()
    fit()
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before}


def fits(n: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of both fits in turn."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "sklearn": []}
    with tempfile.TemporaryDirectory(prefix="hf_sl2o_basis_") as folder:
        record(Path(folder), n)
        for _ in range(rounds):
            for how, results in found.items():
                words = [sys.executable, __file__, "--fit", how, "--folder", folder]
                env = {**os.environ, "PYTHONPATH": str(ROOT)}
                out = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
                results.append(json.loads(out.stdout.splitlines()[-1]))
    seconds = {how: [one["seconds"] for one in results] for how, results in found.items()}
    rows = [row("fit_sklearn", seconds["sklearn"])]
    rows.append(row("fit_vs_sklearn_time", seconds["ours"], baseline=rows[0]["value"]))
    # the basis itself, which is returned, is counted apart
    own = 4 * n * DIM
    rows.append(row("fit_peak_bytes", [one["bytes"] - own for one in found["ours"]], "bytes"))
    rows.append(row("fit_peak_bytes_sklearn", [one["bytes"] for one in found["sklearn"]], "bytes"))
    return [{**entry, "n": n, "dim": DIM, "snapshots": SNAPSHOTS} for entry in rows]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--fit", choices=["ours", "sklearn"], help="what one process of the benchmark does")
    parser.add_argument("--folder", type=Path, help="of the snapshots, with --fit")
    options = parse_options(parser, argv)
    if options.fit:
        if options.folder is None or not (options.folder / "trajectory.json").is_file():
            raise FileNotFoundError(f"--folder is {options.folder}, expected one with a trajectory")
        found = fit_here(options.folder, options.fit)
        print(json.dumps(found))
        return found
    cuda = torch.cuda.is_available()
    n = 1_000_000 if options.quick else 124_439_808 if cuda else 25_000_000
    # the fits first: what this process has had it may keep, and scikit-learn needs 12 GB
    rows = [] if cuda else fits(300_000 if options.quick else 11_173_962, rounds=2 if options.quick else 3)
    rows += products(n, rounds=5 if options.quick else 15, device="cuda" if cuda else "cpu")
    result = {"benchmark": "basis", "rows": rows, "environment": environment()}
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.3f} x baseline"
        print(f"{entry['name']:28} {entry['value']:.4g} {entry['unit']}{ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
