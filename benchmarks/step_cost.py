"""What a step in the subspace costs beside a step of fused AdamW, and how fast project and lift move bytes.

python benchmarks/step_cost.py --json benchmarks/results/step_cost.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sl2o import Layout, LSTMRule, RandomBasis, SubspaceOptimizer
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.timing import alternating, row
from hf_sl2o.foundation.files import save_json

SIZES = {"tiny": (2, 2, 64, 1000), "gpt2": (12, 12, 768, 50257)}  # layers, heads, width, vocabulary


def build(size: str) -> GPT2LMHeadModel:
    layers, heads, width, vocabulary = SIZES[size]
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width, n_positions=128, **special)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    return GPT2LMHeadModel(config).to("cuda" if torch.cuda.is_available() else "cpu")


def benchmark(size: str, rounds: int, batch: int = 32, length: int = 64, dim: int = 40) -> list[dict[str, Any]]:
    """Rows of seconds a training step (forward, backward, step) and of GB/s of the basis."""
    plain, ours = build(size), build(size)
    device = plain.device
    ids = torch.randint(0, SIZES[size][3], (batch, length), device=device)
    dtype = torch.bfloat16 if size != "tiny" else torch.float32
    basis = RandomBasis(Layout.from_named_parameters(ours.named_parameters()), dim).to_dense().to(device, dtype)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    sl2o = SubspaceOptimizer(ours.named_parameters(), basis, LSTMRule())
    sl2o.param_groups[0]["lr"] = 1e-3

    def step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()

    names = ("adamw_fused_step", "sl2o_step")
    times = alternating({names[0]: lambda: step(plain, adamw), names[1]: lambda: step(ours, sl2o)}, rounds)
    rows = [row(names[0], times[names[0]])]
    rows.append(row("sl2o_step_vs_adamw_fused", times[names[1]], baseline=rows[0]["value"]))

    tensors = [p.detach().clone() for p in ours.parameters()]
    source = torch.randn(basis.nbytes // 4, device=device)
    target = torch.empty_like(source)
    c = torch.full((dim,), 1e-6, device=device)
    weights = sum(t.nbytes for t in tensors)
    moved = {"plain_copy": 2 * basis.nbytes, "project": basis.nbytes + weights, "lift": basis.nbytes + 2 * weights}
    works = {
        "plain_copy": lambda: target.copy_(source),
        "project": lambda: basis.project(tensors),
        "lift": lambda: basis.add_(tensors, c),
    }
    times = alternating(works, rounds)
    rates = {name: [moved[name] / 1e9 / t for t in times[name]] for name in works}
    rows.append(row("plain_copy_bandwidth", rates["plain_copy"], "GB/s"))
    copy = rows[-1]["value"]
    rows.extend(row(f"{name}_bandwidth", rates[name], "GB/s", baseline=copy) for name in ("project", "lift"))
    return [
        {**entry, "size": size, "n": basis.layout.n, "dim": dim, "batch": batch, "length": length} for entry in rows
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    options = parse_options(parser, argv)
    rows = benchmark(options.size, rounds=30 if options.quick else 200)
    result = {"benchmark": "step_cost", "rows": rows, "environment": environment()}
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.3f} x baseline"
        low, high = entry["quartiles"]
        print(f"{entry['name']:28} {entry['value']:.4g} {entry['unit']} (quartiles {low:.4g} to {high:.4g}){ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
