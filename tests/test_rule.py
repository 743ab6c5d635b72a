"""The rule against an independent computation, its presets against the paper, its files against damage."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from hf_sl2o import LSTMRule, Rule, RuleConfig, SymbolicRule
from hf_sl2o.rules.config import EXPRESSIONS
from hf_sl2o.rules.inputs import log_and_sign


def numpy_rule(rule, gradients, quirks=False):
    """SL2O's update in numpy from the paper's formulas (PyTorch's gate order i, f, g, o)."""
    w = {name: tensor.double().numpy() for name, tensor in rule.state_dict().items()}
    n, config = gradients.shape[1], rule.config
    m, v = np.zeros(n), np.zeros(n)
    hidden, cell = np.zeros((n, config.hidden_size)), np.zeros((n, config.hidden_size))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    deltas = []
    for t, g in enumerate(gradients, start=1):
        if quirks and (t - 1) % 391 == 0:
            cell = np.zeros_like(cell)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        e = t + 1 if quirks else t
        root = np.sqrt(v / (1 - 0.99**e)) + 1e-8
        x = np.stack([m / (1 - 0.9**e) / root, g / root], axis=1)
        if config.log_sign:
            p = config.log_sign
            big = np.abs(x) >= math.exp(-p)
            with np.errstate(divide="ignore"):
                magnitude = np.where(big, np.log(np.abs(x)) / p, -1)
            x = np.stack([magnitude, np.where(big, np.sign(x), math.exp(p) * x)], axis=2).reshape(n, 4)
        gates = x @ w["cells.0.weight_ih"].T + w["cells.0.bias_ih"] + hidden @ w["cells.0.weight_hh"].T
        i, f, a, o = np.split(gates + w["cells.0.bias_hh"], 4, axis=1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(a)
        hidden = sigmoid(o) * np.tanh(cell)
        v_hat = v / (1 - 0.99**e)
        # ours: no gradient, no movement, and none when it has ceased
        history = v_hat / (v_hat + 1e-16 + 1e-12 * v_hat.mean())
        history *= np.minimum(np.maximum(np.abs(m / (1 - 0.9**e)), np.abs(g)) / root / 0.03, 1)
        deltas.append(config.output_scale * history * np.tanh(hidden @ w["head.weight"][0]))
    return np.stack(deltas)


def run(rule, gradients):
    state, deltas = rule.init_state(gradients.shape[1], dtype=torch.float64), []
    for g in torch.from_numpy(gradients):
        delta, state = rule(g, state)
        deltas.append(delta.detach().numpy())
    return np.stack(deltas)


@pytest.mark.parametrize("preset", ["paper-cnn", "paper-transformer"])
@pytest.mark.parametrize("quirks", [False, True])
def test_update_is_the_papers(preset, quirks):
    rule = LSTMRule(RuleConfig.preset(preset, published_quirks=quirks)).double()
    steps = 395 if quirks else 20  # past the reset at 391
    gradients = np.random.default_rng(0).normal(size=(steps, 5)) * np.array([1e-6, 1e-2, 1, 10, 1e3])
    ours, theirs = run(rule, gradients), numpy_rule(rule, gradients, quirks)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)
    other = numpy_rule(rule, gradients, not quirks)
    assert np.abs(ours - other).max() > 1e-4 * np.abs(ours).max()


def test_presets_have_the_published_constants():
    count = lambda name: sum(p.numel() for p in Rule.from_config(RuleConfig.preset(name)).parameters())  # noqa: E731
    assert count("paper-cnn") == 392 and count("paper-transformer") == 456  # PyTorch's two biases, official code
    cnn = RuleConfig.preset("paper-cnn")
    assert (cnn.beta1, cnn.beta2, cnn.hidden_size, cnn.output_scale, cnn.log_sign) == (0.9, 0.99, 8, 1.0, None)
    rnnprop, dm = RuleConfig.preset("rnnprop"), RuleConfig.preset("l2o-dm")
    assert (rnnprop.beta1, rnnprop.beta2, rnnprop.hidden_size, rnnprop.num_layers) == (0.95, 0.95, 20, 2)
    assert (dm.inputs, dm.log_sign, dm.squash, dm.output_scale) == ("gradient", 5.0, False, 0.01)
    with pytest.raises(ValueError, match="no preset 'adam'"):
        RuleConfig.preset("adam")


@pytest.mark.parametrize("name", ["paper-cnn", "paper-transformer", "rnnprop", "l2o-dm", "symbolic"])
def test_every_preset_runs_is_pure_and_stays_in_bounds(name):
    rule = Rule.from_config(RuleConfig.preset(name))
    state = rule.init_state(7)
    g = torch.randn(7)
    before = [tensor.clone() for tensor in state]
    delta, following = rule(g, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)) and int(following.step) == 1
    again, _ = rule(g, state)
    assert torch.equal(delta, again) and delta.shape == (7,) and delta.dtype == torch.float32
    if rule.config.squash and rule.config.expression is None:
        assert delta.abs().max() <= rule.config.output_scale


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_symbolic_expressions(name):
    rule = SymbolicRule(dataclasses.replace(RuleConfig(), expression=name))
    g = torch.tensor([0.7, -0.2])
    delta, _ = rule(g, rule.init_state(2))
    sign = torch.sign(g).numpy().astype(float)  # the first step's m~ and g~ are the sign
    expected = {
        "tanh": 0.2326 * np.tanh(sign - 0.1094),
        "exp-tanh": 0.2097 * np.exp(np.tanh(sign)) - 0.2523,
        "exp-tanh-cubic": 0.0627 * np.exp(np.tanh(sign + sign**3)),
    }[name]
    np.testing.assert_allclose(delta.numpy(), expected, rtol=1e-5)


def test_coordinates_do_not_see_each_other():
    rule, g = LSTMRule(), torch.tensor([0.5, -2.0, 0.1, 3.0])
    other = g.clone()
    other[1] = 7.0
    a, b = (rule(x, rule.init_state(4))[0] for x in (g, other))
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]]) and a[1] != b[1]


def test_log_and_sign_at_the_edges():
    p = 10.0
    x = torch.tensor([[0.0], [1.0], [-1.0], [math.exp(-10.0) / 2], [1e30]])
    out = log_and_sign(x, p)
    torch.testing.assert_close(out[:4], torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.5]]))
    assert torch.isfinite(out).all()


def test_gradients_reach_every_weight_and_are_right():
    rule = LSTMRule(RuleConfig(hidden_size=3)).double()
    g = torch.randn(4, dtype=torch.float64)

    def loss(*weights):
        values = dict(zip(dict(rule.named_parameters()), weights, strict=True))
        state = rule.init_state(4, dtype=torch.float64)
        for _ in range(2):
            delta, state = torch.func.functional_call(rule, values, (g, state))
        return delta.sum()

    weights = [p.detach().clone().requires_grad_() for p in rule.parameters()]
    assert torch.autograd.gradcheck(loss, weights)


def test_computes_in_fp32_under_autocast():
    rule, g = LSTMRule(), torch.randn(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta, _ = rule(g, rule.init_state(5))
    assert torch.equal(delta, rule(g, rule.init_state(5))[0])


def test_saving_and_loading(tmp_path):
    rule = LSTMRule(RuleConfig.preset("paper-transformer"))
    rule.save_pretrained(tmp_path)
    loaded = Rule.from_pretrained(tmp_path)
    assert isinstance(loaded, LSTMRule) and loaded.config == rule.config and loaded.fingerprint == rule.fingerprint
    assert loaded.fingerprint != LSTMRule(rule.config).fingerprint
    with pytest.raises(ValueError, match="not a SymbolicRule"):
        SymbolicRule.from_pretrained(tmp_path)
    SymbolicRule().save_pretrained(tmp_path / "symbolic")
    assert isinstance(Rule.from_pretrained(tmp_path / "symbolic"), SymbolicRule)


def test_strict_loading(tmp_path):
    LSTMRule().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({**settings["rule"], "warp": 9}, "unknown key 'warp'"),
        ({k: v for k, v in settings["rule"].items() if k != "beta1"}, "lacks the key 'beta1'"),
        ({**settings["rule"], "hidden_size": 16}, "has shape"),
        ({**settings["rule"], "num_layers": 2}, "lacks tensor"),
        ({**settings["rule"], "beta1": "0.9"}, "is malformed"),
        ("LSTM", "expected a JSON object"),
        ({**settings["rule"], "expression": "__import__('os')"}, "is malformed: the expression"),
    ):
        config.write_text(json.dumps({**settings, "rule": change}))
        with pytest.raises(ValueError, match=message):
            Rule.from_pretrained(tmp_path)
    broken = LSTMRule()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        Rule.from_pretrained(tmp_path / "nan")
    with pytest.raises(FileNotFoundError, match="looked for a saved Rule at"):
        Rule.from_pretrained("no/such/place")


@pytest.mark.parametrize(
    "bad",
    [
        {"inputs": "loss"},
        {"beta1": 1.0},
        {"hidden_size": 0},
        {"log_sign": -1.0},
        {"expression": "sin"},
    ],
)
def test_bad_configurations(bad):
    with pytest.raises(ValueError, match="expected|must be"):
        RuleConfig(**bad)
