"""What a user does to the weights between two steps of a run with an average: both points go along."""

import pytest
import torch
from torch import nn

from hf_sl2o import Layout, LearnedOptimizer, LSTMRule, RandomBasis, RuleConfig, SubspaceOptimizer
from hf_sl2o.optim import _piece
from hf_sl2o.optim._kept import KeepsCoefficients

STEPS = 25


@pytest.fixture(autouse=True, params=["read on the host", "never read back"])
def path(request, monkeypatch):
    """What a GPU does, where looking at the weights would wait for it, is computed here on a CPU, too."""
    if request.param == "never read back":
        monkeypatch.setattr(_piece, "_is_host", lambda tensor: False)
        monkeypatch.setattr(KeepsCoefficients, "_on_host", property(lambda self: False))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def rule():
    torch.manual_seed(1)
    return LSTMRule(RuleConfig(output_scale=0.02))


def optimizer_of(model, kind, average):
    if kind == "tensors":
        return LearnedOptimizer(model, rule(), average=average)
    basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), 20)
    inner = rule() if kind == "rule" else (lambda c: torch.optim.SGD(c, lr=0.3, momentum=0.5))
    return SubspaceOptimizer(model, basis, inner, average=average)


def batch(step):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(2 * x[:, :3])


def flat(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


@torch.no_grad()
def write(model, vector):
    torch.nn.utils.vector_to_parameters(vector.clone(), model.parameters())


def run(kind, touch, average=4.0, steps=STEPS):
    """Returns the published weights after each step, and the last one's at the end."""
    model = network()
    optimizer = optimizer_of(model, kind, average)
    published = []
    for step in range(steps):
        x, y = batch(step)
        (model.train()(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            touch(model, step)
        published.append(flat(model))
    optimizer.use_last()
    return torch.stack(published), flat(model), optimizer


def nothing(model, step):
    pass


def clamp(model, step):
    for p in model.parameters():
        p.clamp_(-100, 100)


def load_own(model, step):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def swap(model, step):
    """As a callback that evaluates an average of its own, and puts the weights back."""
    kept = [p.clone() for p in model.parameters()]
    for p, old in zip(model.parameters(), kept, strict=True):
        p.zero_()
        p.copy_(old)


KINDS = ["tensors", "sgd", "rule"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("touch", [clamp, load_own, swap])
def test_writing_the_same_numbers_is_no_change(kind, touch):
    plain, touched = run(kind, nothing), run(kind, touch)
    assert torch.equal(plain[0], touched[0]) and torch.equal(plain[1], touched[1])
    assert (plain[0][-1] - plain[1]).norm() > 1e-3  # the break: two points


@pytest.mark.parametrize("kind", ["sgd", "rule"])
@pytest.mark.parametrize("touch", [clamp, load_own])
def test_nor_is_it_for_an_optimizer_that_does_not_know_the_model(kind, touch):
    ends = []
    for of in (nothing, touch):
        model = network()
        basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), 20)
        inner = rule() if kind == "rule" else (lambda c: torch.optim.SGD(c, lr=0.3))
        optimizer = SubspaceOptimizer(model.named_parameters(), basis, inner, average=4.0)
        for step in range(STEPS):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                of(model, step)
        last = flat(model)
        optimizer.eval()
        ends.append((last, flat(model)))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    assert not torch.equal(*ends[0])


def decay(model, step):
    for p in model.parameters():
        p.mul_(1 - 1e-3)


def small_decay(model, step):
    for p in model.parameters():
        p.mul_(1 - 5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("touch", [decay, small_decay])
def test_both_points_move_by_a_change(kind, touch):
    """Against a run by hand: an optimizer without an average at the last step, and a mean beside it."""
    published, last, _ = run(kind, touch, steps=14)
    model = network()
    optimizer, mean = optimizer_of(model, kind, 0.0), flat(model)
    for step in range(14):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = torch.lerp(mean, flat(model), 5 / (step + 1 + 4))
        here = flat(model)
        write(model, mean)
        with torch.no_grad():
            touch(model, step)
        changed = flat(model)
        write(model, here + changed - mean)
        mean = changed
        torch.testing.assert_close(published[step], mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(last, flat(model), rtol=0, atol=2e-5)
    without, _, _ = run(kind, nothing, steps=14)
    assert (without[-1] - published[-1]).norm() > (1e-2 if touch is decay else 5e-4)


@pytest.mark.parametrize("kind", ["sgd", "rule"])
def test_coefficients_are_those_of_the_weights_after_a_change_in_the_subspace(kind):
    start = flat(network())

    def along(model, step):
        basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), 20)
        basis.add_(list(model.parameters()), torch.full((20,), 1e-4))

    _, _, optimizer = run(kind, along)
    optimizer.use_average()
    model = network()
    write(model, start)
    optimizer.basis.add_(list(model.parameters()), optimizer.coefficients)
    now = torch.cat([p.detach().reshape(-1) for p in optimizer.param_groups[0]["params"]])
    torch.testing.assert_close(flat(model), now, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_are_zero_in_both_points(kind):
    def prune(model, step):
        model[0].weight[:4] = 0

    published, last, _ = run(kind, prune)
    assert not published[-1][: 4 * 6].any()
    if kind == "tensors":  # in a basis the rows go on along the directions, and are pruned again
        assert not last[: 4 * 6].any()
    assert published[-1][4 * 6 :].all()
