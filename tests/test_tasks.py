"""An inner run's own randomness, coordinates and state; `train_on` against torch's optimizers."""

import contextlib
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_sl2o import (
    Layout,
    LearnedOptimizer,
    LSTMRule,
    RandomBasis,
    RuleConfig,
    SubspaceOptimizer,
    Task,
    train_on,
)
from hf_sl2o.meta.task import InnerRun

from .conftest import random_dense
from .test_meta import DOUBLE, data, make_task, network


def dropout_network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).to(dtype)


def dropout_task(dtype=torch.float32, **changes):
    units = torch.ones(5, dtype=dtype)
    basis = random_dense(dropout_network(dtype).named_parameters(), dim=5, dtype=dtype, units=units)
    return make_task(dtype, **{"build_model": lambda: dropout_network(dtype), "basis": basis, **changes})


def go(run, steps):
    """SGD by hand; what the run gives."""
    out = []
    for _ in range(steps):
        value, g = run.gradient()
        run.move(-0.1 * g)
        out += [value, g]
    return out


def weights(run):
    return [p.detach().clone() for p in run.parameters]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def interleaved(task):
    first, second = InnerRun(task, 0), InnerRun(task, 1)
    mixed = [[], []]
    for _ in range(4):
        mixed[0] += go(first, 1)
        mixed[1] += go(second, 1)
    return mixed[0] + weights(first), mixed[1] + weights(second)


# Randomness


def test_interleaved_runs_equal_runs_one_after_the_other(monkeypatch):
    task = dropout_task()
    alone = []
    for seed in (0, 1):
        run = InnerRun(task, seed)
        alone.append(go(run, 4) + weights(run))
    assert not equal(alone[0], alone[1])
    together = interleaved(task)
    assert equal(together[0], alone[0]) and equal(together[1], alone[1])
    monkeypatch.setattr(InnerRun, "own_randomness", lambda self, *options: contextlib.nullcontext())
    broken = interleaved(task)
    assert not equal(broken[0], alone[0])


def test_the_randomness_outside_is_left_alone():
    task = dropout_task()
    before, python = torch.get_rng_state(), random.getstate()
    run = InnerRun(task, 0)
    moved = go(run, 2)
    run.evaluate()
    run.load_state_dict({name: tensor.clone() for name, tensor in run.state_dict().items()})
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    torch.manual_seed(99)
    torch.rand(5)
    assert equal(go(InnerRun(task, 0), 2), moved)  # and does not matter
    dropout_network()(torch.ones(2, 4))
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_loader_that_shuffles_draws_from_the_runs_own_randomness():
    x, y = zip(*data(0, batches=4), strict=True)
    rows = TensorDataset(torch.cat(x), torch.cat(y))
    task = dropout_task(batches=lambda seed: DataLoader(rows, batch_size=8, shuffle=True))
    before = torch.get_rng_state()
    first = go(InnerRun(task, 0), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert equal(go(InnerRun(task, 0), 3), first) and not equal(go(InnerRun(task, 1), 3), first)


def test_evaluation_of_a_random_loss_draws_from_the_runs_own_randomness():
    def noisy(model, batch):
        return (model(batch[0]) - batch[1] + torch.randn_like(batch[1])).square().mean()

    run = InnerRun(dropout_task(loss=noisy), 0)
    before = torch.get_rng_state()
    first = run.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert InnerRun(dropout_task(loss=noisy), 0).evaluate() == first


def test_evaluation_does_not_change_the_run():
    plain, looked_at = InnerRun(dropout_task(), 0), InnerRun(dropout_task(), 0)
    expected = go(plain, 4)
    parts = go(looked_at, 2)
    held_out = looked_at.evaluate()
    assert looked_at.model.training and held_out.shape == () and not held_out.requires_grad
    assert equal(parts + go(looked_at, 2), expected)
    model = looked_at.model.eval()
    with torch.no_grad():
        by_hand = [(model(x) - y).square().mean() for x, y in data(7, batches=2)]
    torch.testing.assert_close(looked_at.evaluate(), torch.stack(by_hand).mean())


# Saved and resumed


def snapshot(run):
    return {name: tensor.clone() for name, tensor in run.state_dict().items()}


def test_a_run_goes_on_from_its_state_to_the_bit():
    whole = InnerRun(dropout_task(), 0)
    go(whole, 3)
    saved = snapshot(whole)
    expected = go(whole, 3) + weights(whole) + list(whole.model.buffers())
    rest = InnerRun(dropout_task(), 0)
    rest.load_state_dict(saved)
    assert rest.drawn == 3 and not equal(weights(rest), dropout_network().parameters())
    assert equal(go(rest, 3) + weights(rest) + list(rest.model.buffers()), expected)
    for forgotten in ("rng.0", "drawn", "parameter.0", "buffer.1.running_mean"):
        broken = InnerRun(dropout_task(), 0)
        fresh = snapshot(broken)
        broken.load_state_dict({**saved, forgotten: fresh[forgotten]})
        ends = go(broken, 3) + weights(broken) + list(broken.model.buffers())
        assert not equal(ends, expected), forgotten


def test_a_run_whose_batches_draw_from_torch_goes_on_to_the_bit():
    rows = torch.cat([x for x, _ in data(0, batches=2)])

    def shuffled(seed):  # what an endless loader does: a new order each pass
        while True:
            for part in torch.randperm(len(rows)).split(8):
                x = rows[part]
                yield x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], dim=1)

    task = dropout_task(batches=shuffled)
    whole = InnerRun(task, 0)
    go(whole, 3)  # in the second pass
    saved = snapshot(whole)
    expected = go(whole, 3) + weights(whole)
    rest = InnerRun(task, 0)
    rest.load_state_dict(saved)
    assert equal(go(rest, 3) + weights(rest), expected)


# Coordinates


def test_scaled_coordinates_are_sgd_with_the_scaled_gradient():
    task, scales = make_task(DOUBLE), torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0], dtype=DOUBLE)
    run = InnerRun(task, 0, scales=scales)
    ours = go(run, 5)
    plain = go(InnerRun(task, 0), 5)
    model, u = network(DOUBLE), task.basis.as_matrix().double()
    for t, (x, y) in zip(range(5), data(0, DOUBLE), strict=False):
        model.zero_grad()
        value = (model(x) - y).square().mean()
        value.backward()
        g = scales * (u @ torch.cat([p.grad.reshape(-1) for p in model.parameters()]))  # dL/dc' with c = s c'
        torch.testing.assert_close(ours[2 * t], value.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours[2 * t + 1], g, rtol=1e-10, atol=1e-12)
        moved = (u.T @ (scales * -0.1 * g)).split([p.numel() for p in model.parameters()])
        with torch.no_grad():
            for p, part in zip(model.parameters(), moved, strict=True):
                p += part.view_as(p)
    torch.testing.assert_close(weights(run), [p.detach() for p in model.parameters()], rtol=1e-10, atol=1e-12)
    assert (ours[-1] - plain[-1]).abs().max() > 1e-3


# What goes wrong is named


def test_errors_name_the_task_and_the_batch():
    def failing(model, batch):
        failing.calls += 1
        if failing.calls == 3:
            raise IndexError("boom")
        return (model(batch[0]) - batch[1]).square().mean()

    failing.calls = 0
    run = InnerRun(make_task(loss=failing), 0)
    with pytest.raises(RuntimeError, match="task 'toy' failed at batch 3: IndexError: boom") as caught:
        go(run, 5)
    assert isinstance(caught.value.__cause__, IndexError)

    detached = make_task(loss=lambda model, batch: model(batch[0]).mean().detach())
    with pytest.raises(RuntimeError, match="task 'toy' failed at batch 1: RuntimeError: .*does not require grad"):
        go(InnerRun(detached, 0), 1)

    def broken_batches(seed):
        yield from data(seed, batches=1)
        raise OSError("disk")

    with pytest.raises(RuntimeError, match=r"task 'toy' failed at batch \d: OSError: disk"):
        go(InnerRun(make_task(batches=broken_batches), 0), 2)
    with pytest.raises(ValueError, match="'toy' ran out of batches; yield at least inner_steps"):
        go(InnerRun(make_task(batches=lambda seed: data(seed, batches=1)), 0), 2)
    with pytest.raises(ValueError, match="task 'toy'.*'0.weight'"):
        InnerRun(make_task(build_model=lambda: nn.Linear(4, 2)), 0)


# train_on


def loop_by_hand(task, inner, steps, schedule=None, seed=0):
    """`SubspaceOptimizer` and a torch schedule in a plain loop."""
    model = task.build_model()
    optimizer = SubspaceOptimizer(model.named_parameters(), task.basis, inner)
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    for _, batch in zip(range(steps), task.batches(seed), strict=False):
        value = task.loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.item())
    with torch.no_grad():
        ended = torch.stack([task.loss(model.eval(), batch) for batch in task.eval_batches]).mean().item()
    return losses, ended


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize(
    "inner",
    [
        lambda c: torch.optim.SGD(c, lr=0.3, momentum=0.9),
        lambda c: torch.optim.AdamW(c, lr=0.1, weight_decay=0.1),
        lambda c: LearnedOptimizer(c, _rule(), lr=0.5),
    ],
    ids=["sgd", "adamw", "learned"],
)
def test_train_on_equals_a_plain_loop(inner, schedule):
    task, steps = make_task(), 12
    factor = {"constant": None, "linear": lambda step: max(0.0, (steps - step) / steps)}
    result = train_on(task, inner, steps, schedule=schedule, evaluate_at=(0, steps))
    losses, ended = loop_by_hand(task, inner, steps, factor[schedule])
    assert losses[0] - min(losses) > 0.01 and result["eval"][0][1] != result["eval"][1][1]
    assert result["train_loss"] == pytest.approx(losses, abs=1e-6)
    assert result["eval"][1] == [steps, pytest.approx(ended, abs=1e-6)]
    other = "linear" if schedule == "constant" else "constant"
    broken, _ = loop_by_hand(task, inner, steps, factor[other])
    assert max(abs(a - b) for a, b in zip(broken, losses, strict=True)) > 1e-4


def _rule():
    torch.manual_seed(1)
    return LSTMRule(RuleConfig(output_scale=0.3))


def test_train_on_gives_its_seed_to_the_batches_and_looks_where_it_is_told():
    task, sgd = make_task(), lambda c: torch.optim.SGD(c, lr=0.3)
    looked = []

    def metric(model):
        looked.append([p.detach().clone() for p in model.parameters()])
        return float(len(looked))

    result = train_on(task, sgd, 6, seed=1, evaluate_at={0, 2, 6, 99}, metric=metric)
    assert [entry[0] for entry in result["eval"]] == [0, 2, 6] and [entry[2] for entry in result["eval"]] == [1, 2, 3]
    assert equal(looked[0], network().parameters()) and not equal(looked[1], looked[2])
    assert len(result["train_loss"]) == 6 and result["seconds"] > 0
    assert train_on(task, sgd, 6)["eval"] == []
    assert train_on(task, sgd, 6, seed=1)["train_loss"] == result["train_loss"]
    assert train_on(task, sgd, 6, seed=2)["train_loss"] != result["train_loss"]
    losses, _ = loop_by_hand(task, sgd, 6, seed=1)
    assert result["train_loss"] == pytest.approx(losses, abs=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match='schedule is \'cosine\', expected "constant" or "linear"'):
        train_on(make_task(), lambda c: torch.optim.SGD(c, lr=0.3), 3, schedule="cosine")


def test_a_model_that_comes_in_evaluation_mode_is_trained_with_its_dropout():
    """As `from_pretrained` returns it."""

    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Dropout(0.5)).eval()

    basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), dim=4)
    batch = torch.ones(2, 30)
    task = Task("dropout", build, lambda seed: [batch] * 4, lambda model, x: model(x).square().mean(), basis, [batch])
    run = InnerRun(task, seed=0)
    assert run.model.training and run.gradient()[0] != run.gradient()[0]
    assert run.evaluate() == run.evaluate() and run.model.training
