"""A rule that finds its own scale in plain loops: what a tensor goes through, schedules, and states."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_sl2o import LearnedOptimizer, LSTMRule, RuleConfig

from .tensor_lstm_cases import a_rule, far, kept, optimizer_of, run, same, tensors

# What a tensor goes through


def test_a_tensor_without_gradients_stays_and_one_that_begins_late_is_stepped():
    """The others go as if it were not there; its own first step is as long as any first step."""

    def missing(step, name, g):
        return None if name == "bias" or (name == "a" and step < 3) else g

    named = tensors()
    start = {name: p.detach().clone() for name, p in named.items()}
    optimizer = optimizer_of(named)
    course = run(named, optimizer, 0, 6, change=missing)
    assert not optimizer.state[named["bias"]] and float(optimizer.state[named["a"]]["step"]) == 3
    assert all(torch.equal(now["bias"], start["bias"]) for now in course) and torch.equal(course[2]["a"], start["a"])
    fewer = {name: p for name, p in tensors().items() if name not in ("a", "bias")}
    end = run(fewer, optimizer_of(fewer), 0, 3)[-1]
    assert far({name: course[2][name] for name in end}, end) < 1e-12
    late, first = far({"a": course[3]["a"]}, {"a": start["a"]}), far(*first_steps_of("a"))
    assert 0.2 * first < late < 5 * first
    assert far(course[-1], run(*both(optimizer_of), 0, 6)[-1]) > 1e-2  # the break


def both(make):
    named = tensors()
    return named, make(named)


def first_steps_of(name):
    named = tensors()
    start = {name: named[name].detach().clone()}
    return {name: run(named, optimizer_of(named), 0, 1)[-1][name]}, start


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tensor_whose_gradient_is_zero_for_a_step_goes_on_as_its_momentum_does(dtype):
    """As an expert that no token was sent to: it is not stepped by the signs of its momentum."""
    rule = a_rule(0.0).to(dtype)
    with torch.no_grad():
        rule.mix.weight[:, 0] = 1.0  # m~, g~, the slow momentum, m / s and g / s
    named = tensors(dtype=dtype)
    optimizer = optimizer_of(named, rule)
    tiny = lambda step, name, g: g * torch.linspace(1e-3, 1, g.numel(), dtype=g.dtype).view_as(g)  # noqa: E731
    course = run(named, optimizer, 0, 5, change=tiny)
    state = {key: value.clone() for key, value in optimizer.state[named["a"]].items()}
    length = rule.lengths(state["tensors"], 1.0).item()
    m, v, slow = (state[key].double().view(3, 5) for key in ("exp_avg", "exp_avg_sq", "momenta"))
    m, v, slow = 0.9 * m / (1 - 0.9**6), 0.99 * v / (1 - 0.99**6), 0.99 * slow / (1 - 0.99**6)
    after = run(named, optimizer, 5, 6, change=lambda step, name, g: 0 * g if name == "a" else g)[-1]
    moved = course[-1]["a"].double() - after["a"].double()
    columns = m / v.sqrt() + slow / v.sqrt() + m / v.mean().sqrt()
    expected = length * 1.5 * torch.tanh(columns / 1.5)
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-2 * length)
    signs = length * 1.5 * m.sign()
    assert (moved - signs).abs().max() > 0.1 * length  # the break
    assert torch.equal(optimizer.state[named["a"]]["tensors"][0, 0], state["tensors"][0, 0])


def test_shapes_of_all_kinds():
    """A scalar, one element, none, rank 1, many dimensions: each moves where it has a gradient."""
    shapes = {"scalar": (), "one": (1,), "none": (0, 3), "row": (1, 7), "column": (7, 1), "deep": (1, 2, 1, 2, 2)}
    named = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    optimizer = LearnedOptimizer(named.values(), a_rule(), average=2.0, weight_decay=0.1)
    for _ in range(3):
        for p in named.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(bool((p != 0).all()) and bool(p.isfinite().all()) for p in named.values())
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    only = LearnedOptimizer([torch.zeros(0, 3, requires_grad=True)], a_rule())
    only.param_groups[0]["params"][0].grad = torch.zeros(0, 3)
    only.step()


@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_an_embedding_move_only_as_their_tokens_are_seen(dense):
    """Those never seen stay; others move no further than AdamW's at the same length of a step."""
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    start, steps = table.detach().clone(), 60
    optimizer = LearnedOptimizer([table, head], a_rule(0.1))
    generator, longest = torch.Generator().manual_seed(2), 0.0
    for step in range(steps):
        seen = torch.randint(0, 40, (3,), generator=generator)
        if step == 0:
            seen[0] = 45  # once, and never again
        table.grad, head.grad = torch.zeros_like(table), torch.randn(4, 4, generator=generator)
        table.grad[seen] = torch.randn(3, 4, generator=generator)
        optimizer.step()
        longest += 1.5 * float(optimizer.rule.lengths(optimizer.state[table]["tensors"], 1.0).detach())
    assert torch.equal(table[46:], start[46:]) and torch.equal(table[40:45], start[40:45])
    moved = (table.detach() - start).abs()
    assert 0 < moved[45].max() < longest * 25 / steps and moved.max() < longest


def test_a_tensor_that_begins_at_zero_is_stepped_as_one_of_its_size():
    """The first length is a tenth of sqrt(1 / (3 fan)), the rms with which torch begins a matrix."""
    torch.manual_seed(0)
    fan = 300
    made = torch.nn.Linear(fan, fan).weight.detach()
    for weights, name in ((torch.zeros(fan, 5), "zero"), (made, "made"), (torch.zeros(fan), "vector")):
        state = a_rule(0.0).init_state(weights.numel(), weights=[weights])
        length = a_rule(0.0).lengths(state.tensors, 1.0).item()
        expected = 0.1 * (0.03 if name == "vector" else float(made.square().mean().sqrt()))
        assert length == pytest.approx(expected, rel=0.02)


def test_gradients_that_are_not_finite_change_nothing():
    named = tensors()
    optimizer = optimizer_of(named, average=3.0, weight_decay=0.1)
    run(named, optimizer, 0, 3)
    before, state = {name: p.detach().clone() for name, p in named.items()}, copy.deepcopy(kept(optimizer))
    for value in (torch.nan, torch.inf):
        bad = lambda step, name, g, value=value: g * value if name == "bias" else g  # noqa: E731
        run(named, optimizer, 3, 4, change=bad)
        assert same({name: p.detach() for name, p in named.items()}, before) and same(kept(optimizer), state)
    assert optimizer.skipped_steps == 2
    run(named, optimizer, 3, 4)
    assert not same(kept(optimizer), state)
    other = tensors()
    plain = optimizer_of(other, average=3.0, weight_decay=0.1)
    assert far(run(other, plain, 0, 4)[-1], {name: p.detach() for name, p in named.items()}) == 0


def test_ascent_is_descent_on_the_negative():
    named, other = tensors(), tensors()
    up = run(named, optimizer_of(named, maximize=True), 0, 4, change=lambda step, name, g: -g)[-1]
    down = run(other, optimizer_of(other), 0, 4)[-1]
    assert same(up, down)
    assert far(run(*both(lambda named: optimizer_of(named, maximize=True)), 0, 4)[-1], down) > 1e-2


def test_differentiable_steps_of_one_tensor_are_those_in_place_and_have_a_gradient():
    g = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]

    def end(differentiable, factor):
        start = torch.ones(4, 3, dtype=torch.float64)
        p = (start * factor).clone() if differentiable else start.clone().requires_grad_()
        optimizer = LearnedOptimizer([p], a_rule().double(), lr=0.5, weight_decay=0.1, differentiable=differentiable)
        for of_step in g:
            p.grad = of_step * factor
            optimizer.step()
        return p

    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = end(True, factor)
    torch.testing.assert_close(found.detach(), end(False, 1.0).detach(), rtol=1e-6, atol=1e-9)
    (derivative,) = torch.autograd.grad(found.sum(), factor)
    assert bool(derivative.isfinite()) and derivative != 0


# Schedules


@pytest.mark.parametrize("way", ["LambdaLR", "initial_lr"])
def test_a_warm_up_from_zero_ends_at_the_same_scale_whatever_the_rate(way):
    ends = {}
    for rate in (1e-3, 0.1, 1.0):
        named = tensors()
        optimizer = optimizer_of(named, lr=rate)
        if way == "LambdaLR":
            start = {name: p.detach().clone() for name, p in named.items()}
            scheduler = LambdaLR(optimizer, lambda t: min(t / 3, 1.0))
            assert optimizer.param_groups[0]["lr"] == 0
            course = run(named, optimizer, 0, 6, scheduler)
            assert same(course[0], start)  # a rate of 0
            ends[rate] = course[-1]
        else:
            for step in range(6):
                optimizer.param_groups[0].update(initial_lr=rate, lr=rate * min(step / 3, 1.0))
                run(named, optimizer, step, step + 1)
            ends[rate] = {name: p.detach().clone() for name, p in named.items()}
    assert far(ends[1e-3], ends[0.1]) < 1e-6 and far(ends[1.0], ends[0.1]) > 1e-3


def test_a_plain_rate_that_begins_at_zero_counts_as_it_is():
    """Nothing says where it will end, so that a rate of 1 is the rule's own."""
    lengths = {}
    for first in (0.0, 1.0):
        named = tensors()
        optimizer = optimizer_of(named, lr=first)
        run(named, optimizer, 0, 1)
        optimizer.param_groups[0]["lr"] = 1.0
        run(named, optimizer, 1, 2)
        row = optimizer.state[named["a"]]["tensors"]
        lengths[first] = optimizer.rule.lengths(row, 1.0).item() / row[0, 0].exp().item()
    assert lengths[0.0] == pytest.approx(lengths[1.0])


def test_rates_as_numbers_and_as_tensors_on_the_device_are_the_same():
    named = tensors()
    expected = run(named, optimizer_of(named, lr=0.3), 0, 4)[-1]
    for rate in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        for options in ({}, {"capturable": True}):
            named = tensors()
            optimizer = optimizer_of(named, lr=rate.clone(), **options)
            assert far(run(named, optimizer, 0, 4)[-1], expected) < 1e-6
            optimizer.param_groups[0]["lr"].fill_(0.0)
            before = {name: p.detach().clone() for name, p in named.items()}
            assert same(run(named, optimizer, 4, 5)[-1], before)
    named = tensors()
    whole = run(named, optimizer_of(named, lr=1), 0, 4)[-1]
    named = tensors()
    assert same(whole, run(named, optimizer_of(named, lr=1.0), 0, 4)[-1]) and far(whole, expected) > 1e-3


def test_a_run_goes_on_beyond_its_planned_length():
    """The schedule ends at 0; a new one goes on from the lengths that were found."""
    named = tensors()
    optimizer = optimizer_of(named, lr=0.5)
    course = run(named, optimizer, 0, 6, LambdaLR(optimizer, lambda t: max(0.0, 1 - t / 4)))
    assert same(course[3], course[5]) and not same(course[2], course[3])
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    after = run(named, optimizer, 6, 9, LambdaLR(optimizer, lambda t: 1 - t / 3))
    assert far(after[0], course[-1]) > 1e-3 and all(bool(p.isfinite().all()) for p in after[-1].values())
    lengths = torch.cat([optimizer.rule.lengths(optimizer.state[p]["tensors"], 0.5) for p in named.values()])
    assert bool((lengths > 0).all())


# States


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_a_state_saved_in_the_middle_goes_on_to_the_bit(way):
    named = tensors()
    expected = run(named, optimizer_of(named, lr=0.4, average=2.0), 0, 6)[-1]
    named = tensors()
    first = optimizer_of(named, lr=0.4, average=2.0)
    run(named, first, 0, 3)
    if way in ("deepcopy", "pickle"):
        pair = {"named": named, "optimizer": first}
        pair = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        other, second = pair["named"], pair["optimizer"]
    else:
        other = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
        second, saved = optimizer_of(other, lr=0.4, average=2.0), first.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        second.load_state_dict(saved)
    assert same(run(other, second, 3, 6)[-1], expected)
    changed = optimizer_of(other, lr=0.4, average=2.0)
    state = copy.deepcopy(first.state_dict())
    state["state"][0]["tensors"][0, 0] += 1.0
    changed.load_state_dict(state)
    for name, p in other.items():
        p.data.copy_(named[name])
    assert far(run(other, changed, 3, 6)[-1], expected) > 1e-3  # the break
    state["state"][0]["tensors"] = state["state"][0]["tensors"][:, 1:]
    with pytest.raises(ValueError, match="'tensors' of the saved optimizer state of parameter 0"):
        optimizer_of(other, average=2.0).load_state_dict(state)
    del state["state"][0]["tensors"]
    with pytest.raises(ValueError, match="lacks 'tensors'"):
        optimizer_of(other, average=2.0).load_state_dict(state)
    with pytest.raises(ValueError, match="another rule"):
        optimizer_of(other, LSTMRule().double(), average=2.0).load_state_dict(first.state_dict())


def stored(optimizer):
    """Bytes of all storages that an optimizer keeps, each once; the parameters and the rule are not its own."""
    own = {p.untyped_storage().data_ptr() for g in optimizer.param_groups for p in g["params"]}
    found = {}

    def look(value, depth=0):
        if torch.is_tensor(value):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif depth < 8 and isinstance(value, dict):
            for part in [*value.values(), *value.keys()]:
                look(part, depth + 1)
        elif depth < 8 and isinstance(value, (list, tuple, set)):
            for part in value:
                look(part, depth + 1)
        elif depth < 8 and type(value).__module__.startswith("hf_sl2o") and not isinstance(value, torch.nn.Module):
            look(vars(value), depth + 1)

    look({**vars(optimizer), "param_groups": None})
    return sum(size for pointer, size in found.items() if pointer not in own)


@pytest.mark.parametrize(("average", "most"), [(0.0, 12), (9.0, 20)])
def test_bytes_a_coordinate(average, most):
    params = [torch.zeros(200, 250, requires_grad=True) for _ in range(2)]
    sizes = {}
    for name, rule in (("tensor", a_rule()), ("distance", a_rule(distance=True)), ("lstm", LSTMRule(RuleConfig()))):
        optimizer = LearnedOptimizer(params, rule, average=average)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        sizes[name] = stored(optimizer) / 1e5
    assert 8 + 8 * bool(average) < sizes["tensor"] < most + 0.05
    assert sizes["tensor"] + 3.9 < sizes["distance"] <= most + 4.05 and sizes["lstm"] > 70  # the break


def test_the_way_from_the_start_is_kept_where_it_is_asked_for():
    named = tensors()
    start = {name: p.detach().clone() for name, p in named.items()}
    optimizer = optimizer_of(named, a_rule(distance=True).double(), lr=0.5)
    end = run(named, optimizer, 0, 5)[-1]
    way = {name: optimizer.state[p]["momenta"][:, -1].view(p.shape) for name, p in named.items()}
    assert far(way, {name: end[name] - start[name] for name in end}) < 1e-9
    rule = a_rule(distance=True).double()
    with torch.no_grad():
        rule.lstm.weight_ih[:, 5:7] += 1.0  # what is measured of the way
    named = tensors()
    assert far(run(named, optimizer_of(named, rule, lr=0.5), 0, 5)[-1], end) > 1e-3
