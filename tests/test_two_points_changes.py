"""What a user changes in the weights between two steps, or inside one, stays."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_sl2o import LearnedOptimizer, build_optimizer
from hf_sl2o.rules import load_rule

from .conftest import random_dense
from .two_points_cases import KINDS, LOW, Net, batch, begun, copies, far, optimizer_of, replace, same, states, step

HOWS = ["load_state_dict", "copy_", "data.copy_", "vector", "data =", "neg_", "rows", "rows in place"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_training_goes_on_from_weights_that_were_replaced(kind, how, dtype):
    model, optimizer = begun(kind, dtype=dtype)
    replace(model, how)
    given = copies(model)
    assert same(states(model), given)
    seen = []
    step(model, optimizer, 4, lambda: seen.extend([copies(model), states(model)]))
    if kind == "tensors" and dtype in LOW:  # element by element: what is by chance the old number keeps its last step
        assert far(seen[0], given) < 0.01 and same(seen[1], given)
    else:
        assert same(seen[0], given) and same(seen[1], given)
    assert far(copies(model), given) < 0.2  # and it is not undone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS[:5])
def test_weights_replaced_between_forward_and_step_stay(kind, how):
    model, optimizer = begun(kind)
    seen = []

    def between():
        replace(model, how)
        seen.extend([copies(model), states(model)])

    step(model, optimizer, 4, between)
    if how != "data.copy_" or kind == "tensors":  # behind torch's back, in a basis, it is only seen after the step
        assert same(seen[0], seen[1])
    assert far(copies(model), seen[0]) < 0.2


@pytest.mark.parametrize("kind", ["sgd", "rule"])
@pytest.mark.parametrize("average", [0.0, 4.0])
@pytest.mark.parametrize("when", ["after the step", "before the step"])
def test_coefficients_follow_weights_that_were_replaced(kind, average, when):
    model, start = Net(), copies(Net())
    basis = random_dense(model.named_parameters())
    optimizer = optimizer_of(model, kind, average, basis)
    for at in range(3):
        step(model, optimizer, at)
    c = torch.linspace(-0.5, 0.5, basis.dim)

    def replace_by_those_of_c():
        with torch.no_grad():
            for p, old, way in zip(model.parameters(), start, basis.lift(c), strict=True):
                p.copy_(old + way)

    if when == "after the step":
        replace_by_those_of_c()
        torch.testing.assert_close(optimizer.coefficients, c, rtol=0, atol=1e-5)
        step(model, optimizer, 3)
    else:
        step(model, optimizer, 3, replace_by_those_of_c)
    found = basis.coordinates(list(model.parameters())) - basis.coordinates(start)
    torch.testing.assert_close(optimizer.coefficients, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64])
@pytest.mark.parametrize("through", ["copy", "data"])
def test_rows_set_to_zero_between_two_steps_stay(kind, average, dtype, through):
    model, optimizer = begun(kind, dtype=dtype, average=average)
    with torch.no_grad():
        (model.a.weight.data if through == "data" else model.a.weight)[:4] = 0
    for group in optimizer.param_groups:
        group["lr"] = 1e-4 * group["lr"]
    step(model, optimizer, 4)
    assert float(model.a.weight.detach()[:4].abs().max()) < 1e-2
    optimizer.use_last()
    assert float(model.a.weight.detach()[:4].abs().max()) < 1e-2
    assert float(model.a.weight.detach()[4:].abs().max()) > 0.1


def test_what_sharpness_aware_steps_add_and_take_off_again_leaves_the_average():
    """A user's w + e - w is w to rounding; that a number differs in its last digit is no change of the weights."""

    def run(kind, exactly):
        model = Net()
        optimizer = optimizer_of(model, kind)
        for at in range(8):
            optimizer.zero_grad()
            model(batch(at))["loss"].backward()
            old = copies(model)
            ways = [0.01 * p.grad / p.grad.norm() for p in model.parameters()]
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), ways)
            optimizer.zero_grad()
            model(batch(at))["loss"].backward()
            with torch.no_grad():
                if exactly:
                    torch._foreach_copy_(list(model.parameters()), old)
                else:
                    torch._foreach_sub_(list(model.parameters()), ways)
            optimizer.step()
        published = copies(model)
        optimizer.use_last()
        return published, copies(model)

    for kind in ("sgd", "rule", "tensors"):
        (published, last), (expected, last_expected) = run(kind, False), run(kind, True)
        assert far(last, last_expected) < 1e-5 and far(expected, last_expected) > 1e-3
        assert far(published, expected) < 1e-5, kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [0.0, 4.0])
def test_what_is_frozen_after_construction_does_not_move(kind, average):
    model, optimizer = begun(kind, average=average)
    held = model.a.weight.detach().clone()
    model.a.weight.requires_grad_(False)
    for at in range(4, 7):
        step(model, optimizer, at)
        assert torch.equal(model.a.weight, held) and torch.equal(model.state_dict()["a.weight"], held)
        optimizer.use_last()
        assert torch.equal(model.a.weight, held)
    optimizer.use_average()
    assert torch.equal(model.a.weight, held)
    model.a.weight.requires_grad_(True)
    step(model, optimizer, 7)
    assert not torch.equal(model.a.weight, held)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(6, dtype=torch.complex64)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.fft.irfft(self.w * torch.fft.rfft(x, n=10), n=10).square().mean() + (self.b - 1).square().sum()


@pytest.mark.parametrize("average", [0.0, 4.0])
def test_complex_weights_have_two_points_as_well(average):
    model, start = Spectral(), Spectral()
    make = lambda net: LearnedOptimizer(net, load_rule("default-lora", with_basis=False), average=average)  # noqa: E731
    optimizer, x = make(model), torch.randn(4, 10)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    published, moved = model.w.detach().clone(), (model.w - start.w).detach()
    assert float(moved.real.abs().max()) > 1e-3 and float(moved.imag.abs().max()) > 1e-3
    model(x)
    assert torch.equal(model.state_dict()["w"], published)
    assert torch.equal(model.w, published) == (average == 0)
    other = Spectral()
    other.load_state_dict(model.state_dict())
    again = make(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, of in ((model, optimizer), (other, again)):
        of.zero_grad()
        net(x).backward()
        of.step()
    assert torch.equal(model.w, other.w)


@pytest.mark.parametrize("average", [0.0, 4.0])
def test_fp64_weights_are_moved_in_fp64(average):
    model = Net(dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-9 * torch.randn_like(p))
    start, basis = copies(model), random_dense(Net().named_parameters())
    optimizer = optimizer_of(model, "sgd", average, basis)
    for at in range(3):
        step(model, optimizer, at)
    c = optimizer.coefficients.double() * basis.units.double()
    for index, (p, old) in enumerate(zip(model.parameters(), start, strict=True)):
        expected = old + (basis.matrix(index).double().T @ c).view(p.shape)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-7 if average else 1e-14)
        assert not torch.equal(p.detach(), p.detach().float().double())


def test_merging_an_adapter_merges_what_is_published():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["a"]))
    optimizer = build_optimizer(model, average=9.0)
    assert optimizer.average == 9.0
    for at in range(4):
        step(model, optimizer, at)
    expected = model.eval()(batch(50))["logits"].detach()
    model.train()(batch(9))
    optimizer.listens = False
    last = model.eval()(batch(50))["logits"].detach()  # the break: where it trains
    optimizer.listens = True
    optimizer.use_average()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(batch(50))["logits"].detach(), expected)
    assert float((last - expected).abs().max()) > 1e-4
