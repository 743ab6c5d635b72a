#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11 or newer.
# Expected: modules_to_save=["head"] trains the module of that name whole, beside the adapter, as target_modules=["head"]
# adapts no other module.
# Happens: names are compared by their last letters, without the dot that target_modules asks for: "conv_head" (the last
# convolution of EfficientNets in timm) is trained whole as well, and saved with the adapter, without a word.
# What to do: look at print_trainable_parameters(), and rename the head, or give a name that no other ends in.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
from peft import LoraConfig, get_peft_model
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.conv_head, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.conv_head(self.body(x)))


def trained(**options):
    model = get_peft_model(Network(), LoraConfig(r=2, **options))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return sorted({name.removeprefix("base_model.model.").split(".")[0] for name in names})


adapted = trained(target_modules=["head"])
saved = trained(target_modules=["body"], modules_to_save=["head"])
print('target_modules=["head"]:                       ', adapted)
print('target_modules=["body"], modules_to_save=["head"]:', saved)

assert adapted == ["head"], adapted
assert saved == ["body", "conv_head", "head"], saved
PY

# Expected output:
# target_modules=["head"]:                        ['head']
# target_modules=["body"], modules_to_save=["head"]: ['body', 'conv_head', 'head']
