#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: train(resume_from_checkpoint=True) on a run whose max_steps are done does nothing.
# Happens: where max_steps ends within an epoch it takes one more optimizer step and ends with global_step =
# max_steps + 1: the limit is looked at after a step only. A run given in num_train_epochs, done to its end, is
# left alone.
# What to do: before resuming, compare global_step in the checkpoint's trainer_state.json with max_steps.
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
from transformers import PrinterCallback, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


torch.manual_seed(1)
data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(32)]


def trainer(folder, **given):
    args = TrainingArguments(
        folder, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        save_strategy="steps", save_steps=4, report_to="none", disable_tqdm=True, use_cpu=True, **given,
    )
    result = Trainer(Line(), args, train_dataset=data)
    result.remove_callback(PrinterCallback)
    return result


seen = {}
for name, given in {"max_steps=4": {"max_steps": 4}, "num_train_epochs=1": {"num_train_epochs": 1}}.items():
    first = trainer(name, **given)
    first.train()
    again = trainer(name, **given)
    again.train(resume_from_checkpoint=True)
    moved = (again.model.layer.weight - first.model.layer.weight).abs().max().item()
    seen[name] = (first.state.global_step, again.state.global_step, moved > 0)
    print(f"{name}: step {first.state.global_step} at the end, {again.state.global_step} after resuming the finished "
          f"run, weights {'moved' if moved else 'unchanged'}")

assert seen["max_steps=4"] == (4, 5, True), seen
assert seen["num_train_epochs=1"] == (8, 8, False), seen
PY

# Expected output:
# max_steps=4: step 4 at the end, 5 after resuming the finished run, weights moved
# num_train_epochs=1: step 8 at the end, 8 after resuming the finished run, weights unchanged
