"""Small networks, optimizers with two points, and what tests of them compare."""

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sl2o import LearnedOptimizer, SL2OTrainer, SL2OTrainingArguments, SubspaceOptimizer
from hf_sl2o.rules import load_rule

from .conftest import random_dense

KINDS = ["tensors", "sgd", "rule"]


LOW = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x, labels=None):
        y = self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))))
        return {"loss": (y - (0 if labels is None else labels)).square().mean(), "logits": y}


NAMED = list(Net().named_parameters())


def batch(step):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


ROWS = [{"x": x, "labels": torch.sin(2 * x[:4])} for step in range(8) for x in batch(step)]


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def states(model):
    found = model.state_dict()
    return [found[name].clone() for name, _ in model.named_parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def far(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def optimizer_of(given, kind, average=4.0, basis=None):
    named = given.named_parameters() if isinstance(given, nn.Module) else given
    if kind == "tensors":
        return LearnedOptimizer(given, load_rule("default-lora", with_basis=False), average=average)
    basis = random_dense(named) if basis is None else basis
    if kind == "sgd":
        return SubspaceOptimizer(given, basis, lambda c: torch.optim.SGD(c, lr=1.0, momentum=0.5), average=average)
    inner = lambda c: LearnedOptimizer(c, load_rule("default", with_basis=True), total_steps=20)  # noqa: E731
    return SubspaceOptimizer(given, basis, inner, average=average)


def step(model, optimizer, at, between=None):
    optimizer.zero_grad()
    model(batch(at))["loss"].backward()
    if between is not None:
        between()
    optimizer.step()


def begun(kind, steps=4, dtype=torch.float32, average=4.0):
    model = Net(dtype=dtype)
    optimizer = optimizer_of(model, kind, average)
    for at in range(steps):
        step(model, optimizer, at)
    return model, optimizer


def replace(model, how):
    other = Net(9, next(model.parameters()).dtype)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif how == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
        return
    elif how == "copy_":
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.copy_(q)
    elif how == "data.copy_":
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data.copy_(q.data)
    elif how == "vector":
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(other.parameters()), model.parameters())
    elif how == "data =":
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = q.data.clone()
    elif how == "neg_":
        for p in model.parameters():
            p.data.neg_()
    elif how == "rows":
        for p in model.parameters():
            p.data = p.data.flip(0)
    elif how == "rows in place":
        for p in model.parameters():
            p.data.copy_(p.data.flip(0).clone())


def arguments(folder, kind, with_basis, average=True, optim="sl2o", **options):
    words = "average=9" if average else "average=0"
    if with_basis:
        if not (folder / "basis").exists():
            random_dense(Net().named_parameters()).save_pretrained(folder / "basis")
        words = f"basis={folder / 'basis'},{'average=4' if average else 'average=0'},lr=5"
    settings = {"max_steps": 6, "per_device_train_batch_size": 16, "use_cpu": True, "report_to": "none", "seed": 1}
    settings |= {
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    settings |= {"learning_rate": 1.0, "optim": optim, "optim_args": words}
    kind = SL2OTrainingArguments if issubclass(kind, SL2OTrainer) else TrainingArguments
    return kind(str(folder / "out"), **{**settings, **options})


def trainer_of(folder, kind=Trainer, with_basis=True, callbacks=(), model=None, objects=None, **options):
    args = arguments(folder, kind, with_basis, **options)
    model = Net() if model is None else model
    return kind(model, args, train_dataset=ROWS, eval_dataset=ROWS[:32], callbacks=list(callbacks), **(objects or {}))


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Calls(TrainerCallback):
    """Calls a function of the state in one hook."""

    def __init__(self, hook, call):
        setattr(self, hook, lambda args, state, control, **kwargs: call(state, control, kwargs["model"]))
