#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: resuming with another learning_rate trains on with the new one, or says that it doesn't.
# Happens: optimizer and scheduler come from the checkpoint with the old rate; the new max_steps is taken, the
# new rate isn't, no warning names it, and trainer.args.learning_rate shows the one that isn't used.
# What to do: start a new run from the saved model, or set the rate in the optimizer's groups and the
# scheduler's base_lrs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import logging

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainingArguments

transformers.logging.set_verbosity_warning()
said = []


class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


transformers.logging.disable_default_handler()
transformers.logging.add_handler(Keep())


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


torch.manual_seed(1)
data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(32)]


def run(rate, steps, resume):
    args = TrainingArguments(
        "out", per_device_train_batch_size=4, learning_rate=rate, lr_scheduler_type="constant", max_steps=steps,
        logging_steps=1, save_steps=4, report_to="none", disable_tqdm=True, use_cpu=True,
    )
    trainer = Trainer(Line(), args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry], trainer


run(0.1, 4, None)
said.clear()
rates, trainer = run(0.001, 7, True)
print("learning_rate of the arguments:", trainer.args.learning_rate)
print("rate used, steps 5 to 7:", rates[4:])
about = [text for text in said if "learning" in text.lower() or "rate" in text.lower().split()]
print("warnings about it:", len(about))

assert trainer.args.learning_rate == 0.001 and rates[4:] == [0.1] * 3, rates
assert not about, about
PY

# Expected output:
# learning_rate of the arguments: 0.001
# rate used, steps 5 to 7: [0.1, 0.1, 0.1]
# warnings about it: 0
