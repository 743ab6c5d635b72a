#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: optim_args="rule=my rules, clip=1" gives rule the value "my rules".
# Happens: all spaces go, within values too: "myrules", which may be another file that exists. The built-in
# optimizers take numbers and words, so this meets whoever enters an optimizer of their own that reads a path.
# What to do: quote the value as in an address ("my%20rules") and unquote it in the handler.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import os

import torch
from transformers import Trainer, TrainingArguments, trainer_optimizer

# An optimizer of one's own, entered where the built-in ones are.
seen = {}


def handler(context):
    seen.update(context.optim_args)
    return torch.optim.SGD, {"lr": context.args.learning_rate}


trainer_optimizer._OPTIMIZER_HANDLERS["sgd"] = handler
os.makedirs("my rules")
os.makedirs("myrules")
args = TrainingArguments("out", optim="sgd", optim_args="rule=my rules, clip=1", report_to="none", use_cpu=True)
Trainer.get_optimizer_cls_and_kwargs(args)
print("given:  ", args.optim_args)
print("arrives:", seen)

assert seen == {"rule": "myrules", "clip": "1"}, seen
assert os.path.isdir(seen["rule"])
PY

# Expected output:
# given:   rule=my rules, clip=1
# arrives: {'rule': 'myrules', 'clip': '1'}
