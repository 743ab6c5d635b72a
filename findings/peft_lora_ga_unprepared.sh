#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11 or newer.
# Expected: an adapter with init_lora_weights="lora_ga" begins at the gradient's directions, or says that a step is missing.
# Happens: without preprocess_loraga before get_peft_model it is ordinary LoRA, to the bit, and nothing says so; a
# comparison of the two then shows no difference.
# What to do: call preprocess_loraga first, and compare lora_B with zero: LoRA-GA does not begin there.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import warnings

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def adapter(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    plain = adapter()
    prepared_by_nobody = adapter(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
same = all(torch.equal(plain[name], prepared_by_nobody[name]) for name in plain)
about_it = [str(one.message) for one in said if "ga" in str(one.message).lower().split()]
print("the same bits as ordinary LoRA:", same)
print("warnings about it:", about_it)

assert plain.keys() == prepared_by_nobody.keys() and same
assert not about_it, about_it
PY

# Expected output:
# the same bits as ordinary LoRA: True
# warnings about it: []
