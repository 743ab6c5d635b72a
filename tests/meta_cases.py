"""Small meta-trainings that several test files share."""

import torch
from torch import nn

from hf_sl2o import (
    LSTMRule,
    MetaTrainer,
    MetaTrainingArguments,
    RuleConfig,
)
from hf_sl2o.foundation.files import load_json, load_tensors

from .conftest import random_dense
from .test_meta import data, make_task


def dropout_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))


def two_tasks(**changes):
    basis = random_dense(dropout_network().named_parameters(), dim=5, units=torch.ones(5))
    return [make_task(**changes), make_task(name="dropout", build_model=dropout_network, basis=basis, **changes)]


def small_rule(**changes):
    torch.manual_seed(11)
    return LSTMRule(RuleConfig(**{"output_scale": 0.3, "hidden_size": 4, **changes}))


def make(
    folder, *, tasks=None, eval_tasks=None, rule=None, estimator=None, meta_optimizer=None, callbacks=(), **options
):
    settings = {"unroll_length": 5, "inner_steps": 15, "meta_epochs": 2, "eval_every": 1, "disable_tqdm": True}
    settings["divergence_factor"] = 20.0  # a lucky first batch ends no episode
    args = MetaTrainingArguments(str(folder), **{**settings, **options})
    return MetaTrainer(
        small_rule() if rule is None else rule,
        args,
        two_tasks() if tasks is None else tasks,
        eval_tasks,
        estimator=estimator,
        meta_optimizer=meta_optimizer,
        callbacks=callbacks,
    )


def end_of(folder):
    """The tensors of the newest checkpoint: rule, best rule, meta-optimizer."""
    return load_tensors(folder / load_json(folder / "checkpoint.json")["folder"] / "meta.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def episodes(trainer):
    return [entry for entry in trainer.log_history if "diverged" in entry]


def scores(trainer):
    return [entry["score"] for entry in trainer.log_history if "score" in entry]


def exploding_task(name="exploding", growth=8.0, nan_at=None):
    def batches(seed):
        for t, (x, y) in enumerate(data(seed)):
            yield x, y * (growth ** (t / 2) if nan_at != t else float("nan"))

    return make_task(name=name, batches=batches)
