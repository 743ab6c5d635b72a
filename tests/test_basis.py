"""project and lift against plain matrix products, in every dtype; files that refuse damage."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sl2o import Basis, DenseBasis, IdentityBasis, Layout, RandomBasis
from hf_sl2o.foundation import files

from .conftest import random_dense

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 3, 2)}


def parameters(dtype=torch.float32):
    return [(name, torch.nn.Parameter(torch.randn(shape, dtype=dtype))) for name, shape in SHAPES.items()]


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_project_and_lift_are_the_matrix_products(dtype, tolerance):
    basis = random_dense(parameters(), dim=4, dtype=torch.float64).to(dtype=dtype)
    u, units = basis.as_matrix().double(), basis.units.double()
    gradients, c = [p.detach() for _, p in parameters()], torch.randn(4)
    torch.testing.assert_close(
        basis.project(gradients).double(), units * (u @ flat(gradients)), rtol=0, atol=10 * tolerance
    )
    torch.testing.assert_close(flat(basis.lift(c)), u.T @ (units * c.double()), rtol=0, atol=10 * tolerance)
    assert not torch.allclose(basis.project(gradients).double(), u @ flat(gradients), atol=1e-3)  # units matter


def test_bf16_costs_half_and_is_close():
    basis = random_dense(parameters(), dim=4)
    half = basis.to(dtype=torch.bfloat16)
    assert half.nbytes * 2 == basis.nbytes
    error = (half.as_matrix() - basis.as_matrix()).abs().max()
    assert 0 < error < 2**-8


def test_lift_is_the_adjoint_of_project():
    basis = random_dense(parameters(torch.float64), dim=4, dtype=torch.float64)
    x, c = [p.detach() for _, p in parameters(torch.float64)], torch.randn(4, dtype=torch.float64)
    left, right = torch.dot(basis.project(x), c), torch.dot(flat(x), flat(basis.lift(c)))
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


def test_missing_gradients_count_as_zero_and_add_works_in_place():
    basis = random_dense(parameters(), dim=4)
    x = [p.detach().clone() for _, p in parameters()]
    zeroed = [x[0], torch.zeros_like(x[1]), x[2]]
    assert torch.equal(basis.project([x[0], None, x[2]]), basis.project(zeroed))
    before, c = [t.clone() for t in x], torch.randn(4)
    basis.add_(x, c)
    torch.testing.assert_close(flat(x) - flat(before), flat(basis.lift(c)), rtol=0, atol=1e-6)


def test_a_move_rounds_bf16_once():
    basis = random_dense(parameters(), dim=4)
    anchors = [p.detach().bfloat16() for _, p in parameters()]
    weights = [a.clone() for a in anchors]
    c = torch.full((4,), 1e-3)
    basis.add_(weights, 100 * c)
    exact = flat(anchors) + flat(basis.lift(100 * c))
    assert torch.equal(flat(weights), exact.bfloat16().double())
    for _ in range(100):  # the same distance in small increments gets lost
        basis.add_(anchors, c)
    assert not torch.equal(flat(anchors), flat(weights))


def test_channels_last_memory_is_written():
    weight = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    basis = random_dense([("w", torch.nn.Parameter(torch.zeros(2, 3, 4, 4)))], dim=2)
    basis.add_([weight], torch.ones(2))
    torch.testing.assert_close(weight, basis.lift(torch.ones(2))[0])


def test_units_change_coordinates_not_the_subspace():
    basis = random_dense(parameters(), dim=4)
    plain = basis.with_units("orthonormal")
    assert torch.equal(plain.units, torch.ones(4)) and torch.equal(plain.with_units("std").units, basis.units)
    torch.testing.assert_close(basis.lift(torch.ones(4))[0], plain.lift(basis.units)[0])
    assert plain.fingerprint != basis.fingerprint
    with pytest.raises(ValueError, match="expected"):
        basis.with_units("metres")


def test_random_basis_is_orthonormal_and_comes_back_from_its_seed():
    layout = Layout.from_named_parameters(parameters())
    basis = RandomBasis(layout, 4, seed=3)
    u = basis.as_matrix()
    torch.testing.assert_close(u @ u.T, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(u, RandomBasis(layout, 4, seed=3).as_matrix())
    assert not torch.equal(u, RandomBasis(layout, 4, seed=4).as_matrix())
    assert torch.equal(u, basis.to_dense().as_matrix())
    with pytest.raises(ValueError, match="expected 1 to n"):
        RandomBasis(layout, layout.n + 1)


def test_identity_basis_is_concatenation():
    pairs = parameters()
    basis = IdentityBasis(Layout.from_named_parameters(pairs))
    tensors = [p.detach().clone() for _, p in pairs]
    assert torch.equal(basis.project(tensors).double(), flat(tensors))
    basis.add_(tensors, -basis.project(tensors))
    assert all(not t.any() for t in tensors)


@pytest.mark.parametrize("kind", ["dense", "bf16", "random"])
def test_saving_and_loading(kind, tmp_path):
    basis = random_dense(parameters(), dim=4)
    if kind == "bf16":
        basis = basis.to(dtype=torch.bfloat16)
    if kind == "random":
        basis = RandomBasis(basis.layout, 4, seed=5)
    basis.save_pretrained(tmp_path)
    loaded = Basis.from_pretrained(tmp_path)
    assert type(loaded) is type(basis) and loaded.dtype == basis.dtype and loaded.fingerprint == basis.fingerprint
    assert torch.equal(loaded.as_matrix(), basis.as_matrix())
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: hf_sl2o" in card and "4-dimensional" in card and str(tmp_path) not in card
    other = RandomBasis if kind != "random" else DenseBasis
    with pytest.raises(ValueError, match="load it with Basis.from_pretrained"):
        other.from_pretrained(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    random_dense(parameters(), dim=4).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())

    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="sha256"):
        Basis.from_pretrained(tmp_path)
    tensors = dict(load_file_bytes(whole, tmp_path))
    tensors["basis.a"][0, 0] += 1
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="damaged or changed"):
        Basis.from_pretrained(tmp_path)
    weights.write_bytes(whole[:-10])
    config.write_text(json.dumps({k: v for k, v in settings.items() if k != "sha256"}))
    with pytest.raises(ValueError, match="truncated"):
        Basis.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for broken, message in (
        ({**settings, "extra": 1}, "unknown key 'extra'"),
        ({"basis": "pca"}, "expected one of"),
        ({**settings, "layout": {}}, "malformed"),
        ({**settings, "spans": [[0]]}, "."),
        ({**settings, "dim": 7}, "says dim 7, the file has 4"),
    ):
        config.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            Basis.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Basis.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        Basis.from_pretrained(tmp_path)


def load_file_bytes(data, folder):
    path = folder / "copy.safetensors"
    path.write_bytes(data)
    return load_file(path)


def test_missing_path_says_what_was_looked_for_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for a saved Basis at .*no local folder.*Hub repository"):
        Basis.from_pretrained(str(tmp_path / "nothing" / "here" / "x"))


def test_full_disk_leaves_the_previous_basis(tmp_path, monkeypatch):
    old = random_dense(parameters(), dim=4)
    old.save_pretrained(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="previous file is unchanged"):
        random_dense(parameters(), dim=3).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(Basis.from_pretrained(tmp_path).as_matrix(), old.as_matrix())
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))


def test_construction_errors():
    layout = Layout.from_named_parameters(parameters())
    good = random_dense(parameters(), dim=4)
    with pytest.raises(ValueError, match="2 matrices for 3"):
        DenseBasis(layout, [torch.zeros(2, 12), torch.zeros(2, 5)])
    with pytest.raises(ValueError, match="directions of 'b'"):
        DenseBasis(layout, [torch.zeros(2, 12), torch.zeros(2, 6), torch.zeros(2, 12)])
    with pytest.raises(ValueError, match="finite and positive"):
        DenseBasis(layout, [good.matrix(i) for i in range(3)], torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_directions_without_units_of_their_own_are_told_apart():
    layout = Layout.from_named_parameters(torch.nn.Linear(30, 20).named_parameters())
    one, other = (RandomBasis(layout, 4, seed=seed).to_dense() for seed in (1, 2))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == RandomBasis(layout, 4, seed=1).to_dense().to(dtype=torch.bfloat16).fingerprint


def test_a_saved_basis_with_nan_is_named(tmp_path):
    layout = Layout.from_named_parameters(torch.nn.Linear(30, 20).named_parameters())
    basis = RandomBasis(layout, 4).to_dense()
    basis._matrices[1][2, 3] = float("nan")
    basis.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'basis.bias' in .* holds NaN or Inf"):
        Basis.from_pretrained(tmp_path)
