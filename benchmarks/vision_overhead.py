"""What share of a training step of recipes/resnet_cifar.py is neither forward, backward nor the optimizer's step.

python benchmarks/vision_overhead.py --json benchmarks/results/vision_overhead.json

The recipe's Trainer on its own data set (random crops and flips, whole batches), against a bare loop over one batch
that lies ready: the same network, batch size and optimizer, a run of each in turn. Beside it, what a batch costs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from hf_sl2o import Layout, RandomBasis, SL2OTrainer, SL2OTrainingArguments, SubspaceOptimizer
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.data.cifar import ImageSet, as_is, load_cifar
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.tasks.networks import Classifier, resnet8, resnet20
from hf_sl2o.experiments.timing import row, synchronize
from hf_sl2o.foundation.files import save_json

BATCH, DIM = 128, 40
NETWORKS = {"resnet8": resnet8, "resnet20": resnet20}


def measure(build: Any, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of the recipe's Trainer and of the bare loop, and seconds a batch, alternating."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = ImageSet(*load_cifar("embedded", "train", 20_000), augment=True)
    torch.manual_seed(0)
    start = Classifier(build())
    basis = RandomBasis(Layout.from_named_parameters(start.named_parameters()), DIM).to_dense().to(device)

    def trainer() -> float:
        with tempfile.TemporaryDirectory() as folder:
            args = SL2OTrainingArguments(
                folder, optim="subspace_sgd", learning_rate=0.05, max_steps=steps, save_strategy="no",
                report_to="none", per_device_train_batch_size=BATCH, remove_unused_columns=False, disable_tqdm=True,
                logging_steps=20, use_cpu=device == "cpu", dataloader_pin_memory=device == "cuda",
            )  # fmt: skip
            made = SL2OTrainer(start, args, basis=basis, train_dataset=images, data_collator=as_is)
            made.remove_callback(PrinterCallback)
            made.train()
            synchronize()
            return made.state.log_history[-1]["train_runtime"] / steps  # type: ignore[no-any-return]

    batch = {key: value.to(device) for key, value in images.__getitems__(range(BATCH)).items()}

    def bare() -> float:
        model = start.to(device).train()
        optimizer = SubspaceOptimizer(model.named_parameters(), basis, lambda c: torch.optim.SGD(c, lr=0.05))
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            model(**batch)["loss"].backward()
            optimizer.step()
            model.zero_grad()
        synchronize()
        return (time.perf_counter() - begin) / steps

    def batches() -> float:
        begin = time.perf_counter()
        for i in range(steps):
            images.__getitems__(range(i * BATCH % 10_000, i * BATCH % 10_000 + BATCH))
        return (time.perf_counter() - begin) / steps

    works = {"bare_step": bare, "recipe_step": trainer, "batch": batches}
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work())
    return times


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parse_options(parser, argv)
    names = ["resnet8"] if options.quick else options.networks
    steps, rounds = (4, 3) if options.quick else (100, 7)
    rows = []
    for name in names:
        times = measure(NETWORKS[name], steps, rounds)
        bare = row(f"{name}/bare_step", times["bare_step"])
        rows += [bare, row(f"{name}/recipe_step", times["recipe_step"], baseline=bare["value"])]
        rows.append(row(f"{name}/batch", times["batch"], baseline=bare["value"]))
        share = [1 - plain / whole for plain, whole in zip(times["bare_step"], times["recipe_step"], strict=True)]
        rows.append(row(f"{name}/share_outside", share, "of a step"))
    result = {
        "benchmark": "vision_overhead", "rows": rows, "batch": BATCH, "steps": steps, "rounds": rounds,
        "environment": environment(),
    }  # fmt: skip
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.3f} x bare"
        low, high = entry["quartiles"]
        print(f"{entry['name']:24} {entry['value']:.4g} {entry['unit']} (quartiles {low:.4g} to {high:.4g}){ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
