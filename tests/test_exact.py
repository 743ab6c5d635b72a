"""theta_0 + lift(c) in one order of operations: the bits of Python's own doubles, for each kind of basis."""

import pytest
import torch

from hf_sl2o import DenseBasis, Layout, QuantizedBasis, RandomBasis, Trajectory, fit_basis
from hf_sl2o.subspace.exact import moved_exactly

from .conftest import random_dense


def by_hand(basis, theta, coefficients):
    """theta_0 + lift(c) of one parameter in Python's own doubles, each operation rounded by itself."""
    factors = [float(c) * float(u) for c, u in zip(coefficients, basis.units, strict=True)]
    mix = getattr(basis, "mix", getattr(basis, "_mix", None))
    if mix is not None:
        factors = in_order([[f * float(m) for m in row] for f, row in zip(factors, mix, strict=True)])
    raw = [
        columns for *_, columns in (basis._raw_columns(0) if basis.kind == "random" else basis._columns(0, 1 << 20))
    ]
    rows = torch.cat(raw, dim=1).tolist()
    lifted = in_order([[f * u for u in row] for f, row in zip(factors, rows, strict=True)])
    return [t + change for t, change in zip(theta.double().reshape(-1).tolist(), lifted, strict=True)]


def in_order(rows):
    total = [0.0] * len(rows[0])
    for row in rows:
        total = [a + b for a, b in zip(total, row, strict=True)]
    return total


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64", "int8", "int4", "random"])
def test_the_sum_is_that_of_pythons_doubles_with_any_number_of_threads(kind):
    weight = torch.nn.Parameter(torch.randn(130, 259))
    dense = random_dense([("w", weight)], dim=7, dtype=torch.float64 if kind == "fp64" else torch.float32)
    basis = {
        "fp32": lambda: dense,
        "fp64": lambda: dense,
        "bf16": lambda: dense.to(dtype=torch.bfloat16),
        "int8": lambda: QuantizedBasis.from_dense(dense, 8),
        "int4": lambda: QuantizedBasis.from_dense(dense, 4),
        "random": lambda: RandomBasis(dense.layout, 7, seed=5),
    }[kind]()
    c = torch.randn(7, dtype=basis.compute_dtype)
    expected = torch.tensor(by_hand(basis, weight, c), dtype=torch.float64).view(weight.shape)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for dtype in (torch.float64, torch.float32):
                found = moved_exactly(basis, [weight.detach().to(dtype)], c)[0]
                assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    finally:
        torch.set_num_threads(threads)
    # and the check is one of bits: the loops that training moves weights by sum in another order
    moved = weight.detach().to(basis.compute_dtype, copy=True)
    basis.add_([moved], c)
    expected = expected.to(moved.dtype)
    assert torch.allclose(moved, expected, atol=1e-5) and not torch.equal(moved, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_below_fp32_are_rounded_from_the_fp32_sum(dtype):
    weight = torch.randn(64, 65).to(dtype)
    basis, c = random_dense([("w", torch.nn.Parameter(torch.zeros(64, 65)))], dim=7), torch.randn(7)
    found = moved_exactly(basis, [weight], c)[0]
    assert found.dtype == dtype and torch.equal(found, moved_exactly(basis, [weight.float()], c)[0].to(dtype))
    # half a unit of the last place and a little more than fp32 holds: rounded up at once, to even in two steps
    tie = torch.tensor([1.0], dtype=torch.bfloat16)
    one = DenseBasis(Layout(("w",), ((1,),)), [torch.ones(1, 1, dtype=torch.float64)])
    step = torch.tensor([2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert moved_exactly(one, [tie], step)[0].item() == 1.0


def test_a_tucker_basis_gives_the_same_bits_with_any_number_of_threads(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Linear(96, 128, bias=False))
    trajectory = fake_trajectory(model, tmp_path / "trajectory")
    basis = fit_basis(trajectory, dim=9, storage="tucker", progress=False)
    assert basis.kind == "tucker" and basis.leading is not None
    start, c = [p.detach() for p in model.parameters()], torch.randn(9)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(moved_exactly(basis, start, c))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
    whole, offset = basis.as_matrix().double(), 0
    for theta, moved in zip(start, found[0], strict=True):
        columns = whole[:, offset : offset + theta.numel()]
        expected = theta.double() + ((basis.units.double() * c.double()) @ columns).view(theta.shape)
        assert torch.allclose(moved.double(), expected, atol=1e-5) and not torch.equal(moved, theta)
        offset += theta.numel()


def fake_trajectory(model, folder):
    trajectory = Trajectory(folder)
    for step in range(14):
        moved = {name: p.detach() + 0.1 * step * torch.randn_like(p) for name, p in model.named_parameters()}
        trajectory.write(step, {name: torch.nn.Parameter(p) for name, p in moved.items()}.items())
    return trajectory
