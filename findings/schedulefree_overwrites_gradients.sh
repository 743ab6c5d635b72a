#!/usr/bin/env bash
# schedulefree 1.4.1, torch 2.13.0, Python 3.11 or newer.
# Expected: step() reads p.grad, as torch's optimizers do. What looks at gradients after it (a norm that is logged, the
# noise between steps, gradients that are added up without zero_grad) finds those of the loss.
# Happens: AdamWScheduleFree writes its normalised gradient into p.grad: after the first step all of them are 1 or -1.
# foreach=False makes no difference. SGDScheduleFree leaves them as they are.
# What to do: read gradients before step(), and clear them after it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/pip install -q schedulefree==1.4.1

venv/bin/python - <<'PY'
import schedulefree
import torch


def after_a_step(make):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = make([p])
    if hasattr(optimizer, "train"):
        optimizer.train()
    p.grad = torch.tensor([100.0, 1.0, -0.01])
    optimizer.step()
    return [round(value, 3) for value in p.grad.tolist()]


seen = {
    "torch.optim.AdamW": after_a_step(lambda p: torch.optim.AdamW(p, lr=1e-2)),
    "AdamWScheduleFree": after_a_step(lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2)),
    "AdamWScheduleFree, foreach=False": after_a_step(
        lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2, foreach=False)
    ),
    "SGDScheduleFree": after_a_step(lambda p: schedulefree.SGDScheduleFree(p, lr=1e-2)),
}
for name, gradient in seen.items():
    print(f"{name:33} {gradient}")

assert seen["torch.optim.AdamW"] == seen["SGDScheduleFree"] == [100.0, 1.0, -0.01], seen
assert seen["AdamWScheduleFree"] == seen["AdamWScheduleFree, foreach=False"] == [1.0, 1.0, -1.0], seen
PY

# Expected output:
# torch.optim.AdamW                 [100.0, 1.0, -0.01]
# AdamWScheduleFree                 [1.0, 1.0, -1.0]
# AdamWScheduleFree, foreach=False  [1.0, 1.0, -1.0]
# SGDScheduleFree                   [100.0, 1.0, -0.01]
