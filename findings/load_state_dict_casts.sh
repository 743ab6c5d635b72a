#!/usr/bin/env bash
# torch 2.13.0, Python 3.11 or newer.
# Expected: Optimizer.load_state_dict gives back a parameter's state as it was saved.
# Happens: every tensor in it takes the dtype of the parameter, if that is a floating one; only the key "step"
# is spared. Counters lose digits (2**24 + 1), masks become floats and can't index any more.
# What to do: name a counter "step", keep integers and masks in param_groups, or cast back in one's own
# load_state_dict.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q numpy==2.4.6

venv/bin/python - <<'PY'
import torch


class Counting(torch.optim.SGD):
    """Keeps a counter of seen tokens and a mask for each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(tokens=torch.tensor(2**24 + 1), mask=torch.ones(2, dtype=torch.bool))


for dtype in (torch.float32, torch.bfloat16):
    p = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    first, second = Counting([p], lr=1), Counting([p], lr=1)
    first.step()
    second.load_state_dict(first.state_dict())
    was, now = first.state[p], second.state[p]
    for key in ("tokens", "mask"):
        print(f"{dtype} parameter, {key}: {was[key].tolist()} {was[key].dtype} -> {now[key].tolist()} {now[key].dtype}")
    assert now["tokens"].dtype == now["mask"].dtype == dtype, now
    assert now["tokens"].item() == 2**24, now
PY

# Expected output:
# torch.float32 parameter, tokens: 16777217 torch.int64 -> 16777216.0 torch.float32
# torch.float32 parameter, mask: [True, True] torch.bool -> [1.0, 1.0] torch.float32
# torch.bfloat16 parameter, tokens: 16777217 torch.int64 -> 16777216.0 torch.bfloat16
# torch.bfloat16 parameter, mask: [True, True] torch.bool -> [1.0, 1.0] torch.bfloat16
