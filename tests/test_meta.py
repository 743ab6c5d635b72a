"""The meta-gradient against autograd through the summed losses; episodes, checkpoints, and what is refused."""

import copy
import json

import pytest
import torch
from torch import nn

from hf_sl2o import LSTMRule, MetaTrainer, MetaTrainingArguments, Rule, RuleConfig, SymbolicRule, Task, unroll
from hf_sl2o.meta.task import InnerRun

from .conftest import random_dense

DOUBLE = torch.float64


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def data(seed, dtype=torch.float32, batches=200):
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
    for _ in range(batches):
        x = torch.randn(8, 4, generator=generator, dtype=dtype)
        yield x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], dim=1)


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def make_task(dtype=torch.float32, name="toy", **changes):
    basis = random_dense(network(dtype).named_parameters(), dim=5, dtype=dtype, units=torch.ones(5, dtype=dtype))
    settings = {
        "build_model": lambda: network(dtype),
        "batches": lambda seed: data(seed, dtype),
        "loss": loss,
        "basis": basis,
        "eval_batches": list(data(7, dtype, 2)),
    }
    return Task(name, **{**settings, **changes})


def direct_meta_gradient(rule, task, steps, lr, shift=0):
    """Autograd through sum_t L(theta_0 + U c_t), the rule's inputs detached; `shift=1` pairs g_t with c_{t+1}."""
    model, u = network(DOUBLE), task.basis.as_matrix().double()
    names, anchors = zip(*[(k, p.detach()) for k, p in model.named_parameters()], strict=True)
    c, state = torch.zeros(5, dtype=DOUBLE), rule.init_state(5, dtype=DOUBLE)
    total, pairs, batches = 0.0, [], data(0, DOUBLE)
    for _ in range(steps):
        batch = next(batches)
        moved = (u.T @ c).split([a.numel() for a in anchors])
        weights = {k: a + d.view_as(a) for k, a, d in zip(names, anchors, moved, strict=True)}
        value = (torch.func.functional_call(model, weights, (batch[0],)) - batch[1]).square().mean()
        leaf = c.detach().requires_grad_()
        moved = (u.T @ leaf).split([a.numel() for a in anchors])
        weights = {k: a + d.view_as(a) for k, a, d in zip(names, anchors, moved, strict=True)}
        inner = (torch.func.functional_call(model, weights, (batch[0],)) - batch[1]).square().mean()
        (g,) = torch.autograd.grad(inner, leaf)
        total = total + value
        delta, state = rule(g.detach(), state)
        pairs.append((g.detach(), c, c - lr * delta))
        c = c - lr * delta
    if shift:
        total = sum(torch.dot(g, after) for g, _, after in pairs)
    return torch.autograd.grad(total, list(rule.parameters()))


def test_meta_gradient_equals_autograd_through_the_summed_losses():
    rule, task = LSTMRule(RuleConfig(output_scale=0.5)).double(), make_task(DOUBLE)
    run = InnerRun(task, seed=0)
    c, state = torch.zeros(5, dtype=DOUBLE), rule.init_state(5, dtype=DOUBLE)
    surrogate, _, _, losses = unroll(rule, run, c, state, steps=8, lr=0.7)
    ours = torch.autograd.grad(surrogate, list(rule.parameters()))
    direct = direct_meta_gradient(rule, task, 8, 0.7)
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert b.norm() > 1e-3
    wrong = direct_meta_gradient(rule, task, 8, 0.7, shift=1)
    assert max((a - b).abs().max() for a, b in zip(ours, wrong, strict=True)) > 1e-3
    assert losses.shape == (8,)


def test_unroll_moves_the_model_as_the_coefficients():
    rule, task = LSTMRule().double(), make_task(DOUBLE)
    run = InnerRun(task, seed=0)
    _, c, _, _ = unroll(rule, run, torch.zeros(5, dtype=DOUBLE), rule.init_state(5, dtype=DOUBLE), steps=4, lr=0.5)
    expected = [a.detach() + d for a, d in zip(network(DOUBLE).parameters(), task.basis.lift(c.detach()), strict=True)]
    for a, b in zip(run.parameters, expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)


def test_meta_training_beats_the_fresh_rule(tmp_path):
    args = MetaTrainingArguments(str(tmp_path), inner_steps=40, meta_epochs=6, disable_tqdm=True)
    trainer = MetaTrainer(LSTMRule(RuleConfig(output_scale=0.3)), args, [make_task()])
    rule = trainer.train()
    validation = [entry["validation_loss"] for entry in trainer.log_history if "best" in entry]
    assert min(validation) < 0.9 * validation[0]
    assert trainer.best == min(entry["score"] for entry in trainer.log_history if "best" in entry) < 1
    assert Rule.from_pretrained(tmp_path).fingerprint == rule.fingerprint
    assert json.loads((tmp_path / "log.json").read_text()) == trainer.log_history


def comparable(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def test_stopping_and_going_on_equals_the_uninterrupted_run(tmp_path):
    fresh = LSTMRule(RuleConfig(output_scale=0.3))

    def trainer(folder, epochs):
        args = MetaTrainingArguments(
            str(tmp_path / folder), inner_steps=20, meta_epochs=epochs, eval_every=1, disable_tqdm=True
        )
        return MetaTrainer(copy.deepcopy(fresh), args, [make_task(), make_task(name="second")])

    whole = trainer("whole", 4)
    whole.train()
    trainer("parts", 2).train()
    rest = trainer("parts", 4)
    rest.train()
    assert rest.rule.fingerprint == whole.rule.fingerprint
    assert comparable(rest.log_history) == comparable(whole.log_history)
    shorter = trainer("short", 2)
    shorter.train()
    assert shorter.rule.fingerprint != whole.rule.fingerprint

    other = MetaTrainingArguments(str(tmp_path / "parts"), inner_steps=30, meta_epochs=4, disable_tqdm=True)
    with pytest.raises(ValueError, match="made with other settings"):
        MetaTrainer(copy.deepcopy(fresh), other, [make_task()]).train()


def test_a_diverging_episode_ends_and_leaves_the_rule_finite(tmp_path):
    args = MetaTrainingArguments(
        str(tmp_path), inner_steps=40, meta_epochs=1, learning_rate=1e6, disable_tqdm=True, eval_every=1
    )
    trainer = MetaTrainer(LSTMRule(), args, [make_task()])
    trainer.train()
    episode = next(entry for entry in trainer.log_history if "diverged" in entry)
    assert episode["diverged"] and episode["steps"] < 40
    assert all(torch.isfinite(p).all() for p in trainer.rule.parameters())


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="unroll_length is 1, expected at least 2"):
        MetaTrainingArguments("x", unroll_length=1)
    with pytest.raises(ValueError, match="inner_steps 5 is below"):
        MetaTrainingArguments("x", inner_steps=5)
    args = MetaTrainingArguments(str(tmp_path), inner_steps=10, disable_tqdm=True)
    with pytest.raises(ValueError, match="at least one task"):
        MetaTrainer(LSTMRule(), args, [])
    with pytest.raises(ValueError, match="no weights to train"):
        MetaTrainer(SymbolicRule(), args, [make_task()])
    with pytest.raises(ValueError, match="'toy' has no eval_batches"):
        MetaTrainer(LSTMRule(), args, [make_task(eval_batches=())])
    with pytest.raises(ValueError, match="task 'toy'.*'0.weight'"):
        MetaTrainer(LSTMRule(), args, [make_task(build_model=lambda: nn.Linear(4, 2))]).train()
    with pytest.raises(ValueError, match="'toy' ran out of batches"):
        MetaTrainer(LSTMRule(), args, [make_task(batches=lambda seed: data(seed, batches=5))]).train()
    rule = LSTMRule()
    with pytest.raises(ValueError, match="use at least 2"):
        unroll(rule, InnerRun(make_task(), 0), torch.zeros(5), rule.init_state(5), steps=1)
