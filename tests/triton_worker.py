"""The Triton kernel on CPU tensors, in Triton's interpreter: prints a line for each rule and odd gradient, as JSON."""

import copy
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import hf_sl2o.rules.rule
from hf_sl2o import Rule, RuleConfig
from hf_sl2o.rules import SHIPPED_RULES, kernel, triton_kernel

SIZES = (1, 33, 70)  # with blocks of 64: less than one, and one and a rest
N = sum(SIZES)
OWN = {
    "gradient": RuleConfig(inputs="gradient", squash=False),
    "all inputs": RuleConfig(
        momenta=(0.3, 0.99), progress=True, tensor_scale=True, agreement=True, log_sign=7.0, reset_cell_every=2
    ),
    "all inputs of a tensor": RuleConfig(
        momenta=(0.3, 0.99), progress=True, tensor_scale=True, per_tensor=4, distance=True, log_sign=5.0
    ),
}


def rules():
    torch.manual_seed(0)
    for name in ("default", "default-lora"):
        yield name, Rule.from_pretrained(SHIPPED_RULES / name)
    for name, config in OWN.items():
        yield name, Rule.from_config(config)


def updates(rule, given, *, fused, finite=None):
    """Deltas and state after some steps."""
    kernel.LEAST = 1 if fused else 1 << 60
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(size, generator=generator) for size in SIZES]
    state, done = rule.init_state(N, weights=weights), []
    original = kernel.fused_update_

    def spied(*args, **options):
        done.append(original(*args, **options))
        return done[-1]

    hf_sl2o.rules.rule.fused_update_ = spied
    deltas = [rule.update_(g.clone(), state, sizes=SIZES, total_steps=9, finite=finite) for g in given]
    hf_sl2o.rules.rule.fused_update_ = original
    assert done == [fused] * len(given), done
    return torch.stack(deltas), state


def far(a, b):
    """The largest distance over b's size and a tenth of its mean; infinite where NaN and Inf are not the same."""
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    return float(((a - b).abs() / (b.abs() + 0.1 * b.abs().mean() + 1e-300)).max())


def main():
    kernel._is_for_triton = lambda g: True
    triton_kernel._BLOCK = 64  # of few coordinates, so that tensors have whole blocks and a rest
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(N, generator=generator) * torch.logspace(-4, 2, N) for _ in range(2)]
    for name, rule in rules():
        found = {"name": name}
        ours, theirs = (updates(rule, given, fused=fused) for fused in (True, False))
        found["deltas"] = far(ours[0], theirs[0])
        found["state"] = {f: far(a, b) for f, a, b in zip(theirs[1]._fields, ours[1], theirs[1], strict=True)}
        broken = copy.deepcopy(rule)
        with torch.no_grad():
            (broken.mix if rule.config.per_tensor else broken.head).weight.mul_(1.1)
        found["broken"] = far(updates(broken, given[:1], fused=True)[0], theirs[0][:1])
        odd = [g.clone() for g in given]
        odd[1][[10, 40]] = torch.tensor([float("nan"), float("inf")])
        found["odd"] = far(*(updates(rule, odd, fused=fused)[0] for fused in (True, False)))
        delta, state = updates(rule, given[:1], fused=True, finite=torch.tensor(False))
        _, fresh = updates(rule, given[:1], fused=False, finite=torch.tensor(False))
        found["skipped"] = not delta.any() and all(torch.equal(a, b) for a, b in zip(state, fresh, strict=True))
        print(json.dumps(found), flush=True)
    wrong = Rule.from_pretrained(SHIPPED_RULES / "paper-cnn")
    network = wrong.for_kernel()
    checks = [network, network._replace(weights=network.weights * 1.01)]
    triton_kernel._BLOCK = 256
    with torch.no_grad():
        print(json.dumps([kernel.agrees(wrong, one, triton_kernel, torch.device("cpu")) for one in checks]))


if __name__ == "__main__":
    main()
