"""The two points of a run in other bases, and of what is outside of one."""

import copy

import pytest
import torch
from torch import nn

from hf_sl2o import IdentityBasis, Layout, RandomBasis, build_optimizer

from .conftest import random_dense
from .two_points_cases import Net, batch, copies, far, optimizer_of, same, states, step


@pytest.mark.parametrize("which", ["random", "identity"])
def test_other_bases_have_two_points_too(which):
    layout = Layout.from_named_parameters(Net().named_parameters())
    basis = RandomBasis(layout, 6) if which == "random" else IdentityBasis(layout)
    model, other = Net(), Net(4)
    optimizer = optimizer_of(model, "rule", basis=basis)
    for at in range(4):
        step(model, optimizer, at)
    published = copies(model)
    model(batch(9))
    assert far(copies(model), published) > 1e-4 and same(states(model), published)
    other.load_state_dict(model.state_dict())
    again = optimizer_of(other, "rule", basis=basis)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for at in range(4, 7):
        step(model, optimizer, at)
        step(other, again, at)
    assert same(copies(model), copies(other))


def test_what_is_outside_the_basis_has_one_point():
    class Longer(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x, labels=None):
            return {"loss": self.head(super().forward(x)["logits"]).square().mean()}

    model = Longer()
    basis = random_dense(Net().named_parameters())
    optimizer = build_optimizer(model, "sl2o", basis=basis, outside="adamw", total_steps=9)
    for at in range(4):
        before = copies(model)
        step(model, optimizer, at, lambda before=before: same(states(model), before) or pytest.fail("not published"))
        assert same(states(model), copies(model))
    published = copies(model)
    model(batch(9))
    assert torch.equal(model.head.weight, published[4]) and not torch.equal(model.a.weight, published[0])
    assert optimizer.average == 4.0 and same(states(model), published)
