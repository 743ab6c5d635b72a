#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: a callback that sets control.should_training_stop in on_train_begin, or in on_step_begin of the first step,
# ends the run before it has changed a weight.
# Happens: the step is taken, logged and counted, and then the run ends: global_step is 1. With gradient accumulation it
# depends on the number of micro-batches: with 2 the run ends after the first one, at global_step 0, its gradient made
# and thrown away.
# What to do: look before train() whether there is anything to train; or raise in the callback.
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
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.forwards = 0

    def forward(self, x, labels):
        self.forwards += 1
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


class Stop(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = True


torch.manual_seed(1)
data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(32)]


def run(event, accumulation):
    args = TrainingArguments(
        "out", max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, learning_rate=0.1,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )
    trainer = Trainer(Line(), args, train_dataset=data, callbacks=[Stop(event)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    moved = not torch.equal(trainer.model.layer.weight, Line().layer.weight)
    return trainer.state.global_step, trainer.model.forwards, moved


seen = {}
for event in ("on_train_begin", "on_step_begin"):
    for accumulation in (1, 2):
        steps, forwards, moved = seen[event, accumulation] = run(event, accumulation)
        print(f"{event}, {accumulation} micro-batches a step: global_step {steps}, {forwards} forward passes, moved: {moved}")
assert seen["on_train_begin", 1] == (1, 1, True) and seen["on_train_begin", 2] == (0, 1, False)
assert seen["on_step_begin", 1] == (1, 1, True) and seen["on_step_begin", 2] == (0, 1, False)
PY

# Expected output:
# on_train_begin, 1 micro-batches a step: global_step 1, 1 forward passes, moved: True
# on_train_begin, 2 micro-batches a step: global_step 0, 1 forward passes, moved: False
# on_step_begin, 1 micro-batches a step: global_step 1, 1 forward passes, moved: True
# on_step_begin, 2 micro-batches a step: global_step 0, 1 forward passes, moved: False
