"""A gradient that is not finite changes nothing, wherever it is, is counted, and raises when it stays."""

import copy

import pytest
import torch

from hf_sl2o import LearnedOptimizer, LSTMRule, RuleConfig, SubspaceOptimizer

from .conftest import random_dense
from .test_optim_learned import backward, equal, net
from .test_optim_subspace import INNERS, make, train


@pytest.mark.parametrize("inner", INNERS)
def test_non_finite_steps_change_nothing_are_counted_and_three_raise(inner):
    model = net()
    optimizer = make(model, inner)
    train(model, optimizer, 2)
    weights, state = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()["state"])

    def poison():
        backward(model, 9)
        model[2].weight.grad[0, 0] = float("nan")
        optimizer.step()

    poison()
    poison()
    assert equal(weights, model.parameters()) and optimizer.skipped_steps == 2
    for key, value in optimizer.state_dict()["state"][0].items():
        if key != "step":
            assert torch.equal(value, state[0][key]), key
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        poison()


def test_non_finite_first_step():
    model = net()
    optimizer = make(model, "adamw")
    backward(model, 0)
    model[0].bias.grad[0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert equal(before, model.parameters()) and optimizer.skipped_steps == 1
    train(model, optimizer, 1)
    assert not equal(before, model.parameters())


@pytest.mark.parametrize("outside", ["adamw", "sgd"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_non_finite_gradient_anywhere_changes_nothing_inside_nor_outside(outside, where):
    model = net()
    partial = random_dense(list(model.named_parameters())[:2], dim=3)
    makers = {"adamw": lambda p: torch.optim.AdamW(p, lr=0.1), "sgd": lambda p: torch.optim.SGD(p, lr=0.1)}
    optimizer = SubspaceOptimizer(model.named_parameters(), partial, INNERS["adamw"], outside=makers[outside])
    poisoned = model[0 if where == "inside" else 2].weight

    def poison():
        backward(model, 9)
        poisoned.grad[0, 0] = float("nan")
        optimizer.step()

    poison()  # the first step: there is no state yet
    assert equal(net().parameters(), model.parameters())
    train(model, optimizer, 2)
    weights, state = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()["state"])
    poison()
    assert equal(weights, model.parameters()) and optimizer.skipped_steps == 2
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if (index, key) != (0, "step") and not (index < 2 and key == "step"):
                assert torch.equal(value, state[index][key]), (index, key)
    twin = net()
    other = SubspaceOptimizer(twin.named_parameters(), partial, INNERS["adamw"], outside=makers[outside])
    train(twin, other, 2)
    assert equal(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))


def test_a_gradient_too_large_to_square_is_skipped_in_a_basis():
    model = net()
    optimizer = make(model, "lstm")
    train(model, optimizer, 1)
    weights = [p.detach().clone() for p in model.parameters()]
    backward(model, 1)
    model[2].weight.grad[0, 0] = 1e25
    optimizer.step()
    assert equal(weights, model.parameters()) and optimizer.skipped_steps == 1


def test_a_gradient_too_large_to_square_is_skipped():
    """Its second moment would be infinite, and the next step NaN."""
    for config in (RuleConfig(), RuleConfig(tensor_scale=True)):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), LSTMRule(config))
        train(model, optimizer, 1)
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, 1)
        model[0].bias.grad[0] = 3e19
        optimizer.step()
        assert equal(before, model.parameters()) and optimizer.skipped_steps == 1
        assert all(bool(p.isfinite().all()) for p in train(model, optimizer, 1))
