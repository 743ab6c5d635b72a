#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11 or newer.
# Expected: a fresh adapter changes nothing, as with LoRA: training begins at the base model.
# Happens: FourierFT draws its spectrum at random where nothing is said, and the logits of the fresh adapter have little
# to do with those of the base model: a pretrained network is lost before the first step.
# What to do: FourierFTConfig(init_weights=True), which begins at zeros; its False means random numbers.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import torch
from peft import FourierFTConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def change(config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        after = get_peft_model(base, config).eval()(input_ids=tokens).logits
    return ((after - before).norm() / before.norm()).item()


where = {"target_modules": ["q_proj", "v_proj"]}
lora = change(LoraConfig(**where))
fourier = change(FourierFTConfig(n_frequency=100, **where))
zeros = change(FourierFTConfig(n_frequency=100, init_weights=True, **where))
print(f"change of the logits by a fresh adapter, LoRA:      {lora:.2f}")
print(f"FourierFT:                                          {fourier:.2f}")
print(f"FourierFT, init_weights=True:                       {zeros:.2f}")

assert lora == zeros == 0, (lora, zeros)
assert fourier > 0.5, fourier
PY

# Expected output:
# change of the logits by a fresh adapter, LoRA:      0.00
# FourierFT:                                          1.41
# FourierFT, init_weights=True:                       0.00
