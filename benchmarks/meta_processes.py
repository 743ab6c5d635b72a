"""Inner steps a second of meta-training in two processes against one, a thread each.

python benchmarks/meta_processes.py --json benchmarks/results/meta_processes.json

Two episodes of a GPT-2 of two layers; one process runs both, two processes run one each and average meta-gradients.
Alternating launches; each reports the time of its episodes, without start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from optimizer_step import build

from hf_sl2o import Layout, LSTMRule, MetaTrainer, MetaTrainingArguments, RandomBasis, RuleConfig, Task
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.foundation.files import save_json


def worker(folder: Path, inner_steps: int) -> None:
    """What each process runs; the first one writes seconds."""
    basis = RandomBasis(Layout.from_named_parameters(build("tiny").named_parameters()), 40).to_dense()

    def batches(seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            yield torch.randint(0, 1000, (32, 64), generator=generator)

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    held_out = [next(batches(1))]
    task = Task("gpt2", lambda: build("tiny"), batches, loss, basis, held_out)
    marks: list[float] = []
    trainer = MetaTrainer(
        LSTMRule(RuleConfig(output_scale=1e-3)),
        MetaTrainingArguments(
            str(folder),
            inner_steps=inner_steps,
            meta_epochs=2,
            episodes_per_task=2,
            eval_every=2,
            use_cpu=True,
            disable_tqdm=True,
        ),
        [task],
        callbacks=[lambda trainer, entry: marks.append(time.perf_counter())],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        # validation, then two entries a meta-epoch: between the ends of both lies one meta-epoch of both episodes
        print(json.dumps({"steps_per_second": 2 * inner_steps / (marks[3] - marks[1])}))
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


def launch(processes: int, inner_steps: int) -> float:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*head, __file__, "--worker", folder, "--inner_steps", str(inner_steps)]
        out = subprocess.run(command, env=env, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{out.stderr[-2000:]}")
    last = next(line for line in reversed(out.stdout.splitlines()) if line.startswith("{"))
    return float(json.loads(last)["steps_per_second"])


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inner_steps", type=int, default=200)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parse_options(parser, argv)
    if options.worker is not None:
        worker(options.worker, options.inner_steps)
        return None
    if options.quick:
        options.rounds, options.inner_steps = 1, 40
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes in rates:
            rates[processes].append(launch(processes, options.inner_steps))
    one, two = (statistics.median(of) for of in rates.values())
    rows = [
        {"name": "one_process", "value": one, "unit": "inner steps/s", "baseline": None, "ratio": None},
        {"name": "two_processes", "value": two, "unit": "inner steps/s", "baseline": one, "ratio": two / one},
    ]
    for entry, of in zip(rows, rates.values(), strict=True):
        entry["all"] = of
        print(f"{entry['name']:16} {entry['value']:.1f} {entry['unit']} ({min(of):.1f} to {max(of):.1f})")
    print(f"ratio {two / one:.2f}")
    result = {"benchmark": "meta_processes", "rows": rows, "environment": environment()}
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
