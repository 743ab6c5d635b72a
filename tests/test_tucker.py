"""Directions that share factors against the products written out; fits against an SVD of all snapshots."""

import pytest
import torch
from torch import nn

from hf_sl2o import Basis, Layout, Trajectory, fit_basis
from hf_sl2o.subspace import factors as fits
from hf_sl2o.subspace import fit
from hf_sl2o.subspace.storage import Ranks, factor_ranks, matrix_shape
from hf_sl2o.subspace.thin import Factors
from hf_sl2o.subspace.tucker import TuckerBasis

from .test_quantized import saved
from .test_storage import flat, write_walk

M, Q, R1, R2, D = 50, 37, 5, 3, 4


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns))[0]


def made(kind):
    left = orthonormal(M, R1) if kind in ("both", "left", "left is narrow") else None
    right = orthonormal(Q, R2 if kind != "left is narrow" else 9) if kind not in ("left", "whole") else None
    shape = (D, M if left is None else left.shape[1], Q if right is None else right.shape[1])
    return Factors(torch.randn(shape), left, right)


@pytest.mark.parametrize("kind", ["both", "left", "right", "left is narrow", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_are_their_product(kind, dtype, monkeypatch):
    monkeypatch.setattr("hf_sl2o.subspace.thin._COLUMNS", 8 * Q)
    of, g = made(kind), torch.randn(M, Q)
    left = torch.eye(M) if of.left is None else of.left
    right = torch.eye(Q) if of.right is None else of.right
    dense = torch.einsum("ma,dab,qb->dmq", left, of.core, right)
    assert of.matrix_shape() == (M, Q)
    torch.testing.assert_close(of.whole(0, M), dense.flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of.whole(3, 9), dense[:, 3:9].flatten(1), rtol=1e-4, atol=1e-4)
    g = g.to(dtype)
    torch.testing.assert_close(of.project(g.view(-1)), dense.flatten(1) @ g.float().view(-1), rtol=1e-3, atol=1e-3)
    if dtype != torch.bfloat16:
        c, weights = torch.randn(D, dtype=dtype), torch.randn(M * Q, dtype=dtype)
        expected = weights + c @ dense.flatten(1).to(dtype)
        part = weights[7 * Q : 20 * Q].clone()
        of.add_thin_(part, of.thin(c), 7 * Q)
        of.add_thin_(weights, of.thin(c))
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part, expected[7 * Q : 20 * Q], rtol=1e-4, atol=1e-4)


def test_small_matrices_and_vectors_are_kept_whole():
    assert matrix_shape((36, 4, 3, 3)) == (36, 36) and matrix_shape((7,)) == (1, 7) and matrix_shape(()) == (1, 1)
    ranks = Ranks(left=64, right=8)
    assert factor_ranks((768, 3072), 32, ranks) == (64, 8)
    assert factor_ranks((3072, 16), 32, ranks) is None and factor_ranks((9,), 32, ranks) is None
    assert factor_ranks((40, 768), 32, ranks) == (40, 8)  # no left factor
    assert factor_ranks((64, 64), 1, Ranks(left=64, right=64)) is None  # factors would take more


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"))


def snapshots(walk):
    with fit.ExitStack() as stack:
        reader = fit._Blocks(walk, walk.steps, "cpu", stack)
        parts = [
            torch.cat([block for _, _, block in reader.of(index)], dim=1) for index in range(len(walk.layout.names))
        ]
    return [part - part.mean(0) for part in parts]


def fitted(walk, monkeypatch, ranks, dim=6):
    monkeypatch.setattr(fit, "ranks_within", lambda *args, **options: ranks)
    return fit_basis(walk, dim, storage="tucker", progress=False)


@pytest.mark.parametrize("entries", [1 << 23, 3000], ids=["one block", "many blocks"])
def test_full_ranks_are_the_dense_basis(walk, monkeypatch, entries):
    monkeypatch.setattr(fit, "_BLOCK_ENTRIES", entries)
    dense = fit_basis(walk, 6, progress=False)
    full = fitted(walk, monkeypatch, Ranks(0, 1000, 1000))
    assert full.leading is None and all(of.left is of.right is None for of in full._factors)
    torch.testing.assert_close(full.as_matrix(), dense.as_matrix(), rtol=0, atol=1e-5)
    torch.testing.assert_close(full.units, dense.units)
    assert full.provenance["direction_error"] < 1e-4
    held = fitted(walk, monkeypatch, Ranks(3, 1000, 1000, 8))  # in 8 bits, and the rest whole
    outside = 1 - float((held.as_matrix() @ dense.as_matrix().T).square().sum()) / 6
    assert held.leading.dim == 3 and 1e-7 < outside < 1e-4
    torch.testing.assert_close(held.units, dense.units, rtol=1e-3, atol=0)


def test_factors_hold_what_an_svd_of_all_snapshots_holds(walk, monkeypatch):
    basis = fitted(walk, monkeypatch, Ranks(0, 2, 3))
    parts = snapshots(walk)
    total = sum(float(part.square().sum()) for part in parts)
    projected = []
    for part, shape in zip(parts, walk.layout.shapes, strict=True):
        m, q = matrix_shape(shape)
        x = part.view(len(part), m, q)
        if min(m, q) >= 32:
            right = torch.linalg.svd(x.reshape(-1, q), full_matrices=False)[2][:2].T
            left = torch.linalg.svd((x @ right).transpose(0, 1).reshape(m, -1), full_matrices=False)[0][:, :3]
            x = left @ (left.T @ x @ right) @ right.T
        projected.append(x.reshape(len(part), -1))
    best = torch.linalg.svdvals(torch.cat(projected, dim=1))[:6].square().sum()
    assert basis.provenance["explained_variance"] == pytest.approx(float(best) / total, abs=1e-5)
    assert basis.provenance["ranks"] == {"leading": 0, "right": 2, "left": 3, "bits": 4}
    worse = fitted(walk, monkeypatch, Ranks(0, 1, 3)).provenance["explained_variance"]
    assert worse < basis.provenance["explained_variance"] - 0.02
    # leading directions hold what factors do not
    kept = fitted(walk, monkeypatch, Ranks(3, 1, 3, 8)).provenance["explained_variance"]
    assert kept > worse + 0.02


def test_left_factors_of_few_snapshots_have_fewer_columns(walk):
    tall = torch.randn(2, 100, 3)
    left = fits._left_factor(tall, 64)
    assert left.shape == (100, 6)
    torch.testing.assert_close(left.T @ left, torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(left @ (left.T @ tall), tall, rtol=0, atol=1e-5)


def test_directions_that_factors_do_not_hold_are_refused(tmp_path, monkeypatch):
    recorded = Trajectory(tmp_path)
    left, right = torch.randn(40, 1), torch.randn(1, 40)
    for step in range(8):  # each other direction is outside the first one's rank
        weight = step * left @ right + 1e-9 * torch.randn(40, 40)
        recorded.write(step, [("w", nn.Parameter(weight.double()))])
    with pytest.raises(ValueError, match="numerical rank 1"):
        fitted(recorded, monkeypatch, Ranks(0, 1, 1), dim=3)
    snapshots = {0: torch.zeros(8, 1, 1)}
    with pytest.raises(ValueError, match="factors hold 0 directions .* and 2 are wanted"):
        fits._rest(snapshots, torch.eye(8, dtype=torch.float64)[:, :1], 2)


@pytest.fixture(params=[0, 2])
def basis(walk, request, monkeypatch):
    return fitted(walk, monkeypatch, Ranks(request.param, 4, 8))


def test_arrays_that_do_not_fit_are_refused(basis):
    layout, of, mix, units = basis.layout, basis._factors, basis.mix, basis.units
    known = {"leading": basis.leading}
    narrow = Factors(of[0].core, of[0].left[:, :-1], of[0].right)
    for broken, message in (
        ((of[:2], mix, units), "factors of 2 parameters for 5"),
        (([narrow, *of[1:]], mix, units), "the factors of 'emb' are"),
        (([Factors(of[0].core[1:], *of[0][1:]), *of[1:]], mix, units), "the factors of 'emb' are"),
        (([Factors(*(t.double() for t in of[0])), *of[1:]], mix, units), "the factors of 'emb' are"),
        (([Factors(of[0].core[0], *of[0][1:]), *of[1:]], mix, units), "the factors of 'emb' are"),
        ((of, mix[:2], units), "mix has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            TuckerBasis(layout, *broken, **known)
    with pytest.raises(ValueError, match="overlap"):
        TuckerBasis(layout, of, mix, units, spans=[(0, 3), (2, 6), (0, 6), (0, 6), (0, 6)], **known)
    with pytest.raises(ValueError, match="stored in float32"):
        basis.to(dtype=torch.bfloat16)
    if basis.leading is not None:
        other = Layout(tuple(f"{name}.x" for name in layout.names), layout.shapes)
        with pytest.raises(ValueError, match="leading directions have spans"):
            TuckerBasis(other, of, mix, units, **known)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t: t.pop("core.emb"), "lacks tensor 'core.emb'"),
        (lambda c, t: t.pop("left.emb"), "the factors of 'emb' are"),
        (lambda c, t: t.update({"left.h.0.b": torch.ones(1)}), "the factors of 'h.0.b' are"),
        (lambda c, t: t.update({"left.no": torch.ones(1)}), "has an unknown tensor 'left.no'"),
        (lambda c, t: t.update({"core.emb": t["core.emb"].half()}), "the factors of 'emb' are"),
        (lambda c, t: t.update({"right.emb": t["right.emb"][:-1].clone()}), "the factors of 'emb' are"),
        (lambda c, t: t["core.emb"].fill_(float("nan")), "'core.emb' in .* NaN"),
        (lambda c, t: t["mix"].fill_(float("inf")), "'mix' in .* NaN or Inf"),
        (lambda c, t: t.pop("units"), "lacks tensor 'units'"),
        (lambda c, t: c.update(leading=3), "."),
        (lambda c, t: c.update(leading=-1), "leading in config.json"),
        (lambda c, t: c.update(leading=6), "leading in config.json"),
        (lambda c, t: c.update(leading=True), "leading in config.json"),
        (lambda c, t: c.update(other=3), "unknown key 'other'"),
        (lambda c, t: c.update(dtype="bfloat16"), "its tensors are"),
    ],
)
def test_files_that_are_no_such_basis_are_refused(basis, tmp_path, change, message):
    assert Basis.from_pretrained(saved(basis, tmp_path, lambda c, t: None)).fingerprint == basis.fingerprint
    with pytest.raises(ValueError, match=message) as caught:
        Basis.from_pretrained(saved(basis, tmp_path, change))
    assert str(tmp_path) in str(caught.value)


def test_codes_out_of_range_are_refused(walk, monkeypatch, tmp_path):
    basis = fitted(walk, monkeypatch, Ranks(2, 4, 8))

    def change(config, tensors):
        tensors["codes.emb"][0, 0] = 0

    with pytest.raises(ValueError, match="codes of 'emb' in .* out of range"):
        Basis.from_pretrained(saved(basis, tmp_path, change))


def test_publishing_moves_both_points_as_two_lifts_do(walk, monkeypatch):
    basis = fitted(walk, monkeypatch, Ranks(2, 4, 8))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).view(-1) for shape in walk.layout.shapes]
    rows = torch.randn(2, 6, generator=generator)
    for move in (True, False):
        new, before = [w.clone() for w in weights], [torch.randn_like(w) for w in weights]
        ways = [b.clone() for b in before]
        done = basis.publish_(new, before, ways, rows, torch.tensor(move))
        if not done:  # no compiler: nothing was done
            assert all(torch.equal(a, b) for a, b in zip(new, weights, strict=True))
            continue
        expected = flat(weights) + flat(basis.lift(rows[0] - rows[1])) if move else flat(before)
        torch.testing.assert_close(flat(new), expected, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(flat(ways), flat(basis.lift(rows[1])), rtol=1e-6, atol=1e-5)
