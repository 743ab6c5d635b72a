"""Sums that say whether weights are those that were written: in a compiled loop as in numpy."""

import numpy as np
import pytest
import torch

from hf_sl2o.optim import _weights
from hf_sl2o.subspace import compiled

SIZES = [0, 1, 60, 61, 62, 975, 976, 977, 15_615, 15_616, 15_617, 300_001]


@pytest.fixture(params=["compiled", "torch"])
def sums(request, monkeypatch):
    """Sums of flat tensors, by each way."""
    if request.param == "torch":
        monkeypatch.setattr(_weights, "column_sums", lambda tensors: None)
    elif compiled.OnCPU.library() is None:
        pytest.skip("there is no C++ compiler here")
    return _weights.Weights._measure


def by_numpy(tensor):
    numbers = tensor.double().numpy()
    return [numbers[column :: compiled.SUMS].sum() for column in range(compiled.SUMS)]


def test_they_are_those_of_numpy(sums):
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    found = sums(tensors)
    np.testing.assert_allclose(found.numpy(), np.array([by_numpy(t) for t in tensors]), rtol=1e-5, atol=2e-4)


def test_they_do_not_depend_on_the_number_of_threads(sums):
    tensors = [torch.randn(n) for n in (*SIZES, 2_000_003)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sums(tensors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("n", [62, 977, 300_001])
def test_a_small_change_a_sign_and_an_exchange_are_seen(sums, n):
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
    before = sums([weights])
    assert torch.equal(sums([weights.clone()]), before)
    for at in (0, n // 2, n - 1):
        changed = weights.clone()
        changed[at] *= 1 + 1e-3
        assert not torch.equal(sums([changed]), before)
        changed[at] = -weights[at]
        assert not torch.equal(sums([changed]), before)
    exchanged = weights.clone()
    exchanged[0], exchanged[1] = weights[1], weights[0]
    assert not torch.equal(sums([exchanged]), before)


def test_other_dtypes_and_strides_are_left_to_torch():
    tensors = [torch.randn(100, dtype=torch.float64), torch.randn(100).bfloat16(), torch.randn(200)[::2]]
    assert all(compiled.column_sums([t]) is None for t in tensors)
    for t in tensors:
        np.testing.assert_allclose(
            _weights.Weights._measure([t])[0].double().numpy(), by_numpy(t), rtol=1e-2, atol=1e-5
        )
