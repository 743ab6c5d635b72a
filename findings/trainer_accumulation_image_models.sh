#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: 4 micro-batches with gradient_accumulation_steps=4 give the gradient and loss of their mean.
# Happens: the forward of ResNet, RegNet, MobileNetV2, BEiT and PoolFormer has **kwargs, so the Trainer leaves
# the division to the model; the model drops num_items_in_batch, and both come out 4 times too large. ViT is
# right. max_grad_norm and the scale invariance of Adam hide it; SGD meets it as a 4 times larger learning rate.
# What to do: set loss_is_scaled_for_ga = False on the Trainer for these models, not for ViT (x 1/4).
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
    BeitConfig, BeitForImageClassification, MobileNetV2Config, MobileNetV2ForImageClassification, PoolFormerConfig,
    PoolFormerForImageClassification, PrinterCallback, RegNetConfig, RegNetForImageClassification, ResNetConfig,
    ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification,
)

transformers.logging.set_verbosity_error()
common = {"num_labels": 3}
vit = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
pool = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2],
        "padding": [2, 1], "drop_path_rate": 0.0}
models = {
    "ResNet": (ResNetForImageClassification, ResNetConfig(**stages, layer_type="basic", **common)),
    "RegNet": (RegNetForImageClassification, RegNetConfig(**stages, groups_width=8, **common)),
    "MobileNetV2": (MobileNetV2ForImageClassification,
                    MobileNetV2Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, image_size=32, **common)),
    "BEiT": (BeitForImageClassification, BeitConfig(**vit, drop_path_rate=0.0, **common)),
    "PoolFormer": (PoolFormerForImageClassification, PoolFormerConfig(**pool, **common)),
    "ViT": (ViTForImageClassification, ViTConfig(**vit, **common)),
}

# Four micro-batches with the same four images: their mean is the mean of one of them, batch norm included.
torch.manual_seed(0)
data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(4)]


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_step(model_class, config, accumulate, set_false=False):
    torch.manual_seed(0)
    args = TrainingArguments(
        "out", per_device_train_batch_size=4, gradient_accumulation_steps=accumulate, max_steps=1, logging_steps=1,
        optim="sgd", max_grad_norm=0, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        train_sampling_strategy="sequential",
    )
    gradient = Gradient()
    trainer = Trainer(model_class(config), args, train_dataset=data * accumulate, callbacks=[gradient])
    trainer.remove_callback(PrinterCallback)
    if set_false:
        trainer.loss_is_scaled_for_ga = False
    trainer.train()
    return gradient.seen, trainer.state.log_history[0]["loss"]


for name, (model_class, config) in models.items():
    whole, loss = one_step(model_class, config, 1)
    parts, logged = one_step(model_class, config, 4)
    ratio, cosine = (parts.norm() / whole.norm()).item(), torch.cosine_similarity(whole, parts, dim=0).item()
    right, _ = one_step(model_class, config, 4, set_false=True)
    fixed = (right.norm() / whole.norm()).item()
    print(f"{name:<12} gradient x {ratio:.3f}, logged loss x {logged / loss:.3f}; with "
          f"loss_is_scaled_for_ga=False gradient x {fixed:.3f}")
    expected = 1 if name == "ViT" else 4
    assert abs(ratio - expected) < 0.01 and abs(logged / loss - expected) < 0.01, (name, ratio, logged / loss)
    assert cosine > 0.999 and abs(fixed - expected / 4) < 0.01, (name, cosine, fixed)
PY

# Expected output:
# ResNet       gradient x 4.000, logged loss x 4.000; with loss_is_scaled_for_ga=False gradient x 1.000
# RegNet       gradient x 4.000, logged loss x 4.000; with loss_is_scaled_for_ga=False gradient x 1.000
# MobileNetV2  gradient x 4.000, logged loss x 4.000; with loss_is_scaled_for_ga=False gradient x 1.000
# BEiT         gradient x 4.000, logged loss x 4.000; with loss_is_scaled_for_ga=False gradient x 1.000
# PoolFormer   gradient x 4.000, logged loss x 4.000; with loss_is_scaled_for_ga=False gradient x 1.000
# ViT          gradient x 1.000, logged loss x 1.000; with loss_is_scaled_for_ga=False gradient x 0.250
