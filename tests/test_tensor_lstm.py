"""A rule that finds its own scale against an independent computation: its update, tensors, rates and files."""

import json

import numpy as np
import pytest
import torch

import hf_sl2o.rules.rule
from hf_sl2o import LearnedOptimizer, LSTMRule, Rule, RuleConfig, SymbolicRule
from hf_sl2o.rules import TensorLSTMRule

from .tensor_lstm_cases import SHAPES, ByHand, a_rule, far, gradients, optimizer_of, run, tensors


def by_hand(rule, rates, weight_decay=0.0, rate=None, steps=8):
    """The weights after each step, and the model itself."""
    reference, course = ByHand(rule, tensors().values(), rates[0] if rate is None else rate), []
    for step in range(steps):
        reference.step([g.numpy() for _, g in gradients(step)], rates[step], weight_decay)
        course.append({k: torch.tensor(x["theta"]) for k, x in zip(SHAPES, reference.of, strict=True)})
    return course, reference


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momenta", [(0.99,), (), (0.5, 0.999)])
@pytest.mark.parametrize("name", ["constant", "linear", "warm-up"])
def test_update_is_that_of_the_description(name, momenta, weight_decay):
    factor = {"constant": lambda t: 1.0, "linear": lambda t: 1 - t / 8, "warm-up": lambda t: min(t / 3, 1.0)}[name]
    rule, named = a_rule(momenta=momenta).double(), tensors()
    optimizer = optimizer_of(named, rule, lr=0.7, weight_decay=weight_decay)
    course = run(named, optimizer, 0, 8, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))
    expected, reference = by_hand(rule, [0.7 * factor(t) for t in range(8)], weight_decay, rate=0.7)
    for found, wanted in zip(course, expected, strict=True):
        assert far(found, wanted) < 1e-5
    for p, x in zip(named.values(), reference.of, strict=True):
        np.testing.assert_allclose(optimizer.state[p]["tensors"][0, 0].item(), x["length"], rtol=1e-5, atol=1e-6)
    constant, _ = by_hand(rule, [0.6] * 8, weight_decay)
    assert far(course[-1], constant[-1]) > 1e-2  # the break


def test_each_part_of_what_it_sees_counts():
    """The break beside the equality above: without any one weight the run ends elsewhere."""
    rule = a_rule().double()
    expected = by_hand(rule, [0.7] * 8)[0][-1]
    for name, weight in rule.state_dict().items():
        for index in np.ndindex(*weight.shape) if weight.numel() < 20 else [(0, j) for j in range(weight.shape[-1])]:
            index = index[-weight.ndim :]
            before = weight[index].item()
            weight[index] = before + 3.0
            assert far(by_hand(rule, [0.7] * 8)[0][-1], expected) > 1e-7, (name, index)
            weight[index] = before


@pytest.mark.parametrize("of_gradient", [-1, 1])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_rescaling_a_tensor_rescales_its_steps_and_changes_nothing_else(scale, of_gradient):
    """As by the chain rule (-1), or with gradients in the same scale."""

    def steps(name, factor, rule=None):
        named = tensors()
        with torch.no_grad():
            for key, p in named.items():
                p.mul_(factor if key == name else 1.0)
        start = {key: p.detach().clone() for key, p in named.items()}
        change = lambda step, key, g: g * (factor**of_gradient if key == name else 1.0)  # noqa: E731
        end = run(named, optimizer_of(named, rule or a_rule(eps=1e-12).double()), 0, 6, change=change)[-1]
        return {key: (end[key] - start[key]) / (factor if key == name else 1.0) for key in end}

    plain = steps("a", 1.0)
    for name in ("a", "conv", "one"):
        assert far(steps(name, scale), plain) < 1e-5
    fixed = LSTMRule(RuleConfig(tensor_scale=True)).double()
    assert far(steps("a", scale, fixed), steps("a", 1.0, fixed)) > 0.5  # the break: a step of fixed length


@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_any_chunks_give_the_same(chunk, monkeypatch):
    named, other = tensors(), tensors()
    expected = run(other, optimizer_of(other), 0, 5)[-1]
    monkeypatch.setitem(hf_sl2o.rules.rule._CHUNK, "cpu", chunk)
    assert far(run(named, optimizer_of(named), 0, 5)[-1], expected) < 1e-12


def test_all_tensors_are_compared_in_any_order_and_in_any_groups():
    named = tensors()
    expected = run(named, optimizer_of(named), 0, 5)[-1]
    for options in ({}, {"foreach": False}, {"foreach": True}, {"capturable": True}):
        named = tensors()
        order = dict(reversed(named.items()))
        assert far(run(named, optimizer_of(order, **options), 0, 5)[-1], expected) < 1e-10
        named = tensors()
        groups = [{"params": [p]} for p in named.values()]
        grouped = LearnedOptimizer(groups, a_rule().double(), **options)
        assert far(run(named, grouped, 0, 5)[-1], expected) < 1e-10
    for name in ("a", "scalar"):
        alone = {name: tensors()[name]}
        assert far(run(alone, optimizer_of(alone), 0, 5)[-1], {name: expected[name]}) > 1e-4  # the break: by itself


def test_groups_with_rates_of_their_own():
    """As one group in which the first guess of each tensor is at its own rate."""
    rates = dict(zip(tensors(), (0.2, 0.4, 1.0, 3.0, 0.3, 0.5, 0.7, 2.0), strict=False))
    named = tensors()
    groups = [{"params": [p], "lr": rates[name]} for name, p in named.items()]
    ends = [run(named, LearnedOptimizer(groups, a_rule().double()), 0, 5)[-1]]
    named = tensors()
    groups = [{"params": [p], "lr": torch.tensor(rates[name])} for name, p in named.items()]
    ends.append(run(named, LearnedOptimizer(groups, a_rule().double()), 0, 5)[-1])
    assert far(ends[0], ends[1]) < 1e-6
    named = tensors()
    decayed = [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in named.values()]
    whole = run(named, LearnedOptimizer(decayed, a_rule().double()), 0, 5)[-1]
    named = tensors()
    expected = run(named, optimizer_of(named), 0, 5)[-1]
    for name, p in named.items():  # what does not decay goes as it went without
        same_end = torch.allclose(whole[name], expected[name], rtol=1e-9)
        assert same_end == (p.ndim < 2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_call_of_the_rule_is_a_step_over_one_tensor(scale):
    """`rule(g, state)` without an optimizer, in place and not."""
    rule = a_rule().double()
    weights, state = [scale * tensors()["a"].detach()], None
    state = rule.init_state(15, dtype=torch.float64, weights=weights, rate=0.4)
    ours = type(state)(*(tensor.clone() for tensor in state))
    reference, moved = ByHand(rule, weights, 0.4), 0.0
    for step in range(4):
        g = dict(gradients(step))["a"].reshape(-1)
        delta, state = rule(g, state, rate=0.4)
        in_place = rule.update_(g.clone(), ours, rate=0.4)
        torch.testing.assert_close(in_place, delta.detach(), rtol=1e-10, atol=0)
        reference.step([g.numpy().reshape(3, 5)], 0.4)
        moved = moved + delta.detach().numpy().reshape(3, 5)
    np.testing.assert_allclose(weights[0].numpy() - moved, reference.of[0]["theta"], rtol=1e-5)
    for found, expected in zip(ours, state, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-14)


def test_precision():
    """fp32 agrees with fp64, but for what a slow momentum is rounded to; weights in bf16 have the same state."""
    named = tensors()
    exact = run(named, optimizer_of(named), 0, 6)[-1]
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 3e-2)):
        named = tensors(dtype=dtype)
        optimizer = optimizer_of(named, a_rule())
        end = run(named, optimizer, 0, 6)[-1]
        assert far(end, exact) < tolerance and all(value.dtype == dtype for value in end.values())
        for state in optimizer.state.values():
            assert {state[key].dtype for key in ("step", "exp_avg_sq", "momenta", "tensors")} == {torch.float32}
            assert state["exp_avg"].dtype == torch.bfloat16
    assert far(end, exact) > 1e-4  # the break: bf16 does round
    rule = a_rule()
    state = rule.init_state(15, weights=[tensors()["a"].detach().float()])
    g = dict(gradients(0))["a"].reshape(-1).float()
    plain, kept = rule(g, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, of_under = rule(g, state)
        inputs = rule.tensor_inputs(g, state)
        lengths = rule.lengths(kept.tensors, 0.3)
    assert torch.equal(under, plain) and all(torch.equal(a, b) for a, b in zip(kept, of_under, strict=True))
    assert torch.equal(inputs, rule.tensor_inputs(g, state))
    assert torch.equal(lengths, rule.lengths(kept.tensors, 0.3))


# Rates


def ends(rate, factors, rule=None, group_alone=False, steps=6):
    named = tensors()
    optimizer = optimizer_of(named, rule, lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            if not group_alone:
                group["initial_lr"] = rate
            group["lr"] = rate * factors[step]
        run(named, optimizer, step, step + 1)
    return {name: p.detach().clone() for name, p in named.items()}


def test_a_rate_is_where_it_begins_to_look_between_a_tenth_and_ten():
    ones = [1.0] * 6
    by_rate = {rate: ends(rate, ones) for rate in (1e-9, 2e-4, 0.01, 0.1, 0.3, 1.0, 10.0, 100.0)}
    for rate in (1e-9, 2e-4, 0.01):
        assert far(by_rate[rate], by_rate[0.1]) < 1e-6
    assert far(by_rate[100.0], by_rate[10.0]) < 1e-6
    for one, other in ((0.1, 0.3), (0.3, 1.0), (1.0, 10.0)):
        assert far(by_rate[one], by_rate[other]) > 1e-3  # the break
    start = {name: p.detach() for name, p in tensors().items()}
    assert far(ends(0.0, ones) | {"b": by_rate[1.0]["b"]}, start | {"b": by_rate[1.0]["b"]}) == 0


def test_the_first_guess_of_a_length_is_proportional_to_the_rate_within_those_bounds():
    lengths = {}
    for rate in (0.05, 0.1, 1.0, 10.0, 20.0):
        state = a_rule().init_state(15, weights=[tensors()["a"].detach()], rate=rate)
        lengths[rate] = a_rule().lengths(state.tensors, rate).item()
    assert lengths[10.0] == pytest.approx(10 * lengths[1.0]) == pytest.approx(100 * lengths[0.1])
    assert lengths[0.05] == lengths[0.1] and lengths[20.0] == lengths[10.0]


def test_what_a_schedule_multiplies_counts_in_full():
    """A tenth of the rate is a tenth of the step, whatever the rate; a rate of 0 moves nothing."""
    rule = a_rule().double()
    for rate in (2e-4, 1.0, 50.0):
        state = rule.init_state(15, dtype=torch.float64, weights=[tensors()["a"].detach()], rate=rate)
        whole = rule.lengths(state.tensors, rate)
        torch.testing.assert_close(rule.lengths(state.tensors, 0.1 * rate), 0.1 * whole, rtol=1e-6, atol=0)
        torch.testing.assert_close(rule.lengths(state.tensors, torch.tensor(3 * rate)), 3 * whole, rtol=1e-6, atol=0)
        assert not rule.lengths(state.tensors, 0.0).any()
    faded = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert far(ends(0.01, faded), ends(0.1, faded)) < 1e-6
    assert far(ends(1.0, faded), ends(1.0, [1.0] * 6)) > 1e-2
    before, after = ends(1.0, faded, steps=5), ends(1.0, faded, steps=6)
    assert all(torch.equal(before[name], after[name]) for name in before)


# Files and configurations


def test_files(tmp_path):
    rule = a_rule(average=9.0)
    rule.save_pretrained(tmp_path)
    found = Rule.from_pretrained(tmp_path)
    assert type(found) is TensorLSTMRule and found.config == rule.config and found.fingerprint == rule.fingerprint
    assert TensorLSTMRule.from_pretrained(tmp_path).fingerprint == rule.fingerprint
    named, other = tensors(), tensors()
    a, b = (run(p, optimizer_of(p, r.double()), 0, 3)[-1] for p, r in ((named, rule), (other, found)))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, p in a_rule().named_parameters():
        changed = a_rule()
        changed.get_parameter(name).data.view(-1)[-1] += 1e-3
        assert changed.fingerprint != a_rule().fingerprint and p.numel(), name
    assert a_rule(per_tensor=6).fingerprint != a_rule().fingerprint != a_rule(momenta=(0.98,)).fingerprint
    assert a_rule(average=9.0).fingerprint == a_rule().fingerprint
    with pytest.raises(ValueError, match="holds a TensorLSTMRule, not a LSTMRule"):
        LSTMRule.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("checksum")
    for change, match in (
        ({"per_tensors": 8}, "per_tensors"),
        ({"per_tensor": 6}, "not what its config.json describes"),
        ({"per_tensor": 0}, "not what its config.json describes"),
        ({"per_tensor": -1}, "per_tensor is -1"),
        ({"distance": True}, "not what its config.json describes"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "rule": {**config["rule"], **change}}))
        with pytest.raises(ValueError, match=match):
            Rule.from_pretrained(tmp_path)


def test_kinds_of_rules():
    config = RuleConfig(per_tensor=4)
    assert type(Rule.from_config(config)) is TensorLSTMRule
    assert type(Rule.from_config(RuleConfig())) is LSTMRule
    assert type(Rule.from_config(RuleConfig(expression="tanh"))) is SymbolicRule
    with pytest.raises(ValueError, match="no per_tensor"):
        TensorLSTMRule(RuleConfig())
    with pytest.raises(ValueError, match='per_tensor adds to inputs "normalized"'):
        RuleConfig(per_tensor=4, inputs="gradient")
    for further in ({"agreement": True}, {"expression": "tanh"}):
        with pytest.raises(ValueError, match="leave agreement and expression"):
            RuleConfig(per_tensor=4, **further)
    with pytest.raises(ValueError, match="per_tensor is 0"):
        RuleConfig(distance=True)
    assert "an LSTM of size 4, " in Rule.from_config(config).card()["summary"]
