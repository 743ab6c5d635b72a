"""A basis of stored directions in 8 or 4 bits a number.

Each 128 columns of a direction share a scale. What was rounded is no longer orthonormal; a (d, d) matrix makes it so,
and is applied to d numbers before a lift and after a projection, never to columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..foundation.checked import check_float, check_integer
from ..foundation.hub import take
from .basis import Basis, check_start
from .compiled import Stored
from .dense import DenseBasis
from .host import apart, in_host_memory, pieces, widths
from .layout import Layout
from .stored import CHECKED_COLUMNS, check_directions, check_names, stored_layout, stored_spans

#: Columns that share a scale.
BLOCK = 128
#: The largest code by bits; codes are symmetric, so that a sign costs nothing.
LARGEST = {8: 127, 4: 7}
_DTYPES = {8: torch.int8, 4: torch.uint8}
# Columns converted at a time: the fp32 copy of 40 directions stays in the cache. A multiple of BLOCK.
_CONVERTED_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 17}


def quantize(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds rows to codes with one scale for 128 columns.

    Args:
        rows (`torch.Tensor` of shape `(d, k)`): Numbers.
        bits (`int`): 8 or 4.

    Returns:
        Codes, int8 of shape `(d, k)`, or uint8 of shape `(d, ceil(k / 2))` with two codes a byte, the even column in
        the low half, each stored as the code plus 8; and scales, fp32 of shape `(d, ceil(k / 128))`.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.subspace.quantized import quantize
    >>> codes, scales = quantize(torch.tensor([[127.0, -63.6, 0.0]]), bits=8)
    >>> codes, scales
    (tensor([[127, -64,   0]], dtype=torch.int8), tensor([[1.]]))
    ```
    """
    d, k = rows.shape
    blocks = -(-k // BLOCK)
    padded = torch.nn.functional.pad(rows.float(), (0, blocks * BLOCK - k)).view(d, blocks, BLOCK)
    scales = padded.abs().amax(dim=2) / LARGEST[bits]
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (padded / divisors[..., None]).round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8)
    codes = codes.view(d, blocks * BLOCK)
    if bits == 8:
        return codes[:, :k].contiguous(), scales
    half = (codes[:, : k + k % 2] + 8).to(torch.uint8).view(d, -1, 2)
    return half[..., 0] | half[..., 1] << 4, scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Returns columns `start` to `stop` of what [`quantize`] rounded: `(d, stop - start)`, fp32."""
    if bits == 8:
        numbers = codes[:, start:stop].float()
    else:
        pairs = codes[:, start // 2 : (stop + 1) // 2]
        both = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)
        numbers = both[:, start % 2 : start % 2 + stop - start].float().sub_(8)
    first, last = start // BLOCK, -(-stop // BLOCK)
    if start % BLOCK == 0 and stop % BLOCK == 0:
        return numbers.view(len(codes), -1, BLOCK).mul_(scales[:, first:last, None]).view(len(codes), -1)
    offset = start - first * BLOCK
    return numbers.mul_(scales[:, first:last].repeat_interleave(BLOCK, dim=1)[:, offset : offset + stop - start])


def inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """G^-1/2 of a Gram matrix, fp64: of all that make directions orthonormal it changes them least (Loewdin).

    Raises:
        `ValueError`: the directions depend on each other.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    if not bool(values[0] > 1e-8 * values[-1]):
        raise ValueError(
            f"the {len(gram)} directions depend on each other once rounded (eigenvalues of their products from "
            f"{float(values[0]):.2g} to {float(values[-1]):.2g}); choose a smaller dim, or a storage of more bits"
        )
    return (vectors * values.rsqrt()) @ vectors.T


def check_spans(spans: Sequence[tuple[int, int]]) -> None:
    """Raises `ValueError` unless any two spans are the same or apart: the matrix then mixes within each."""
    distinct = sorted({*spans})
    if any(last > first for (_, last), (first, _) in zip(distinct, distinct[1:], strict=False)):
        raise ValueError(f"spans {distinct[:4]} overlap; expected spans that are the same or apart")


class QuantizedBasis(Basis):
    """Stored directions of 8 or 4 bits a number; [`QuantizedBasis.from_dense`] makes one.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        codes (`Sequence[torch.Tensor]`): For each parameter int8 of shape `(d_p, numel)` (8 bits), or uint8 of shape
            `(d_p, ceil(numel / 2))` (4 bits); see [`quantize`].
        scales (`Sequence[torch.Tensor]`): For each parameter fp32 of shape `(d_p, ceil(numel / 128))`.
        mix (`torch.Tensor` of shape `(d, d)`): fp32; the directions are `mix @ codes`.
        units (`torch.Tensor` of shape `(d,)`): Length of one unit of each coefficient.
        natural_units (`torch.Tensor` of shape `(d,)`, *optional*, defaults to `units`): The trajectory's standard
            deviations.
        spans (`Sequence[tuple[int, int]]`, *optional*, defaults to `(0, d)` for each parameter): Coefficients of each
            parameter.
        provenance (`dict`, *optional*): How it was made.
        start (`torch.Tensor` of shape `(2, k, 16)`, *optional*): See [`Basis`].

    Raises:
        `ValueError`: shapes or dtypes do not fit the layout, or spans overlap in part.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis
    >>> from hf_sl2o.subspace.quantized import QuantizedBasis
    >>> layout = Layout.from_named_parameters(torch.nn.Linear(64, 64).named_parameters())
    >>> dense = RandomBasis(layout, dim=4).to_dense()
    >>> basis = QuantizedBasis.from_dense(dense, bits=8)
    >>> dense.nbytes / basis.nbytes > 3.5, float((basis.as_matrix() - dense.as_matrix()).norm()) < 0.02
    (True, True)
    ```
    """

    kind = "quantized"
    may_stay_on_host = True

    def __init__(
        self,
        layout: Layout,
        codes: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        mix: torch.Tensor,
        units: torch.Tensor,
        natural_units: torch.Tensor | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        provenance: dict[str, Any] | None = None,
        *,
        start: torch.Tensor | None = None,
    ) -> None:
        if not len(codes) == len(scales) == len(layout.names):
            raise ValueError(f"got {len(codes)} codes and {len(scales)} scales for {len(layout.names)} parameters")
        spans = [(0, units.numel())] * len(codes) if spans is None else spans
        super().__init__(layout, spans, units, units if natural_units is None else natural_units, provenance)
        check_spans(self.spans)
        self.bits = 4 if codes[0].dtype == torch.uint8 else 8
        for name, numel, (first, last), code, scale in zip(
            layout.names, layout.numels, self.spans, codes, scales, strict=True
        ):
            shape = (last - first, numel if self.bits == 8 else -(-numel // 2))
            for what, tensor, wanted, dtype in (
                ("codes", code, shape, _DTYPES[self.bits]),
                ("scales", scale, (last - first, -(-numel // BLOCK)), torch.float32),
            ):
                if tuple(tensor.shape) != wanted or tensor.dtype != dtype:
                    raise ValueError(
                        f"the {what} of {name!r} have shape {tuple(tensor.shape)} and {tensor.dtype}, expected "
                        f"{wanted} and {dtype}"
                    )
        if mix.shape != (self.dim, self.dim) or mix.dtype != torch.float32:
            raise ValueError(f"mix has shape {tuple(mix.shape)} and {mix.dtype}, expected {(self.dim,) * 2} and fp32")
        self._codes, self._scales, self.mix = list(codes), list(scales), mix
        self.units, self.natural_units = self.units.float(), self.natural_units.float()
        self.start = check_start(start, layout)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, basis: DenseBasis, bits: int = 8) -> QuantizedBasis:
        """Rounds a dense basis, block by block.

        Args:
            basis ([`DenseBasis`]): fp32, bf16 or fp64.
            bits (`int`, *optional*, defaults to 8): 8 or 4.

        Returns:
            [`QuantizedBasis`] with the units of `basis`; `provenance["direction_error"]` is the root mean square
            distance of its directions (of length 1) from those of `basis`.

        Raises:
            `ValueError`: other bits; directions that depend on each other once rounded.
        """
        if bits not in LARGEST:
            raise ValueError(f"bits is {bits!r}, expected 8 or 4")
        codes: list[torch.Tensor] = []
        scales: list[torch.Tensor] = []
        gram, cross = (torch.zeros(basis.dim, basis.dim, dtype=torch.float64) for _ in range(2))
        for index, (first, last) in enumerate(basis.spans):
            parts = []
            for rows in _aligned(columns for _, _, columns in basis._columns(index, 1 << 20)):
                code, scale = quantize(rows, bits)
                rounded = dequantize(code, scale, bits, 0, rows.shape[1])
                gram[first:last, first:last] += (rounded @ rounded.T).double().cpu()
                cross[first:last, first:last] += (rows.float() @ rounded.T).double().cpu()
                parts.append((code, scale))
            codes.append(torch.cat([code for code, _ in parts], dim=1))
            scales.append(torch.cat([scale for _, scale in parts], dim=1))
        mix = inverse_root(gram)
        error = max(0.0, 2 - 2 * float((mix * cross).sum()) / basis.dim) ** 0.5
        provenance = {**basis.provenance, "storage": f"int{bits}", "direction_error": error}
        return cls(
            basis.layout, codes, scales, mix.float().to(basis.device), basis.units, basis.natural_units, basis.spans,
            provenance, start=basis.start,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.bits]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._codes, *self._scales, self.mix))

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{self.bits}-{digest_of(self.mix, *self._codes, *self._scales)}"

    def stored(self) -> Stored | None:
        return None if apart(self._codes[0], self.device) else Stored(f"int{self.bits}", self._codes, self._scales)

    def from_products(self, raw: torch.Tensor) -> torch.Tensor:
        return (self.mix @ raw) * self.units

    def to_products(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows * self.units.to(rows.dtype)) @ self.mix.to(rows.dtype)

    def rounded(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Columns of the stored directions of parameter `index`, before `mix`: `(d_p, stop - start)`, fp32."""
        return dequantize(self._codes[index], self._scales[index], self.bits, start, stop)

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        if apart(self._codes[index], self.device):
            yield from self._copied_columns(index)
            return
        numel, width = self.layout.numels[index], _CONVERTED_COLUMNS.get(self.device.type, width)
        for start in range(0, numel, width):
            stop = min(start + width, numel)
            yield start, stop, self.rounded(index, start, stop)

    def _copied_columns(self, index: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As `_columns`, of codes and scales on the host."""
        codes, scales, numel, two = self._codes[index], self._scales[index], self.layout.numels[index], self.bits == 4

        def cut(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            of_codes = codes[:, start // 2 : (stop + 1) // 2] if two else codes[:, start:stop]
            return of_codes, scales[:, start // BLOCK : -(-stop // BLOCK)]

        piece, step = widths(len(codes), self.bits / 8, 4)
        for first, last, parts in pieces(numel, piece, cut, self.device):
            for start in range(first, last, step):
                stop = min(start + step, last)
                yield start, stop, dequantize(parts[0], parts[1], self.bits, start - first, stop - first)
            del parts  # before the next piece is begun

    def matrix(self, index: int) -> torch.Tensor:
        first, last = self.spans[index]
        return self.mix[first:last, first:last] @ super().matrix(index)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> QuantizedBasis:
        if dtype not in (None, self.dtype):
            raise ValueError(
                f"a basis of {self.bits} bits a number cannot be stored in {dtype}; fit or load a dense one, and call "
                "its `to(dtype=...)`"
            )
        there = None if self.stays_on_host else device
        codes, scales = ([t.to(there) for t in tensors] for tensors in (self._codes, self._scales))
        mix, units, natural = (t.to(device) for t in (self.mix, self.units, self.natural_units))
        return self._like(codes, scales, mix, units, natural)

    def _in_host_memory(self) -> QuantizedBasis:
        codes, scales = in_host_memory(self._codes), in_host_memory(self._scales)
        return self._like(codes, scales, self.mix, self.units, self.natural_units)

    def with_units(self, units: str) -> QuantizedBasis:
        return self._like(self._codes, self._scales, self.mix, self._units_named(units), self.natural_units)

    def _like(
        self,
        codes: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        mix: torch.Tensor,
        units: torch.Tensor,
        natural: torch.Tensor,
    ) -> QuantizedBasis:
        made = QuantizedBasis(
            self.layout, codes, scales, mix, units, natural, self.spans, self.provenance, start=self.start
        )
        made.stays_on_host = self.stays_on_host
        return made

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {"mix": self.mix, "units": self.units.clone(), "natural_units": self.natural_units}
        for name, codes, scales in zip(self.layout.names, self._codes, self._scales, strict=True):
            tensors |= {f"codes.{name}": codes, f"scales.{name}": scales}
        return self._config(), tensors if self.start is None else {**tensors, "start": self.start}

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> QuantizedBasis:
        take(config, {"basis", "dim", "dtype", "layout", "spans", "provenance"}, where)
        layout = stored_layout(config["layout"], f"config.json in {where}")
        check_integer(f"dim in config.json in {where}", config["dim"], 1)
        spans = stored_spans(config["spans"], config["dim"], where)
        expected = {f"{part}.{name}" for name in layout.names for part in ("codes", "scales")}
        check_names(tensors, expected | {"mix", "units", "natural_units"}, {"start"}, where)
        codes, scales = ([tensors[f"{part}.{name}"] for name in layout.names] for part in ("codes", "scales"))
        units, natural = stored_units(tensors, config["dim"], where)
        check_float(tensors["mix"], f"'mix' in {where}")
        check_codes(layout, codes, scales, where)
        start = tensors.get("start")
        return cls(layout, codes, scales, tensors["mix"], units, natural, spans, config["provenance"], start=start)


def _aligned(blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Joins (d, k) blocks to ones whose columns are a multiple of 128, but for the last."""
    kept: torch.Tensor | None = None
    for block in blocks:
        block = block if kept is None else torch.cat([kept, block], dim=1)
        whole = block.shape[1] // BLOCK * BLOCK
        if whole:
            yield block[:, :whole]
        kept = block[:, whole:].clone() if whole < block.shape[1] else None
    if kept is not None:
        yield kept


def digest_of(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits of the first tensor and of the first 64 columns of the others."""
    digest = hashlib.sha256(tensors[0].detach().cpu().contiguous().numpy().tobytes())
    for tensor in tensors[1:]:
        digest.update(tensor.flatten(1)[:, :64].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def stored_units(tensors: dict[str, torch.Tensor], dim: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns units and natural units of a file; raises `ValueError` unless both are fp32 and of shape `(d,)`."""
    for name in ("units", "natural_units", *({"start"} & tensors.keys())):
        check_float(tensors[name], f"{name!r} in {where}")
        if name != "start" and (tensors[name].shape != (dim,) or tensors[name].dtype != torch.float32):
            raise ValueError(
                f"{name!r} in {where} has shape {tuple(tensors[name].shape)} and {tensors[name].dtype}, expected "
                f"{(dim,)} and fp32; restore it from its source"
            )
    return tensors["units"], tensors["natural_units"]


def check_codes(layout: Layout, codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], where: str) -> None:
    """Raises `ValueError` where a code or a scale is none that [`quantize`] makes."""
    for name, code, scale in zip(layout.names, codes, scales, strict=True):
        for row in (part for whole in code for part in whole.reshape(-1).split(CHECKED_COLUMNS)):
            low = bool((row == -128).any()) if code.dtype == torch.int8 else False
            if low or (code.dtype == torch.uint8 and bool((((row & 15) == 0) | ((row >> 4) == 0)).any())):
                raise ValueError(f"the codes of {name!r} in {where} are out of range; restore it from its source")
        check_directions(scale, f"'scales.{name}' in {where}")
        if bool((scale < 0).any()):
            raise ValueError(f"'scales.{name}' in {where} is negative; restore it from its source")
