"""Three estimates of a window's meta-gradient against finite differences, autograd and an enumeration."""

import copy
import itertools

import pytest
import torch
from torch import nn

from hf_sl2o import PES, FirstOrder, IdentityBasis, Layout, LSTMRule, RuleConfig, SecondOrder, Task, unroll
from hf_sl2o.meta.task import InnerRun

from .conftest import random_dense
from .test_meta import DOUBLE, make_task, network


def small_rule(**changes):
    torch.manual_seed(5)
    return LSTMRule(RuleConfig(**{"output_scale": 0.5, "hidden_size": 3, **changes})).double()


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def cosine(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


class LossOf(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.model, self.of = task.build_model().double(), task.loss

    def forward(self, batch):
        return self.of(self.model, batch)


def by_hand(rules, task, lrs, *, scales=None, second_order=True, total_steps=None, seen=None):
    """(T,) losses at theta_0 + U c_t, step t made by `rules[t]`; autograd runs through all of it, or not through g."""
    net, u = LossOf(task), task.basis.as_matrix().double()
    u = u if scales is None else scales[:, None] * u
    names, anchors = zip(*[(name, p.detach()) for name, p in net.named_parameters()], strict=True)
    c, state = torch.zeros(len(u), dtype=DOUBLE).requires_grad_(), rules[0].init_state(len(u), dtype=DOUBLE)
    losses, batches = [], iter(task.batches(0))
    for rule, lr in zip(rules, lrs, strict=True):
        moved = (u.T @ c).split([anchor.numel() for anchor in anchors])
        weights = {k: a + part.view_as(a) for k, a, part in zip(names, anchors, moved, strict=True)}
        value = torch.func.functional_call(net, weights, ([x.double() for x in next(batches)],))
        (g,) = torch.autograd.grad(value, c, create_graph=True)
        g = g if second_order else g.detach()
        delta, state = rule(g, state, total_steps=total_steps)
        if seen is not None:
            seen.append((g, delta))
        c = c - lr * delta
        losses.append(value)
    return torch.stack(losses)


def windows(estimator, rule, task, lrs, lengths, *, seed=0, scales=None, total_steps=None, between=None):
    """The windows of one episode."""
    runs = [InnerRun(task, 0, scales=scales) for _ in range(estimator.runs)]
    carry, generator, out, done = estimator.begin(rule, runs), torch.Generator().manual_seed(seed), [], 0
    for length in lengths:
        part, done = lrs[done : done + length], done + length
        total = len(lrs) if total_steps is None else total_steps
        window = estimator.window(rule, runs, carry, part, total_steps=total, generator=generator)
        carry = window.carry if between is None else between(window.carry)
        out.append(window)
    return out, runs


def central_difference(of, rule, name, index, h=1e-5):
    weights = dict(rule.named_parameters())[name].data.view(-1)
    kept, values = float(weights[index]), []
    for value in (kept + h, kept - h):
        weights[index] = value
        values.append(float(of().detach()))
    weights[index] = kept
    return (values[0] - values[1]) / (2 * h)


# SecondOrder


@pytest.mark.parametrize("scaled", [False, True])
def test_second_order_equals_finite_differences_in_both_windows(scaled):
    scales = torch.tensor([0.3, 0.7, 1.0, 1.5, 3.0], dtype=DOUBLE) if scaled else None
    base, task, lrs = small_rule(), make_task(DOUBLE), [0.7, 0.5, 0.6, 0.4, 0.7, 0.5, 0.6]
    rule = copy.deepcopy(base)
    both, _ = windows(SecondOrder(), base, task, lrs, [4, 3], scales=scales)
    first, _ = windows(FirstOrder(), base, task, lrs, [4, 3], scales=scales)
    for k, part in ((0, slice(0, 4)), (1, slice(4, 7))):
        rules = [rule if part.start <= t < part.stop else base for t in range(7)]
        gradients = dict(zip(dict(rule.named_parameters()), both[k].gradients, strict=True))
        for name, gradient in gradients.items():
            index = int(gradient.abs().argmax())
            expected = central_difference(
                lambda: by_hand(rules, task, lrs, scales=scales)[part].sum(),  # noqa: B023
                rule,
                name,
                index,
            )
            assert abs(expected) > 1e-3
            assert float(gradient.view(-1)[index]) == pytest.approx(expected, rel=1e-5)
        difference = flat(both[k].gradients) - flat(first[k].gradients)
        assert difference.norm() > 1e-3 * flat(both[k].gradients).norm()  # 100 times the tolerance above
    torch.testing.assert_close(both[1].losses, first[1].losses, rtol=1e-10, atol=1e-10)


def test_second_order_moves_the_model_as_first_order_does():
    rule, task = small_rule(), make_task(DOUBLE)
    second, moved = windows(SecondOrder(), rule, task, [0.5] * 6, [3, 3])
    first, others = windows(FirstOrder(), rule, task, [0.5] * 6, [3, 3])
    assert (flat(moved[0].parameters) - flat(network(DOUBLE).parameters())).norm() > 0.1
    torch.testing.assert_close(flat(moved[0].parameters), flat(others[0].parameters), rtol=1e-10, atol=1e-10)
    assert second[1].carry.keys() == first[1].carry.keys()
    for name, value in second[1].carry.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, first[1].carry[name], rtol=1e-10, atol=1e-10)


def test_second_order_in_an_identity_basis():
    rule = small_rule().float()
    task = make_task(basis=IdentityBasis(Layout.from_named_parameters(network().named_parameters())))
    (window,), _ = windows(SecondOrder(), rule, task, [0.2] * 4, [4])
    exact, rough = [
        torch.autograd.grad(
            by_hand([double] * 4, task, [0.2] * 4, second_order=order).sum(), list(double.parameters())
        )
        for double in [copy.deepcopy(rule).double()]
        for order in (True, False)
    ]
    scale = flat(exact).norm()
    assert (flat(window.gradients) - flat(exact)).norm() < 3e-5 * scale  # fp32 against fp64
    assert (flat(window.gradients) - flat(rough)).norm() > 3e-3 * scale


# FirstOrder over some of the coordinates


def gradient_of(surrogate, rule):
    return flat(torch.autograd.grad(surrogate, list(rule.parameters())))


def test_mean_over_all_choices_of_coordinates_is_the_whole_gradient():
    rule, task = small_rule(), make_task(DOUBLE)

    def at(chosen):
        run = InnerRun(task, 0)
        c, state = torch.zeros(5, dtype=DOUBLE), rule.init_state(5, dtype=DOUBLE)
        coordinates = None if chosen is None else torch.tensor(chosen)
        return gradient_of(
            unroll(rule, run, c, state, steps=5, lr=0.7, coordinates=coordinates, imitation=0.1)[0], rule
        )

    whole, parts = at(None), [at(chosen) for chosen in itertools.combinations(range(5), 2)]
    assert all((part - whole).norm() > 0.01 * whole.norm() for part in parts)
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-9, atol=1e-12)
    unscaled = torch.stack(parts).mean(0) * 2 / 5  # the break: without d / K
    assert (unscaled - whole).norm() > 0.5 * whole.norm()


def test_drawn_coordinates_are_unbiased_and_change_no_movement():
    rule, task, lrs = small_rule(), make_task(DOUBLE), [0.7] * 4
    (whole,), runs = windows(FirstOrder(), rule, task, lrs, [4])
    full = flat(whole.gradients)
    draws = []
    for seed in range(192):
        (part,), moved = windows(FirstOrder(coordinates=2), rule, task, lrs, [4], seed=seed)
        draws.append(flat(part.gradients))
    draws = torch.stack(draws)
    assert cosine(draws.mean(0), full) > 0.99
    errors = [
        (draws.view(-1, block, len(full)).mean(1) - full).norm(dim=1).square().mean().sqrt() for block in (6, 24)
    ]
    assert 1.4 < errors[0] / errors[1] < 2.9  # four times the draws, half the error
    torch.testing.assert_close(part.losses, whole.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(moved[0].parameters), flat(runs[0].parameters), rtol=1e-12, atol=1e-12)
    assert (flat(moved[0].parameters) - flat(network(DOUBLE).parameters())).norm() > 0.1
    again, _ = windows(FirstOrder(coordinates=2), rule, task, lrs, [4], seed=0)
    assert torch.equal(flat(again[0].gradients), draws[0])
    assert len(torch.unique(draws.round(decimals=9), dim=0)) == 10  # every choice of 2 of 5


def test_some_coordinates_carry_the_state_of_all_into_the_next_window():
    rule, task, lrs = small_rule(momenta=(0.5,)), make_task(DOUBLE), [0.7] * 6
    whole, _ = windows(FirstOrder(), rule, task, lrs, [3, 3])
    part, _ = windows(FirstOrder(coordinates=2), rule, task, lrs, [3, 3])
    for name, value in whole[1].carry.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(part[1].carry[name], value, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole[0].carry["c"], whole[1].carry["c"])


@pytest.mark.parametrize("k", [5, 99])
def test_all_coordinates_are_the_whole_gradient_to_the_bit(k):
    rule, task = small_rule(), make_task(DOUBLE)
    (whole,), _ = windows(FirstOrder(), rule, task, [0.7] * 4, [4])
    (same,), _ = windows(FirstOrder(coordinates=k), rule, task, [0.7] * 4, [4])
    (less,), _ = windows(FirstOrder(coordinates=4), rule, task, [0.7] * 4, [4])
    assert torch.equal(flat(whole.gradients), flat(same.gradients))
    assert not torch.allclose(flat(whole.gradients), flat(less.gradients))


# PES


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 6, dtype=DOUBLE))


def quadratic(weights=(1.0, 1.0, 1.0, 1.0)):
    """sum_t weight_t |w - target|^2: the weights say at which steps a movement pays."""
    basis = random_dense(Point().named_parameters(), dim=3, dtype=DOUBLE, units=torch.ones(3, dtype=DOUBLE))
    target = torch.tensor([1.0, -0.5, 2.0, 0.3, -1.2, 0.8], dtype=DOUBLE)

    def batches(seed):
        for weight in weights:
            yield torch.tensor(weight, dtype=DOUBLE), target

    return Task("quadratic", Point, batches, lambda net, batch: batch[0] * (net.w - batch[1]).square().mean(), basis)


def mean_of_draws(estimator, rule, task, lrs, lengths, draws, **options):
    total = 0.0
    for seed in range(draws):
        out, _ = windows(estimator, rule, task, lrs, lengths, seed=seed, **options)
        total = total + sum(flat(window.gradients) for window in out)
    return total / draws


def exact_gradient(rule, task, lrs):
    total = by_hand([rule] * len(lrs), task, lrs).sum()
    exact = flat(torch.autograd.grad(total, list(rule.parameters())))
    name, p = next(iter(rule.named_parameters()))
    index = int(exact[: p.numel()].abs().argmax())
    of = lambda: by_hand([rule] * len(lrs), task, lrs).sum()  # noqa: E731
    assert float(exact[index]) == pytest.approx(central_difference(of, rule, name, index), rel=1e-5)
    return exact


def test_pes_in_one_window_agrees_with_the_exact_gradient():
    rule, task, lrs = small_rule(hidden_size=1), quadratic(), [0.5] * 4
    exact = exact_gradient(rule, task, lrs)
    mean = mean_of_draws(PES(sigma=0.01), rule, task, lrs, [4], 250)
    assert cosine(mean, exact) > 0.9
    assert 0.7 < mean.norm() / exact.norm() < 1.4
    before = flat(rule.parameters())
    (window,), _ = windows(PES(sigma=0.01), rule, task, lrs, [4])
    assert torch.equal(flat(rule.parameters()), before)  # the rule itself is never perturbed
    unperturbed = by_hand([rule] * 4, task, lrs)
    torch.testing.assert_close(window.losses, unperturbed.detach(), rtol=1e-2, atol=1e-3)


def test_pes_sees_beyond_its_window_and_truncation_does_not():
    # Movements of the first window pay in the second, which makes none.
    rule, task, lrs = small_rule(hidden_size=1), quadratic((1e-4, 1e-4, 1.0, 1.0)), [0.5, 0.5, 0.0, 0.0]
    exact = exact_gradient(rule, task, lrs)
    truncated, _ = windows(FirstOrder(), rule, task, lrs, [2, 2])
    assert sum(flat(window.gradients) for window in truncated).norm() < 1e-3 * exact.norm()
    mean = mean_of_draws(PES(sigma=0.01), rule, task, lrs, [2, 2], 250)
    assert cosine(mean, exact) > 0.9
    assert 0.7 < mean.norm() / exact.norm() < 1.4

    def forget(carry):  # the break: each window for itself
        return {name: torch.zeros_like(value) if name.startswith("xi.") else value for name, value in carry.items()}

    blind = mean_of_draws(PES(sigma=0.01), rule, task, lrs, [2, 2], 250, between=forget)
    assert cosine(blind, exact) < 0.7 and blind.norm() < 0.5 * exact.norm()


def test_the_two_runs_of_pes_see_the_same_batches_and_dropout():
    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()

    basis = random_dense(build().named_parameters(), dim=5, dtype=DOUBLE, units=torch.ones(5, dtype=DOUBLE))
    task, rule = make_task(DOUBLE, build_model=build, basis=basis), small_rule()
    (window,), _ = windows(PES(sigma=1e-9), rule, task, [0.5] * 4, [4])
    estimates = flat(window.gradients) * 1e-9
    assert estimates.norm() < 1e2 * 1e-9  # L+ - L- is of the size of sigma, not of the difference of two masks
    (other,), _ = windows(PES(sigma=0.1), rule, task, [0.5] * 4, [4])
    assert flat(other.gradients).norm() > 1e-3


# unroll


def at_start(rule, task):
    return InnerRun(task, 0), torch.zeros(5, dtype=DOUBLE), rule.init_state(5, dtype=DOUBLE)


def test_imitation_adds_the_distance_to_adams_step():
    rule, task, lrs = small_rule(), make_task(DOUBLE), [0.7, 0.5, 0.3, 0.2]
    run, c, state = at_start(rule, task)
    with_term = gradient_of(unroll(rule, run, c, state, steps=4, lr=lrs, imitation=0.3, imitation_lr=0.05)[0], rule)
    ended = flat(run.parameters)
    run, c, state = at_start(rule, task)
    without = gradient_of(unroll(rule, run, c, state, steps=4, lr=lrs)[0], rule)
    torch.testing.assert_close(ended, flat(run.parameters), rtol=0, atol=0)
    seen = []
    by_hand([rule] * 4, task, lrs, second_order=False, seen=seen)
    m, v, term, wrong = 0.0, 0.0, 0.0, 0.0
    for t, ((g, delta), lr) in enumerate(zip(seen, lrs, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        adam = 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        term = term + 0.3 * (lr * delta - adam).square().mean() / 2
        wrong = wrong + 0.3 * (delta - adam).square().mean() / 2  # the break: lr forgotten
    by_autograd = flat(torch.autograd.grad(term, list(rule.parameters()), retain_graph=True))
    broken = gradient_of(wrong, rule)
    assert by_autograd.norm() > 1e-4
    torch.testing.assert_close(with_term - without, by_autograd, rtol=1e-7, atol=1e-12)
    assert (with_term - without - broken).norm() > 0.1 * by_autograd.norm()


def test_learning_rates_are_one_a_step():
    rule, task, lrs = small_rule(), make_task(DOUBLE), [0.9, 0.1, 0.5, 0.3]
    run, c, state = at_start(rule, task)
    surrogate, _, _, losses = unroll(rule, run, c, state, steps=4, lr=lrs)
    expected = by_hand([rule] * 4, task, lrs, second_order=False)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient_of(surrogate, rule), gradient_of(expected.sum(), rule), rtol=1e-8, atol=1e-10)
    constant = by_hand([rule] * 4, task, [0.45] * 4, second_order=False)
    assert (losses - constant.detach()).abs().max() > 1e-3


def test_a_rule_that_sees_its_progress_is_told_the_total():
    rule, task, lrs = small_rule(progress=True), make_task(DOUBLE), [0.7] * 5
    ends = []
    for total in (5, 50):
        run, c, state = at_start(rule, task)
        surrogate, c, _, losses = unroll(rule, run, c, state, steps=5, lr=0.7, total_steps=total)
        expected = by_hand([rule] * 5, task, lrs, second_order=False, total_steps=total)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            gradient_of(surrogate, rule), gradient_of(expected.sum(), rule), rtol=1e-8, atol=1e-10
        )
        ends.append(c.detach())
    assert (ends[0] - ends[1]).norm() > 1e-3
    for estimator in (FirstOrder(), FirstOrder(coordinates=2), SecondOrder(), PES()):
        near, _ = windows(estimator, rule, task, lrs, [5], total_steps=5)
        far, _ = windows(estimator, rule, task, lrs, [5], total_steps=50)
        assert (near[0].losses - far[0].losses).abs().max() > 1e-4


def test_what_is_refused():
    rule, task = small_rule(), make_task(DOUBLE)
    with pytest.raises(ValueError, match="unroll of 1 steps has no meta-gradient; use at least 2"):
        unroll(rule, *at_start(rule, task), steps=1)
    seeing = small_rule(progress=True)
    with pytest.raises(ValueError, match="total_steps is None"):
        unroll(seeing, *at_start(seeing, task), steps=2)
    plain = small_rule(inputs="gradient")
    with pytest.raises(ValueError, match='imitation compares with m~.*"gradient"'):
        unroll(plain, *at_start(plain, task), steps=2, imitation=0.1)
    with pytest.raises(ValueError, match="coordinates is 0, expected at least 1"):
        FirstOrder(coordinates=0)
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            PES(sigma=sigma)
