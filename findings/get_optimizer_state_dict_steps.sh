#!/usr/bin/env bash
# torch 2.13.0, Python 3.11 or newer.
# Expected: get_optimizer_state_dict only reads.
# Happens: on an optimizer that hasn't stepped it takes a step itself, with lr 0 and zero gradients, to create
# the state. The counter is then 1, and AdamW's bias correction makes its first real update 0.744 of what it
# would be.
# What to do: don't save before the first step; an optimizer of one's own must take a step with lr 0 without
# moving.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q numpy==2.4.6

venv/bin/python - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(look):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    if look:
        get_optimizer_state_dict(model, optimizer)
    before = model.weight.detach().clone()
    count = optimizer.state[model.weight]["step"].item() if optimizer.state else 0
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    return count, (model.weight - before).norm().item()


count, plain = first_update(look=False)
print(f"untouched:           step counter {count:.0f}, first update of length {plain:.5f}")
counted, short = first_update(look=True)
print(f"after the call:      step counter {counted:.0f}, first update of length {short:.5f}, ratio {short / plain:.3f}")

assert (count, counted) == (0, 1), (count, counted)
assert abs(short / plain - 0.744) < 0.005, short / plain
PY

# Expected output:
# untouched:           step counter 0, first update of length 0.02449
# after the call:      step counter 1, first update of length 0.01823, ratio 0.744
