"""Peak memory of a training step above the weights, beside AdamW over all of them.

    python benchmarks/memory.py --json benchmarks/results/memory.json

Each arm trains GPT-2 small from its config in fp32 on 1 x 32 tokens, in a process of its own: three steps of forward,
backward and optimizer. Counted is all but the weights and the batch: the basis, what the optimizer keeps, gradients,
activations, temporary tensors. On a CPU it is the peak of the process' resident memory, with an allocator that gives
back at once what is freed; on CUDA that of allocated memory. SL2O has its gradients streamed, and AdamW without an
average moves its coefficients, but for the arm of the shipped rule. What a basis holds is random: its sizes count, and
those of Tucker are the defaults. A dense basis has 40 directions, or as many as fit.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from optimizer_step import DIM, moved_by_rule, random_tucker
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sl2o import Basis, DenseBasis, Layout, QuantizedBasis, SubspaceOptimizer
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment, peak_bytes, reset_peak
from hf_sl2o.foundation.files import save_json
from hf_sl2o.subspace.quantized import quantize

ROOT = Path(__file__).resolve().parent.parent
SIZES: dict[str, dict[str, int]] = {
    "warm": {"vocab_size": 200, "n_layer": 2, "n_head": 2, "n_embd": 64},
    "quick": {"vocab_size": 8000, "n_layer": 4, "n_head": 4, "n_embd": 256},
    "gpt2": {},  # as the class has it
}
LENGTH, STEPS = 32, 3  # tokens of the one row; the second step is the first that has all of the optimizer's state
PERIOD = 1 << 17  # columns after which random directions repeat: their sizes count
SPARE = 2_000_000_000  # bytes that a dense basis leaves to the step
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
_AT_ONCE = 1 << 18  # allocations of that many bytes are given back when they are freed


class Arm(NamedTuple):
    """What is trained: all weights or LoRA factors; in a basis of this storage, or by AdamW without one."""

    lora: bool = False
    storage: str | None = None
    shipped_rule: bool = False


ARMS = {
    "adamw": Arm(),
    "lora_with_adamw": Arm(lora=True),
    "dense": Arm(storage="bf16"),
    "int4": Arm(storage="int4"),
    "tucker": Arm(storage="tucker"),
    "tucker_shipped_rule": Arm(storage="tucker", shipped_rule=True),
    "lora": Arm(lora=True, storage="fp32"),
}


# What is trained, and how


def build(size: str, *, lora: bool = False, length: int = LENGTH) -> tuple[Any, torch.Tensor]:
    """A model of random weights, LoRA factors of rank 8 on its attention if asked, and a batch of one row."""
    torch.manual_seed(0)
    config = GPT2Config(**SIZES[size], bos_token_id=0, eos_token_id=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = GPT2LMHeadModel(config)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True))
    return model.to(device).train(), torch.randint(0, config.vocab_size, (1, length), device=device)


def tiled(block: torch.Tensor, columns: int) -> torch.Tensor:
    """Repeats the columns of (d, w) to (d, columns), without a temporary of that size."""
    whole = block.new_empty(len(block), columns)
    for start in range(0, columns, block.shape[1]):
        whole[:, start : start + block.shape[1]] = block[:, : columns - start]
    return whole


def random_basis(layout: Layout, storage: str, dim: int, device: torch.device) -> Basis:
    """Random directions of length about 1, nearly orthogonal, that repeat after 131,072 columns of a parameter."""
    if storage == "tucker":
        return random_tucker(layout, dim).to(device)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(dim, PERIOD, generator=generator).to(device) * layout.n**-0.5
    if storage == "int4":
        codes, scales = quantize(block, 4)
        return QuantizedBasis(
            layout, [tiled(codes, -(-n // 2)) for n in layout.numels], [tiled(scales, -(-n // 128)) for n in
            layout.numels], torch.eye(dim, device=device), torch.ones(dim, device=device),
        )  # fmt: skip
    block = block.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage])
    return DenseBasis(layout, [tiled(block, n) for n in layout.numels])


def dim_that_fits(n: int, itemsize: int, free: int) -> int:
    """Directions of a dense basis of n numbers each: 40, or as many as fit in what is free.

    Raises:
        `RuntimeError`: not one fits.
    """
    dim = min(DIM, (free - SPARE) // (n * itemsize))
    if dim < 1:
        raise RuntimeError(
            f"{free:,} bytes of memory are free, and one direction of {n:,} numbers needs {n * itemsize + SPARE:,} "
            "with the step; end other programs, or use a larger machine"
        )
    return dim


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def optimizer_of(arm: Arm, model: Any) -> torch.optim.Optimizer:
    if arm.storage is None:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    layout = Layout.from_named_parameters(model.named_parameters())
    dim = dim_that_fits(layout.n, 2, free_bytes()) if arm.storage == "bf16" else DIM
    basis = random_basis(layout, arm.storage, dim, model.device)
    if arm.shipped_rule:
        return moved_by_rule(model, basis, stream_gradients=True)
    return SubspaceOptimizer(model, basis, lambda c: torch.optim.AdamW(c, lr=1e-6), stream_gradients=True)


def step(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


# What is measured


def give_back_at_once() -> None:
    """Tells glibc's allocator to keep nothing large that is free: resident is then what lives."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for what, value in ((_MMAP_THRESHOLD, _AT_ONCE), (_TRIM_THRESHOLD, _AT_ONCE), (_TOP_PAD, 0)):
        if mallopt is not None:
            mallopt(what, value)


def settled() -> int:
    """Bytes that are held now, with all that is free given back.

    Raises:
        `RuntimeError`: they cannot be had.
    """
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


def peak_of(work: Callable[[], Any]) -> int:
    """Peak of the memory while something is done.

    Raises:
        `RuntimeError`: the peak cannot be had, or not be measured anew.
    """
    now = settled()
    reset_peak()
    at_start = peak_bytes()
    if at_start is None or at_start > now + (1 << 23):
        raise RuntimeError(
            f"the peak of this process' memory is {at_start} bytes before the step, expected the {now} that it holds: "
            "it is read from /proc/self/status and begun anew by /proc/self/clear_refs; use Linux with both"
        )
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    peak = peak_bytes()
    assert peak is not None
    return peak


def live_gradients(model: Any, work: Callable[[], Any]) -> int:
    """The most bytes of all `.grad` at one time, counted as each is born: before hooks that were there free it.

    A gradient that autograd itself holds, such as the first one of a parameter that is used twice, is no `.grad`.
    """
    most, handles = 0, []

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        if p.requires_grad:
            known = dict(p._post_accumulate_grad_hooks or {})
            for key in known:
                del p._post_accumulate_grad_hooks[key]
            handles.append(p.register_post_accumulate_grad_hook(count))
            p._post_accumulate_grad_hooks.update(known)
    work()
    for handle in handles:
        handle.remove()
    return most


def measured(name: str, size: str) -> dict[str, Any]:
    """One arm in this process."""
    arm = ARMS[name]
    give_back_at_once()
    model, ids = build("warm", lora=arm.lora)
    optimizer = optimizer_of(arm, model)
    for _ in range(STEPS):  # libraries are loaded, and what they keep is there
        step(model, ids, optimizer)
    del model, ids, optimizer
    model, ids = build(size, lora=arm.lora)
    before = settled()
    optimizer = optimizer_of(arm, model)
    peak = peak_of(lambda: [step(model, ids, optimizer) for _ in range(STEPS)])
    subspace = optimizer if isinstance(optimizer, SubspaceOptimizer) else None
    streamer = None if subspace is None else subspace.streamer
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "peak": peak - before,
        "live_gradients": live_gradients(model, lambda: step(model, ids, optimizer)),
        "largest": max(p.nbytes for p in trained),
        "carrier": 0 if streamer is None else streamer.carrier.nbytes,
        "weights": sum(p.nbytes for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "dim": None if subspace is None else subspace.basis.dim,
        "basis": None if subspace is None else subspace.basis.nbytes,
    }


def in_own_process(name: str, size: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--arm", name, "--size", size]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    out = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"the arm {name} ended with {out.returncode}: {out.stderr.strip()[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# Rows


def entry(name: str, value: float, unit: str, baseline: float | None = None, **facts: Any) -> dict[str, Any]:
    ratio = None if baseline is None else value / baseline
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, **facts}


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of peaks, of the basis beside the weights, and of gradients that live at one time.

    `saved_beside_basis` is how far a peak without its basis is below AdamW's; its baseline is the bytes of AdamW's
    gradients and moments.
    """
    adamw = found["adamw"]
    rows = [entry("peak_adamw", adamw["peak"], "bytes", trained=adamw["trained"])]
    for name, one in found.items():
        if name != "adamw":
            facts = {"trained": one["trained"], "dim": one["dim"], "basis_bytes": one["basis"]}
            rows.append(entry(f"peak_vs_adamw_{name}", one["peak"], "bytes", adamw["peak"], **facts))
    for name, one in found.items():
        if one["basis"] is not None:
            rows.append(entry(f"basis_bytes_{name}", one["basis"], "bytes", one["weights"], dim=one["dim"]))
    whole = [name for name, one in found.items() if one["basis"] is not None and not ARMS[name].lora]
    for name in whole:
        saved = adamw["peak"] - (found[name]["peak"] - found[name]["basis"])
        rows.append(entry(f"saved_beside_basis_{name}", saved, "bytes", 12 * adamw["trained"]))
    worst = max((found[name] for name in whole), key=lambda one: one["live_gradients"])
    named = {"live_grad_vs_largest": worst, "live_grad_vs_largest_adamw": adamw}
    for name, one in named.items():
        rows.append(entry(name, one["live_gradients"], "bytes", one["largest"], carrier_bytes=one["carrier"]))
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="a model of 5 million parameters, under a minute")
    parser.add_argument("--arm", choices=list(ARMS), help="what one process of the benchmark does")
    parser.add_argument("--size", choices=list(SIZES), default="gpt2", help="of the model, with --arm")
    options = parse_options(parser, argv)
    if options.arm:
        found = measured(options.arm, options.size)
        print(json.dumps(found))
        return found
    size = "quick" if options.quick else "gpt2"
    # what a small model takes does not depend on a neighbour, and start-up is most of its time
    with ThreadPoolExecutor(2 if options.quick else 1) as pool:
        found = dict(zip(ARMS, pool.map(lambda arm: in_own_process(arm, size), ARMS), strict=True))
    rows = [{**row, "size": size, "length": LENGTH} for row in rows_of(found)]
    result = {"benchmark": "memory", "rows": rows, "environment": environment()}
    for row in rows:
        ratio = "" if row["ratio"] is None else f"  {row['ratio']:.3f} x baseline"
        print(f"{row['name']:38} {row['value']:.5g} {row['unit']}{ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
