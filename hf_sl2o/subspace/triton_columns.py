"""Products with stored directions on a GPU, as Triton kernels over a table of all parameters: one launch each way.

A program takes 8,192 columns of one parameter and all its directions, so that U, the gradient and the weights are read
once. What it reads is where the table says: nothing is copied into one block, and the host waits for nothing. The
formulas are those of `columns.cpp`.
"""

# Triton's own language: its functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .compiled import Stored, Tensors

_CHUNK, _BLOCK = 8192, 128  # a scale of int8 and int4 is of 128 columns, too


@triton.jit
def _tile(codes, scales, numel, row, rows, col, STORAGE: tl.constexpr, BLOCK: tl.constexpr):
    """(directions, BLOCK) numbers of U^T, fp32; zeros outside."""
    inside = (row < rows)[:, None] & (col < numel)[None, :]
    wide = row.to(tl.int64)[:, None]
    at = wide * numel + col[None, :]
    if STORAGE == 0:
        return tl.load(codes.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    if STORAGE == 1:
        return tl.load(codes.to(tl.pointer_type(tl.bfloat16)) + at, mask=inside, other=0.0).to(tl.float32)
    blocks = (numel + BLOCK - 1) // BLOCK
    of_row = row.to(tl.int64) * blocks + tl.min(col, 0) // BLOCK
    scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + of_row, mask=row < rows, other=0.0)
    if STORAGE == 2:
        number = tl.load(codes.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0).to(tl.float32)
    else:
        pair = wide * ((numel + 1) // 2) + col[None, :] // 2
        two = tl.load(codes.to(tl.pointer_type(tl.uint8)) + pair, mask=inside, other=0x88).to(tl.int32)
        number = (((two >> ((col[None, :] & 1) * 4).to(tl.int32)) & 15) - 8).to(tl.float32)
    return number * scale[:, None]


@triton.jit
def _place(table, owners, starts, EVEN: tl.constexpr):
    """Of this program: its parameter, first column, and what the table says: codes, scales, numel, directions."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = tl.load(starts + chunk)
    codes = tl.load(table + 4 * owner)
    numel = tl.load(table + 4 * owner + 2)
    if EVEN:  # rows begin at multiples of 16 bytes: loads are of 16 bytes
        codes = tl.multiple_of(codes, 16)
        numel = tl.multiple_of(numel, 16)
        start = tl.multiple_of(start, 16)
    return owner, start, codes, tl.load(table + 4 * owner + 1), numel, tl.load(table + 4 * owner + 3)


@triton.jit
def _vector(at, BF16: tl.constexpr):
    if BF16:
        return at.to(tl.pointer_type(tl.bfloat16))
    return at.to(tl.pointer_type(tl.float32))


@triton.jit
def _project(table, owners, starts, gradients, parts, STORAGE: tl.constexpr, BF16: tl.constexpr, EVEN: tl.constexpr,
             DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    owner, start, codes, scales, numel, rows = _place(table, owners, starts, EVEN)
    at = tl.load(gradients + owner)
    row = tl.arange(0, DIM)
    total = tl.zeros((DIM, BLOCK), tl.float32)
    if at != 0:
        for offset in range(0, CHUNK, BLOCK):
            if start + offset < numel:
                col = start + offset + tl.arange(0, BLOCK)
                g = tl.load(_vector(at, BF16) + col, mask=col < numel, other=0.0).to(tl.float32)
                total += _tile(codes, scales, numel, row, rows, col, STORAGE, BLOCK) * g[None, :]
    tl.store(parts + tl.program_id(0).to(tl.int64) * DIM + row, tl.sum(total, 1))


@triton.jit
def _add(table, owners, starts, firsts, weights, coefficients, STORAGE: tl.constexpr, EVEN: tl.constexpr,
         DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    owner, start, codes, scales, numel, rows = _place(table, owners, starts, EVEN)
    at = tl.load(weights + owner)
    row = tl.arange(0, DIM)
    c = tl.load(coefficients + tl.load(firsts + owner) + row, mask=row < rows, other=0.0)
    if at != 0:
        for offset in range(0, CHUNK, BLOCK):
            if start + offset < numel:
                col = start + offset + tl.arange(0, BLOCK)
                moved = tl.sum(_tile(codes, scales, numel, row, rows, col, STORAGE, BLOCK) * c[:, None], 0)
                here = _vector(at, False) + col
                tl.store(here, tl.load(here, mask=col < numel, other=0.0) + moved, mask=col < numel)


@triton.jit
def _publish(table, owners, starts, firsts, weights, before, ways, coefficients, dim, moves, STORAGE: tl.constexpr,
             EVEN: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    owner, start, codes, scales, numel, rows = _place(table, owners, starts, EVEN)
    at, old, way = tl.load(weights + owner), tl.load(before + owner), tl.load(ways + owner)
    row = tl.arange(0, DIM)
    mine = coefficients + tl.load(firsts + owner) + row
    c, ahead = tl.load(mine, mask=row < rows, other=0.0), tl.load(mine + dim, mask=row < rows, other=0.0)
    if old != 0:
        if tl.load(moves) != 0:
            old = old * 0
    if at != 0:
        for offset in range(0, CHUNK, BLOCK):
            if start + offset < numel:
                col = start + offset + tl.arange(0, BLOCK)
                tile = _tile(codes, scales, numel, row, rows, col, STORAGE, BLOCK)
                back = tl.sum(tile * ahead[:, None], 0)
                here, inside = _vector(at, False) + col, col < numel
                published = tl.sum(tile * c[:, None], 0) + tl.load(here, mask=inside, other=0.0) - back
                if old != 0:  # nothing moved: they go back
                    published = tl.load(_vector(old, False) + col, mask=inside, other=0.0)
                tl.store(here, published, mask=inside)
                tl.store(_vector(way, False) + col, back, mask=inside)


class Table:
    """Where the directions of each parameter are, on the device; made once a basis."""

    def __init__(self, basis: Any, stored: Stored, number: int) -> None:
        count, device, pointers = len(stored.codes), stored.codes[0].device, stored.pointers
        scales = pointers[count:] or [0] * count
        rows = [last - first for first, last in basis.spans]
        numels = basis.layout.numels
        owners: list[int] = []
        starts: list[int] = []
        self.begins = [0]  # the first program of each parameter, and their number
        for index, numel in enumerate(numels):
            columns = range(0, numel, _CHUNK)
            owners += [index] * len(columns)
            starts += columns
            self.begins.append(len(owners))
        entries = zip(pointers[:count], scales, numels, rows, strict=True)
        self.table = torch.tensor([list(entry) for entry in entries], dtype=torch.int64, device=device)  # (k, 4)
        self.owners = torch.tensor(owners, dtype=torch.int64, device=device)
        self.starts = torch.tensor(starts, dtype=torch.int64, device=device)
        self.firsts = torch.tensor([first for first, _ in basis.spans], dtype=torch.int64, device=device)
        self.device = device
        even = all(p % 16 == 0 for p in pointers[:count]) and all(numel % 32 == 0 for numel in numels)
        dim = max(16, triton.next_power_of_2(max(rows)))
        self.common = {"STORAGE": number, "EVEN": even, "DIM": dim, "CHUNK": _CHUNK, "BLOCK": _BLOCK}
        self.spans = [basis.spans[owner] for owner in owners]  # of each program
        # of each range of coefficients the programs that add to it
        self.blocks = [(span, self._those_of(span)) for span in dict.fromkeys(self.spans)]

    def _those_of(self, span: tuple[int, int]) -> Any:
        if all(one == span for one in self.spans):
            return slice(None)
        return torch.tensor([i for i, one in enumerate(self.spans) if one == span], device=self.device)

    def addresses(self, tensors: Tensors) -> torch.Tensor:
        """(k,) int64 on the device, by a copy that nobody waits for."""
        there = torch.tensor([0 if t is None else t.data_ptr() for t in tensors], dtype=torch.int64)
        return there.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else there

    def launch(self, kernel: Any, programs: slice, *arguments: Any, **options: Any) -> None:
        owners, starts = self.owners[programs], self.starts[programs]
        kernel[(len(owners),)](self.table, owners, starts, *arguments, **self.common, **options)


def project(basis: Any, table: Table, gradients: Tensors, begin: int, halves: bool) -> torch.Tensor:
    """Sums U_p^T g without units, `(d,)` fp32: of all parameters, or of number `begin` alone.

    Gradients are of bf16 (`halves`) or fp32.
    """
    whole = len(gradients) == len(basis.spans)
    programs = slice(0, len(table.owners)) if whole else slice(table.begins[begin], table.begins[begin + 1])
    addresses = table.addresses([*([None] * begin), *gradients])
    parts = torch.empty(programs.stop - programs.start, table.common["DIM"], device=table.device)
    table.launch(_project, programs, addresses, parts, BF16=halves)
    raw = torch.zeros(basis.dim, dtype=torch.float64, device=table.device)
    for (first, last), those in table.blocks if whole else [(basis.spans[begin], slice(None))]:
        raw[first:last] = parts[those, : last - first].sum(0, dtype=torch.float64)
    return raw.float()


def add(table: Table, weights: Tensors, coefficients: torch.Tensor) -> None:
    table.launch(_add, slice(None), table.firsts, table.addresses(weights), coefficients)


def publish(
    table: Table, weights: Tensors, before: Tensors, ways: Tensors, rows: torch.Tensor, moved: torch.Tensor
) -> None:
    addresses = [table.addresses(tensors) for tensors in (weights, before, ways)]
    table.launch(_publish, slice(None), table.firsts, *addresses, rows, rows.shape[1], moved.to(torch.int32))
