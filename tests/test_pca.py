"""fit_basis against scikit-learn and torch.linalg; trajectories that survive what disks and users do."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA, TruncatedSVD
from torch import nn

from hf_sl2o import Basis, Trajectory, fit_basis
from hf_sl2o.foundation import files
from hf_sl2o.subspace import fit as pca
from hf_sl2o.subspace.basis import start_sample

NAMES = {"emb.weight": (7, 4), "h.0.w": (4, 3), "h.0.b": (3,), "h.1.w": (3, 5), "h.1.scale": ()}


@pytest.fixture
def trajectory(tmp_path):
    """Twelve snapshots of a walk in five directions plus noise."""
    torch.manual_seed(0)
    n = sum(torch.Size(shape).numel() for shape in NAMES.values())
    walk = torch.randn(12, 5).cumsum(0) @ torch.randn(5, n) + 0.1 * torch.randn(12, n) + 2.0
    trajectory = Trajectory(tmp_path / "trajectory")
    for step, row in enumerate(walk):
        parts = row.split([torch.Size(shape).numel() for shape in NAMES.values()])
        trajectory.write(step, [(k, nn.Parameter(p.view(s))) for (k, s), p in zip(NAMES.items(), parts, strict=True)])
    return trajectory, walk.double().numpy()


def same_up_to_sign(ours, theirs):
    signs = np.sign((ours * theirs).sum(1, keepdims=True))
    np.testing.assert_allclose(ours * signs, theirs, atol=1e-5)


@pytest.mark.parametrize("entries", [1 << 23, 40], ids=["one block", "many blocks"])
def test_centred_equals_sklearn(trajectory, monkeypatch, entries):
    monkeypatch.setattr(pca, "_BLOCK_ENTRIES", entries)
    recorded, walk = trajectory
    basis = fit_basis(recorded, 5, progress=False)
    reference = PCA(n_components=5, svd_solver="full").fit(walk)
    same_up_to_sign(basis.as_matrix().numpy(), reference.components_)
    np.testing.assert_allclose(basis.units.numpy(), np.sqrt(reference.explained_variance_), rtol=1e-5)
    ratio = basis.provenance["explained_variance_ratio"]
    np.testing.assert_allclose(ratio, reference.explained_variance_ratio_, rtol=1e-6)
    uncentred = fit_basis(recorded, 5, center=False, progress=False).as_matrix().numpy()
    assert np.abs(np.abs(uncentred[0]) - np.abs(reference.components_[0])).max() > 1e-2


def test_uncentred_equals_sklearn(trajectory):
    recorded, walk = trajectory
    basis = fit_basis(recorded, 5, center=False, progress=False)
    reference = TruncatedSVD(5, algorithm="arpack").fit(walk)
    same_up_to_sign(basis.as_matrix().numpy(), reference.components_)


def test_layer_blocks_are_pca_of_each_layer(trajectory):
    recorded, walk = trajectory
    basis = fit_basis(recorded, 2, blocks="layer", progress=False)
    assert basis.dim == 6 and basis.spans == ((0, 2), (2, 4), (2, 4), (4, 6), (4, 6))
    matrix = basis.as_matrix().numpy()
    for rows, columns in (((0, 2), (0, 28)), ((2, 4), (28, 43)), ((4, 6), (43, 59))):
        reference = PCA(n_components=2, svd_solver="full").fit(walk[:, slice(*columns)])
        same_up_to_sign(matrix[slice(*rows), slice(*columns)], reference.components_)
        outside = matrix[slice(*rows)].copy()
        outside[:, slice(*columns)] = 0
        assert not outside.any()


def test_directions_are_orthonormal_and_whiten_the_trajectory(trajectory):
    recorded, walk = trajectory
    basis = fit_basis(recorded, 5, progress=False)
    u = basis.as_matrix().double()
    torch.testing.assert_close(u @ u.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    centred = torch.from_numpy(walk - walk.mean(0))
    torch.testing.assert_close(
        (centred @ u.T / basis.units).std(0), torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert torch.equal(fit_basis(recorded, 5, units="orthonormal", progress=False).units, torch.ones(5))


def test_bf16_storage(trajectory):
    recorded, _ = trajectory
    half, full = (fit_basis(recorded, 3, dtype=dtype, progress=False) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(half.as_matrix(), full.as_matrix().bfloat16().float())


def test_rank_decides_not_the_number_of_snapshots(tmp_path):
    recorded, direction = Trajectory(tmp_path), torch.randn(6, 2)
    for step in range(8):  # eight snapshots in a plane
        recorded.write(step, [("w", nn.Parameter(direction @ torch.randn(2)))])
    with pytest.raises(ValueError, match="numerical rank 2; choose dim <= 2"):
        fit_basis(recorded, 3, progress=False)
    assert torch.isfinite(fit_basis(recorded, 2, progress=False).as_matrix()).all()


def test_constant_trajectory_and_too_few_snapshots(tmp_path):
    recorded = Trajectory(tmp_path)
    recorded.write(0, [("w", nn.Parameter(torch.ones(3)))])
    with pytest.raises(ValueError, match="holds 1 snapshots, at least 2"):
        fit_basis(recorded, 1)
    recorded.write(1, [("w", nn.Parameter(torch.ones(3)))])
    with pytest.raises(ValueError, match="rank 0"):
        fit_basis(recorded, 1, progress=False)


def test_non_finite_snapshots_are_refused_when_written_and_when_read(trajectory):
    recorded, _ = trajectory
    bad = [(k, nn.Parameter(torch.full(s, float("nan")))) for k, s in NAMES.items()]
    with pytest.raises(ValueError, match="'emb.weight' holds NaN or Inf at step 99.*12 earlier ones are intact"):
        recorded.write(99, bad)
    assert len(Trajectory(recorded.folder)) == 12
    tensors = load_file(recorded.path(3))
    tensors["h.0.b"][1] = float("inf")
    save_file(tensors, recorded.path(3))
    with pytest.raises(ValueError, match="snapshot-000000003.*NaN or Inf in 'h.0.b'"):
        fit_basis(recorded, 3, progress=False)
    tensors["h.0.b"] = torch.full_like(tensors["h.0.b"], 1e200, dtype=torch.float64)
    save_file(tensors, recorded.path(3))
    with pytest.raises(ValueError, match="snapshot-000000003.*numbers too large to square in 'h.0.b'"):
        fit_basis(recorded, 3, progress=False)


def test_damaged_and_foreign_snapshots(trajectory):
    recorded, _ = trajectory
    whole = recorded.path(2).read_bytes()
    recorded.path(2).write_bytes(whole[:50])
    with pytest.raises(ValueError, match="snapshot-000000002.*truncated"):
        fit_basis(recorded, 3, progress=False)
    recorded.path(2).unlink()
    with pytest.raises(FileNotFoundError, match="snapshot-000000002"):
        fit_basis(recorded, 3, progress=False)
    with pytest.raises(ValueError, match="no snapshot of step 77"):
        fit_basis(recorded, 3, steps=[0, 77])
    with pytest.raises(ValueError, match="'emb.weight' has shape"):
        recorded.write(20, [(k, nn.Parameter(torch.zeros(*s, 1))) for k, s in NAMES.items()])


def test_only_trainable_parameters_tied_ones_once_and_written_again(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model["b"].bias.requires_grad = False
    recorded = Trajectory(tmp_path)
    recorded.write(0, model.named_parameters(remove_duplicate=False))
    assert set(load_file(recorded.path(0))) == {"a.weight", "a.bias"}
    nn.init.ones_(model["a"].bias)
    recorded.write(0, model.named_parameters())
    assert len(recorded) == 1 and load_file(recorded.path(0))["a.bias"].eq(1).all()


def test_forgetting_and_clearing(trajectory):
    recorded, _ = trajectory
    recorded.forget_after(4)
    assert Trajectory(recorded.folder).steps == [0, 1, 2, 3, 4] and not recorded.path(5).exists()
    recorded.clear()
    assert len(Trajectory(recorded.folder)) == 0 and not list(recorded.folder.iterdir())


def test_full_disk_keeps_what_was_recorded(trajectory, monkeypatch):
    recorded, walk = trajectory

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="nothing was left behind"):
        recorded.write(50, [(k, nn.Parameter(torch.zeros(s))) for k, s in NAMES.items()])
    monkeypatch.undo()
    again = Trajectory(recorded.folder)
    assert again.steps == list(range(12)) and fit_basis(again, 5, progress=False).dim == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: list(data), "holds a JSON list, expected an object"),
        (lambda data: {**data, "steps": ["0", "1"]}, "expected a list of integers of at least 0"),
        (lambda data: {**data, "steps": [-1, 0]}, "expected a list of integers of at least 0"),
        (lambda data: {**data, "steps": [0, 0, 1]}, "lists a step twice"),
        (lambda data: {**data, "steps": None}, "expected a list of integers"),
        (lambda data: {"steps": data["steps"]}, "layout in .* is malformed"),
        (lambda data: {**data, "layout": {**data["layout"], "names": [1, 2, 3, 4, 5]}}, "expected a list of strings"),
        (lambda data: {**data, "layout": {**data["layout"], "shapes": [[-3]] * 5}}, "lists of integers of at least 0"),
        (lambda data: {**data, "layout": {**data["layout"], "shapes": [[1 << 40] * 2] * 5}}, "scalars"),
        (lambda data: {**data, "layout": {**data["layout"], "shapes": [[2]] * 4}}, "one shape a name"),
        (lambda data: {**data, "steps": [0, 1]}, 'damaged or changed.*remove its "checksum"'),
    ],
)
def test_a_manifest_of_another_shape_is_named(trajectory, change, message):
    recorded, _ = trajectory
    data = json.loads(recorded.manifest.read_text())
    recorded.manifest.write_text(json.dumps(change(data)))
    with pytest.raises(ValueError, match=f"trajectory.json.*{message}|{message}.*"):
        Trajectory(recorded.folder)
    older = {key: value for key, value in data.items() if key != "checksum"}
    recorded.manifest.write_text(json.dumps({**older, "steps": [0, 1, 2]}))  # by hand, or of an earlier version
    assert Trajectory(recorded.folder).steps == [0, 1, 2]


def test_what_no_direction_can_be_fitted_to_is_refused(trajectory, tmp_path):
    recorded, _ = trajectory
    for dtype in (torch.int32, torch.complex64, torch.bool):
        with pytest.raises(ValueError, match=f"dtype is {dtype}, expected one of"):
            fit_basis(recorded, 3, dtype=dtype, progress=False)
    with pytest.raises(ValueError, match="dim is 2.5, expected an integer"):
        fit_basis(recorded, 2.5, progress=False)
    wave = [("w", nn.Parameter(torch.zeros(3))), ("wave", nn.Parameter(torch.ones(3, dtype=torch.complex64)))]
    with pytest.raises(ValueError, match="'wave' is complex"):
        Trajectory(tmp_path / "complex").write(0, wave)
    assert len(Trajectory(tmp_path / "complex")) == 0
    tensors = load_file(recorded.path(3))
    save_file({**tensors, "h.0.b": tensors["h.0.b"].int()}, recorded.path(3))
    with pytest.raises(ValueError, match="snapshot-000000003.*'h.0.b' of dtype I32, expected a float one"):
        fit_basis(recorded, 3, progress=False)


def test_a_changed_or_exchanged_snapshot_is_refused(trajectory):
    recorded, _ = trajectory
    whole = recorded.path(4).read_bytes()
    recorded.path(4).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(ValueError, match="snapshot-000000004.*its checksum is"):
        fit_basis(recorded, 3, progress=False)
    recorded.path(4).write_bytes(recorded.path(5).read_bytes())
    with pytest.raises(ValueError, match="snapshot-000000004.*holds the snapshot of step 5"):
        fit_basis(recorded, 3, progress=False)
    recorded.path(4).write_bytes(whole)
    assert fit_basis(recorded, 3, progress=False).dim == 3


def test_a_basis_knows_where_its_trajectory_began_and_ended(trajectory, tmp_path):
    recorded, walk = trajectory
    basis = fit_basis(recorded, 3, steps=[2, 5, 7, 8, 9], progress=False)
    assert basis.start.shape == (2, len(NAMES), 16) and basis.start.dtype == torch.float32
    for row, step in enumerate((0, 9)):
        torch.testing.assert_close(basis.start[row, 0], torch.from_numpy(walk[step, :16]).float())
        assert basis.start[row, 4].tolist() == [pytest.approx(walk[step, -1]), *[0.0] * 15]  # a scalar, padded
    for other in (basis.to(dtype=torch.bfloat16), basis.with_units("orthonormal")):
        assert torch.equal(other.start, basis.start)
    basis.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert torch.equal(loaded.start, basis.start) and loaded.fingerprint == basis.fingerprint
    moved = type(basis)(basis.layout, basis._matrices, basis.units, start=basis.start + 1)
    assert moved.fingerprint == type(basis)(basis.layout, basis._matrices, basis.units).fingerprint


def test_start_samples_are_the_first_entries_whatever_the_memory():
    tensors = [torch.randn(3, 4, 5, 6), torch.randn(2, 3), torch.tensor(7.0), torch.zeros(0, 4), torch.randn(40)]
    sample = start_sample(tensors)
    for row, tensor in zip(sample, tensors, strict=True):
        first = tensor.reshape(-1)[:16]
        assert torch.equal(row[: len(first)], first) and not row[len(first) :].any()
    other = [tensors[0].to(memory_format=torch.channels_last), tensors[1].T.contiguous().T, *tensors[2:]]
    assert torch.equal(start_sample(other), sample)
    assert torch.equal(start_sample([tensors[1].bfloat16()])[0, :6], tensors[1].bfloat16().float().reshape(-1))
