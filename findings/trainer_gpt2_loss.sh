#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: Trainer's loss and eval_loss of a causal language model are the mean over the predicted tokens, for
# all models.
# Happens: the first label of a row is never predicted and isn't counted for models named ...ForCausalLM, but it
# is for GPT2LMHeadModel (loss_type is None, of which a warning speaks, but not of this): with rows of 16 tokens
# loss, eval_loss and gradient are 15/16 of the right value, and exp(eval_loss) is no perplexity. The shorter
# the texts the more.
# What to do: give the first label of each row the value -100, or evaluate with the model's own loss.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import torch
import transformers
from transformers import (
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments,
)

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
length = 16
models = {
    "GPT2LMHeadModel": GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=length, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "LlamaForCausalLM": LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
}
tokens = torch.randint(32, (8, length))
masked = tokens.clone()
masked[:, 0] = -100  # the first label is never predicted


def losses(model, labels):
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]
    args = TrainingArguments(
        "out", per_device_train_batch_size=8, per_device_eval_batch_size=8, learning_rate=0.0, max_steps=1,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    with torch.no_grad():
        return model(input_ids=tokens, labels=labels).loss.item(), trainer.state.log_history[-2]["loss"], eval_loss


for name, model in models.items():
    for what, labels in {"labels = input_ids": tokens, "first label -100": masked}.items():
        own, logged, evaluated = losses(model, labels)
        print(f"{name:<16} {what:<18}: model's loss {own:.4f}, Trainer's loss {logged:.4f}, eval_loss {evaluated:.4f}, "
              f"ratio {evaluated / own:.4f}")
        expected = (length - 1) / length if name == "GPT2LMHeadModel" and labels is tokens else 1
        assert abs(evaluated / own - expected) < 1e-4 and abs(logged / own - expected) < 1e-4, (name, own, evaluated)
PY

# Expected output:
# GPT2LMHeadModel  labels = input_ids: model's loss 3.4801, Trainer's loss 3.2626, eval_loss 3.2626, ratio 0.9375
# GPT2LMHeadModel  first label -100  : model's loss 3.4801, Trainer's loss 3.4801, eval_loss 3.4801, ratio 1.0000
# LlamaForCausalLM labels = input_ids: model's loss 3.4643, Trainer's loss 3.4643, eval_loss 3.4643, ratio 1.0000
# LlamaForCausalLM first label -100  : model's loss 3.4643, Trainer's loss 3.4643, eval_loss 3.4643, ratio 1.0000
