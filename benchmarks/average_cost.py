"""What a running average costs: a training step with it beside one without, weights put where they are read included.

python benchmarks/average_cost.py --json benchmarks/results/average_cost.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sl2o import Layout, LearnedOptimizer, RandomBasis, SubspaceOptimizer
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.timing import alternating, row
from hf_sl2o.foundation.files import save_json
from hf_sl2o.rules import load_rule

#: layers, width, batch, length
SIZES = {"quick": (2, 64, 4, 32), "small": (6, 256, 8, 64)}


def build(size: str, *, lora: bool) -> torch.nn.Module:
    layers, width, _, length = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000, n_layer=layers, n_head=4, n_embd=width, n_positions=length, bos_token_id=0, eos_token_id=0
    )
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model: torch.nn.Module = GPT2LMHeadModel(config)
    if lora:
        targets = ["c_attn", "c_proj", "c_fc"]
        model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, fan_in_fan_out=True))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def step_of(size: str, *, lora: bool, average: float, dim: int = 40) -> tuple[Callable[[], Any], int]:
    """A training step as a Trainer makes it, and the number of scalars that it moves."""
    model = build(size, lora=lora)
    _, _, batch, length = SIZES[size]
    device = next(model.parameters()).device
    ids = torch.randint(0, 1000, (batch, length), device=device, generator=torch.Generator(device).manual_seed(1))
    if lora:
        rule = load_rule(None, with_basis=False)
        optimizer: Any = LearnedOptimizer(model, rule, lr=1e-3, total_steps=10_000, average=average)
    else:
        rule = load_rule(None, with_basis=True)
        basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim).to_dense().to(device)

        def inner(c: list[torch.Tensor]) -> LearnedOptimizer:
            return LearnedOptimizer(c, rule, lr=1e-3, total_steps=10_000)

        optimizer = SubspaceOptimizer(model, basis, inner, average=average)

    def step() -> None:
        optimizer.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()

    return step, sum(p.numel() for p in model.parameters() if p.requires_grad)


def benchmark(size: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, lora, eta in (("lora", True, 9.0), ("basis", False, 4.0)):
        (plain, n), (averaged, _) = step_of(size, lora=lora, average=0.0), step_of(size, lora=lora, average=eta)
        times = alternating({"plain": plain, "averaged": averaged}, rounds)
        base = row(f"{name}_step", times["plain"])
        rows += [base, row(f"{name}_step_averaged", times["averaged"], baseline=base["value"])]
        pairs = [a / b for a, b in zip(times["averaged"], times["plain"], strict=True)]
        rows.append(row(f"{name}_ratio_of_pairs", pairs, "x"))
        rows[-3:] = [{**entry, "size": size, "n": n, "average": eta} for entry in rows[-3:]]
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="seconds, on a tiny model")
    options = parser.parse_args(argv)
    rows = benchmark("quick" if options.quick else "small", rounds=10 if options.quick else 150)
    result = {"benchmark": "average_cost", "rows": rows, "environment": environment()}
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.3f} x without"
        low, high = entry["quartiles"]
        print(f"{entry['name']:24} {entry['value']:.4g} {entry['unit']} (quartiles {low:.4g} to {high:.4g}){ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
