"""Networks and rules of the tests of gradients of zero."""

import torch
from transformers import TrainingArguments

from hf_sl2o import LSTMRule, Rule, RuleConfig, SymbolicRule
from hf_sl2o.rules import load_rule
from hf_sl2o.rules.config import EXPRESSIONS

SHIPPED = ["default", "default-lora", "paper-cnn", "paper-transformer"]


PRESETS = ["paper-cnn", "paper-transformer", "rnnprop", "l2o-dm", "symbolic"]


ALL_INPUTS = RuleConfig(
    momenta=(0.5, 0.99), progress=True, tensor_scale=True, agreement=True, log_sign=5.0, embed_size=4, num_layers=2,
    squash=False,
)  # fmt: skip


def rules():
    found = {name: load_rule(name, with_basis=False) for name in SHIPPED}
    torch.manual_seed(1)
    for name in PRESETS:
        found[f"preset {name}"] = Rule.from_config(RuleConfig.preset(name))
        found[f"published {name}"] = Rule.from_config(RuleConfig.preset(name, published_quirks=True))
    found |= {f"expression {name}": SymbolicRule(RuleConfig(expression=name)) for name in EXPRESSIONS}
    found["all inputs"] = LSTMRule(ALL_INPUTS)
    return found


NAMES = sorted(rules())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copies(tensors):
    return [p.detach().clone() for p in tensors]


SEEN, UNSEEN = [2, 3], [0, 1, 4, 5, 6, 7, 8, 9]


def arguments(folder, kind=TrainingArguments, **options):
    settings = {"max_steps": 5, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "seed": 1}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "optim": "sl2o"}
    return kind(str(folder), **{**settings, **options})


def batch(step):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


def step(model, optimizer, at, change=lambda p: None):
    optimizer.zero_grad()
    model(batch(at))["loss"].backward()
    for p in model.parameters():
        change(p)
    optimizer.step()
