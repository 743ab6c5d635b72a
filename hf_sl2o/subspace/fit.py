"""From a training trajectory to a basis: snapshots on disk, then principal components, out of core.

T snapshots of n parameters, d components. The (T, n) matrix is never held: one pass over the files sums the (T, T)
Gram matrix in float64, a second one forms the directions block by block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..foundation.checked import FLOATS, check_integer
from ..foundation.pieces import FLOATS_BY_NAME, TensorFile
from .basis import Basis, start_sample
from .dense import DenseBasis
from .factors import Components, fit_quantized, fit_tucker
from .layout import Layout
from .storage import STORAGES, Ranks, choose_storage, ranks_within, storage_bytes
from .trajectory import Trajectory

logger = logging.getLogger(__name__)

# Storages of a dense basis.
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
# Entries of a (T, columns) float64 block: 64 MB.
_BLOCK_ENTRIES = 1 << 23
# Eigenvalues of the Gram matrix below this share of the largest are rounding: with it every direction is orthonormal
# to 1e-5 (the error of an eigenvalue is about T * 2e-16 of the largest).
_RANK_TOLERANCE = 1e-10


class _Blocks:
    """Reads the snapshots as float64 blocks of shape (T, columns) on a device, parameter by parameter.

    A block is valid until the next one is read: all are in the same memory.
    """

    def __init__(self, trajectory: Trajectory, steps: list[int], device: torch.device | str, stack: ExitStack) -> None:
        assert trajectory.layout is not None
        self.device = device
        self.layout, self.steps = trajectory.layout, steps
        self.paths = [trajectory.path(step) for step in steps]
        self.files = [stack.enter_context(_open_snapshot(trajectory, step)) for step in steps]
        self._bytes, self._numbers = bytearray(), torch.empty(0, dtype=torch.float64, device=device)

    def sample(self, file: TensorFile) -> torch.Tensor:
        """[`start_sample`] of the parameters in an open snapshot: `(k, 16)`."""
        return start_sample(
            file.rows(name, 0, min(16, shape[0]) if shape else 1)
            for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
        )

    def in_order(self) -> list[int]:
        """Parameters as they lie in the files."""
        return sorted(range(len(self.layout.names)), key=lambda index: self.files[0].place(self.layout.names[index]))

    def of(self, index: int, *, summing: bool = False) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields (first column, last column, block) of one parameter, as whole rows of its first dimension."""
        name, shape, numel = self.layout.names[index], self.layout.shapes[index], self.layout.numels[index]
        rows = shape[0] if shape else 1
        width = numel // max(rows, 1)  # scalars a row
        step = max(1, _BLOCK_ENTRIES // (len(self.files) * max(width, 1)))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            columns = (last - first) * width
            if (count := len(self.files) * columns) > len(self._numbers):
                self._numbers = torch.empty(count, dtype=torch.float64, device=self.device)
            block = self._numbers[:count].view(len(self.files), columns)
            for row, file in enumerate(self.files):
                if (size := file.bytes_of(name, first, last)) > len(self._bytes):
                    self._bytes = bytearray(size)
                block[row] = file.rows(name, first, last, summing=summing, buffer=self._bytes).reshape(-1)
            yield first * width, first * width + columns, block

    def refuse_non_finite(self, index: int) -> None:
        """Raises for the first snapshot whose numbers of a parameter are not finite, or too large to be squared."""
        name = self.layout.names[index]
        for _, _, block in self.of(index):
            finite = torch.isfinite(block.square()).all(dim=1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                self.files[row].check()  # says so where the file was damaged
                large = bool(torch.isfinite(block[row]).all())
                raise ValueError(
                    f"snapshot {self.paths[row]} holds {'numbers too large to square' if large else 'NaN or Inf'} in "
                    f"{name!r}; leave that step out with steps=..., or record it again with a lower learning rate"
                )


def _open_snapshot(trajectory: Trajectory, step: int) -> TensorFile:
    """Opens the snapshot of `step`; says what is wrong with it, but for its checksum."""
    path = trajectory.path(step)
    if not path.is_file():
        raise FileNotFoundError(
            f"{trajectory.manifest} lists step {step}, and its file {path} is gone; leave that step out with "
            "steps=..., or record the trajectory again"
        )
    assert trajectory.layout is not None
    file = TensorFile(path)
    if (found := file.metadata.get("step", str(step))) != str(step):
        raise ValueError(f"{path} holds the snapshot of step {found}; record it again")
    if missing := [name for name in sorted(trajectory.layout.names) if name not in file]:
        raise ValueError(f"{path} lacks the parameter {missing[0]!r}; record the trajectory again")
    for name, shape in zip(trajectory.layout.names, trajectory.layout.shapes, strict=True):
        if file.shape(name) != shape:
            raise ValueError(f"{path} has {name!r} with shape {file.shape(name)}, expected {shape}; record it again")
        if file.dtype(name) not in FLOATS_BY_NAME:
            raise ValueError(f"{path} has {name!r} of dtype {file.dtype(name)}, expected a float one; record it again")
    return file


def _start(reader: _Blocks, trajectory: Trajectory, stack: ExitStack) -> torch.Tensor:
    """[`start_sample`] of the first recorded snapshot and of the last one that is read: `(2, k, 16)`."""
    first, oldest = trajectory.steps[0], reader.files[0]
    if first != reader.steps[0] and trajectory.path(first).is_file():
        oldest = stack.enter_context(_open_snapshot(trajectory, first))
        oldest.check()
    return torch.stack([reader.sample(oldest), reader.sample(reader.files[-1])])


def _components(
    gram: torch.Tensor, dim: int, what: str, samples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenpairs of a (T, T) Gram matrix: (T, d) vectors, (d,) eigenvalues, all eigenvalues descending."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum()) if values[0] > 0 else 0
    if dim > rank:
        raise ValueError(
            f"dim is {dim}, but {what} ({samples} snapshots) has numerical rank {rank}; choose dim <= {rank}, or "
            "record more snapshots"
        )
    chosen = vectors[:, :dim]
    # Signs are arbitrary; as in scikit-learn's svd_flip the largest entry is made positive. Pointing every direction
    # along the training path instead would let a rule replay the path without looking at a gradient.
    largest = chosen.abs().argmax(dim=0)
    return chosen * chosen[largest, torch.arange(dim)].sign(), values[:dim], values


def _chosen(trajectory: Trajectory, steps: list[int] | None) -> tuple[list[int], Layout]:
    """The steps of the snapshots that are used, and what they hold."""
    chosen = trajectory.steps if steps is None else sorted({*steps})
    if trajectory.layout is None or len(chosen) < 2:
        raise ValueError(
            f"{trajectory.folder} holds {len(chosen)} snapshots, at least 2 are needed; train with "
            "TrajectoryCallback(folder, every_steps=...)"
        )
    if unknown := sorted(set(chosen) - set(trajectory.steps)):
        raise ValueError(f"{trajectory.folder} has no snapshot of step {unknown[0]}; it has {trajectory.steps}")
    return chosen, trajectory.layout


def _grams(reader: _Blocks, groups: list[list[int]], center: bool, bar: Any) -> list[torch.Tensor]:
    """X X^T of the parameters of each group, `(T, T)`, float64; the files' checksums are looked at on the way."""
    snapshots = len(reader.files)
    grams = [torch.zeros(snapshots, snapshots, dtype=torch.float64) for _ in groups]
    number = {index: place for place, group in enumerate(groups) for index in group}
    for index in reader.in_order():
        for first, last, block in reader.of(index, summing=True):
            if center:
                block -= block.mean(dim=0)
            product = (block @ block.T).cpu()
            if not bool(torch.isfinite(product).all()):  # as it is where a number is not
                reader.refuse_non_finite(index)
            grams[number[index]] += product
            bar.update(last - first)
    for file in reader.files:
        file.check()
    return grams


def _write_directions(
    matrix: torch.Tensor, reader: _Blocks, index: int, weights: torch.Tensor, center: bool, bar: Any
) -> None:
    """Fills `(d, n_i)` with the directions of one parameter; `weights` is `(d, T)`."""
    products = torch.empty(0, dtype=torch.float64, device=weights.device)
    for first, last, block in reader.of(index):
        if center:
            block -= block.mean(dim=0)
        if products.shape != (len(weights), last - first):
            products = torch.empty(len(weights), last - first, dtype=torch.float64, device=weights.device)
        matrix[:, first:last] = torch.mm(weights, block, out=products)
        bar.update(last - first)


def _fit_dense(
    reader: _Blocks, groups: list[list[int]], components: list[Components], dtype: torch.dtype, center: bool, bar: Any
) -> DenseBasis:
    """Stored directions of the groups, each with its components, in standard deviations."""
    matrices: dict[int, torch.Tensor] = {}
    spans: list[tuple[int, int]] = [(0, 0)] * len(reader.layout.names)
    for number, (group, (vectors, values, _)) in enumerate(zip(groups, components, strict=True)):
        dim, weights = len(values), vectors / values.sqrt()  # (T, d)
        for index in group:
            matrices[index] = torch.empty(dim, reader.layout.numels[index], dtype=dtype)
            _write_directions(matrices[index], reader, index, weights.T.to(reader.device), center, bar)
            spans[index] = number * dim, (number + 1) * dim
    deviations = [(values / (len(reader.steps) - int(center))).sqrt() for _, values, _ in components]
    std = torch.cat(deviations).to(torch.promote_types(torch.float32, dtype))
    return DenseBasis(reader.layout, [matrices[index] for index in range(len(matrices))], std, std, spans)


def _check_storage(storage: str | None, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    if storage is not None and storage not in (*STORAGES, "auto"):
        raise ValueError(f"storage is {storage!r}, expected one of {(*STORAGES, 'auto')}, or None for that of dtype")
    if storage is not None and dtype != torch.float32:
        raise ValueError(f"got storage={storage!r} and dtype={dtype}; give one of them")


def _taken(
    storage: str | None,
    budget_bytes: int | None,
    dtype: torch.dtype,
    layout: Layout,
    dim: int,
    groups: list[list[int]],
) -> tuple[str, Ranks, dict[str, Any]]:
    """Storage and Tucker's sizes, and what provenance says of the choice; raises `ValueError` where none fits."""
    number = {index: place for place, group in enumerate(groups) for index in group}
    spans = [(number[i] * dim, (number[i] + 1) * dim) for i in range(len(layout.names))]
    total, said = dim * len(groups), {} if storage is None else {"storage": storage}
    if storage == "auto":
        storage, why = choose_storage(layout, total, budget_bytes, spans=spans)
        logger.info("fit_basis: %s", why)
        said = {"storage": storage, "storage_reason": why}
    storage = storage or _NAMES[dtype]
    if storage == "tucker":
        return storage, ranks_within(layout, total, budget_bytes, spans=spans), said
    needed = storage_bytes(layout, total, storage, spans=spans)
    if budget_bytes is not None and needed > budget_bytes:
        raise ValueError(
            f"{storage} takes {needed:,} bytes, and budget_bytes is {budget_bytes:,}; choose "
            'storage="auto", a smaller dim, more bytes, or no budget and basis.on_host()'
        )
    return storage, Ranks(), said


def _fit(
    reader: _Blocks,
    groups: list[list[int]],
    components: list[Components],
    storage: str,
    ranks: Ranks,
    center: bool,
    bar: Any,
) -> tuple[Basis, dict[str, Any]]:
    """The basis in standard deviations, and what provenance says of it."""
    shares = [(values / all_values.sum()).tolist() for _, values, all_values in components]
    ratios = shares[0] if len(shares) == 1 else [sum(block) for block in shares]
    known = {"explained_variance": sum(ratios) / len(groups), "explained_variance_ratio": ratios}
    if storage in _NAMES.values():
        dtype = next(dtype for dtype, name in _NAMES.items() if name == storage)
        return _fit_dense(reader, groups, components, dtype, center, bar), known
    basis: Basis
    if storage == "tucker":
        basis, fitted = fit_tucker(reader, groups, components, ranks, center, bar)
    else:
        basis, fitted = fit_quantized(reader, groups, components, int(storage.removeprefix("int")), center, bar)
    return basis, {
        "explained_variance": sum(fitted.explained) / len(groups), "explained_variance_ratio": fitted.explained,
        "dense_explained_variance": known["explained_variance"], "direction_error": fitted.error,
        "bytes": basis.nbytes, **({"ranks": asdict(ranks)} if storage == "tucker" else {}),
    }  # fmt: skip


def fit_basis(
    trajectory: Trajectory | str | Path,
    dim: int,
    *,
    units: str = "std",
    center: bool = True,
    blocks: str = "global",
    dtype: torch.dtype = torch.float32,
    storage: str | None = None,
    budget_bytes: int | None = None,
    steps: list[int] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Basis:
    """Fits the principal components of a trajectory, streaming over blocks of parameters.

    X (T, n) snapshots, centred; X X^T = W diag(lambda) W^T; directions U = X^T W_d diag(lambda_d)^-1/2.

    Args:
        trajectory ([`Trajectory`] or path): The snapshots.
        dim (`int`): d, the number of directions (of each layer with `blocks="layer"`). The paper uses 40 of 60
            snapshots.
        units (`str`, *optional*, defaults to `"std"`): `"std"`: c in standard deviations of the trajectory along each
            direction; `"orthonormal"`: the paper's coordinates. [`Basis.with_units`] changes it later.
        center (`bool`, *optional*, defaults to `True`): Subtract the mean snapshot (PCA, official code); `False` as in
            "Fine-tuning Happens in Tiny Subspaces" (ACL 2023).
        blocks (`str`, *optional*, defaults to `"global"`): `"global"`, or `"layer"` for d directions a layer.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Storage dtype of the directions.
        storage (`str`, *optional*, defaults to that of `dtype`): `"fp32"`, `"bf16"`, `"int8"`, `"int4"`, `"tucker"`,
            or `"auto"`: the first of them that fits in `budget_bytes`.
        budget_bytes (`int`, *optional*): The most bytes of the basis on the device; Tucker's ranks are chosen by it.
        steps (`list[int]`, *optional*, defaults to all): Which snapshots to use.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the products are computed; it must
            know float64. A block of the trajectory at a time is there. The basis is returned on the CPU.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        [`DenseBasis`], [`QuantizedBasis`] or [`TuckerBasis`]; `provenance` holds the explained variance.

    Raises:
        `ValueError`: fewer than two snapshots, NaN or Inf in one, `dim` above the numerical rank, a damaged file,
            a dtype that is no float one, or a budget that nothing fits.
        `FileNotFoundError`: a snapshot is gone.
    """
    _check_storage(storage, dtype)
    check_integer("dim", dim, 1)
    trajectory = trajectory if isinstance(trajectory, Trajectory) else Trajectory(trajectory)
    chosen, layout = _chosen(trajectory, steps)
    groups = layout.blocks(blocks)
    taken, ranks, said = _taken(storage, budget_bytes, dtype, layout, dim, groups)
    with ExitStack() as stack:
        reader = _Blocks(trajectory, chosen, device, stack)
        bar = stack.enter_context(
            tqdm(total=layout.n * (3 if taken == "tucker" else 2), unit="param", unit_scale=True, desc="fit_basis",
                 disable=not progress)
        )  # fmt: skip
        start = _start(reader, trajectory, stack)
        components = []
        for group, gram in zip(groups, _grams(reader, groups, center, bar), strict=True):
            what = "the trajectory" if blocks == "global" else f"the block of {layout.names[group[0]]!r}"
            components.append(_components(gram, dim, what, len(chosen)))
        basis, known = _fit(reader, groups, components, taken, ranks, center, bar)
    basis.start, basis.provenance = start, {
        "snapshots": len(chosen), "first_step": chosen[0], "last_step": chosen[-1], "center": center,
        "blocks": blocks, **known, **said,
    }  # fmt: skip
    share = 100 * known["explained_variance"]
    logger.info("fit_basis: %d directions hold %.4f %% of the variance of %s", dim, share, trajectory.folder)
    return basis.with_units(units)
