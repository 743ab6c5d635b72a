"""What a step in a subspace costs beside fused AdamW and what people use instead of it.

    python benchmarks/optimizer_step.py --size gpt2 --json benchmarks/results/optimizer_step.json

Training steps (forward, backward, optimizer) of a GPT-2 in turn; then optimizer steps alone, with given gradients, of
GaLore, APOLLO and schedule-free AdamW too where they are installed (galore-torch and apollo-torch, both with
bitsandbytes, and schedulefree). What a basis holds is random: its sizes count, and those of Tucker are the defaults.
With `--beside` a checkout of an earlier commit steps in turn with this one, each in a process of its own. `gpu.py`
runs the first part on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sl2o import (
    Basis,
    DenseBasis,
    Layout,
    QuantizedBasis,
    RandomBasis,
    SubspaceOptimizer,
    TuckerBasis,
    build_optimizer,
)
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.timing import alternating, row
from hf_sl2o.foundation.files import save_json
from hf_sl2o.subspace.quantized import quantize
from hf_sl2o.subspace.storage import Ranks, factor_ranks, matrix_shape
from hf_sl2o.subspace.thin import Factors
from hf_sl2o.subspace.tucker import leading_basis

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"tiny": (2, 2, 64, 1000), "small": (4, 8, 512, 20000), "gpt2": (12, 12, 768, 50257)}
DIM = 40


def build(size: str) -> GPT2LMHeadModel:
    layers, heads, width, vocabulary = SIZES[size]
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width, n_positions=128, **special)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    return GPT2LMHeadModel(config).to("cuda" if torch.cuda.is_available() else "cpu")


def random_tucker(layout: Layout, dim: int = DIM, ranks: Ranks | None = None) -> TuckerBasis:
    """A Tucker basis of random directions, with the sizes that a fit would choose."""
    ranks = Ranks() if ranks is None else ranks
    whole = ranks.of_leading(dim)
    generator, scale = torch.Generator().manual_seed(0), layout.n**-0.5
    factors, codes, scales = [], [], []
    for shape, numel in zip(layout.shapes, layout.numels, strict=True):
        m, q = matrix_shape(shape)
        left, right = factor_ranks(shape, dim - whole, ranks) or (m, q)
        factors.append(
            Factors(
                torch.randn(dim - whole, left, right, generator=generator) * scale,
                None if left == m else torch.linalg.qr(torch.randn(m, left, generator=generator))[0],
                None if right == q else torch.linalg.qr(torch.randn(q, right, generator=generator))[0],
            )
        )
        code, of_code = quantize(torch.randn(whole, numel, generator=generator) * scale, ranks.bits)
        codes.append(code)
        scales.append(of_code)
    spans = [(0, dim)] * len(factors)
    leading = leading_basis(layout, codes, scales, spans, whole)
    return TuckerBasis(layout, factors, torch.eye(dim), torch.ones(dim), spans=spans, leading=leading)


def dense(layout: Layout, device: torch.device, dtype: torch.dtype) -> Basis:
    """Random directions in the storage; never more of them in fp32 than those of one parameter."""
    generator, scale = torch.Generator().manual_seed(0), layout.n**-0.5
    matrices = [(torch.randn(DIM, n, generator=generator) * scale).to(device, dtype) for n in layout.numels]
    return DenseBasis(layout, matrices)


def moved_by_rule(model: torch.nn.Module, basis: Basis | None = None, **options: Any) -> torch.optim.Optimizer:
    """The shipped rule, with its running average, at a rate that hardly moves what is random."""
    optimizer = build_optimizer(model, "sl2o", basis=basis, total_steps=10_000, **options)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    return optimizer


def training_steps(size: str, rounds: int, batch: int = 32, length: int = 64) -> list[dict[str, Any]]:
    """Rows of seconds a training step, each beside fused AdamW's."""
    first = build(size)
    device = first.device
    ids = torch.randint(0, SIZES[size][3], (batch, length), device=device)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()

    lora = get_peft_model(copy.deepcopy(first), LoraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True))
    models = {"": copy.deepcopy(first), "_streamed": copy.deepcopy(first), "_tucker": copy.deepcopy(first),
              "_pca_lora": lora}  # fmt: skip
    layouts = {name: Layout.from_named_parameters(model.named_parameters()) for name, model in models.items()}
    full = dense(layouts[""], device, torch.float32 if size == "tiny" else torch.bfloat16)
    bases = {"": full, "_streamed": full, "_tucker": random_tucker(layouts["_tucker"]).to(device),
             "_pca_lora": dense(layouts["_pca_lora"], device, torch.float32)}  # fmt: skip
    optimizers = {
        name: moved_by_rule(model, bases[name], stream_gradients=name == "_streamed") for name, model in models.items()
    }
    adamw = torch.optim.AdamW(first.parameters(), lr=1e-6, fused=True)
    works: dict[str, Callable[[], Any]] = {"adamw_fused_step": lambda: step(first, adamw)}
    for name, model in models.items():
        works[f"sl2o_step_vs_adamw_fused{name}"] = lambda model=model, name=name: step(model, optimizers[name])
    times = alternating(works, rounds, warmup=3)
    baseline = row("adamw_fused_step", times["adamw_fused_step"])
    rows = [baseline, *(row(name, times[name], baseline=baseline["value"]) for name in list(works)[1:])]
    facts = {"size": size, "n": layouts[""].n, "dim": DIM, "batch": batch, "length": length}
    return [{**entry, **facts} for entry in rows]


# Optimizer steps alone


def peers(model: GPT2LMHeadModel) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """What is installed of the optimizers that promise less memory, with the settings of their READMEs."""
    found: dict[str, Callable[[], torch.optim.Optimizer]] = {}
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    common = {"params": matrices, "update_proj_gap": 10_000, "proj_type": "std"}
    if importlib.util.find_spec("schedulefree"):
        import schedulefree

        def schedule_free() -> torch.optim.Optimizer:
            optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-6)
            optimizer.train()
            return optimizer

        found["schedulefree_step"] = schedule_free
    if importlib.util.find_spec("galore_torch"):
        from galore_torch import GaLoreAdamW

        low = {**common, "rank": 128, "scale": 0.25}
        found["galore_step"] = lambda: GaLoreAdamW([{"params": others}, low], lr=1e-6, no_deprecation_warning=True)
    if importlib.util.find_spec("apollo_torch"):
        from apollo_torch import APOLLOAdamW

        for name, options in (
            ("apollo_step", {"rank": 128, "scale_type": "channel", "scale": 1}),
            ("apollo_mini_step", {"rank": 1, "scale_type": "tensor", "scale": 128}),
        ):
            group = {**common, "proj": "random", **options}
            found[name] = lambda group=group: APOLLOAdamW([{"params": others}, group], lr=1e-6)
    return found


def steps_alone(size: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of seconds of `optimizer.step()` with given gradients; GaLore's are without its decompositions.

    Each in turn with fused AdamW, one at a time: all their states together are more than many machines have.
    """
    model = build(size)
    layout, device = Layout.from_named_parameters(model.named_parameters()), model.device
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    of_8 = lambda: QuantizedBasis.from_dense(RandomBasis(layout, 8).to_dense(), bits=4).to(device)  # noqa: E731
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw_foreach_step": lambda: torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True),
        **peers(model),
        "dense_bf16_step": lambda: in_adamw(model, dense(layout, device, torch.bfloat16)),
        "int4_of_8_step": lambda: in_adamw(model, of_8()),
        "tucker_step_vs_adamw_fused": lambda: in_adamw(model, random_tucker(layout).to(device)),
        "tucker_step_shipped_rule": lambda: moved_by_rule(model, random_tucker(layout).to(device)),
    }

    def step(optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, SubspaceOptimizer):
            optimizer.use_last()
        optimizer.step()

    rows = []
    for name, make in makers.items():
        optimizer = make()
        works = {"adamw": adamw.step, name: lambda optimizer=optimizer: step(optimizer)}
        times = alternating(works, rounds, warmup=2)
        rows.append(row(name, times[name], baseline=row("adamw", times["adamw"])["value"]))
        print(f"{name}: {rows[-1]['ratio']:.2f} of fused AdamW", flush=True)
        del optimizer, works
        gc.collect()
    return [{**entry, "size": size, "n": layout.n} for entry in rows]


def in_adamw(model: torch.nn.Module, basis: Basis) -> SubspaceOptimizer:
    return SubspaceOptimizer(model.named_parameters(), basis, lambda c: torch.optim.AdamW(c, lr=1e-6))


# Beside an earlier commit

CODE = """
import json, sys, time
import torch
from hf_sl2o import Layout, RandomBasis, SubspaceOptimizer

n, rounds = int(sys.argv[1]), int(sys.argv[2])
model = torch.nn.ParameterList(torch.randn(768, 768) for _ in range(n // 768**2))
for p in model:
    p.grad = torch.randn_like(p) * 1e-3
basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), 40).to_dense().to(dtype=torch.bfloat16)
optimizer = SubspaceOptimizer(model.named_parameters(), basis, lambda c: torch.optim.AdamW(c, lr=1e-6))
times = []
for _ in range(rounds + 1):
    start = time.perf_counter()
    optimizer.step()
    times.append(time.perf_counter() - start)
print(json.dumps(min(times[1:])))
"""


def beside(checkout: Path, n: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the step in a dense bf16 basis of this checkout and of another one, in turn."""
    found: dict[str, list[float]] = {"before": [], "now": []}
    for _ in range(rounds):
        for name, folder in (("before", checkout), ("now", ROOT)):
            env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
            words = [sys.executable, "-c", CODE, str(n), "3"]
            out = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=True)
            found[name].append(float(json.loads(out.stdout.splitlines()[-1])))
    before = row("step_before", found["before"])
    rows = [before, row("step_vs_before", found["now"], baseline=before["value"])]
    return [{**entry, "n": n, "dim": DIM, "threads": torch.get_num_threads()} for entry in rows]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this one")
    options = parse_options(parser, argv)
    if options.beside is not None and not (options.beside / "hf_sl2o").is_dir():
        raise ValueError(f"--beside is {options.beside}, expected a checkout: a folder that holds hf_sl2o")
    quick = options.quick or options.size == "tiny"
    # a training step of the real size takes seconds on a CPU: there the small one does
    trained = "small" if options.size == "gpt2" and not torch.cuda.is_available() else options.size
    rows = []
    if options.beside is not None:  # first: what this process has had it may keep
        rows += beside(options.beside, 1_200_000 if quick else 25_000_000, rounds=2 if quick else 5)
    rows += training_steps(trained, rounds=10 if options.quick else 30)
    rows += steps_alone(options.size, rounds=5 if quick else 9)
    result = {"benchmark": "optimizer_step", "rows": rows, "environment": environment()}
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.3f} x baseline"
        low, high = entry["quartiles"]
        print(f"{entry['name']:36} {entry['value']:.4g} {entry['unit']} (quartiles {low:.4g} to {high:.4g}){ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
