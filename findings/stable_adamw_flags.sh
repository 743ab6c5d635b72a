#!/usr/bin/env bash
# transformers 5.23.0, torch-optimi 0.3.3, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: optim_args="decouple_lr=False,kahan_sum=False" turns both off, as "False" does for other optimizers'
# flags.
# Happens: stable_adamw takes bool("False"), which is True: both are turned on.
# What to do: leave the keys out, or give them an empty value ("kahan_sum=").
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6 torch-optimi==0.3.3
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
from transformers import Trainer, TrainingArguments


def flags(optim_args):
    args = TrainingArguments("out", optim="stable_adamw", optim_args=optim_args, report_to="none", use_cpu=True)
    optimizer, given = Trainer.get_optimizer_cls_and_kwargs(args)
    print(f"{optimizer.__name__}, optim_args={optim_args!r}: decouple_lr={given['decouple_lr']}, "
          f"kahan_sum={given['kahan_sum']}")
    return given["decouple_lr"], given["kahan_sum"]


assert flags(None) == (False, None)
assert flags("decouple_lr=False,kahan_sum=False") == (True, True)
assert flags("decouple_lr=,kahan_sum=") == (False, False)
PY

# Expected output:
# StableAdamW, optim_args=None: decouple_lr=False, kahan_sum=None
# StableAdamW, optim_args='decouple_lr=False,kahan_sum=False': decouple_lr=True, kahan_sum=True
# StableAdamW, optim_args='decouple_lr=,kahan_sum=': decouple_lr=False, kahan_sum=False
