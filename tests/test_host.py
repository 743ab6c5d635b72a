"""Directions that stay in host memory: the tests of all storages, copies in pieces and their order."""

import contextlib
import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from hf_sl2o import Basis, DenseBasis, QuantizedBasis, SubspaceOptimizer, fit_basis
from hf_sl2o.foundation.ranks import basis_facts
from hf_sl2o.subspace import dense, host, quantized
from hf_sl2o.subspace.storage import choose_storage

from . import test_storage as shared
from .conftest import random_dense

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
STORAGES = [*DTYPES, "int8", "int4", "int8 layer", "int4 layer"]
WAYS = ["host", "mapped", "copied"]


@dataclasses.dataclass
class Copies:
    """What begin_copy was asked for, and how much of it is held."""

    sizes: list[int] = dataclasses.field(default_factory=list)
    held: int = 0
    peak: int = 0

    def begin(self, parts, device):
        there = []
        for part in parts:
            memory = np.empty(part.numel() * part.itemsize, dtype=np.uint8)  # lives as long as a view of the copy
            copy = torch.from_numpy(memory).view(part.dtype).view(part.shape)
            there.append(copy.copy_(part))
            weakref.finalize(memory, self._freed, memory.nbytes)
            self.held += memory.nbytes
        self.sizes.append(sum(part.nbytes for part in there))
        self.peak = max(self.peak, self.held)
        return there, None

    def _freed(self, nbytes):
        self.held -= nbytes


@pytest.fixture
def copies(monkeypatch):
    """Directions go to the device in small pieces, as if it were another one."""
    seen = Copies()
    monkeypatch.setattr(host, "begin_copy", seen.begin)
    monkeypatch.setattr(host, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(host, "CONVERTED_BYTES", 1 << 12)
    for module in (dense, quantized):
        monkeypatch.setattr(module, "apart", lambda tensor, device: True)
    return seen


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return shared.write_walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def plain(walk):
    made = {s: fit_basis(walk, shared.DIM, dtype=dtype, progress=False) for s, dtype in DTYPES.items()}
    made |= {s: fit_basis(walk, shared.DIM, storage=s, progress=False) for s in ("int8", "int4", "tucker")}
    layered = {s: fit_basis(walk, 3, blocks="layer", storage=s, progress=False) for s in ("int8", "int4")}
    return made | {f"{s} layer": one for s, one in layered.items()}


@pytest.fixture(scope="module")
def mapped(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped")
    for storage in STORAGES:
        plain[storage].save_pretrained(folder / storage)
    return {s: Basis.from_pretrained(folder / s, mapped=True) for s in STORAGES}


def of_way(way, request):
    if way == "copied":
        request.getfixturevalue("copies")
    name = "mapped" if way == "mapped" else "plain"
    bases = request.getfixturevalue(name)
    return {s: bases[s] if way == "mapped" else bases[s].on_host() for s in STORAGES}


# What is computed


@pytest.mark.parametrize("storage", [s for s in STORAGES if s not in ("fp16", "fp64")])
@pytest.mark.parametrize("way", WAYS)
def test_what_holds_of_all_storages(way, storage, request, tmp_path, walk):
    bases = of_way(way, request)
    assert bases[storage].has_loops == (way != "copied")
    shared.test_directions_are_orthonormal(bases, storage)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        shared.test_project_and_lift_are_the_products_with_the_matrix(bases, storage, dtype, None)
    shared.test_lift_is_the_adjoint_of_project(bases, storage, None)
    shared.test_lifted_rows_missing_gradients_and_strided_memory(bases, storage, None)
    shared.test_what_a_basis_says_of_itself_is_so(bases, walk, storage)
    shared.test_bytes_are_known_before_a_basis_is_made(bases, storage)
    shared.test_units_devices_dtypes_files_and_fingerprints(bases, storage, tmp_path, walk)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_same_basis(way, storage, request, plain, tmp_path):
    expected = plain[storage]
    g, c = shared.gradients(), torch.randn(2, expected.dim)
    numbers = [expected.project(g), expected.coordinates(g), expected.as_matrix(), expected.lift(c[0])[0]]
    facts = basis_facts(expected)
    basis = of_way(way, request)[storage]
    assert basis.stays_on_host and not expected.stays_on_host and type(basis) is type(expected)
    found = [basis.project(g), basis.coordinates(g), basis.as_matrix(), basis.lift(c[0])[0]]
    for one, other in zip(found, numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-4)  # as of all storages
    assert basis_facts(basis) == facts and basis.nbytes == expected.nbytes
    plain[storage].save_pretrained(tmp_path / "plain")
    basis.save_pretrained(tmp_path / "other")
    files = [tmp_path / folder / "model.safetensors" for folder in ("plain", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    changed = basis.with_units("orthonormal")
    assert changed.stays_on_host and changed.to("cpu").stays_on_host and changed.on_host() is changed
    with pytest.raises(AssertionError):  # another one is told from it
        torch.testing.assert_close(changed.project(g), numbers[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("average, streamed", [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int4"])
def test_a_run_is_the_same(storage, average, streamed, copies, monkeypatch):
    ends = []
    for way in ("plain", "copied"):
        if way == "plain":
            with monkeypatch.context() as patch:
                patch.setattr(dense, "apart", lambda tensor, device: False)
                patch.setattr(quantized, "apart", lambda tensor, device: False)
                ends.append(run_of(storage, average, streamed, False))
            assert not copies.sizes
        else:
            ends.append(run_of(storage, average, streamed, True))
            assert copies.sizes
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(run_of(storage, average, streamed, True, steps=11), ends[0], rtol=1e-3, atol=1e-4)


def run_of(storage, average, streamed, on_host, steps=12):
    model = shared.Regression()
    start = random_dense(model.named_parameters(), dim=6)
    basis = QuantizedBasis.from_dense(start, 4) if storage == "int4" else start.to(dtype=DTYPES[storage])
    basis = basis.on_host() if on_host else basis
    given = model if average or streamed else model.named_parameters()
    inner = lambda c: torch.optim.Adam(c, lr=0.1)  # noqa: E731
    optimizer = SubspaceOptimizer(given, basis, inner, average=average, stream_gradients=streamed)
    assert optimizer.basis.stays_on_host == on_host
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return shared.flat(model.parameters())


# Pieces


@pytest.mark.parametrize("storage", STORAGES)
def test_pieces_are_small_and_few_are_held(storage, plain, copies):
    basis, g, c = plain[storage].on_host(), shared.gradients(), torch.randn(2, plain[storage].dim)
    for use in (
        lambda: basis.project(g),
        lambda: basis.coordinates(g),
        lambda: basis.add_(g, c[0]),
        lambda: [lifted.sum() for index in range(len(g)) for _, _, lifted in basis.lift_rows(index, c)],
        lambda: [basis.project_part(index, one) for index, one in enumerate(g)],
    ):
        copies.sizes.clear()
        copies.peak = 0
        use()
        gc.collect()
        least = 256 * 6 * basis.compute_dtype.itemsize  # no piece has fewer columns, and it has its scales beside it
        assert max(copies.sizes) <= max(1 << 12, least) * 1.07
        of_mix = 0 if storage in DTYPES else basis.mix.nbytes
        assert len(copies.sizes) > len(g) and sum(copies.sizes) == basis.nbytes - of_mix
        assert max(copies.sizes) < copies.peak <= 3 * max(copies.sizes) and copies.held == 0
    copies.peak = 0
    assert copies.held == 0 and basis.as_matrix().isfinite().all()


def test_the_next_piece_is_begun_before_the_present_one_is_used_and_no_earlier(plain, copies):
    columns = plain["bf16"].on_host()._columns(0, 1 << 22)
    next(columns)
    assert len(copies.sizes) == 2
    columns.close()
    assert len(copies.sizes) == 2 and copies.held == 0


def test_kept_columns_keep_their_numbers(plain, copies):
    basis, whole = plain["fp32"].on_host(), plain["fp32"]._matrices[0]
    kept = list(basis._columns(0, 1 << 22))
    assert len(kept) > 2
    for start, stop, columns in kept:
        assert torch.equal(columns, whole[:, start:stop])


def test_widths_are_whole_blocks_and_fit():
    for rows, stored_bytes in ((1, 4), (40, 0.5), (40, 2), (1000, 8)):
        piece, converted = host.widths(rows, stored_bytes, 4)
        assert piece % 256 == converted % 256 == 0 and piece * rows * stored_bytes <= host.PIECE_BYTES
        assert (piece + 256) * rows * stored_bytes > host.PIECE_BYTES and converted * rows * 4 <= host.CONVERTED_BYTES
    assert host.widths(10**6, 4, 4) == (256, 256)


def test_pieces_of_nothing():
    assert list(host.pieces(0, 256, lambda a, b: [torch.zeros(b - a)], torch.device("cpu"))) == []
    one = DenseBasis(random_dense([("w", torch.nn.Parameter(torch.zeros(3)))], dim=2).layout, [torch.eye(3)[:2]])
    assert not host.apart(one._matrices[0], one.device) and host.apart(one._matrices[0], torch.device("meta"))


def test_storage_of_another_dtype_stays_on_the_host(plain):
    half = plain["fp32"].on_host().to(dtype=torch.bfloat16)
    assert half.stays_on_host and torch.equal(half.as_matrix(), plain["fp32"].to(dtype=torch.bfloat16).as_matrix())
    assert half.units.dtype == torch.float32


@pytest.mark.parametrize("storage", STORAGES)
def test_only_what_is_of_size_d_moves(storage, plain, mapped, monkeypatch):
    moved, to = [], torch.Tensor.to

    def spy(tensor, *args, **kwargs):
        if any(isinstance(one, torch.device) for one in (*args, *kwargs.values())):
            moved.append(tensor.numel())
        return to(tensor, *args, **kwargs)

    for basis, few in ((plain[storage].on_host(), True), (mapped[storage], True), (plain[storage], False)):
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", spy)
            basis.to(torch.device("cpu"))
        assert moved and (max(moved) <= basis.dim**2) == few


def test_a_budget_that_nothing_fits_names_the_host(walk):
    with pytest.raises(ValueError, match=r"leave the directions on the host \(basis.on_host\(\), or .*mapped=True"):
        choose_storage(walk.layout, shared.DIM, 1000)
    with pytest.raises(ValueError, match=r"without a budget and leave it on the host \(basis.on_host\(\)\)"):
        fit_basis(walk, shared.DIM, storage="tucker", budget_bytes=1000)


# Streams: copies that run when somebody waits for them, and not before


class Queue:
    """A stream whose work is done when an event is waited for."""

    def __init__(self, device=None):
        self.work, self.log = [], []

    def wait_stream(self, other):
        self.log.append("wait")

    def wait_event(self, event):
        event.synchronize()

    def synchronize(self):
        while self.work:
            self.work.pop(0)()


class Event:
    waits = True

    def __init__(self):
        self.queue, self.done = None, True

    def record(self, queue):
        self.queue, self.done = queue, False
        queue.work.append(lambda: setattr(self, "done", True))

    def synchronize(self):
        while self.waits and not self.done:
            self.queue.work.pop(0)()


@pytest.fixture(params=["pinned", "not pinned"])
def lane(request, copies, monkeypatch):
    """The copies of a CUDA device, on such streams."""
    entered, copy, empty = [], torch.Tensor.copy_, torch.empty

    @contextlib.contextmanager
    def stream(queue):
        entered.append(queue)
        yield
        entered.pop()

    def later(tensor, source, non_blocking=False):
        if not non_blocking:
            return copy(tensor, source)
        entered[-1].log.append("copy")
        entered[-1].work.append(lambda: copy(tensor, source))
        return tensor

    main = Queue()
    for name, fake in {"Stream": Queue, "Event": Event, "stream": stream, "current_stream": lambda d: main}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k).fill_(1))
    monkeypatch.setattr(torch.Tensor, "copy_", later)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: request.param == "pinned")
    made = host._Lane(torch.device("cpu"))
    monkeypatch.setattr(host, "begin_copy", lambda parts, device: made.begin(parts))
    return made


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8", "int4"])
def test_nothing_is_read_before_its_copy_or_overwritten_before_it_was_read(storage, plain, lane, monkeypatch):
    basis, g = plain[storage].on_host(), shared.gradients()
    expected = basis.units.double() * (basis.as_matrix().double() @ shared.flat(g))
    log = lane.stream.log  # each piece first waits for what had its memory before
    assert log[:2] == ["wait", "copy"] and log.count("copy") >= log.count("wait") > len(g)
    torch.testing.assert_close(basis.project(g).double(), expected, rtol=1e-5, atol=2e-4)
    columns = basis._columns(0, 1 << 22)
    next(columns)
    assert lane.stream.work  # the next piece is under way
    columns.close()
    assert not lane.stream.work  # and done before its memory is given back
    monkeypatch.setattr(Event, "waits", False)
    assert not torch.allclose(basis.project(g).double(), expected, rtol=1e-2, atol=1e-2)


def test_a_buffer_is_filled_again_only_after_it_was_read(plain, lane, monkeypatch):
    parts = [torch.full((2, 300), float(number)) for number in range(5)]
    there = [lane.begin([part]) for part in parts]
    there[-1][1].synchronize()
    assert all(torch.equal(one[0][0], part) for one, part in zip(there, parts, strict=True))
    monkeypatch.setattr(Event, "waits", False)
    there = [lane.begin([part]) for part in parts]
    lane.stream.synchronize()
    if lane.buffers:
        assert not torch.equal(there[0][0][0], parts[0])
