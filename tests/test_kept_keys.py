"""Keys of what is kept: nothing that differs has the key of another, and what is equal has the same one."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sl2o.experiments.kept.keys import fingerprint_of, model_key, source_of


@dataclasses.dataclass
class Row:
    values: torch.Tensor


class Plain:
    def __init__(self, value):
        self.value = value


def picture(mode, size, palette=None):
    image = Image.new(mode, size)
    if palette is not None:
        image.putpalette(palette)
    return image


LONG = torch.zeros(5000)
MIDDLE = LONG.index_fill(0, torch.tensor([2500]), 1.0)
PAIRS = {
    "lengths": ([1, 12], [11, 2]),
    "order": ([1, 11], [11, 1]),
    "nesting": ([[1], [2]], [[1, 2]]),
    "text and number": (["1"], [1]),
    "keys": ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    "tensors' dtype": (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
    "tensors' shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "arrays' dtype": (np.zeros(4, np.float32), np.zeros(4, np.int32)),
    "arrays' shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "pictures' size": (picture("L", (2, 3)), picture("L", (3, 2))),
    "palettes": (picture("P", (2, 2), [0, 0, 0, 9, 9, 9]), picture("P", (2, 2), [0, 0, 0, 8, 8, 8])),
    "data classes": (Row(LONG), Row(MIDDLE)),
    "objects": (Plain(1), Plain(2)),
}


@pytest.mark.parametrize("one, other", [pytest.param(*pair, id=name) for name, pair in PAIRS.items()])
def test_rows_that_differ_have_other_fingerprints(one, other):
    assert fingerprint_of([one]) == fingerprint_of([one]) != fingerprint_of([other]) != fingerprint_of([other, other])


def test_rows_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="give Comparison an identity"):
        fingerprint_of([torch.zeros(2, 2).to_sparse()])

    class Noisy(list):
        def __getitem__(self, index):
            return torch.randn(3)

    with pytest.raises(ValueError, match="row 0 differs each time it is read"):
        fingerprint_of(Noisy([1, 2]))
    lazy = torch.randn(2, dtype=torch.complex64).conj()
    assert fingerprint_of([lazy]) == fingerprint_of([lazy.resolve_conj()])
    knot = Plain(1)
    knot.value = [knot]
    assert fingerprint_of([knot])  # ends


class Focal(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def forward(self, model, batch):
        return model(batch).pow(self.gamma).mean()


def weighted(model, batch, weight=1.0):
    return weight * model(batch).mean()


def enclosing(weight):
    def loss(model, batch):
        return weight * model(batch).mean()

    return loss


class Bound:
    def __init__(self, weight):
        self.weight = weight

    def loss(self, model, batch):
        return self.weight * model(batch).mean()


FUNCTIONS = {
    "partial": lambda value: functools.partial(weighted, weight=value),
    "closure": enclosing,
    "bound method": lambda value: Bound(value).loss,
    "module": Focal,
    "closure with a tensor": lambda value: enclosing(torch.tensor(value)),
    "closure with a function": lambda value: enclosing(functools.partial(weighted, weight=value)),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in FUNCTIONS.items()])
def test_functions_with_other_values_in_them_are_others(make):
    assert source_of(make(1.0)) == source_of(make(1.0)) != source_of(make(2.0))


def test_functions_of_other_code_are_others():
    assert source_of(weighted) != source_of(enclosing) and source_of(torch.sum) == source_of(torch.sum)
    assert source_of(torch.sum) != source_of(torch.mean)


class Scaled(nn.Linear):
    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def linear(factor=None, cls=Scaled):
    torch.manual_seed(0)
    made = cls(3, 2)
    if factor is not None:
        made.factor = factor
    return made


def test_models_that_differ_in_anything_that_counts_are_others():
    class Twice(Scaled):
        def forward(self, x):
            return 2 * super().forward(x)

    Twice.__qualname__, Twice.__name__ = Scaled.__qualname__, Scaled.__name__
    same, frozen, moved = linear(), linear(), linear()
    frozen.bias.requires_grad_(False)
    moved.bias.data += 1e-3
    found = {model_key(model) for model in (same, frozen, moved, linear(2.0), linear(cls=Twice), nn.Linear(3, 2))}
    assert len(found) == 6 and model_key(linear()) == model_key(same)
    activations = {model_key(nn.Sequential(linear(), act)) for act in (nn.ReLU(), nn.Tanh(), nn.GELU())}
    assert len(activations) == 3
    assert model_key(nn.Sequential(linear(), nn.Dropout(0.1))) != model_key(nn.Sequential(linear(), nn.Dropout(0.2)))
    same.eval()
    assert model_key(same) == model_key(linear())  # a run begins in training mode


def test_the_version_of_transformers_is_no_part_of_a_model(monkeypatch):
    def gpt2(**options):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=9, n_layer=1, n_head=1, n_embd=4, n_positions=4, **options))

    one, other = gpt2(), gpt2(attn_pdrop=0.0)
    before = model_key(one)
    one.config.transformers_version = "99.0"
    assert model_key(one) == before != model_key(other)
