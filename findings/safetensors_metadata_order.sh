#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.13.0, Python 3.11 or newer.
# Expected: the same tensors with the same metadata make the same file, so that a checksum, a cache or a Hub knows it.
# Happens: with two metadata entries or more their order in the header is drawn anew at each save. The files differ, and
# so do their sha256: a Hub keeps each as a new object. With one entry, such as transformers' {"format": "pt"}, or
# none, they are equal. The order of the tensors does not change.
# What to do: put all of it into one entry, or write the header again in order; compare tensors, not files.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q safetensors==0.8.0 numpy==2.4.6 packaging==26.0

venv/bin/python - <<'PY'
import torch
from safetensors import safe_open
from safetensors.torch import save_file

tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}


def files_of(metadata):
    """How many different files 20 saves make."""
    found = set()
    for _ in range(20):
        save_file(tensors, "x.safetensors", metadata=metadata)
        with open("x.safetensors", "rb") as file:
            found.add(file.read())
        with safe_open("x.safetensors", "pt") as file:
            assert file.metadata() == metadata
    return len(found)


none, one = files_of(None), files_of({"format": "pt"})
three = files_of({"format": "pt", "step": "100", "run": "a"})
print("20 saves without metadata:", none, "file")
print("20 saves with one entry:  ", one, "file")
print("20 saves with three: more than one file:", three > 1)
assert none == one == 1 < three <= 6
PY

# Expected output:
# 20 saves without metadata: 1 file
# 20 saves with one entry:   1 file
# 20 saves with three: more than one file: True
