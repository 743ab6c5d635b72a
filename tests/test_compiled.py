"""The compiled loops over stored directions, beside a plain product in float64."""

import importlib.util
import os
import pickle
import subprocess
import sys

import pytest
import torch

from hf_sl2o import DenseBasis, Layout, RandomBasis, SubspaceOptimizer
from hf_sl2o.foundation import native
from hf_sl2o.subspace import compiled

# 3 x 1: below a vector's width; 4,096 and 128 columns are the loops' own; 2 x 4,099 ends in the middle of all of them
SHAPES = ((3, 1), (64, 64), (128,), (2, 4099), (), (257, 130))
LAYOUT = Layout(tuple(f"p{i}" for i in range(len(SHAPES))), SHAPES)


# With TRITON_INTERPRET=1 these are tests of the Triton kernels, on CPU tensors.
TRITON = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _loops(monkeypatch):
    if TRITON:
        pytest.importorskip("triton")
        monkeypatch.setattr(compiled, "OnCPU", compiled._OnCUDA)
    elif native.load_native(compiled._SOURCE) is None:
        pytest.skip("there is no C++ compiler here, so there are no compiled loops")


def basis_of(dtype=torch.float32, dim=7, spans=None):
    generator = torch.Generator().manual_seed(0)
    spans = spans or [(0, dim)] * len(SHAPES)
    matrices = [
        torch.randn(stop - start, numel, generator=generator).to(dtype) / LAYOUT.n**0.5
        for (start, stop), numel in zip(spans, LAYOUT.numels, strict=True)
    ]
    units = torch.rand(dim, generator=generator) + 0.5
    return DenseBasis(LAYOUT, matrices, units, spans=spans)


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def flat(them):
    return torch.cat([one.reshape(-1).double() for one in them])


def exact(basis):
    return basis.as_matrix().double() * basis.units.double()[:, None]  # (d, n)


LAYERS = [(0, 3), (0, 3), (3, 7), (3, 7), (3, 7), (0, 3)]


@pytest.mark.parametrize("spans", [None, LAYERS], ids=["global", "layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_and_lift_are_the_products(dtype, spans):
    basis, g, weights = basis_of(dtype, spans=spans), tensors(1), tensors(2)
    assert basis.has_loops
    projected = exact(basis) @ flat(g)
    torch.testing.assert_close(basis.project(g).double(), projected, rtol=1e-5, atol=1e-5)
    c = torch.randn(7, generator=torch.Generator().manual_seed(3))
    moved = flat(weights) + exact(basis).T @ c.double()
    basis.add_(weights, c)
    torch.testing.assert_close(flat(weights), moved, rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError):  # another coefficient is another result
        basis.add_(weights, c * 1e-3)
        torch.testing.assert_close(flat(weights), moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_change_a_bit(dtype, monkeypatch):
    monkeypatch.setattr(compiled, "_THREADED", 0)
    g, known = tensors(1), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            basis, weights = basis_of(dtype), tensors(2)
            projected = basis.project(g)
            basis.add_(weights, projected)
            results.append((projected, flat(weights)))
    finally:
        torch.set_num_threads(known)
    for projected, weights in results[1:]:
        assert torch.equal(projected, results[0][0]) and torch.equal(weights, results[0][1])


def test_gradients_of_bf16_and_missing_ones():
    basis, g = basis_of(), tensors(1, torch.bfloat16)
    torch.testing.assert_close(basis.project(g).double(), exact(basis) @ flat(g), rtol=1e-5, atol=1e-5)
    without = [None if index == 3 else one for index, one in enumerate(g)]
    zeros = [torch.zeros_like(one) if index == 3 else one for index, one in enumerate(g)]
    assert torch.equal(basis.project(without), basis.project(zeros))
    assert not torch.equal(basis.project(without), basis.project(g))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_gradients_stay_so(bad):
    g = tensors(1)
    g[3][1, 4098] = bad  # in the tail of a row
    assert not basis_of().project(g).isfinite().all()


def test_memory_that_is_not_contiguous_is_left_to_torch():
    basis, g = basis_of(), tensors(1)
    turned = [one.T.contiguous().T if one.ndim == 2 else one for one in g]
    torch.testing.assert_close(basis.project(turned), basis.project(g))
    weights = [one.clone() for one in turned]
    assert not compiled.add(basis, weights, torch.ones(7))
    basis.add_(weights, torch.ones(7))
    torch.testing.assert_close(flat(weights), flat(g) + exact(basis).sum(0), rtol=1e-6, atol=1e-6)


def test_publish_is_two_lifts_and_a_choice():
    basis, weights, before = basis_of(), tensors(2), tensors(4)
    rows = torch.randn(2, 7, generator=torch.Generator().manual_seed(3))
    delta, ahead = exact(basis).T @ rows.double().T[:, 0], exact(basis).T @ rows.double().T[:, 1]
    start, ways = flat(weights), [torch.empty(shape) for shape in SHAPES]
    assert basis.publish_(weights, [None] * 6, ways, rows, torch.tensor(True))
    torch.testing.assert_close(flat(weights), start + delta - ahead, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flat(ways), ahead, rtol=1e-5, atol=1e-5)
    # where nothing moved the weights go back, also where the way is written over what they were before
    ways = [one.clone() for one in before]
    assert basis.publish_(weights, ways, ways, rows, torch.tensor(False))
    assert torch.equal(flat(weights), flat(before))
    torch.testing.assert_close(flat(ways), ahead, rtol=1e-5, atol=1e-5)


def test_frozen_parameter_stays():
    basis, weights = basis_of(), tensors(2)
    held = weights[1].clone()
    assert compiled.add(basis, [None if index == 1 else one for index, one in enumerate(weights)], torch.ones(7))
    assert torch.equal(weights[1], held)


def test_what_the_loops_do_not_know_is_left_to_torch():
    assert not basis_of(torch.float64).has_loops
    assert not RandomBasis(LAYOUT, 7).has_loops
    assert compiled.project(basis_of().to(dtype=torch.float64), tensors(1)) is None
    assert not compiled.add(basis_of(), tensors(2, torch.bfloat16), torch.ones(7))


def test_moved_storage_is_followed():
    basis, g = basis_of(), tensors(1)
    first = basis.project(g)
    basis._matrices[3] = basis._matrices[3].clone()  # as sharing memory between processes does
    assert torch.equal(basis.project(g), first)
    assert torch.equal(pickle.loads(pickle.dumps(basis)).project(g), first)


@pytest.mark.parametrize("average", [0.0, 9.0])
def test_run_with_and_without_the_loops(average, monkeypatch):
    def run():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
        basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), 6).to_dense()
        optimizer = SubspaceOptimizer(model, basis, lambda c: torch.optim.AdamW(c, lr=0.1), average=average)
        x, losses = torch.randn(64, 12), []
        for _ in range(12):
            loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, flat(model.parameters())

    losses, weights = run()
    monkeypatch.setattr(DenseBasis, "stored", lambda self: None)
    plain, plain_weights = run()
    assert losses == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not TRITON, reason="of the Triton kernels")
@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_that_compute_something_else_are_not_used(wrong, monkeypatch, caplog):
    basis, g = basis_of(), tensors(1)
    expected = basis.project(g)
    add = compiled._OnCUDA.add
    if wrong:
        monkeypatch.setattr(compiled._OnCUDA, "add", lambda self, weights, c: add(self, weights, 1.01 * c))
    compiled._made.clear()
    torch.testing.assert_close(basis.project(g), expected)
    assert compiled._made[basis].works != wrong
    assert ("something else than torch" in caplog.text) == wrong


@pytest.mark.skipif(TRITON, reason="these are those tests")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for CUDA on Linux")
def test_the_same_of_the_triton_kernels():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "-p no:xdist -p no:cacheprovider"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", __file__]  # inf times 0, in numpy
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
