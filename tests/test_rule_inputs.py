"""Further momenta and the share of the run that is done, as a rule's inputs: values, files, and the optimizer."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import hf_sl2o.rules.rule
from hf_sl2o import LearnedOptimizer, LSTMRule, Rule, RuleConfig


def small_rule(**changes):
    torch.manual_seed(1)
    return LSTMRule(RuleConfig(**{"output_scale": 0.1, "hidden_size": 3, "momenta": (0.5, 0.99), **changes}))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def backward(model, step, only=None):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator)
    model.zero_grad()
    (model(x) - x[:, :1]).square().mean().backward()
    if only is not None:
        for p in list(model.parameters())[only:]:
            p.grad = None


def train(model, optimizer, steps, first=0, only=None):
    for step in range(first, first + steps):
        backward(model, step, only)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def close(a, b, tolerance):
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


def what_the_network_sees(rule, gradients, total_steps):
    columns, state = [], rule.init_state(gradients.shape[1], dtype=torch.float64)
    handle = rule.cells[0].register_forward_pre_hook(lambda module, inputs: columns.append(inputs[0].detach().numpy()))
    for g in torch.from_numpy(gradients):
        _, state = rule(g, state, total_steps=total_steps)
    handle.remove()
    return np.stack(columns), state


@pytest.mark.parametrize("log_sign", [None, 10.0])
@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("momenta", [(), (0.5,), (0.5, 0.99, 0.0)])
def test_number_of_inputs(momenta, progress, log_sign):
    rule = small_rule(momenta=momenta, progress=progress, log_sign=log_sign)
    expected = (2 + len(momenta)) * (2 if log_sign else 1) + progress
    assert rule.config.input_size == expected == rule.cells[0].input_size
    state = rule.init_state(7)
    assert state.momenta.shape == (7, len(momenta))
    delta, state = rule(torch.randn(7), state, total_steps=10)
    assert delta.shape == (7,) and state.momenta.shape == (7, len(momenta))


def test_momenta_are_averages_with_bias_correction_and_progress_runs_from_minus_one_to_one():
    rule = small_rule(progress=True).double()
    gradients = np.random.default_rng(0).normal(size=(6, 4))
    seen, state = what_the_network_sees(rule, gradients, total_steps=6)
    decays = (0.9, None, 0.5, 0.99)
    averages, v = np.zeros((4, 4)), np.zeros(4)
    for t, g in enumerate(gradients, start=1):
        v = 0.99 * v + 0.01 * g * g
        root = np.sqrt(v / (1 - 0.99**t)) + 1e-8
        for k, beta in enumerate(decays):
            if beta is None:
                expected = uncorrected = g / root
            else:
                averages[k] = beta * averages[k] + (1 - beta) * g
                expected, uncorrected = averages[k] / (1 - beta**t) / root, averages[k] / root
            np.testing.assert_allclose(seen[t - 1, :, k], expected, rtol=1e-12)
            if k == 3:  # the break: without bias correction
                assert np.abs(seen[t - 1, :, k] - uncorrected).max() > 0.1
        np.testing.assert_allclose(seen[t - 1, :, 4], 2 * (t - 1) / 6 - 1, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(state.momenta.numpy(), averages[2:].T, rtol=1e-12)
    longer, _ = what_the_network_sees(rule, gradients, total_steps=3)
    assert longer[:, :, 4].max() == 1  # past the end it stays at the end


def test_files_keep_both_choices(tmp_path):
    rule = small_rule(progress=True)
    rule.save_pretrained(tmp_path)
    loaded = Rule.from_pretrained(tmp_path)
    assert loaded.config == rule.config and loaded.config.momenta == (0.5, 0.99)
    assert isinstance(loaded.config.momenta, tuple) and hash(loaded.config) == hash(rule.config)
    assert loaded.fingerprint == rule.fingerprint != small_rule(progress=True, momenta=(0.5, 0.98)).fingerprint


def test_a_config_without_the_two_keys_still_loads(tmp_path):
    rule = small_rule(momenta=())
    rule.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    saved = config["rule"]
    del saved["momenta"], saved["progress"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = Rule.from_pretrained(tmp_path)
    assert loaded.config == rule.config and loaded.fingerprint == rule.fingerprint
    del saved["beta1"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks the key 'beta1'"):
        Rule.from_pretrained(tmp_path)


def test_bad_momenta():
    for momenta in ((1.0,), (-0.1,), (0.5, 2.0)):
        with pytest.raises(ValueError, match="momenta are"):
            RuleConfig(momenta=momenta)
    with pytest.raises(ValueError, match='beside inputs "normalized"'):
        RuleConfig(inputs="gradient", momenta=(0.5,))


def test_foreach_equals_a_tensor_at_a_time():
    results = []
    for foreach in (True, False):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), small_rule(progress=True), foreach=foreach, total_steps=8)
        train(model, optimizer, 3, only=2)  # the last tensors start three steps later
        results.append(train(model, optimizer, 5, first=3))
    assert not close(results[0], net().parameters(), 1e-2)
    assert close(*results, 1e-6)
    model = net()
    together = LearnedOptimizer(model.parameters(), small_rule(progress=True), total_steps=8)
    assert not close(train(model, together, 8), results[0], 1e-4)  # the break: all start at once


def test_state_dict_resumes_to_the_bit(tmp_path):
    whole, part = net(), net()
    expected = train(whole, LearnedOptimizer(whole.parameters(), small_rule(progress=True), total_steps=8), 8)
    first = LearnedOptimizer(part.parameters(), small_rule(progress=True), total_steps=8)
    train(part, first, 4)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    forgetful = copy.deepcopy(part)
    second = LearnedOptimizer(part.parameters(), small_rule(progress=True))  # total_steps is in the state
    second.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(train(part, second, 4, first=4), expected, strict=True))
    third = LearnedOptimizer(forgetful.parameters(), small_rule(progress=True))
    for entry in saved["state"].values():
        entry["momenta"] = torch.zeros_like(entry["momenta"])
    third.load_state_dict(saved)
    assert not close(train(forgetful, third, 4, first=4), expected, 1e-4)


def test_progress_without_total_steps_is_refused():
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), small_rule(progress=True))
    with pytest.raises(ValueError, match="total_steps is None: pass the number of steps"):
        train(model, optimizer, 1)
    with pytest.raises(ValueError, match="total_steps is 0"):
        train(model, LearnedOptimizer(model.parameters(), small_rule(progress=True), total_steps=0), 1)
    train(model, LearnedOptimizer(model.parameters(), small_rule()), 1)


@pytest.mark.parametrize("uniform", [True, False])
def test_update_in_chunks_equals_forward(monkeypatch, uniform):
    rule = small_rule(progress=True).double()
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(10, generator=generator, dtype=torch.float64)
    state = rule.init_state(10, dtype=torch.float64)
    if not uniform:
        state = state._replace(step=torch.arange(10, dtype=torch.float64))
    _, state = rule(g.roll(1), state, total_steps=20)
    state = type(state)(*(tensor.detach() for tensor in state))
    delta, following = rule(g, state, total_steps=20)
    sizes = []
    monkeypatch.setitem(hf_sl2o.rules.rule._CHUNK, "cpu", 3)
    rule.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    frozen, ours = type(state)(*(tensor.clone() for tensor in state)), type(state)(*(t.clone() for t in state))
    out = g.clone()
    assert rule.update_(out, ours, total_steps=20) is out and sizes == [3, 3, 3, 1]
    torch.testing.assert_close(out, delta.detach(), rtol=1e-12, atol=1e-15)
    for name, value, expected, before in zip(state._fields, ours, following, state, strict=True):
        assert torch.equal(value, before) == (name == "tensors"), name  # it keeps nothing of whole tensors
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-15)
    kept = g.clone()
    rule.update_(kept, frozen, finite=torch.tensor(False), total_steps=20)
    assert not kept.any() and all(torch.equal(a, b) for a, b in zip(frozen, state, strict=True))


def test_a_cell_reset_also_works_where_tensors_are_at_different_steps():
    results = []
    for foreach in (True, False):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), small_rule(reset_cell_every=2), foreach=foreach)
        train(model, optimizer, 1, only=2)
        results.append(train(model, optimizer, 4, first=1))
    assert close(*results, 1e-6)
