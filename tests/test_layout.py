"""Layouts: order, tied weights, wrapper prefixes, and refusals that name the first difference."""

import pytest
import torch
from torch import nn

from hf_sl2o import Layout


def named(**shapes):
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def test_trainable_parameters_in_order_tied_ones_once():
    tied = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": tied, "b": nn.Linear(3, 3)})
    model["b"].weight = tied.weight
    model["b"].bias.requires_grad = False
    layout = Layout.from_named_parameters(model.named_parameters(remove_duplicate=False))
    assert layout.names == ("a.weight", "a.bias") and layout.n == 12 and layout.numels == (9, 3)


def test_wrapper_prefixes_do_not_matter():
    plain = Layout.from_named_parameters(named(weight=(2, 3)))
    wrapped = Layout.from_named_parameters([("module._orig_mod.weight", nn.Parameter(torch.zeros(2, 3)))])
    assert plain == wrapped and plain.fingerprint == wrapped.fingerprint
    assert plain.fingerprint != Layout.from_named_parameters(named(weight=(3, 2))).fingerprint


def test_first_difference_is_named():
    layout = Layout.from_named_parameters(named(a=(2,), b=(3, 4), c=(5,)))
    with pytest.raises(ValueError, match=r"'b'.*does not have.*'x'"):
        layout.select(named(a=(2,), x=(3, 4), c=(5,)))
    with pytest.raises(ValueError, match=r"'b' has shape \(4, 3\).*fitted for \(3, 4\)"):
        layout.select(named(a=(2,), b=(4, 3), c=(6,)))
    with pytest.raises(ValueError, match="covers 3 tensors"):
        layout.check_tensors([torch.zeros(2)])
    covered, outside = layout.select(named(c=(5,), head=(7,), b=(3, 4), a=(2,)))
    assert [tuple(p.shape) for p in covered] == [(2,), (3, 4), (5,)] and [name for name, _ in outside] == ["head"]


def test_blocks_by_layer():
    layout = Layout.from_named_parameters(
        named(**{"wte.weight": (2,), "h.0.w": (2,), "h.0.b": (1,), "h.1.w": (2,), "ln.w": (1,), "ln.b": (1,)})
    )
    assert layout.blocks("layer") == [[0], [1, 2], [3], [4, 5]]
    assert layout.blocks("global") == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="expected"):
        layout.blocks("row")


def test_nothing_trainable_and_bad_construction():
    with pytest.raises(ValueError, match="at least one"):
        Layout.from_named_parameters([])
    with pytest.raises(ValueError, match="distinct"):
        Layout(("a", "a"), ((1,), (1,)))
    with pytest.raises(ValueError, match="one shape a name"):
        Layout(("a",), ())
