"""torch.optim semantics of SubspaceOptimizer, a test a row of the design's table, with torch.optim as the oracle."""

import copy
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_sl2o import IdentityBasis, Layout, LearnedOptimizer, LSTMRule, RuleConfig, SubspaceOptimizer, SymbolicRule

from .conftest import random_dense
from .test_optim_learned import backward, equal, net

INNERS = {
    "sgd": lambda c: torch.optim.SGD(c, lr=0.5, momentum=0.9),
    "adamw": lambda c: torch.optim.AdamW(c, lr=0.1, weight_decay=0.0),
    "symbolic": lambda c: LearnedOptimizer(c, SymbolicRule(), lr=0.5),
    "lstm": lambda c: LearnedOptimizer(c, _rule(), lr=1.0),
}


def _rule():
    torch.manual_seed(1)
    return LSTMRule(RuleConfig(output_scale=0.3))


def make(model, inner="sgd", **options):
    basis = options.pop("basis", None) or random_dense(model.named_parameters(), dim=4)
    return SubspaceOptimizer(model.named_parameters(), basis, INNERS.get(inner, inner), **options)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("inner", INNERS)
def test_trajectory_is_the_inner_optimizers_on_c(inner):
    """Oracle: autograd with respect to c through theta_0 + U c, and the inner optimizer alone."""
    model, reference = net(), net()
    basis = random_dense(model.named_parameters(), dim=4)
    ours = train(model, make(model, inner, basis=basis), 5)
    c = torch.nn.Parameter(torch.zeros(4))
    optimizer = INNERS[inner]([c])
    names = [name for name, _ in reference.named_parameters()]
    anchors = [p.detach() for p in reference.parameters()]
    u = basis.as_matrix() * basis.units[:, None]
    for step in range(5):
        moved = (u.T @ c).split([a.numel() for a in anchors])
        weights = {n: a + d.view_as(a) for n, a, d in zip(names, anchors, moved, strict=True)}
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (torch.func.functional_call(reference, weights, (x,)) - x[:, :1]).square().mean()
        (c.grad,) = torch.autograd.grad(loss, c)
        optimizer.step()
    for a, d, p in zip(anchors, basis.lift(c.detach()), ours, strict=True):
        torch.testing.assert_close(p, a + d, rtol=1e-4, atol=1e-5)
    assert max((p - a).abs().max() for p, a in zip(ours, anchors, strict=True)) > 1e-2


def test_identity_basis_is_the_plain_optimizer():
    a, b = net(), net()
    basis = IdentityBasis(Layout.from_named_parameters(a.named_parameters()))
    ours = train(a, make(a, "adamw", basis=basis), 4)
    theirs = train(b, torch.optim.AdamW(b.parameters(), lr=0.1, weight_decay=0.0), 4)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_params_by_name_in_any_order_or_by_position():
    a, b = net(), net()
    basis = random_dense(a.named_parameters(), dim=4)
    by_name = SubspaceOptimizer(reversed(list(a.named_parameters())), basis, INNERS["sgd"])
    by_position = SubspaceOptimizer(b.parameters(), basis, INNERS["sgd"])
    assert equal(train(a, by_name, 2), train(b, by_position, 2))
    assert by_name.param_groups[0]["param_names"] == list(basis.layout.names)
    with pytest.raises(ValueError, match="'0.weight' has shape"):
        SubspaceOptimizer(list(reversed(list(a.parameters()))), basis, INNERS["sgd"])
    with pytest.raises(ValueError, match="not param groups"):
        SubspaceOptimizer([{"params": list(a.parameters())}], basis, INNERS["sgd"])


def test_one_group_of_model_parameters_with_the_inner_keys():
    model = net()
    optimizer = make(model, "adamw")
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert group["lr"] == 0.1 and group["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="second optimizer"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_schedules_reach_the_inner_optimizer():
    model, reference = net(), net()
    basis = random_dense(model.named_parameters(), dim=4)
    optimizer = make(model, basis=basis)
    scheduler = LambdaLR(optimizer, lambda step: 0.1**step)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)
    assert not equal(model.parameters(), train(reference, make(reference, basis=basis), 3))


def test_closure_is_called_once_and_lbfgs_is_refused():
    model, calls = net(), []

    def closure():
        assert torch.is_grad_enabled()
        backward(model, 0)
        calls.append(1)
        return 7.0

    assert make(model).step(closure) == 7.0 and len(calls) == 1
    with pytest.raises(NotImplementedError, match="LBFGS evaluates a closure"):
        make(model, lambda c: torch.optim.LBFGS(c))
    with pytest.raises(NotImplementedError, match="hf_sl2o.unroll"):
        make(model, lambda c: LearnedOptimizer(c, _rule(), differentiable=True))
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer"):
        make(model, lambda c: c)


def test_missing_gradients_are_zero_and_none_at_all_skips():
    a, b = net(), net()
    basis = random_dense(a.named_parameters(), dim=4)
    one, two = make(a, basis=basis), make(b, basis=basis)
    for model, optimizer in ((a, one), (b, two)):
        backward(model, 0)
        model[0].weight.grad = None if model is a else torch.zeros_like(model[0].weight)
        optimizer.step()
    assert equal(a.parameters(), b.parameters())
    before = [p.detach().clone() for p in a.parameters()]
    a.zero_grad()
    one.step()
    assert equal(before, a.parameters())


def test_grad_scaler_sees_model_parameters():
    a, b = net(), net()
    basis = random_dense(a.named_parameters(), dim=4)
    scaled, plain = make(a, basis=basis), make(b, basis=basis)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backward(b, 0)
    plain.step()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    scaler.scale((a(x) - x[:, :1]).square().mean()).backward()
    scaler.step(scaled)
    scaler.update()
    assert equal(a.parameters(), b.parameters())
    scaler.scale(a(x).sum() * float("inf")).backward()
    scaler.step(scaled)
    assert equal(a.parameters(), b.parameters()) and scaled.skipped_steps == 0


@pytest.mark.parametrize("inner", INNERS)
def test_resume_is_exact_and_holds_no_basis(inner, tmp_path):
    whole, part = net(), net()
    basis = random_dense(whole.named_parameters(), dim=4)
    reference = train(whole, make(whole, inner, basis=basis), 6)
    first = make(part, inner, basis=basis)
    train(part, first, 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert set(saved["state"]) == {0, 1, 2, 3} and all("step" in entry for entry in saved["state"].values())
    assert set(saved["state"][1]) == {"step"} and saved["state"][0]["coefficients"].shape == (4,)
    assert all(value.numel() <= 4 * 8 for value in saved["state"][0].values())
    forgetful = copy.deepcopy(part)
    second = make(part, inner, basis=basis)
    second.load_state_dict(saved)
    assert torch.equal(second.coefficients, first.coefficients)
    assert equal(reference, train(part, second, 3, first=3))
    if inner != "symbolic":
        assert not equal(reference, train(forgetful, make(forgetful, inner, basis=basis), 3, first=3))


def test_another_basis_or_rule_is_refused():
    model = net()
    basis = random_dense(model.named_parameters(), dim=4)
    saved = make(model, "lstm", basis=basis).state_dict()
    with pytest.raises(ValueError, match="another basis"):
        make(model, "lstm", basis=basis.with_units("std").with_units("orthonormal")).load_state_dict(saved)
    with pytest.raises(ValueError, match="another rule"):
        make(model, lambda c: LearnedOptimizer(c, LSTMRule()), basis=basis).load_state_dict(saved)


def test_accelerate_wraps_and_reloads():
    from accelerate import Accelerator

    model = net()
    optimizer = make(model, "adamw")
    accelerator = Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, optimizer)
    train(model, wrapped, 2)
    assert torch.linalg.vector_norm(optimizer.coefficients) > 0


def test_bf16_weights_follow_c_without_drift():
    model = net(torch.bfloat16)
    start = [p.detach().clone() for p in model.parameters()]
    basis = random_dense(net().named_parameters(), dim=4)
    optimizer = make(model, lambda c: torch.optim.SGD(c, lr=1e-3), basis=basis)
    train(model, optimizer, 60)
    expected = [a.float() + d for a, d in zip(start, basis.lift(optimizer.coefficients), strict=True)]
    assert equal(model.parameters(), [e.bfloat16() for e in expected])
    other = make(model, lambda c: torch.optim.SGD(c, lr=1e-3), basis=basis)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.coefficients.dtype == torch.float32 and torch.equal(other.coefficients, optimizer.coefficients)


@pytest.mark.parametrize("inner", INNERS)
def test_lr_zero_changes_no_bit(inner):
    model = net()
    optimizer = make(model, inner)
    optimizer.param_groups[0]["lr"] = 0.0
    model[0].bias.data[0] = -0.0
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, 2)
    assert equal(before, after) and torch.signbit(after[1][0])
    assert not optimizer.coefficients.any()


def test_maximize_foreach_capturable_reach_the_inner_optimizer():
    model, reference = net(), net()
    basis = random_dense(model.named_parameters(), dim=4)
    up = train(model, make(model, lambda c: torch.optim.SGD(c, lr=0.5, maximize=True), basis=basis), 1)
    down = train(reference, make(reference, lambda c: torch.optim.SGD(c, lr=0.5), basis=basis), 1)
    for a, b, start in zip(up, down, net().parameters(), strict=True):
        torch.testing.assert_close(a - start, start - b, rtol=1e-4, atol=1e-6)
    optimizer = make(net(), lambda c: torch.optim.Adam(c, foreach=True))
    assert optimizer.param_groups[0]["foreach"] is True and optimizer.param_groups[0]["capturable"] is False


def test_weight_decay_pulls_c_to_the_anchor():
    model = net()
    optimizer = make(model, lambda c: torch.optim.AdamW(c, lr=0.1, weight_decay=0.5))
    train(model, optimizer, 3)
    c = optimizer.coefficients
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.inner.state.clear()
    optimizer.step()
    torch.testing.assert_close(optimizer.coefficients, c * (1 - 0.1 * 0.5))


def test_clipping_acts_on_the_projected_gradient():
    model = net()
    optimizer = make(model, lambda c: torch.optim.SGD(c, lr=1.0), max_grad_norm=1e-2)
    backward(model, 0)
    g = optimizer.projected_gradient()
    optimizer.step()
    assert torch.linalg.vector_norm(g) > 1e-2
    expected = -g * 1e-2 / torch.linalg.vector_norm(g)
    torch.testing.assert_close(optimizer.coefficients, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(optimizer.grad_norm, torch.linalg.vector_norm(g))
    norm = optimizer.clip_projected(1e-2)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(g))
    clipped = torch.linalg.vector_norm(optimizer.projected_gradient())
    torch.testing.assert_close(clipped, torch.tensor(1e-2), rtol=1e-3, atol=0)
    for p in model.parameters():  # what is done to the gradients after it counts
        p.grad.zero_()
    before = optimizer.coefficients
    optimizer.step()
    assert torch.equal(optimizer.coefficients, before)


def test_gradient_share():
    model = net()
    basis = random_dense(model.named_parameters(), dim=4)
    optimizer = make(model, basis=basis)
    backward(model, 0)
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = (basis.as_matrix() @ flat).square().sum() / flat.square().sum()
    torch.testing.assert_close(optimizer.gradient_share(), expected)
    inside = basis.lift(torch.randn(4))
    for p, g in zip(model.parameters(), inside, strict=True):
        p.grad = g
    torch.testing.assert_close(optimizer.gradient_share(), torch.tensor(1.0))


def test_parameters_outside_are_left_alone_or_trained(caplog):
    model = net()
    partial = random_dense(list(model.named_parameters())[:2], dim=3)
    frozen = SubspaceOptimizer(model.named_parameters(), partial, INNERS["sgd"])
    assert "2 trainable parameters are outside the basis" in caplog.text and "2.weight" in caplog.text
    head = [p.detach().clone() for p in model[2].parameters()]
    train(model, frozen, 2)
    assert equal(head, model[2].parameters())
    adamw = lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)  # noqa: E731
    both = SubspaceOptimizer(model.named_parameters(), partial, INNERS["sgd"], outside=adamw)
    reference = copy.deepcopy(model)
    backward(model, 0)
    backward(reference, 0)
    both.step()
    adamw(reference[2].parameters()).step()
    assert equal(model[2].parameters(), reference[2].parameters()) and len(both.param_groups) == 2
    again = SubspaceOptimizer(model.named_parameters(), partial, INNERS["sgd"], outside=adamw)
    again.load_state_dict(copy.deepcopy(both.state_dict()))
    twin = copy.deepcopy(model)
    twin_optimizer = SubspaceOptimizer(twin.named_parameters(), partial, INNERS["sgd"], outside=adamw)
    twin_optimizer.load_state_dict(copy.deepcopy(both.state_dict()))
    assert equal(train(model, again, 2, first=1), train(twin, twin_optimizer, 2, first=1))


@pytest.mark.parametrize("inner", INNERS)
def test_what_it_keeps_moves_with_the_model_in_the_middle_of_a_run(inner):
    ends = []
    for moves in (False, True):
        model = net(torch.bfloat16)
        optimizer = make(model, inner, average=4.0)
        train(model, optimizer, 2)
        if moves:
            optimizer._to(torch.device("cpu"))
        train(model, optimizer, 2, first=2)
        optimizer.use_average()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert equal(*ends)


def test_a_run_that_goes_on_for_longer_has_its_own_length():
    lengths = []
    for own in (100, None):
        model = net()
        short = make(model, lambda c: LearnedOptimizer(c, _rule(), total_steps=10))
        train(model, short, 1)
        longer = make(model, lambda c, own=own: LearnedOptimizer(c, _rule(), total_steps=own))
        longer.load_state_dict(copy.deepcopy(short.state_dict()))
        train(model, longer, 1)
        lengths.append((longer.param_groups[0]["total_steps"], longer.inner.param_groups[0]["total_steps"]))
    assert lengths == [(100, 100), (10, 10)]


def test_a_frozen_parameter_that_the_basis_moves_is_refused():
    model = net()
    basis = random_dense(model.named_parameters(), dim=4)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the basis moves '0.weight', which is frozen \\(2 such"):
        make(model, basis=basis)


def test_loading_coefficients():
    model = net()
    optimizer = make(model)
    start, c = [p.detach().clone() for p in model.parameters()], torch.tensor([1.0, -1.0, 0.5, 2.0])
    optimizer.load_coefficients(c)
    for p, s, d in zip(model.parameters(), start, optimizer.basis.lift(c), strict=True):
        torch.testing.assert_close(p.detach(), s + d)
    moved = [p.detach().clone() for p in model.parameters()]
    optimizer.load_coefficients(torch.zeros(4), move_weights=False)
    assert equal(moved, model.parameters()) and not optimizer.coefficients.any()
    with pytest.raises(ValueError, match="expected \\(4,\\)"):
        optimizer.load_coefficients(torch.zeros(5))


def test_step_compiles():
    a, b = net(), net()
    basis = random_dense(a.named_parameters(), dim=4)
    compiled, plain = make(a, "lstm", basis=basis), make(b, "lstm", basis=basis)
    train(a, compiled, 1)
    backward(a, 1)
    torch.compile(compiled.step, backend="eager")()
    train(b, plain, 2)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_hooks_copies_and_pickles():
    model, seen = net(), []
    optimizer = make(model, "lstm")
    optimizer.register_step_pre_hook(lambda *args: seen.append(1))
    train(model, optimizer, 2)
    assert len(seen) == 2
    pair = copy.deepcopy((model, optimizer))
    assert pair[1].basis is optimizer.basis and pair[1].inner is not optimizer.inner
    assert equal(train(*pair, 2, first=2), train(model, optimizer, 2, first=2))
    assert not equal(train(*pair, 1, first=4), model.parameters())
    loaded = pickle.loads(pickle.dumps(make(net(), _rule())))
    assert isinstance(loaded.inner, LearnedOptimizer)


def test_parameters_are_read_from_the_group_at_each_step():
    model = net()
    optimizer = make(model)
    replaced = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = replaced  # as fully_shard does
    before = [p.detach().clone() for p in replaced]
    for p in replaced:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not equal(before, replaced) and equal(model.parameters(), net().parameters())
    assert len(make(net()).state) == 0
