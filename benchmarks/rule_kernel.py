"""What the compiled step of a rule costs beside the same step in torch, and beside fused AdamW.

    python benchmarks/rule_kernel.py --json benchmarks/results/rule_kernel.json

On a CPU 3 million coordinates: one whole step of the rule (moments, inputs, LSTM, head) by the kernel, beside one flat
`torch.nn.LSTMCell` call alone, its inputs given, and beside the whole step in torch; memory that a step needs beside
the state; and `optimizer.step()` of the rule for raw tensors with and without the kernel. On a GPU 10 million: the
share of the memory bandwidth that a step reaches, and its time over fused AdamW's, with fp32 and with bf16 states.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_sl2o
from hf_sl2o import LSTMRule, Rule
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment, peak_bytes, reset_peak
from hf_sl2o.experiments.timing import alternating, row
from hf_sl2o.foundation.files import save_json
from hf_sl2o.rules import SHIPPED_RULES, kernel

WIDTH = 8 * 768  # of a tensor: a LoRA factor of rank 8 on a matrix 768 wide
_NO_KERNEL = 1 << 60  # coordinates


def without_kernel(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` with every step left to torch."""

    def patched() -> None:
        least, kernel.LEAST = kernel.LEAST, _NO_KERNEL
        try:
            work()
        finally:
            kernel.LEAST = least

    return patched


def rule_rows(n: int, rounds: int) -> list[dict[str, Any]]:
    """The step of SL2O's rule over `n` coordinates in torch and by the kernel."""
    rule = Rule.from_pretrained(SHIPPED_RULES / "paper-cnn")
    assert isinstance(rule, LSTMRule)
    cell, g, x = rule.cells[0], torch.randn(n), torch.randn(n, 2)
    state = rule.init_state(n)
    work, hidden = g.clone(), (state.hidden[:, 0], state.cell[:, 0])

    def fused() -> None:
        if not kernel.fused_update_(rule, work.copy_(g), state, torch.ones(1, 2), sizes=None, finite=None):
            raise RuntimeError(
                "there is no kernel here (no C++ compiler, or HF_SL2O_NATIVE=0), or too few coordinates"
            )

    with torch.no_grad():
        flat = {"eager_lstmcell": lambda: cell(x, hidden), "eager_rule": lambda: rule(g, state), "kernel": fused}
        times = alternating(flat, rounds, warmup=1)
        rows = [row(name, times[name]) for name in ("eager_lstmcell", "eager_rule")]
        for name, baseline in zip(("rule_vs_eager_lstmcell", "rule_vs_eager_rule"), rows[:2], strict=True):
            rows.append(row(name, times["kernel"], baseline=baseline["value"]))
        eager = row("eager_rule_peak_beside_state", peaks(flat["eager_rule"]), "bytes")
        rows += [eager, row("rule_peak_beside_state", peaks(fused), "bytes", eager["value"] or None)]
    return [{**entry, "coordinates": n} for entry in rows]


def peaks(work: Callable[[], Any], times: int = 3) -> list[float]:
    """How far the memory of the process rises while something is done, from one that holds nothing that is free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    found = []
    for _ in range(times):
        if trim is not None:  # glibc: else what an earlier work gave back is used again, and nothing rises
            trim(0)
        reset_peak()
        before = peak_bytes()
        work()
        after = peak_bytes()
        if before is None or after is None:
            raise RuntimeError("the peak of a process' memory cannot be had on this system; use Linux")
        found.append(float(after - before))
    return found


def tensors(n: int, device: str) -> torch.nn.ParameterList:
    torch.manual_seed(0)
    model = torch.nn.ParameterList(torch.randn(8, WIDTH // 8, device=device) / 28 for _ in range(n // WIDTH))
    for p in model:
        p.grad = torch.randn_like(p) * 1e-3
    return model


def optimizer_rows(n: int, rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """`optimizer.step()` of the rule for raw tensors, with a running average, in torch and by the kernel."""
    model, other = tensors(n, device), tensors(n, device)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True)
    ours = hf_sl2o.build_optimizer(model.named_parameters(), "sl2o", average=9.0, total_steps=1_000_000)
    works = {"adamw_fused_step": adamw.step, "rule_step_eager": without_kernel(ours.step), "rule_step": ours.step}
    times = alternating(works, rounds, warmup=1)
    rows = [row("adamw_fused_step", times["adamw_fused_step"]), row("rule_step_eager", times["rule_step_eager"])]
    rows.append(row("rule_step", times["rule_step"], baseline=rows[1]["value"]))
    rows.append(row("rule_step_vs_adamw_fused", times["rule_step"], baseline=rows[0]["value"]))
    if device == "cpu":
        eager = row("rule_step_eager_peak_beside_state", peaks(works["rule_step_eager"]), "bytes")
        rows += [eager, row("rule_step_peak_beside_state", peaks(ours.step), "bytes", eager["value"] or None)]
    return [{**entry, "coordinates": n // WIDTH * WIDTH} for entry in rows]


def gpu_rows(n: int, rounds: int) -> list[dict[str, Any]]:
    """The kernel of SL2O's rule on a GPU over `n` coordinates, each number read and written once."""
    from hf_sl2o.rules import triton_kernel

    rule = Rule.from_pretrained(SHIPPED_RULES / "paper-cnn").to("cuda")
    network, config = rule.for_kernel(), rule.config
    assert network is not None
    network = network._replace(weights=network.weights.detach())
    model = tensors(n, "cuda")
    sizes = [p.numel() for p in model]
    n = sum(sizes)
    g, source = torch.randn(n, device="cuda"), torch.randn(1 << 28, device="cuda")
    target, decays = torch.empty_like(source), (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    works: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "adamw": adamw.step}
    moved = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        state = rule.init_state(n, device="cuda")
        state = state._replace(hidden=state.hidden.to(dtype), cell=state.cell.to(dtype))
        numbers = kernel.step_numbers(
            config, state, torch.ones(len(sizes), 2, device="cuda"), decays, config.eps, None
        )
        options = {"sizes": sizes, "finite": None, "decays": decays, "eps": config.eps}
        arguments = (config, network, numbers, g, state)
        works[name] = lambda arguments=arguments, options=options: triton_kernel.launch(*arguments, **options)
        moved[name] = 2 * (g.nbytes + sum(tensor.nbytes for tensor in state[1:-1]))
    with torch.no_grad():
        if not kernel.agrees(rule, network, triton_kernel, g.device):
            raise RuntimeError(
                "the Triton kernel computes something else than torch on this GPU: its time says nothing"
            )
        times = alternating(works, rounds)
    rows = [row("copy_bandwidth", [2 * source.nbytes / 1e9 / t for t in times["copy"]], "GB/s")]
    rates = [moved["fp32"] / 1e9 / t for t in times["fp32"]]
    rows.append(row("rule_bandwidth_fraction", rates, "GB/s", rows[0]["value"]))
    rows.append(row("adamw_fused_step", times["adamw"]))
    for name in moved:
        rows.append(row(f"rule_vs_adamw_fused_{name}", times[name], baseline=rows[2]["value"]))
    return [{**entry, "coordinates": n} for entry in rows]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--coordinates", type=int, help="3 million on a CPU, 10 million on a GPU")
    options = parse_options(parser, argv)
    least = max(WIDTH, kernel.LEAST)
    if options.coordinates is not None and options.coordinates < least:
        raise ValueError(f"--coordinates is {options.coordinates}, expected at least {least}: fewer are left to torch")
    if torch.cuda.is_available():
        n = options.coordinates or 10_000_000
        rows = gpu_rows(n, 20 if options.quick else 200) + optimizer_rows(n, 5 if options.quick else 50, "cuda")
    else:
        torch.set_num_threads(options.threads)
        n, rounds = options.coordinates or 3_000_000, 3 if options.quick else 11
        rows = rule_rows(n, rounds) + optimizer_rows(n, rounds)
    result = {"benchmark": "rule_kernel", "rows": rows, "environment": environment()}
    for entry in rows:
        ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.3f} x baseline"
        low, high = entry["quartiles"]
        print(f"{entry['name']:34} {entry['value']:.4g} {entry['unit']} (quartiles {low:.4g} to {high:.4g}){ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
