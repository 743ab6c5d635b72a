"""What an optimizer did, step by step, against torch's own optimizers and expressions that are known."""

import dataclasses

import pytest
import torch

from hf_sl2o import IdentityBasis, LearnedOptimizer, LSTMRule, Rule, RuleConfig, SymbolicRule
from hf_sl2o.analysis.paths import record_path, response, samples_of, seen
from hf_sl2o.meta import train_on

from .meta_cases import two_tasks


def test_a_path_is_the_run(tmp_path):
    task = two_tasks()[0]
    adam = lambda c: torch.optim.Adam(c, lr=0.1)  # noqa: E731
    path = record_path(task, adam, 12, schedule="linear", seed=3)
    plain = train_on(task, adam, 12, schedule="linear", seed=3)
    assert path.train_loss.tolist() == plain["train_loss"]
    assert path.updates.shape == path.gradients.shape == (12, task.basis.dim)
    torch.testing.assert_close(path.rates, torch.tensor([0.1 * (12 - t) / 12 for t in range(12)]))
    # The same gradients given to torch's Adam by hand
    c = torch.nn.Parameter(torch.zeros(task.basis.dim))
    by_hand = torch.optim.Adam([c], lr=0.1)
    for t, g in enumerate(path.gradients):
        by_hand.param_groups[0]["lr"] = 0.1 * (12 - t) / 12
        c.grad = g.clone()
        by_hand.step()
        torch.testing.assert_close(path.coefficients[t + 1], c.detach())
    assert torch.allclose(path.shares.sum(dim=1), torch.ones(12)) and bool((path.lengths > 0).all())
    other = record_path(task, adam, 12, schedule="linear", seed=4)
    assert not torch.equal(other.gradients, path.gradients)  # the break


def test_what_adam_sees_is_its_step():
    """m~ without the rule: lr m~ is the step of torch's Adam with the same constants."""
    config = RuleConfig()
    adam = lambda c: torch.optim.Adam(c, lr=0.1, betas=(config.beta1, config.beta2), eps=config.eps)  # noqa: E731
    path = record_path(two_tasks()[0], adam, 15)
    m, g = seen(path.gradients, config)
    torch.testing.assert_close(0.1 * m, path.updates.double(), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(0.1 * g, path.updates.double(), rtol=1e-1)


@pytest.mark.parametrize("name", ["tanh", "exp-tanh-cubic", "0.3 * tanh(g + 0.5 * m)"])
def test_samples_of_an_expression_are_the_expression(name):
    rule = SymbolicRule(RuleConfig(expression=name))
    paths = [
        record_path(two_tasks()[0], lambda c: LearnedOptimizer(c, rule, lr=0.3), 10, seed=seed, schedule="linear")
        for seed in (0, 1)
    ]
    samples = samples_of(paths, rule, 60)
    torch.testing.assert_close(samples.delta, rule.expression(samples.m, samples.g), rtol=1e-3, atol=1e-5)
    assert samples.delta.std() > 0.01
    first, second = samples.split(50)
    assert len(first.m) == 50 and len(second.delta) == 10 and torch.equal(second.g, samples.g[50:])
    assert torch.equal(samples.m, samples_of(paths, rule, 60).m)
    assert not torch.equal(samples.m, samples_of(paths, rule, 60, seed=1).m)


def test_response_is_that_of_the_network():
    torch.manual_seed(0)
    rule = LSTMRule(RuleConfig.preset("paper-cnn"))
    m, g = torch.meshgrid(torch.linspace(-2, 2, 5), torch.linspace(-3, 3, 4), indexing="ij")
    found = response(rule, m, g, steps=7)
    assert found.shape == m.shape
    hidden, cell = torch.zeros(20, 8), torch.zeros(20, 8)
    inputs = torch.stack([m.flatten(), g.flatten()], dim=-1)
    with torch.no_grad():
        for _ in range(7):
            hidden, cell = rule.cells[0](inputs, (hidden, cell))
        expected = torch.tanh(rule.head(hidden))[:, 0]
    torch.testing.assert_close(found.flatten(), expected)
    assert not torch.allclose(response(rule, m, g, steps=1), found, rtol=1e-2)  # the break
    symbolic = SymbolicRule()
    torch.testing.assert_close(response(symbolic, m, g), 0.2326 * torch.tanh(g - 0.1094))


@pytest.mark.parametrize(
    "config, more",
    [
        (RuleConfig(progress=True), "progress"),
        (RuleConfig(momenta=(0.99,)), "momenta"),
        (RuleConfig(tensor_scale=True), "tensor_scale"),
        (RuleConfig(per_tensor=4), "per_tensor"),
        (RuleConfig.preset("l2o-dm"), "inputs 'gradient'"),
    ],
)
def test_a_rule_that_sees_more(config, more):
    rule = Rule.from_config(config)
    for call in (lambda: samples_of([], rule, 1), lambda: response(rule, torch.ones(1), torch.ones(1))):
        with pytest.raises(ValueError, match=f"sees more than m~ and g~: .*{more}"):
            call()


def test_too_few_numbers_and_whole_weights():
    rule = SymbolicRule()
    path = record_path(two_tasks()[0], lambda c: LearnedOptimizer(c, rule), 2)
    with pytest.raises(ValueError, match=r"expected at least 10,000; record longer"):
        samples_of([path], rule, 10_000)
    whole = two_tasks()[0]
    flat = dataclasses.replace(whole, basis=IdentityBasis(whole.basis.layout))
    with pytest.raises(ValueError, match="a path is kept of one in a subspace"):
        record_path(flat, lambda c: torch.optim.SGD(c, lr=0.1), 2)
