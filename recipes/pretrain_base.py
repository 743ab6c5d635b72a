"""Trains the small bases that LoRA tasks adapt: each sees a part of its data, the rest is held back for the adapter.

    python recipes/pretrain_base.py --data PATH --output_dir outputs/meta_train/tasks
    python recipes/pretrain_base.py --names digits-mlp docs-gpt2      # no download

GPT-2 on E2E without restaurants near something; a ViT on the first seven classes of CIFAR-10; an MLP on the first
seven digits; a GPT-2 on one half of Python's help topics, the other half is in capitals; a Llama on the email and
asyncio packages, not on unittest. Made once, kept as safetensors. Where pretrained weights are at hand, adapt those:
a task takes any model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.tasks.named import check_tasks, pretrained_base
from hf_sl2o.experiments.tasks.problems import PROBLEMS

NAMES = ("digits-mlp", "docs-gpt2", "e2e-gpt2", "cifar-vit", "code-llama")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=sorted(set(NAMES) & set(PROBLEMS)), default=list(NAMES))
    parser.add_argument("--data", default="embedded", help="embedded, or a folder with e2e_nlg and cifar10")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/meta_train/tasks"))
    options = parse_options(parser, argv)
    check_tasks(options.names, options.data, lora=True)
    losses: dict[str, dict[str, float]] = {}
    for name in options.names:
        problem, where, weights = pretrained_base(name, options.data, options.output_dir)
        model = problem.build_model()
        model.load_state_dict(weights, strict=False)
        model.eval()
        with torch.no_grad():
            losses[name] = {
                part: sum(float(problem.loss(model, batch)) for batch in problem.eval_batches(part))
                / len(problem.eval_batches(part))
                for part in ("base", "held-back")
            }
        print(f"{name}: held-out loss {losses[name]['base']:.3f} on what it saw, {losses[name]['held-back']:.3f} on "
              f"what was held back ({where})")  # fmt: skip
    return losses


if __name__ == "__main__":
    run_script(main)
