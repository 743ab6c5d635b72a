"""The main job at real size on one GPU: GPT-2 124M from its config, E2E, bf16, d = 40, the shipped rule.

    python benchmarks/gpu.py --data FOLDER --json benchmarks/results/gpu.json

Before it the steps of a GPT-2 beside fused AdamW's, project and lift in each storage, and the rule's kernel: the rows
of `optimizer_step.py`, `basis.py` and `rule_kernel.py`. FOLDER holds train.csv and validation.csv of E2E, and
`gpt2_tokenizer/`. Needs torch, transformers, accelerate, peft and safetensors, and 40 GB in --output_dir for the
snapshots and the basis. Schedules are short: this measures that it works and what it costs, not how good it gets. Each
part is written when it is done; killed and started again with the same --output_dir it goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import basis
import optimizer_step
import rule_kernel

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.data.e2e import load_rows
from hf_sl2o.experiments.environment import environment
from hf_sl2o.foundation.files import save_json
from hf_sl2o.rules import SHIPPED_RULES, kernel
from recipes import gpt2_e2e

ARMS = ["sl2o", "subspace_adamw", "subspace_adamw_orthonormal", "subspace_momentum", "adamw"]


def real_size(data: Path) -> list[str]:
    flags = "--model gpt2 --from_scratch --bf16 --seeds 1 --trajectory_steps 600 --snapshots 50 --max_steps 100"
    flags += " --eval_rows 256 --eval_steps 10 --quick_grid --save_strategy no --trajectory_learning_rates 0.0006"
    return [
        *flags.split(),
        "--rule",
        str(SHIPPED_RULES / "default"),
        "--tokenizer",
        str(data / "gpt2_tokenizer"),
        "--data",
        str(data),
    ]


def smoke(data: Path) -> list[str]:
    flags = (
        "--use_cpu --seeds 1 --trajectory_steps 30 --snapshots 15 --dim 6 --max_steps 4 --eval_steps 2 --meta_epochs 1"
    )
    flags += " --logging_steps 2 --inner_steps 10 --train_rows 200 --eval_rows 32 --quick_grid --save_strategy no"
    return [*flags.split(), "--trajectory_learning_rates", "0.003", "--data", str(data)]


def kernels(smoke: bool) -> list[dict[str, Any]]:
    """Rows of the two hot loops; at toy size those of a CPU."""
    if torch.cuda.is_available() and not smoke:
        rows = basis.products(124_439_808, rounds=15, device="cuda")
        torch.cuda.empty_cache()
        return rows + rule_kernel.gpu_rows(10_000_000, 200) + rule_kernel.optimizer_rows(10_000_000, 50, "cuda")
    return basis.products(50_000, rounds=2, device="cpu") + rule_kernel.rule_rows(2 * kernel.LEAST, 2)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--output_dir", type=Path, help="keep the runs here; default: a folder that is deleted")
    parser.add_argument("--smoke", action="store_true", help="the same code at toy size, on a CPU too")
    options = parse_options(parser, argv)
    if not torch.cuda.is_available() and not options.smoke:
        sys.exit("there is no GPU here (torch.cuda.is_available() is False); --smoke runs the same code at toy size")
    for split in ("train", "validation"):
        load_rows(str(options.data), split)
    if not options.smoke and not (options.data / "gpt2_tokenizer").is_dir():
        raise FileNotFoundError(f"--data is {options.data}, which has no gpt2_tokenizer; put the one of GPT-2 there")
    start = time.perf_counter()
    print("[optimizer step]", flush=True)
    size = "tiny" if options.smoke else "gpt2"
    rows = optimizer_step.training_steps(size, rounds=5 if options.smoke else 40)
    result: dict[str, Any] = {"benchmark": "gpu", "rows": rows, "environment": environment(ROOT)}
    if options.json:
        save_json(options.json, result)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print("[kernels]", flush=True)
    rows += kernels(options.smoke)
    if options.json:
        save_json(options.json, result)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    work = options.output_dir or Path(tempfile.mkdtemp(prefix="hf_sl2o_gpu_"))
    try:
        flags = smoke(options.data) if options.smoke else real_size(options.data)
        result["main_job"] = gpt2_e2e.main([*flags, "--output_dir", str(work), "--arms", *ARMS])
    finally:
        if options.output_dir is None:
            shutil.rmtree(work, ignore_errors=True)
    result["seconds"] = time.perf_counter() - start
    if options.json:
        save_json(options.json, result)
    print(f"{result['environment']['device']}: {result['seconds']:.0f} s")
    return result


if __name__ == "__main__":
    run_script(main)
