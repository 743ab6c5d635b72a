#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: with enable_jit_checkpoint=True a SIGTERM saves a checkpoint and ends the training there, so that
# the model in memory after train() is the one that was saved.
# Happens: a timer asks for the checkpoint 3 s after the signal; where that falls within a step, the checkpoint
# is written before the optimizer's step, which is then still taken: the model and global_step are one ahead of
# the folder.
# What to do: after train() trust the folder; don't call save_model() or log results under the checkpoint's
# number.
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
import signal
import time

import torch
import transformers
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()


class Line(torch.nn.Module):
    pause = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        time.sleep(self.pause)
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


class Preempt(TrainerCallback):
    """The scheduler's SIGTERM, early in a step that takes 5 seconds."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.pause = 5
            os.kill(os.getpid(), signal.SIGTERM)


torch.manual_seed(1)
data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(32)]
args = TrainingArguments(
    "out", per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_steps=8,
    save_strategy="no", enable_jit_checkpoint=True, report_to="none", disable_tqdm=True, use_cpu=True,
)
trainer = Trainer(Line(), args, train_dataset=data, callbacks=[Preempt()])
trainer.remove_callback(PrinterCallback)
trainer.train()

folders = sorted(os.listdir("out"))
saved = load_file(f"out/{folders[-1]}/model.safetensors")["layer.weight"]
moved = (trainer.model.layer.weight - saved).abs().max().item()
print("checkpoints:", *folders)
print("trainer.state.global_step after train():", trainer.state.global_step)
print("model in memory equals the saved one:", moved == 0)

assert folders == ["checkpoint-3"], folders
assert trainer.state.global_step == 4, trainer.state.global_step
assert moved > 0
PY

# Expected output:
# checkpoints: checkpoint-3
# trainer.state.global_step after train(): 4
# model in memory equals the saved one: False
