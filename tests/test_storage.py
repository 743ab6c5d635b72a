"""The same methods over every storage of a basis, and the choice of the one that fits."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_sl2o import Basis, Layout, RandomBasis, SubspaceOptimizer, Trajectory, fit_basis
from hf_sl2o.subspace import compiled
from hf_sl2o.subspace.storage import Ranks, choose_storage, ranks_within, storage_bytes

SHAPES = {"emb": (70, 48), "h.0.w": (64, 40), "h.0.b": (41,), "h.1.w": (36, 4, 3, 3), "h.1.scale": ()}
#: The most that directions may lie outside the dense ones' subspace (root mean square; all of it is 1).
ERRORS = {"fp32": 1e-5, "bf16": 3e-3, "int8": 1e-2, "int4": 0.15, "tucker": 0.15}
DIM = 6


def write_walk(folder, seed=0):
    """Snapshots of a walk whose matrices are of rank 2, with a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    recorded, time = Trajectory(folder), drawn(16, DIM + 2).cumsum(0) * torch.linspace(2, 0.5, DIM + 2)
    means = {name: drawn(*shape) for name, shape in SHAPES.items()}
    ways = {}
    for name, shape in SHAPES.items():
        if len(shape) < 2:
            ways[name] = drawn(DIM + 2, *shape)
        else:
            left, right = drawn(shape[0], 2), drawn(2, int(np.prod(shape[1:])))
            ways[name] = (left @ drawn(DIM + 2, 2, 2) @ right).view(DIM + 2, *shape)
    for step, row in enumerate(time):
        parts = {
            name: means[name] + torch.tensordot(row, ways[name], 1) + 0.01 * drawn(*SHAPES[name]) for name in SHAPES
        }
        recorded.write(step, [(name, nn.Parameter(part)) for name, part in parts.items()])
    return recorded


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def bases(walk):
    made = {storage: fit_basis(walk, DIM, storage=storage, progress=False) for storage in ERRORS}
    layered = {s: fit_basis(walk, 3, blocks="layer", storage=s, progress=False) for s in ("int8", "int4", "tucker")}
    return made | {f"{s} layer": one for s, one in layered.items()} | {"random": RandomBasis(walk.layout, DIM, seed=2)}


ALL = [*ERRORS, "int8 layer", "int4 layer", "tucker layer", "random"]


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def gradients(seed=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES.values()]


@pytest.fixture(params=["compiled", "torch"])
def route(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(compiled, "load_native", lambda source: None)


@pytest.mark.parametrize("storage", ALL)
def test_directions_are_orthonormal(bases, storage):
    u = bases[storage].as_matrix().double()
    tolerance = 1e-3 if storage == "bf16" else 1e-5  # dense directions have no matrix that repairs their rounding
    torch.testing.assert_close(u @ u.T, torch.eye(len(u), dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("storage", ALL)
def test_project_and_lift_are_the_products_with_the_matrix(bases, storage, dtype, route):
    basis = bases[storage]
    u, units, c = basis.as_matrix().double(), basis.units.double(), torch.randn(basis.dim)
    g = gradients(dtype=dtype)
    expected = units * (u @ flat(g))
    torch.testing.assert_close(basis.project(g).double(), expected, rtol=1e-5, atol=2e-4)
    raw = torch.zeros(basis.dim)
    for index, one in enumerate(g):
        raw[slice(*basis.spans[index])] += basis.project_part(index, one)
    torch.testing.assert_close(basis.from_products(raw).double(), expected, rtol=1e-5, atol=2e-4)
    moved = [one.clone() for one in g]
    basis.add_(moved, c)
    exact = flat(g) + u.T @ (units * c.double())
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(flat(moved), exact, rtol=tolerance, atol=1e-4)
    assert (
        not torch.allclose(flat(moved), flat(g) + u.T @ c.double(), atol=1e-2) or storage == "random"
    )  # units matter


@pytest.mark.parametrize("storage", ALL)
def test_lift_is_the_adjoint_of_project(bases, storage, route):
    basis, g = bases[storage], gradients()
    c = torch.randn(basis.dim)
    left, right = torch.dot(basis.project(g), c).double(), torch.dot(flat(g), flat(basis.lift(c)))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)
    tolerance = 1e-2 if storage == "bf16" else 1e-4
    torch.testing.assert_close(basis.coordinates(basis.lift(c)), c, rtol=0, atol=tolerance)


@pytest.mark.parametrize("storage", ALL)
def test_lifted_rows_missing_gradients_and_strided_memory(bases, storage, route):
    basis, g = bases[storage], gradients()
    rows = torch.randn(2, basis.dim)
    for index, shape in enumerate(SHAPES.values()):
        parts = [part for _, _, part in basis.lift_rows(index, rows)]
        for row, lifted in zip(rows, torch.cat(parts, dim=1), strict=True):
            torch.testing.assert_close(lifted.view(shape), basis.lift(row)[index], rtol=1e-5, atol=1e-5)
    zeroed = [g[0], torch.zeros_like(g[1]), *g[2:]]
    torch.testing.assert_close(basis.project([g[0], None, *g[2:]]), basis.project(zeroed))
    strided = [one.clone() for one in g]
    strided[0] = g[0].T.contiguous().T
    strided[3] = g[3].to(memory_format=torch.channels_last)
    basis.add_(strided, rows[0])
    torch.testing.assert_close(flat(strided), flat(g) + flat(basis.lift(rows[0])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", [*ERRORS, "int8 layer", "int4 layer", "tucker layer"])
def test_what_a_basis_says_of_itself_is_so(bases, walk, storage):
    basis, dense = bases[storage], bases["fp32"]
    snapshots = [Trajectory(walk.folder).path(step) for step in walk.steps]
    x = torch.stack([flat(tensors_of(path, walk.layout)) for path in snapshots])
    x -= x.mean(0)
    along, said = x @ basis.as_matrix().double().T, basis.provenance
    if "layer" not in storage:
        held = float(along.square().sum() / x.square().sum())
        assert said["explained_variance"] == pytest.approx(held, abs=2e-4 if storage == "bf16" else 2e-6)
        assert sum(said["explained_variance_ratio"]) == pytest.approx(said["explained_variance"])
        u, v = basis.as_matrix().double(), dense.as_matrix().double()
        outside = float((v - (v @ u.T) @ u).square().sum() / DIM) ** 0.5  # 1 - cos^2 would be rounding alone in fp32
        assert outside <= ERRORS[storage]
        if storage not in ("fp32", "bf16"):
            assert said["direction_error"] == pytest.approx(outside, abs=1e-4) and outside > 1e-4
            assert said["dense_explained_variance"] == dense.provenance["explained_variance"]
            assert said["bytes"] == basis.nbytes
    tolerance = 0.02 if storage.startswith("int4") else 3e-3  # int4 keeps the units of the dense basis
    torch.testing.assert_close(
        along.std(0) / basis.units.double(), torch.ones(basis.dim).double(), rtol=0, atol=tolerance
    )


def tensors_of(path, layout):
    tensors = load_file(path)
    return [tensors[name] for name in layout.names]


@pytest.mark.parametrize("storage", ALL)
def test_bytes_are_known_before_a_basis_is_made(bases, storage):
    basis, name = bases[storage], storage.partition(" ")[0]
    assert storage_bytes(basis.layout, basis.dim, name, spans=basis.spans) == basis.nbytes


@pytest.mark.parametrize("storage", ALL)
def test_units_devices_dtypes_files_and_fingerprints(bases, storage, tmp_path, walk):
    basis = bases[storage]
    basis.save_pretrained(tmp_path)
    loaded = Basis.from_pretrained(tmp_path)
    assert type(loaded) is type(basis) and loaded.fingerprint == basis.fingerprint and loaded.nbytes == basis.nbytes
    torch.testing.assert_close(loaded.as_matrix(), basis.as_matrix(), rtol=0, atol=1e-7)
    assert loaded.provenance == basis.provenance
    assert torch.equal(loaded.to("cpu").as_matrix(), loaded.as_matrix())
    plain = loaded.with_units("orthonormal")
    assert torch.equal(plain.as_matrix(), loaded.as_matrix()) and torch.equal(plain.units, torch.ones(basis.dim))
    assert torch.equal(plain.with_units("std").units, basis.units) and copy.deepcopy(basis) is basis
    if storage not in ("fp32", "bf16"):
        with pytest.raises(ValueError, match="dense"):
            basis.to(dtype=torch.float16)


def test_fingerprints_tell_directions_apart(bases, tmp_path):
    known = [bases[storage].fingerprint for storage in ALL if storage != "bf16"]  # bf16 is the same basis as fp32
    assert len({*known}) == len(known)
    other = write_walk(tmp_path, seed=1)
    for storage in ("int8", "int4", "tucker"):
        assert fit_basis(other, DIM, storage=storage, progress=False).fingerprint != bases[storage].fingerprint
        again = fit_basis(other, DIM, storage=storage, units="orthonormal", progress=False)
        same = fit_basis(other, DIM, storage=storage, units="orthonormal", progress=False)
        assert again.fingerprint == same.fingerprint


def test_the_choice_is_the_most_exact_that_fits(walk):
    layout = walk.layout
    sizes = {storage: storage_bytes(layout, DIM, storage) for storage in ERRORS}
    assert sizes["fp32"] == 4 * DIM * layout.n and sizes["bf16"] == 2 * DIM * layout.n
    for storage in ("fp32", "bf16", "int8", "int4"):
        taken, why = choose_storage(layout, DIM, sizes[storage])
        assert taken == storage and f"{storage} takes" in why
        assert choose_storage(layout, DIM, sizes[storage] - 1)[0] != storage
    budget = sizes["int4"] - 1
    taken, why = choose_storage(layout, DIM, budget)
    assert taken == "tucker" and "int4 would take" in why
    basis = fit_basis(walk, DIM, storage="auto", budget_bytes=budget, progress=False)
    assert type(basis).kind == "tucker" and basis.nbytes <= budget
    assert basis.provenance["storage"] == "tucker" and basis.provenance["storage_reason"] == why
    least = min(storage_bytes(layout, DIM, "tucker", ranks=Ranks(0, 4, 16)), sizes["int4"])
    with pytest.raises(ValueError, match=f"at least {least:,} bytes.*RandomBasis"):
        choose_storage(layout, DIM, least - 1)
    assert choose_storage(layout, DIM, least)[0] == "tucker"


def test_a_storage_and_a_budget_that_do_not_fit_are_refused(walk):
    with pytest.raises(ValueError, match="storage is 'int2', expected one of"):
        fit_basis(walk, DIM, storage="int2")
    with pytest.raises(ValueError, match="give one of them"):
        fit_basis(walk, DIM, storage="int8", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs budget_bytes"):
        fit_basis(walk, DIM, storage="auto")
    with pytest.raises(ValueError, match="int8 takes .* and budget_bytes is 1,000"):
        fit_basis(walk, DIM, storage="int8", budget_bytes=1000)
    with pytest.raises(ValueError, match="Tucker takes at least"):
        fit_basis(walk, DIM, storage="tucker", budget_bytes=1000)
    with pytest.raises(ValueError, match="budget_bytes is 0"):
        fit_basis(walk, DIM, storage="auto", budget_bytes=0)
    with pytest.raises(ValueError, match="storage is 'zip'"):
        storage_bytes(walk.layout, DIM, "zip")
    with pytest.raises(ValueError, match="right is 0"):
        Ranks(right=0)
    with pytest.raises(ValueError, match="bits is 2"):
        Ranks(bits=2)
    assert ranks_within(walk.layout, DIM, None) == Ranks()


class Regression(nn.Module):
    """Two layers that learn what another such net says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 36))
        self.x = torch.randn(256, 40)
        self.y = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 36))(self.x).detach()

    def forward(self):
        return (self.net(self.x) - self.y).square().mean()


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    model, recorded = Regression(), Trajectory(tmp_path_factory.mktemp("regression"))
    start, optimizer = copy.deepcopy(model.state_dict()), torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(40):
        recorded.write(step, model.named_parameters())
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return model, start, recorded


def trained(model, start, basis, average=0.0):
    model.load_state_dict(start)
    params = model if average else model.named_parameters()
    optimizer = SubspaceOptimizer(params, basis, lambda c: torch.optim.Adam(c, lr=0.1), average=average)
    for _ in range(60):
        model.zero_grad()
        model.train()
        model().backward()
        optimizer.step()
    model.eval()  # at the average, where there is one
    return float(model().detach())


@pytest.mark.parametrize("average", [0.0, 2.0])
@pytest.mark.parametrize("storage, most", [("int8", 1.01), ("int4", 1.05), ("tucker", 1.15)])
def test_training_reaches_the_loss_of_the_dense_basis(regression, storage, most, average, route):
    model, start, recorded = regression
    dense = trained(model, start, fit_basis(recorded, 8, progress=False), average)
    reached = trained(model, start, fit_basis(recorded, 8, storage=storage, progress=False), average)
    assert reached <= most * dense
    # a random subspace does not: the bound means something
    assert trained(model, start, RandomBasis(Layout.from_named_parameters(model.named_parameters()), 8)) > 1.5 * dense
