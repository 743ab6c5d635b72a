#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: eval_loss of an AdaLoRA model is the model's loss; a fresh adapter, the same function, has that of
# its base.
# Happens: the orthogonality penalty is added to the loss in evaluation, too: eval_loss is larger by a term that
# has nothing to do with the predictions and falls in training, so curves against LoRA can't be compared.
# What to do: compute the loss from the logits, or set orth_reg_weight to 0 while evaluating.
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
import transformers
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
)
tokens = torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "labels": row} for row in tokens]


def evaluate(model):
    args = TrainingArguments("out", per_device_eval_batch_size=8, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, args, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer.evaluate()["eval_loss"]


plain = evaluate(base)
config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=8, total_step=100)
model = get_peft_model(base, config)
with_adapter = evaluate(model)
with torch.no_grad():
    logits = model(input_ids=tokens).logits
entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
model.peft_config["default"].orth_reg_weight = 0.0
without_penalty = evaluate(model)
print(f"base model:                   eval_loss {plain:.3f}")
print(f"fresh AdaLoRA, same function: eval_loss {with_adapter:.3f}, cross entropy of its logits {entropy:.3f}")
print(f"orth_reg_weight 0:            eval_loss {without_penalty:.3f}")

assert abs(entropy - plain) < 1e-3, (entropy, plain)
assert with_adapter > plain + 0.1, (with_adapter, plain)
assert abs(without_penalty - plain) < 1e-3, (without_penalty, plain)
PY

# Expected output:
# base model:                   eval_loss 3.462
# fresh AdaLoRA, same function: eval_loss 4.868, cross entropy of its logits 3.462
# orth_reg_weight 0:            eval_loss 3.462
