#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11 or newer.
# Expected: .to(torch.float16) of a float64 tensor gives the nearest number, as numpy's astype does.
# Happens: it goes by way of float32, and so does .to(torch.bfloat16): rounded twice, a number just above half way goes
# down. Weights that were summed in fp64 and stored in half precision are not those that numpy makes of them.
# What to do: round in numpy where the last bit counts, or say float32 in between, and do so everywhere.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q numpy==2.4.6

venv/bin/python - <<'PY'
import numpy as np
import torch

# a little more than half way from 1 to the next number of fp16, and of bf16
fp16 = torch.tensor(1 + 2**-11 + 2**-40, dtype=torch.float64)
bf16 = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)
by_torch, by_numpy = fp16.to(torch.float16).item(), float(fp16.numpy().astype(np.float16))
print("fp64 to fp16: torch", by_torch, "numpy", by_numpy)
print("fp64 to bf16: torch", bf16.to(torch.bfloat16).item(), "nearest", 1 + 2**-7)

assert by_numpy == 1 + 2**-10, by_numpy
assert by_torch == 1.0, by_torch
assert bf16.to(torch.bfloat16) == 1.0
PY

# Expected output:
# fp64 to fp16: torch 1.0 numpy 1.0009765625
# fp64 to bf16: torch 1.0 nearest 1.0078125
