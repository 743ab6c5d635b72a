"""The compiled loops over directions of few bits and thin factors beside them, against products in float64."""

import pickle

import pytest
import torch

from hf_sl2o import Layout
from hf_sl2o.foundation import native
from hf_sl2o.subspace import compiled
from hf_sl2o.subspace.quantized import quantize
from hf_sl2o.subspace.thin import Factors
from hf_sl2o.subspace.tucker import TuckerBasis, leading_basis

D, WHOLE = 9, 3
# whole rows a chunk (an odd number), a slice of one, factors on one side, some that the loops do not take
SHAPES = ((7, 256), (33, 1152), (3, 4608), (5, 128), (6, 130), (130,), (64, 384))
# ranks (left, right); None: no factor
RANKS = ((4, 3), (6, 5), (3, 2), (None, 4), (3, 3), (None, None), (2, 5))


@pytest.fixture(autouse=True)
def _loops():
    if native.load_native(compiled._SOURCE) is None:
        pytest.skip("there is no C++ compiler here, so there are no compiled loops")


def basis_of(bits=4):
    generator = torch.Generator().manual_seed(bits)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    layout = Layout(tuple(f"p{i}" for i in range(len(SHAPES))), SHAPES)
    factors, codes, scales = [], [], []
    for shape, (left, right), numel in zip(SHAPES, RANKS, layout.numels, strict=True):
        m, q = shape if len(shape) == 2 else (1, *shape)
        factors.append(
            Factors(
                drawn(D - WHOLE, left or m, right or q) / layout.n**0.5,
                None if left is None else torch.linalg.qr(drawn(m, left))[0],
                None if right is None else torch.linalg.qr(drawn(q, right))[0],
            )
        )
        code, scale = quantize(drawn(WHOLE, numel) / layout.n**0.5, bits)
        codes.append(code)
        scales.append(scale)
    leading = leading_basis(layout, codes, scales, [(0, D)] * len(SHAPES), WHOLE)
    mix = torch.linalg.qr(drawn(D, D))[0]
    return TuckerBasis(layout, factors, mix, torch.rand(D, generator=generator) + 0.5, leading=leading)


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def flat(them):
    return torch.cat([one.reshape(-1).double() for one in them])


def exact(basis):
    return basis.as_matrix().double() * basis.units.double()[:, None]  # (d, n)


def near(found, expected):
    return float((found.double() - expected).abs().max()) < 2e-6 * float(expected.abs().max()) * len(expected) ** 0.25


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_project(bits, dtype):
    basis, gradients = basis_of(bits), tensors(1, dtype)
    assert [of.wide is not None for of in basis._factors] == [True, True, True, True, False, False, False]
    assert basis._of_both() is not None
    assert near(basis.project(gradients), exact(basis) @ flat(gradients))
    gradients[1] = gradients[3] = None
    alike = [torch.zeros(shape) if g is None else g for shape, g in zip(SHAPES, gradients, strict=True)]
    assert near(basis.project(gradients), exact(basis) @ flat(alike))


def test_a_basis_that_was_used_can_be_pickled():
    basis, gradients = basis_of(), tensors(1)
    found = basis.project(gradients)
    assert basis._of_both() is basis._of_both()  # made once
    assert pickle.loads(pickle.dumps(basis)).project(gradients).equal(found)


def test_the_order_of_the_columns_counts(monkeypatch):
    basis, gradients = basis_of(), tensors(1)
    monkeypatch.setattr(compiled, "in_order", lambda wide, storage: wide.contiguous())
    assert not near(basis.project(gradients), exact(basis) @ flat(gradients))


@pytest.mark.parametrize("bits", [4, 8])
def test_add(bits):
    basis, weights = basis_of(bits), tensors(2)
    before, c = flat(weights), torch.randn(D)
    basis.add_(weights, c)
    assert near(flat(weights), before + exact(basis).T @ c.double())


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_publish(moved, begun):
    basis, weights, before, ways = basis_of(), tensors(2), tensors(3), tensors(4)
    at, back, rows = flat(weights), flat(before), torch.randn(2, D)
    old = before if begun else [None] * len(SHAPES)
    assert basis.publish_(weights, old, ways, rows, torch.tensor(moved))
    delta, ahead = (exact(basis).T @ row for row in rows.double())
    assert near(flat(ways), ahead)
    assert near(flat(weights), at + delta - ahead if moved or not begun else back)


def test_publish_leaves_out_a_frozen_parameter():
    basis, weights, ways = basis_of(), tensors(2), tensors(4)
    same = weights[1].clone()
    given = [None if i == 1 else one for i, one in enumerate(weights)]
    basis.publish_(given, [None] * len(SHAPES), ways, torch.randn(2, D), torch.tensor(True))
    assert weights[1].equal(same)


def test_threads_do_not_change_the_result(monkeypatch):
    basis, gradients, found = basis_of(), tensors(1), []
    monkeypatch.setattr(compiled, "_THREADED", 0)
    known = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            weights = tensors(2)
            basis.add_(weights, torch.ones(D))
            found.append((basis.project(gradients), flat(weights)))
    finally:
        torch.set_num_threads(known)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
