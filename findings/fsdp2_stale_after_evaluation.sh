#!/usr/bin/env bash
# torch 2.13.0, its CPU build (on Linux: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu), Python 3.11.
# Expected: a forward pass of a model under fully_shard (FSDP2) uses the sharded weights as they are when it begins.
# Happens: after a forward pass without gradients (an evaluation) the root module stays gathered. What is written to
# its sharded parameters then is not seen by the next forward pass for training, which computes with the old weights,
# and named_parameters() gives the gathered ones in their place. No warning. The modules inside are not concerned.
# What to do: call reshard() on each FSDPModule before weights are moved or read outside a step.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > now.py <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(1, 4)


def output_of_zeros(evaluated, resharded=False):
    """Sets all weights to zero, then trains on: with zero weights the output is 0."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    fully_shard(model[0])
    fully_shard(model)
    sharded = list(model.parameters())
    if evaluated:
        with torch.no_grad():
            model(x)
    if resharded:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    kinds = [type(p).__name__ for p in model.parameters()]
    with torch.no_grad():
        for p in sharded:
            p.zero_()
    return model(x).item(), kinds


seen = {
    "never evaluated": output_of_zeros(False),
    "evaluated": output_of_zeros(True),
    "evaluated, resharded": output_of_zeros(True, resharded=True),
}
for name, (output, kinds) in seen.items():
    print(f"{name}: output {output:.4f} of zero weights; parameters are {kinds}")
assert seen["never evaluated"] == seen["evaluated, resharded"] == (0.0, ["DTensor"] * 4), seen
assert seen["evaluated"][0] != 0.0 and seen["evaluated"][1] == ["DTensor"] * 2 + ["Parameter"] * 2, seen
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 venv/bin/python now.py
# never evaluated: output 0.0000 of zero weights; parameters are ['DTensor', 'DTensor', 'DTensor', 'DTensor']
# evaluated: output -0.0806 of zero weights; parameters are ['DTensor', 'DTensor', 'Parameter', 'Parameter']
# evaluated, resharded: output 0.0000 of zero weights; parameters are ['DTensor', 'DTensor', 'DTensor', 'DTensor']
