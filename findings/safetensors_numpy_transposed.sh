#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6, torch 2.13.0, Python 3.11 or newer.
# Expected: a transposed array is saved as its values, or refused as the torch half of the library does.
# Happens: safetensors.numpy writes the memory as it lies under the new shape: the array loads scrambled,
# without a word. Its docstring asks for contiguous arrays, and nothing checks. The V of an SVD, Vt.T, is such a
# view.
# What to do: np.ascontiguousarray before saving.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q safetensors==0.8.0 numpy==2.4.6 packaging==26.0

venv/bin/python - <<'PY'
import numpy as np
import torch
from safetensors.numpy import load, save
from safetensors.torch import save as save_torch

a = np.arange(6, dtype=np.float32).reshape(2, 3).T  # 3 x 2, a view of the rows
back = load(save({"a": a}))["a"]
print("saved: ", a.tolist())
print("loaded:", back.tolist())
copied = load(save({"a": np.ascontiguousarray(a)}))["a"]
print("np.ascontiguousarray first: equal", np.array_equal(copied, a))
try:
    save_torch({"a": torch.from_numpy(a)})
    refused = False
except ValueError as error:
    refused = "non contiguous" in str(error)
print("safetensors.torch refuses the same array:", refused)

assert back.shape == a.shape and not np.array_equal(back, a)
assert back.ravel().tolist() == [0, 1, 2, 3, 4, 5]
assert np.array_equal(copied, a) and refused
PY

# Expected output:
# saved:  [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
# loaded: [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
# np.ascontiguousarray first: equal True
# safetensors.torch refuses the same array: True
