"""What a step of the rule for raw tensors costs over millions of scalars, and the bytes that it keeps for each.

    python benchmarks/rule_step.py --beside A_CHECKOUT_OF_366488a --json benchmarks/results/rule_step.json

The factors of LoRA of rank 8 on matrices 768 wide, as many as make `--coordinates` scalars; the gradients are given,
so that nothing but `optimizer.step()` is timed. The rule is the one that ships, with its running average; fused AdamW
stands beside it. Each round starts a process a checkout, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.timing import row
from hf_sl2o.foundation.files import save_json

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import gc, json, sys, time
import torch
import hf_sl2o

coordinates, steps, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = torch.nn.ParameterList(torch.randn(8, 768) / 768**0.5 for _ in range(coordinates // (8 * 768)))
for p in model:
    p.grad = torch.randn_like(p) * 1e-3

def tensors():
    found = {}
    for entry in gc.get_objects():
        if isinstance(entry, torch.Tensor):
            storage = entry.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())

def timed(step):
    step()  # makes the state
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)

adamw = timed(torch.optim.AdamW(model.parameters(), fused=True).step)
gc.collect()
before = tensors()
optimizer = hf_sl2o.build_optimizer(model.named_parameters(), "sl2o", average=9.0, total_steps=1000)
seconds = timed(optimizer.step)
gc.collect()
n = sum(p.numel() for p in model)
print(json.dumps({"coordinates": n, "adamw": adamw, "seconds": seconds, "bytes": (tensors() - before) / n}))
"""


def measured(checkout: Path, coordinates: int, steps: int, threads: int) -> dict[str, float]:
    """Seconds of a step, the least of some, of the rule and of fused AdamW; bytes that are kept for a coordinate."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", CODE, str(coordinates), str(steps), str(threads)]
    out = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--coordinates", type=int, default=3_000_000)
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--json", type=Path)
    options = parse_options(parser, argv)
    if options.coordinates < 8 * 768:
        raise ValueError(f"--coordinates is {options.coordinates}, expected at least {8 * 768}, one factor")
    checkouts = {"rule_step": ROOT}
    if options.beside is not None:
        if not (options.beside / "hf_sl2o").is_dir():
            raise ValueError(f"--beside is {options.beside}, expected a checkout: a folder that holds hf_sl2o")
        checkouts["rule_step_beside"] = options.beside
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            found[name].append(measured(checkout, options.coordinates, options.steps, options.threads))
    adamw = row("adamw_fused_step", [entry["adamw"] for of in found.values() for entry in of])
    rows = [adamw]
    for name, of in reversed(found.items()):
        beside = next((r["value"] for r in rows if r["name"] == "rule_step_beside"), None)
        rows.append(row(name, [entry["seconds"] for entry in of], baseline=beside))
    for name, of in reversed(found.items()):
        beside = next((r["value"] for r in rows if r["name"] == "state_beside"), None)
        rows.append(
            row(name.replace("rule_step", "state"), [entry["bytes"] for entry in of], "bytes a scalar", beside)
        )
    settings = {name: getattr(options, name) for name in ("rounds", "steps", "threads", "coordinates")}
    result = {**settings, "rows": rows, "environment": environment()}
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f", {entry['ratio']:.2f} of the other"
        print(f"{entry['name']:20} {entry['value']:.4g} {entry['unit']}{ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
