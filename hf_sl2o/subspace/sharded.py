"""A basis cut as FSDP2 cuts the parameters: each process keeps the directions of its own part.

Gradients and weights stay where they are. Each process multiplies its part, and d numbers are summed over all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .basis import Basis
from .dense import DenseBasis
from .layout import Layout
from .quantized import BLOCK, QuantizedBasis
from .random import RandomBasis
from .shards import Shards, own_part


class ShardedBasis(Basis):
    """The part of a basis that belongs to the parts of the parameters which are here; [`ShardedBasis.cut`] makes one.

    `project` takes the gradients (each a `DTensor`, or the part of it that is here) and sums over the processes: all
    of them have to call it. `add_`, `lift_rows` and `publish_` work on the parts, and talk to nobody.
    """

    kind = "sharded"
    is_saved = False

    def __init__(self, whole: Basis, here: Basis | None, numbers: Sequence[int], shards: Shards) -> None:
        super().__init__(whole.layout, whole.spans, whole.units, whole.natural_units, whole.provenance)
        self.start, self.shards = whole.start, shards
        self._fingerprint = whole.fingerprint
        self._dtype, self._compute = whole.dtype, whole.compute_dtype
        self._here = here  # over the parts that are not empty; None: all are
        self._numbers = list(numbers)  # of those in the whole layout
        self._place = {number: place for place, number in enumerate(numbers)}

    @classmethod
    @torch.no_grad()
    def cut(cls, basis: Basis, params: Sequence[torch.Tensor]) -> ShardedBasis:
        """Keeps of a basis what belongs to the parts of the parameters that are here, on their device.

        Args:
            basis ([`DenseBasis`], [`QuantizedBasis`] or [`RandomBasis`]): The whole one, the same on all processes. A
                random one makes all its directions everywhere, and uses its part.
            params (`Sequence[torch.Tensor]`): In the order of the basis.

        Raises:
            `NotImplementedError`: another kind of basis; a cut that is none of FSDP2.
        """
        shards = Shards(basis.layout.names, params)
        numbers = [number for number, p in enumerate(params) if own_part(p).numel()]
        names = tuple(basis.layout.names[number] for number in numbers)
        layout = Layout(names, tuple(tuple(own_part(params[number]).shape) for number in numbers)) if names else None
        here = None if layout is None else _cut(basis, layout, numbers, [shards.slices[number] for number in numbers])
        device = params[0].device
        made = cls(basis, here, numbers, shards)
        return made.to(device=device)

    def with_units(self, units: str) -> ShardedBasis:
        raise NotImplementedError("choose the units before the basis is cut: pass the optimizer basis.with_units(...)")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ShardedBasis:
        made = object.__new__(ShardedBasis)
        made.__dict__.update(self.__dict__)
        made._here = None if self._here is None else self._here.to(device=device, dtype=dtype)
        made.units, made.natural_units = self.units.to(device=device), self.natural_units.to(device=device)
        return made

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._compute

    @property
    def nbytes(self) -> int:
        return 0 if self._here is None else self._here.nbytes

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def has_loops(self) -> bool:
        return self._here is not None and self._here.has_loops

    def from_products(self, raw: torch.Tensor) -> torch.Tensor:
        """A projected gradient, (d,), from the products of this process: sums over all."""
        return self.shards.sum(raw if self._here is None else self._here.from_products(raw))

    def _part(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        part, expected = own_part(tensor), self._here_numel(number)
        if part.numel() != expected:  # a compiled loop would read what is behind it
            raise ValueError(
                f"{self.layout.names[number]!r} has {part.numel()} numbers here, expected the {expected} of this "
                "process' part"
            )
        return part

    def _here_numel(self, number: int) -> int:
        return 0 if self._here is None or number not in self._place else self._here.layout.numels[self._place[number]]

    @torch.no_grad()
    def project(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        tensors = list(tensors)
        total = torch.zeros(self.dim, dtype=self.compute_dtype, device=self.device)
        parts = [None if (t := tensors[number]) is None else self._part(number, t) for number in self._numbers]
        shares = [self.shards.shares[number] for number in self._numbers]
        for share in sorted({*shares}):
            assert self._here is not None
            ours = [part if of == share else None for part, of in zip(parts, shares, strict=True)]
            total += share * self._here.project(ours)
        return self.shards.sum(total)

    @torch.no_grad()
    def project_part(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        part = self._part(index, tensor)
        if self._here is None or index not in self._place:
            first, last = self.spans[index]
            return torch.zeros(last - first, dtype=self.compute_dtype, device=self.device)
        return self.shards.shares[index] * self._here.project_part(self._place[index], part)

    @torch.no_grad()
    def add_(self, tensors: Iterable[torch.Tensor], coefficients: torch.Tensor) -> None:
        tensors = list(tensors)
        parts = [self._part(number, tensors[number]) for number in self._numbers]
        if self._here is not None:
            self._here.add_(parts, coefficients)

    @torch.no_grad()
    def lift_rows(
        self, index: int, rows: torch.Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        if self._here is not None and index in self._place:
            yield from self._here.lift_rows(self._place[index], rows, dtype)

    @torch.no_grad()
    def publish_(
        self,
        weights: Sequence[torch.Tensor | None],
        before: Sequence[torch.Tensor | None],
        ways: Sequence[torch.Tensor | None],
        rows: torch.Tensor,
        moved: torch.Tensor,
    ) -> bool:
        if self._here is None:
            return False
        of_parts = [[tensors[number] for number in self._numbers] for tensors in (weights, before, ways)]
        return self._here.publish_(of_parts[0], of_parts[1], of_parts[2], rows, moved)

    def lift(self, coefficients: torch.Tensor) -> list[torch.Tensor]:
        """Returns the parts of U (units * c) that are here, flat."""
        parts = [
            torch.zeros(self._here_numel(number), dtype=self.compute_dtype, device=self.device)
            for number in range(len(self.layout.names))
        ]
        self.add_(parts, coefficients)
        return parts

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        if self._here is not None and index in self._place:
            yield from self._here._columns(self._place[index], width)

    def as_matrix(self) -> torch.Tensor:
        raise NotImplementedError("only a part of the basis is here; load the whole one (Basis.from_pretrained)")

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        raise NotImplementedError("only a part of the basis is here; save the whole one, from which it was cut")

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> ShardedBasis:
        raise NotImplementedError("a part of a basis is not saved; load the whole one")


def _cut(basis: Basis, layout: Layout, numbers: Sequence[int], slices: Sequence[tuple[slice, ...]]) -> Basis:
    """The directions of the given parts, as a basis over them."""
    spans = [basis.spans[number] for number in numbers]
    if isinstance(basis, DenseBasis):
        matrices = [
            _columns_of(basis._matrices[number], basis.layout.shapes[number], cut)
            for number, cut in zip(numbers, slices, strict=True)
        ]
        dense = DenseBasis(layout, matrices, basis.units, basis.natural_units, spans, basis.provenance)
        return dense.on_host() if basis.stays_on_host else dense
    if not isinstance(basis, QuantizedBasis | RandomBasis):
        raise NotImplementedError(
            f"a {basis.kind} basis cannot be cut for sharded parameters; use a dense, int8 or int4 one (cut over the "
            "processes it takes little memory), or train with DDP"
        )
    ranges = [
        _range(basis.layout.names[number], basis.layout.shapes[number], cut)
        for number, cut in zip(numbers, slices, strict=True)
    ]
    if isinstance(basis, RandomBasis):
        return _Columns(layout, basis, numbers, ranges)
    # whole blocks of 128 columns, which share a scale; what is before a part is left out of its products
    before = [start % BLOCK for start, _ in ranges]
    codes, scales, per = [], [], 1 if basis.bits == 8 else 2
    for number, (start, stop), skipped in zip(numbers, ranges, before, strict=True):
        first = start - skipped
        codes.append(basis._codes[number][:, first // per : -(-stop // per)].contiguous())
        scales.append(basis._scales[number][:, first // BLOCK : -(-stop // BLOCK)].contiguous())
    lengths = [stop - start + skipped for (start, stop), skipped in zip(ranges, before, strict=True)]
    blocks = QuantizedBasis(
        Layout(layout.names, tuple((length,) for length in lengths)), codes, scales, basis.mix, basis.units,
        basis.natural_units, spans, basis.provenance,
    )  # fmt: skip
    blocks = blocks.on_host() if basis.stays_on_host else blocks
    if not any(before):
        return blocks
    whole = range(len(numbers))
    return _Columns(layout, blocks, whole, list(zip(before, lengths, strict=True)))


def _columns_of(matrix: torch.Tensor, shape: Sequence[int], slices: Sequence[slice]) -> torch.Tensor:
    """The columns of a (d_p, numel) matrix that belong to a part of a tensor of this shape."""
    if all(cut.stop - cut.start == size for cut, size in zip(slices, shape, strict=True)):
        return matrix
    return matrix.view(len(matrix), *shape)[(slice(None), *slices)].flatten(1).clone()


def _range(name: str, shape: Sequence[int], slices: Sequence[slice]) -> tuple[int, int]:
    """The range of the flat whole that a part is."""
    if any(cut.stop - cut.start < size for cut, size in list(zip(slices, shape, strict=True))[1:]):
        raise NotImplementedError(
            f"parameter {name!r} is not cut along its first dimension, which only a dense basis follows; use one "
            "(`to_dense()` of a random basis), or leave out fully_shard's shard_placement_fn"
        )
    step = torch.Size(shape[1:]).numel()
    return (slices[0].start * step, slices[0].stop * step) if shape else (0, 1)


class _Columns(Basis):
    """A range of the columns of each parameter of another basis."""

    kind = "columns"
    is_saved = False

    def __init__(self, layout: Layout, of: Basis, numbers: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(layout, [of.spans[number] for number in numbers], of.units, of.natural_units, of.provenance)
        self._of, self._numbers, self._ranges = of, list(numbers), list(ranges)

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        first, last = self._ranges[index]
        for start, stop, columns in self._of._columns(self._numbers[index], width):
            if start >= last:
                return
            if stop > first:
                begin, end = max(start, first), min(stop, last)
                yield begin - first, end - first, columns[:, begin - start : end - start]

    def from_products(self, raw: torch.Tensor) -> torch.Tensor:
        return self._of.from_products(raw)

    def to_products(self, rows: torch.Tensor) -> torch.Tensor:
        return self._of.to_products(rows)

    @property
    def dtype(self) -> torch.dtype:
        return self._of.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._of.compute_dtype

    @property
    def nbytes(self) -> int:
        return self._of.nbytes

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> _Columns:
        return _Columns(self.layout, self._of.to(device=device, dtype=dtype), self._numbers, self._ranges)

    def with_units(self, units: str) -> _Columns:
        return _Columns(self.layout, self._of.with_units(units), self._numbers, self._ranges)

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        raise NotImplementedError("some columns of a basis are not saved; save the whole one")

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> _Columns:
        raise NotImplementedError("some columns of a basis are not saved; load the whole one")
