#!/usr/bin/env bash
# torch 2.13.0, its CPU build (on Linux: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu), accelerate 1.15.0,
# Python 3.11.
# Expected: `__setstate__` of an optimizer of one's own runs where the optimizer is unpickled or copied.
# Happens: Accelerator.prepare calls it, too, on the live optimizer: accelerate loads the optimizer's own state_dict
# into it, and torch's load_state_dict ends in __setstate__ with `state` and `param_groups` alone.
# What to do: let __setstate__ keep what it is not given; what it sets anew is gone after prepare, and in a Trainer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6 accelerate==1.15.0

cat > prepare.py <<'PY'
import torch
from accelerate import Accelerator


class Counting(torch.optim.SGD):
    calls = []

    def __setstate__(self, state):
        self.calls.append(sorted(state))
        super().__setstate__(state)


model = torch.nn.Linear(2, 1)
optimizer = Counting(model.parameters(), lr=0.1)
print("after the constructor:", Counting.calls)
Accelerator(cpu=True).prepare(optimizer)
print("after prepare:", Counting.calls)
assert Counting.calls == [["param_groups", "state"]], Counting.calls
PY
venv/bin/python prepare.py

# Expected output:
# after the constructor: []
# after prepare: [['param_groups', 'state']]
