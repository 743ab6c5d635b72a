"""What a rule sees of a coordinate's tensor: values, chunks, tensors together and apart, files, meta-gradients."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import hf_sl2o.rules.rule
from hf_sl2o import (
    PES,
    FirstOrder,
    IdentityBasis,
    Layout,
    LearnedOptimizer,
    LSTMRule,
    MetaTrainingArguments,
    Rule,
    RuleConfig,
    SecondOrder,
    SubspaceOptimizer,
    Task,
    train_on,
    unroll,
)
from hf_sl2o.meta.episodes import Episode
from hf_sl2o.meta.task import InnerRun


def small_rule(**changes):
    torch.manual_seed(1)
    both = {"tensor_scale": True, "agreement": True}
    return LSTMRule(RuleConfig(**{"output_scale": 0.1, "hidden_size": 3, **both, **changes}))


def plain_rule():
    return small_rule(tensor_scale=False, agreement=False)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(20)]


def task():
    class Exact(IdentityBasis):
        compute_dtype = torch.float64

    basis = Exact(Layout.from_named_parameters(build().named_parameters()))
    loss = lambda model, x: (model(x) - x[:, :1]).square().mean()  # noqa: E731
    return Task("net", build, batches, loss, basis, batches(99)[:1])


def run_of(of):
    run = InnerRun(of, 0)
    run.basis = of.basis
    return run


def test_values_against_numpy():
    rule = small_rule().double()
    columns = []
    rule.cells[0].register_forward_pre_hook(lambda module, inputs: columns.append(inputs[0].detach().numpy()))
    gradients = np.random.default_rng(0).normal(size=(5, 6)) * [1, 10, 100, 1, 2, 3]
    state, m, v = rule.init_state(6, dtype=torch.float64), np.zeros(6), np.zeros(6)
    for t, g in enumerate(gradients, start=1):
        _, state = rule(torch.from_numpy(g), state)
        cosine = g @ m / (np.linalg.norm(g) * np.linalg.norm(m)) if t > 1 else 0.0
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
        s = np.sqrt(v_hat.mean())
        expected = np.stack([m_hat / np.sqrt(v_hat), g / np.sqrt(v_hat), m_hat / s, g / s, np.full(6, cosine)], axis=1)
        np.testing.assert_allclose(columns[-1], expected, rtol=1e-6)
        assert np.abs(g / np.sqrt(v_hat).mean() - g / s).max() > 0.1  # the break: the mean of the roots
        after = g @ m / (np.linalg.norm(g) * np.linalg.norm(m))
        assert t == 1 or abs(cosine - after) > 1e-3  # the break: the m that g is in already
    assert rule.config.input_size == 5 and small_rule(log_sign=5.0).config.input_size == 9


def test_agreement_tells_steps_too_short_from_steps_too_long():
    """On a bowl gradients agree while steps are short and turn over when they are too long; noise is orthogonal."""
    rule = plain_rule().double()
    rule.config = small_rule().config

    def last(step, noise=0.0):
        generator = torch.Generator().manual_seed(0)
        x, state, cosine = torch.ones(1000, dtype=torch.float64), rule.init_state(1000, dtype=torch.float64), None
        for _ in range(4):
            g = x if not noise else noise * torch.randn(1000, generator=generator, dtype=torch.float64)
            cosine = float(rule.tensor_inputs(g, state)[0, 1])
            state = state._replace(exp_avg=torch.lerp(g, state.exp_avg, 0.9), step=state.step + 1)
            x = x - step * g
        return cosine

    assert last(0.1) > 0.99 and last(2.1) < -0.99 and abs(last(0.0, noise=1.0)) < 0.1


@pytest.mark.parametrize("uniform", [True, False])
def test_chunks_and_tensors_apart_give_the_same(monkeypatch, uniform):
    rule = small_rule().double()
    sizes = [3, 1, 6]
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(10, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, 10, dtype=torch.float64)
    state = rule.init_state(10, dtype=torch.float64)
    if not uniform:  # tensors that joined later are at another step
        state = state._replace(step=torch.tensor([4.0, 0.0, 2.0]).repeat_interleave(torch.tensor(sizes)).double())
    state = rule(g.roll(1), state)[1].detach()
    apart = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 10)):
        apart.append(rule(g[part], state.at(part))[0].detach())
    apart = torch.cat(apart)
    for chunk in (3, 4, 100):
        monkeypatch.setitem(hf_sl2o.rules.rule._CHUNK, "cpu", chunk)
        ours, out = type(state)(*(tensor.clone() for tensor in state)), g.clone()
        rule.update_(out, ours, sizes=sizes)
        torch.testing.assert_close(out, apart, rtol=1e-12, atol=1e-15)
        one, other = type(state)(*(tensor.clone() for tensor in state)), g.clone()
        if uniform:
            rule.update_(other, one)  # the break: as one tensor
            assert not torch.allclose(other, apart, rtol=1e-2)


def test_no_vector_of_n_numbers_is_made():
    rule, n = small_rule(), 1 << 16
    state, g = rule.init_state(n), torch.randn(n)
    given = {tensor.untyped_storage().data_ptr() for tensor in (g, state.exp_avg, state.exp_avg_sq)}
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                    made.append(tensor.numel())
            return out

    with Watch():
        rule.tensor_inputs(g, state, [n // 2, n // 4, n // 4])
    assert made and max(made) <= 2 * 3


def test_foreach_equals_a_tensor_at_a_time_and_resumes(tmp_path):
    def train(model, optimizer, first, last):
        for x in batches(3)[first:last]:
            model.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    results = []
    for foreach in (True, False):
        model = build()
        results.append(train(model, LearnedOptimizer(model.parameters(), small_rule(), foreach=foreach), 0, 8))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    model = build()
    plain = train(model, LearnedOptimizer(model.parameters(), plain_rule()), 0, 8)
    assert (plain - results[0]).abs().max() > 1e-3
    model = build()
    first = LearnedOptimizer(model.parameters(), small_rule())
    train(model, first, 0, 4)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = LearnedOptimizer(model.parameters(), small_rule())
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert torch.equal(train(model, second, 4, 8), results[0])


def test_files_and_older_files(tmp_path):
    rule = small_rule()
    rule.save_pretrained(tmp_path)
    assert Rule.from_pretrained(tmp_path).fingerprint == rule.fingerprint
    plain = plain_rule()
    plain.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    for name in ("tensor_scale", "agreement"):
        del config["rule"][name]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    assert Rule.from_pretrained(tmp_path / "plain").fingerprint == plain.fingerprint != rule.fingerprint
    for name in ("tensor_scale", "agreement"):
        with pytest.raises(ValueError, match=f'{name} adds to inputs "normalized"'):
            RuleConfig(inputs="gradient", **{name: True})


def test_a_task_of_raw_tensors_runs_as_an_optimizer_over_them():
    """Coefficients of an identity basis are handed out a tensor at a time, so s is that of each parameter."""
    of = task()
    seen = train_on(of, lambda c: LearnedOptimizer(c, small_rule().double()), 6, evaluate_at={6})["train_loss"]
    model, losses = build(), []
    optimizer = LearnedOptimizer(model.parameters(), small_rule().double())
    for x in batches(0)[:6]:
        model.zero_grad()
        loss = of.loss(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(seen, losses, rtol=1e-6)


def test_meta_gradient_of_all_coordinates_and_of_a_part():
    """A part's gradients add up to the whole: each sees the scale of its whole tensor."""
    rule = small_rule().double()

    def gradient(chosen):
        run = run_of(task())
        c = torch.zeros(run.basis.dim, dtype=torch.float64)
        state = rule.init_state(run.basis.dim, dtype=torch.float64)
        surrogate, c, _, losses = unroll(rule, run, c, state, steps=4, coordinates=chosen)
        grads = torch.autograd.grad(surrogate, list(rule.parameters()))
        return torch.cat([g.flatten() for g in grads]), c.detach(), losses

    whole, c, losses = gradient(None)
    n = len(c)
    halves = [gradient(part) for part in (torch.arange(0, n, 2), torch.arange(1, n, 2))]
    weights = [len(range(k, n, 2)) / n for k in (0, 1)]
    torch.testing.assert_close(
        sum(w * h[0] for w, h in zip(weights, halves, strict=True)), whole, rtol=1e-9, atol=1e-12
    )
    for _, of_half, half_losses in halves:
        torch.testing.assert_close(of_half, c, rtol=1e-12, atol=0)
        assert torch.equal(half_losses, losses)


def test_second_order_equals_finite_differences_and_all_estimators_see_the_same_losses():
    rule = small_rule().double()

    def window(estimator, of=rule):
        runs = [run_of(task()) for _ in range(estimator.runs)]
        generator = torch.Generator().manual_seed(0)
        return estimator.window(of, runs, estimator.begin(of, runs), [1.0] * 4, total_steps=4, generator=generator)

    exact = window(SecondOrder())
    torch.testing.assert_close(window(FirstOrder()).losses, exact.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(window(PES(sigma=1e-9)).losses, exact.losses, rtol=1e-6, atol=0)
    weight, step = rule.cells[0].weight_ih, 1e-6
    for index in ((0, 2), (4, 3), (3, 4)):  # columns of m^ / s, g / s and the agreement
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
            ends.append(float(window(SecondOrder()).losses.sum()))
            with torch.no_grad():
                weight[index] -= sign * step
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert abs(numeric) > 1e-8
        np.testing.assert_allclose(exact.gradients[0][index].item(), numeric, rtol=1e-4)


def test_meta_training_takes_the_steps_that_the_optimizer_takes():
    def of_episode(rule):
        episode = Episode(0, task(), FirstOrder(), seed=0, steps=4, random_scaling=0.0, device=torch.device("cpu"),
                          autocast=None)  # fmt: skip
        episode.begin(rule)
        episode.advance(rule, MetaTrainingArguments("unused", unroll_length=4, inner_steps=4, eval_every=1))
        return torch.cat([p.detach().flatten() for p in episode.runs[0].parameters])

    def of_optimizer(rule):
        run = InnerRun(task(), 0)
        optimizer = LearnedOptimizer(run.parameters, rule)
        for _ in range(4):
            _, g = run.gradient()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in run.parameters])

    rule = small_rule()
    torch.testing.assert_close(of_episode(rule), of_optimizer(rule), rtol=1e-4, atol=1e-6)
    plain = plain_rule()
    assert (of_episode(plain) - of_optimizer(rule)).abs().max() > 1e-3  # the break


def test_an_identity_basis_equals_the_rule_on_the_parameters():
    def train(make):
        model = build().float()
        optimizer = make(model)
        for x in batches(3)[:6]:
            model.zero_grad()
            (model(x.float()) - x[:, :1].float()).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def in_basis(model):
        basis = IdentityBasis(Layout.from_named_parameters(model.named_parameters()))
        return SubspaceOptimizer(model.named_parameters(), basis, small_rule())

    def as_one_tensor(model):
        optimizer = in_basis(model)
        optimizer.inner.tensor_shapes = None
        return optimizer

    expected = train(lambda model: LearnedOptimizer(model.parameters(), small_rule()))
    torch.testing.assert_close(train(in_basis), expected, rtol=1e-4, atol=1e-6)
    assert (train(as_one_tensor) - expected).abs().max() > 1e-3  # the break
