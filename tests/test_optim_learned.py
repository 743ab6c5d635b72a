"""torch.optim semantics of LearnedOptimizer, a test a row of the design's table."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from hf_sl2o import LearnedOptimizer, LSTMRule, RuleConfig, SymbolicRule


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def rule():
    torch.manual_seed(1)
    return LSTMRule(RuleConfig(output_scale=0.1))


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    (model(x) - x[:, :1]).square().mean().backward()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_update_is_the_rule_on_each_scalar():
    model, r = net(), rule()
    optimizer = LearnedOptimizer(model.parameters(), r, lr=0.5)
    states = {p: r.init_state(p.numel()) for p in model.parameters()}
    expected = {p: p.detach().clone() for p in model.parameters()}
    for step in range(3):
        backward(model, step)
        for p in expected:
            delta, states[p] = r(p.grad.reshape(-1), states[p])
            expected[p] = expected[p] - 0.5 * delta.detach().view_as(p)
        optimizer.step()
    for p, value in expected.items():
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["tensors", "dicts", "pairs"])
def test_params_in_three_forms(form):
    model, reference = net(), net()
    params = {
        "tensors": list(model.parameters()),
        "dicts": [{"params": list(model.parameters())}],
        "pairs": list(model.named_parameters()),
    }[form]
    ours = train(model, LearnedOptimizer(params, rule()), 2)
    assert equal(ours, train(reference, LearnedOptimizer(reference.parameters(), rule()), 2))


def test_groups_and_added_groups_have_their_own_rate():
    model = net()
    optimizer = LearnedOptimizer([{"params": model[0].parameters(), "lr": 0.0}], rule())
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1.0})
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, 1, first=2)
    assert equal(before[:2], after[:2]) and not equal(before[2:], after[2:])
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_lr_zero_changes_no_bit_and_tensors_are_rates():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    assert equal(before, train(model, LearnedOptimizer(model.parameters(), rule(), lr=0.0), 2))
    a, b = net(), net()
    ours = train(a, LearnedOptimizer(a.parameters(), rule(), lr=torch.tensor(0.5)), 2)
    assert equal(ours, train(b, LearnedOptimizer(b.parameters(), rule(), lr=0.5), 2))
    assert not equal(ours, train(net(), LearnedOptimizer(b.parameters(), rule(), lr=0.5), 2))


def test_schedulers():
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), rule())
    for make in (
        lambda o: LambdaLR(o, lambda step: 0.5**step),
        lambda o: MultiStepLR(o, [1]),
        lambda o: ReduceLROnPlateau(o),
    ):
        scheduler = make(copy.deepcopy(optimizer))
        assert scheduler.optimizer.param_groups[0]["lr"] == 1.0
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    OneCycleLR(LearnedOptimizer(net().parameters(), rule()), 1.0, total_steps=3, cycle_momentum=False)


def test_closure_runs_once_with_gradients():
    model, calls = net(), []

    def closure():
        assert torch.is_grad_enabled()
        backward(model, 0)
        calls.append(1)
        return torch.tensor(3.0)

    assert LearnedOptimizer(model.parameters(), rule()).step(closure) == 3.0 and len(calls) == 1


def test_parameters_without_gradient_are_left_alone():
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), rule())
    backward(model, 0)
    skipped = model[0].weight
    before, skipped.grad = skipped.detach().clone(), None
    optimizer.step()
    assert torch.equal(skipped, before) and skipped not in optimizer.state
    backward(model, 1)
    optimizer.step()
    assert int(optimizer.state[skipped]["step"]) == 1 and int(optimizer.state[model[0].bias]["step"]) == 2


def test_late_parameters_have_their_own_bias_correction():
    a, b = net(), net()
    together = LearnedOptimizer(a.parameters(), rule())
    single = LearnedOptimizer(b.parameters(), rule(), foreach=False)
    for model, optimizer in ((a, together), (b, single)):
        backward(model, 0)
        model[2].bias.grad = None
        optimizer.step()
        train(model, optimizer, 3, first=1)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_non_finite_steps_change_nothing_are_counted_and_three_raise(caplog):
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), rule())
    train(model, optimizer, 2)
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])

    def poison(value):
        backward(model, 9)
        model[0].bias.grad[1] = value
        optimizer.step()

    poison(float("nan"))
    poison(float("inf"))
    assert equal(weights, model.parameters()) and optimizer.skipped_steps == 2
    for index, saved in optimizer.state_dict()["state"].items():
        assert all(torch.equal(saved[key], state[index][key]) for key in saved)
    assert "2 in all, 2 in a row" in caplog.text
    train(model, optimizer, 1, first=5)
    assert not equal(weights, model.parameters())
    poison(float("nan"))
    poison(float("nan"))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        poison(float("nan"))


def test_grad_scaler_skips():
    model = net()
    optimizer, scaler = LearnedOptimizer(model.parameters(), rule()), torch.amp.GradScaler("cpu", init_scale=2.0)
    backward(model, 0)
    model[0].weight.grad[0, 0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert equal(before, model.parameters()) and scaler.get_scale() == 1.0 and optimizer.skipped_steps == 0


def test_state_dict_resumes_to_the_bit(tmp_path):
    whole, part = net(), net()
    reference = train(whole, LearnedOptimizer(whole.parameters(), rule()), 6)
    first = LearnedOptimizer(part.parameters(), rule())
    train(part, first, 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    keys = {key for entry in saved["state"].values() for key in entry}
    assert keys == {"step", "exp_avg", "exp_avg_sq", "hidden", "cell", "momenta"} and len(saved["state"]) == 4
    forgetful = copy.deepcopy(part)
    second = LearnedOptimizer(part.parameters(), rule())
    second.load_state_dict(saved)
    assert equal(reference, train(part, second, 3, first=3))
    assert not equal(reference, train(forgetful, LearnedOptimizer(forgetful.parameters(), rule()), 3, first=3))


def test_another_rule_is_refused():
    model = net()
    saved = LearnedOptimizer(model.parameters(), rule()).state_dict()
    with pytest.raises(ValueError, match="made with another rule"):
        LearnedOptimizer(model.parameters(), LSTMRule()).load_state_dict(saved)


def test_bf16_weights_keep_fp32_state():
    model = net(torch.bfloat16)
    optimizer = LearnedOptimizer(model.parameters(), rule())
    train(model, optimizer, 2)
    other = LearnedOptimizer(model.parameters(), rule())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state["exp_avg"].dtype == torch.float32 for state in other.state.values())
    train(model, other, 1)


def test_foreach_and_single_tensor_agree():
    results = []
    for foreach in (None, True, False):
        model = net()
        results.append(train(model, LearnedOptimizer(model.parameters(), rule(), foreach=foreach), 4))
    assert equal(results[0], results[1])
    for a, b in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_maximize_is_the_negative_gradient():
    a, b = net(), net()
    up, down = LearnedOptimizer(a.parameters(), rule(), maximize=True), LearnedOptimizer(b.parameters(), rule())
    for step in range(3):
        backward(a, step)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            q.grad = -p.grad
        up.step()
        down.step()
    assert equal(a.parameters(), b.parameters())


def test_weight_decay_is_decoupled():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = LearnedOptimizer(model.parameters(), SymbolicRule(), lr=0.5, weight_decay=0.1)
    plain = net()
    train(plain, LearnedOptimizer(plain.parameters(), SymbolicRule(), lr=0.5), 1)
    train(model, optimizer, 1)
    for p, q, start in zip(model.parameters(), plain.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.05 * start)


def test_capturable_reads_nothing_back():
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), rule(), capturable=True)
    backward(model, 0)
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    for _ in range(5):
        optimizer.step()
    assert optimizer.skipped_steps == 5
    other = net()
    ours = train(other, LearnedOptimizer(other.parameters(), rule(), capturable=True), 3)
    plain = net()
    assert equal(ours, train(plain, LearnedOptimizer(plain.parameters(), rule()), 3))


def test_differentiable_gradcheck():
    torch.manual_seed(0)
    r = LSTMRule(RuleConfig(hidden_size=2)).double()

    def final(start, gradient):
        p = start.clone()
        p.grad = gradient
        optimizer = LearnedOptimizer([p], r, lr=0.3, differentiable=True)
        optimizer.step()
        p.grad = gradient * 2
        optimizer.step()
        return p

    start = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(final, (start, gradient), atol=1e-6)


def test_hooks_copies_and_pickles():
    model, seen = net(), []
    optimizer = LearnedOptimizer(model.parameters(), rule())
    optimizer.register_step_post_hook(lambda *args: seen.append(1))
    train(model, optimizer, 2)
    assert len(seen) == 2
    for duplicate in (
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(LearnedOptimizer(net().parameters(), rule()))),
    ):
        assert duplicate.rule.fingerprint == optimizer.rule.fingerprint
    pair = copy.deepcopy((model, optimizer))
    assert equal(train(*pair, 2, first=2), train(model, optimizer, 2, first=2))


def test_step_compiles():
    a, b = net(), net()
    optimizer = LearnedOptimizer(a.parameters(), rule())
    train(a, optimizer, 1)
    backward(a, 1)
    torch.compile(optimizer.step, backend="eager")()
    train(b, LearnedOptimizer(b.parameters(), rule()), 2)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_long_parameters_are_handled_in_chunks():
    torch.manual_seed(0)
    gradient = torch.randn(20_001)
    p = nn.Parameter(torch.zeros(20_001))
    p.grad = gradient
    r = rule()
    LearnedOptimizer([p], r).step()
    expected, _ = r(gradient, r.init_state(20_001))
    torch.testing.assert_close(-p.detach(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_errors():
    model = net()
    with pytest.raises(TypeError, match="expected a Rule"):
        LearnedOptimizer(model.parameters(), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="lr is -1"):
        LearnedOptimizer(model.parameters(), rule(), lr=-1)
    with pytest.raises(ValueError, match="weight_decay"):
        LearnedOptimizer(model.parameters(), rule(), weight_decay=-1)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse=False"):
        LearnedOptimizer(table.parameters(), rule()).step()


def test_numbers_that_would_divide_by_zero_are_refused():
    for options, message in (({"betas": (1.0, 0.99)}, "betas are"), ({"eps": 0.0}, "eps is 0")):
        with pytest.raises(ValueError, match=message):
            LearnedOptimizer(net().parameters(), rule(), **options)
    for bad in ({"eps": -1.0}, {"output_scale": float("nan")}, {"bias_correction_offset": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RuleConfig(**bad)


def test_a_run_that_goes_on_for_longer_has_its_own_length():
    model = net()
    short = LearnedOptimizer(model.parameters(), rule(), total_steps=10)
    train(model, short, 1)
    for own, expected in ((100, 100), (None, 10)):
        longer = LearnedOptimizer(model.parameters(), rule(), total_steps=own)
        longer.load_state_dict(copy.deepcopy(short.state_dict()))
        assert longer.param_groups[0]["total_steps"] == expected
