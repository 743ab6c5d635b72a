"""A rule, whichever, moves no coordinate that has no history of gradient."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from hf_sl2o import LSTMRule, Rule, RuleConfig
from hf_sl2o.rules import load_rule

from .no_gradient_cases import NAMES, rules


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_moves_a_coordinate_only_after_a_gradient(name):
    rule = rules()[name]
    state, course = rule.init_state(3), []
    for t in range(30):
        g = torch.tensor([0.0, 0.0 if t < 20 else 1e-2, 1e-2 * (-1) ** t])
        delta, state = rule(g, state, total_steps=30)
        course.append(delta)
    deltas = torch.stack(course)
    assert torch.equal(deltas[:, 0], torch.zeros(30))
    assert torch.equal(deltas[:20, 1], torch.zeros(20)) and bool((deltas[20:, 1] != 0).any())
    assert bool((deltas[:, 2] != 0).any())


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place_and_steps_of_several_tensors_move_it_as_little(name):
    rule = rules()[name]
    state = rule.init_state(12, weights=[torch.zeros(4), torch.zeros(3, 2), torch.zeros(2)])
    for _ in range(4):
        g = torch.cat([torch.zeros(4), 1e-2 * torch.randn(5), torch.zeros(3)])
        delta = rule.update_(g.clone(), state, sizes=(4, 6, 2), total_steps=4)
        assert torch.equal(delta[g == 0], torch.zeros(7)) and bool((delta[g != 0] != 0).all())


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])
def test_the_guard_leaves_ordinary_gradients_as_they_are(scale):
    """Beside the definition: the network's output itself, at gradients far from eps and from rounding."""
    torch.manual_seed(3)
    rule = LSTMRule(RuleConfig(output_scale=0.01, log_sign=10.0, tensor_scale=True))
    state = rule.init_state(50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        g = scale * (torch.randn(50, generator=generator).abs() + 0.1)
        new_m, new_v = torch.lerp(g, state.exp_avg, 0.9), torch.lerp(g * g, state.exp_avg_sq, 0.99)
        t = state.step + 1
        m_hat, v_hat = new_m / (1 - 0.9**t), new_v / (1 - 0.99**t)
        s = v_hat.mean().sqrt() + 1e-8
        inputs = torch.stack([m_hat / (v_hat.sqrt() + 1e-8), g / (v_hat.sqrt() + 1e-8), m_hat / s, g / s], dim=-1)
        logs = (inputs.abs().log() / 10).clamp_min(-1)
        signs = (inputs * torch.exp(torch.tensor(10.0))).clamp(-1, 1)
        columns = torch.stack([logs, signs], dim=-1).flatten(-2)
        output, *_ = rule._output(columns, state.hidden, state.cell, s.expand(1, 2))
        delta, state = rule(g, state)
        torch.testing.assert_close(delta, 0.01 * output, rtol=1e-4, atol=1e-7)


def test_old_files_have_the_guard_too(tmp_path):
    rule = LSTMRule(RuleConfig())
    rule.save_pretrained(tmp_path / "rule")
    config = json.loads((tmp_path / "rule" / "config.json").read_text())
    later = ("momenta", "progress", "tensor_scale", "agreement", "average", "per_tensor", "distance")
    kept = {key: value for key, value in config["rule"].items() if key not in later}
    save_file({name: tensor.contiguous() for name, tensor in rule.state_dict().items()}, tmp_path / "plain")
    (tmp_path / "plain").replace(tmp_path / "rule" / "model.safetensors")
    sha256 = hashlib.sha256((tmp_path / "rule" / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "rule" / "config.json").write_text(json.dumps({"rule": kept, "sha256": sha256}))
    old = Rule.from_pretrained(tmp_path / "rule")
    assert old.fingerprint == rule.fingerprint
    state = old.init_state(2)
    for _ in range(5):
        delta, state = old(torch.tensor([0.0, 1e-3]), state)
        assert delta[0] == 0 and delta[1] != 0


@pytest.mark.parametrize("name", ["default", "default-lora", "paper-cnn"])
def test_one_gradient_long_ago_does_not_let_it_walk(name):
    """A token seen in one batch: thereafter its row has no gradient, and AdamW moves it by ten steps at most."""
    rule = load_rule(name, with_basis=False)
    state, walked, typical = rule.init_state(64), torch.zeros(64), 0.0
    generator, steps = torch.Generator().manual_seed(0), 400
    for t in range(steps):
        g = 1e-2 * torch.randn(64, generator=generator)
        g[0] = 1e-2 if t == 0 else 0.0
        with torch.no_grad():
            delta, state = rule(g, state, total_steps=steps)
        if t >= 50:
            walked += delta
            typical += float(delta[1:].square().mean().sqrt()) / (steps - 50)
    assert abs(float(walked[0])) < 20 * typical
