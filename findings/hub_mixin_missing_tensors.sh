#!/usr/bin/env bash
# huggingface_hub 2.4.0, safetensors 0.8.0, torch 2.13.0, Python 3.11 or newer.
# Expected: from_pretrained on a file that lacks a layer raises, or warns as transformers does.
# Happens: the layer keeps its random initial values, different at each load, without a word.
# What to do: from_pretrained(..., strict=True).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6 packaging==26.0

venv/bin/python - <<'PY'
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file


class Net(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, width=4):
        super().__init__()
        self.body, self.head = torch.nn.Linear(width, width), torch.nn.Linear(width, 2)


Net().save_pretrained("net")
tensors = load_file("net/model.safetensors")
save_file({k: v for k, v in tensors.items() if k.startswith("body")}, "net/model.safetensors")

one, two = Net.from_pretrained("net"), Net.from_pretrained("net")
print("body equal in two loads:", torch.equal(one.body.weight, two.body.weight))
print("head equal in two loads:", torch.equal(one.head.weight, two.head.weight))
try:
    Net.from_pretrained("net", strict=True)
    refused = ""
except RuntimeError as error:
    refused = str(error).split("\n")[0]
print("strict=True:", refused)

assert torch.equal(one.body.weight, two.body.weight) and not torch.equal(one.head.weight, two.head.weight)
assert refused
PY

# Expected output:
# Loading weights from local directory
# Loading weights from local directory
# body equal in two loads: True
# head equal in two loads: False
# Loading weights from local directory
# strict=True: Error(s) in loading state_dict for Net:
