"""A basis of a subspace of the weights: two operations, `project` (n to d) and `lift` (d to n).

n parameters covered, d coefficients. U, of shape (n, d), has orthonormal columns; it is kept per parameter as U^T, of
shape (d_p, numel), where d_p is smaller than d if the basis has one block a layer. `units` (d,) say how long one unit
of a coefficient is: theta = theta_0 + U (units * c), and the projected gradient is units * (U^T grad).
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..foundation.checked import shown
from ..foundation.hub import HubFiles
from . import compiled, host
from .layout import Layout

# Columns handled at a time: what a bf16 weight costs as an fp32 temporary.
_COLUMNS = 1 << 22
# Entries of each parameter that tell one start from another.
SAMPLED = 16

B = TypeVar("B", bound="Basis")


def start_sample(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the first 16 entries of each of k tensors, padded with zeros: `(k, 16)`, fp32, on the CPU."""
    rows = []
    for tensor in tensors:
        row, flat = torch.zeros(SAMPLED), tensor.detach()
        while flat.ndim > 1 and len(flat) and flat[0].numel() >= SAMPLED:
            flat = flat[0]  # no copy of a tensor that is not contiguous
        first = flat[:SAMPLED].reshape(-1)[:SAMPLED] if flat.ndim else flat.reshape(1)
        row[: len(first)] = first
        rows.append(row)
    return torch.stack(rows)


def check_start(start: torch.Tensor | None, layout: Layout) -> torch.Tensor | None:
    """Returns `start`; raises `ValueError` unless it is fp32 of shape `(2, k, 16)`."""
    expected = (2, len(layout.names), SAMPLED)
    if start is not None and (tuple(start.shape) != expected or start.dtype != torch.float32):
        raise ValueError(f"start has shape {tuple(start.shape)} and {start.dtype}, expected {expected} and fp32")
    return start


class Basis(HubFiles):
    """A subspace of a model's weights behind two methods, `project` and `lift`.

    Use [`DenseBasis`] for stored directions (from [`fit_basis`]) and [`RandomBasis`] for seeded ones. Objects are
    immutable: `to` and `with_units` return new ones that share storage.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        spans (`Sequence[tuple[int, int]]`): For each parameter the range of coefficients that move it; `(0, d)`
            everywhere for a global basis.
        units (`torch.Tensor` of shape `(d,)`): Length of one unit of each coefficient, in weight units.
        natural_units (`torch.Tensor` of shape `(d,)`): What `with_units("std")` restores.
        provenance (`dict`, *optional*): JSON values that say how the basis was made; saved with it.

    Attributes:
        start (`torch.Tensor` of shape `(2, k, 16)`, *optional*): [`start_sample`] of the k parameters at the first and
            at the last snapshot of the trajectory that a basis was fitted to; None where that is not known. No part of
            the fingerprint.
        stays_on_host (`bool`): Whether `to` leaves the directions on the host; see [`Basis.on_host`].
    """

    kind: str
    reads, key = frozenset({"mapped"}), "basis"
    is_saved = True
    may_stay_on_host = False
    stays_on_host = False
    start: torch.Tensor | None = None
    _kinds: dict[str, type[Basis]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.is_saved:
            Basis._kinds[cls.kind] = cls

    def __init__(
        self,
        layout: Layout,
        spans: Sequence[tuple[int, int]],
        units: torch.Tensor,
        natural_units: torch.Tensor,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if not (provenance is None or isinstance(provenance, dict)):
            raise ValueError(f"provenance is {shown(provenance)}, expected a dict of JSON values")
        self.layout = layout
        self.spans = tuple((int(start), int(stop)) for start, stop in spans)
        self.units = units
        self.natural_units = natural_units
        self.provenance = dict(provenance or {})
        if units.ndim != 1 or natural_units.shape != units.shape:
            raise ValueError(f"units must have shape (d,), got {tuple(units.shape)} and {tuple(natural_units.shape)}")
        if not (units.is_floating_point() and natural_units.is_floating_point()):
            raise ValueError(f"units have dtypes {units.dtype} and {natural_units.dtype}, expected float ones")
        of_units = [units] if natural_units is units else [units, natural_units]
        if not all(bool(torch.isfinite(u).all() and (u > 0).all()) for u in of_units):
            raise ValueError("units must be finite and positive; a direction without variance has no unit of its own")
        if len(self.spans) != len(layout.names) or any(not 0 <= a < b <= self.dim for a, b in self.spans):
            raise ValueError("spans must give each parameter a range of coefficients within (0, d)")

    @property
    def dim(self) -> int:
        """d, the number of coefficients."""
        return self.units.numel()

    @property
    def tensor_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that the coefficients are: one of (d,); of an identity basis the parameters' own."""
        return [(self.dim,)]

    @property
    def tensor_sizes(self) -> list[int]:
        """Their sizes."""
        return [math.prod(shape) for shape in self.tensor_shapes]

    @property
    def device(self) -> torch.device:
        return self.units.device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Storage dtype of the directions; arithmetic is fp32 (fp64 for a float64 basis)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the stored directions."""

    @property
    def fingerprint(self) -> str:
        """Identifies layout, size and coordinates (by the trajectory's units); optimizer states carry it."""
        numbers = torch.stack([self.units, self.natural_units]).double().cpu()
        digest = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]
        return f"{self.kind}-{self.dim}-{self.layout.fingerprint}-{digest}"

    @abstractmethod
    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields `(start, stop, those columns)` of what is stored of parameter `index`, in the arithmetic dtype.

        Those of U_p^T, before what `from_products` does to all products.
        """

    @abstractmethod
    def to(self: B, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> B:
        """Returns the basis on another device or in another storage dtype."""

    def on_host(self: B) -> B:
        """Returns the basis with its directions in host memory, pinned where there is CUDA, whatever `to` says.

        `to` then moves the units; all methods copy the directions in pieces, of which under 64 MB are on the device
        at a time. This basis' own memory is free once nothing holds it. Torch rounds pinned memory up to powers of 2.

        Raises:
            `ValueError`: it is neither a dense basis nor a quantized one.
        """
        return host.on_host(self)

    @abstractmethod
    def with_units(self: B, units: str) -> B:
        """Returns the same subspace in other coordinates.

        Args:
            units (`str`): `"std"`: c is measured in standard deviations of the trajectory along each direction;
                `"orthonormal"`: one unit is length 1 in weight space, the paper's coordinates.
        """

    def _units_named(self, units: str) -> torch.Tensor:
        if units == "std":
            return self.natural_units
        if units == "orthonormal":
            return torch.ones_like(self.natural_units)
        raise ValueError(f'units is {units!r}, expected "std" or "orthonormal"')

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.dtype)

    def stored(self) -> compiled.Stored | None:
        """The directions as they are in memory, where a compiled loop can read them; by default None."""
        return None

    @property
    def has_loops(self) -> bool:
        """Whether compiled loops may read the directions."""
        return compiled.may_work(self)

    def from_products(self, raw: torch.Tensor) -> torch.Tensor:
        """A projected gradient, (d,), from the products with the stored directions."""
        return raw * self.units

    def to_products(self, rows: torch.Tensor) -> torch.Tensor:
        """What the stored directions are multiplied by, (..., d), for coefficients in units."""
        return rows * self.units.to(rows.dtype)

    @torch.no_grad()
    def project(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """Returns units * (U^T g) for gradients g given per parameter; None counts as zero.

        Args:
            tensors (`Iterable[torch.Tensor | None]`): One a parameter, in the order of the layout, any float dtype.

        Returns:
            `torch.Tensor` of shape `(d,)`, fp32 (fp64 for a float64 basis), on the basis' device.
        """
        tensors = list(tensors)
        raw = compiled.project(self, tensors) if self.has_loops else None
        if raw is None:
            raw = torch.zeros(self.dim, dtype=self.compute_dtype, device=self.device)
            for index, (tensor, (first, last)) in enumerate(zip(tensors, self.spans, strict=True)):
                if tensor is not None:
                    raw[first:last] += self._products(index, tensor)
        return self.from_products(raw)

    @torch.no_grad()
    def project_part(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what the gradient of parameter `index` adds to the products that `project` puts into units: (d_p,).

        The sum over the parameters, each at its span, goes through `from_products`.
        """
        raw = compiled.project(self, [tensor], index) if self.has_loops else None
        return self._products(index, tensor) if raw is None else raw[slice(*self.spans[index])]

    def _products(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        flat, (first, last) = tensor.reshape(-1), self.spans[index]
        raw = torch.zeros(last - first, dtype=self.compute_dtype, device=self.device)
        for start, stop, columns in self._columns(index, _COLUMNS):
            raw.addmv_(columns, flat[start:stop].to(columns.dtype))
        return raw

    @torch.no_grad()
    def add_(self, tensors: Iterable[torch.Tensor], coefficients: torch.Tensor) -> None:
        """Adds `lift(coefficients)` to `tensors` in place, without a temporary of their size for fp32 weights.

        Sums are formed in the wider of the two precisions: fp64 weights stay fp64, those below fp32 are rounded once.
        """
        tensors = list(tensors)
        if self.has_loops and compiled.add(self, tensors, self.to_products(coefficients.to(self.compute_dtype))):
            return
        for index, (tensor, (first, last)) in enumerate(zip(tensors, self.spans, strict=True)):
            # reshape copies where the memory is not contiguous (channels_last); that copy is written back below
            flat = tensor.detach().reshape(-1)
            wide = torch.promote_types(flat.dtype, self.compute_dtype)
            c = self.to_products(coefficients.to(wide))[first:last]
            for start, stop, columns in self._columns(index, _COLUMNS):
                part = flat[start:stop]
                if part.dtype == columns.dtype == wide:
                    part.addmv_(columns.T, c)
                else:
                    part.copy_(torch.addmv(part.to(wide), columns.to(wide).T, c))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat.view(tensor.shape))

    @torch.no_grad()
    def publish_(
        self,
        weights: Sequence[torch.Tensor | None],
        before: Sequence[torch.Tensor | None],
        ways: Sequence[torch.Tensor | None],
        rows: torch.Tensor,
        moved: torch.Tensor,
    ) -> bool:
        """Adds lift(rows[0] - rows[1]) to `weights`, and writes lift(rows[1]) to `ways`, in one pass over U.

        Args:
            weights, ways: fp32, one a parameter; None: it stays as it is.
            before: What the weights become where `moved` is false; None: they move.
            rows (`torch.Tensor` of shape `(2, d)`): Coefficients.
            moved (0-d bool `torch.Tensor`): Whether the weights move.

        Returns:
            Whether it did that; where there is no compiled loop for it, nothing was done.
        """
        return self.has_loops and compiled.publish(self, weights, before, ways, self.to_products(rows), moved)

    @torch.no_grad()
    def lift_rows(
        self, index: int, rows: torch.Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields `(start, stop, L[:, start:stop])` of parameter `index`, where row i of L is `lift(rows[i])` there.

        U is read once for all rows.

        Args:
            index (`int`): The parameter's number in the layout.
            rows (`torch.Tensor` of shape `(r, d)`): Coefficients.
            dtype (`torch.dtype`, *optional*): Of the sums; by default that of the basis' arithmetic.
        """
        dtype = self.compute_dtype if dtype is None else dtype
        first, last = self.spans[index]
        scaled = self.to_products(rows.to(dtype))[:, first:last]  # (r, d_p)
        for start, stop, columns in self._columns(index, _COLUMNS):
            yield start, stop, scaled @ columns.to(dtype)

    @torch.no_grad()
    def coordinates(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """Returns `U^T theta / units`, (d,): of theta_0 + lift(c) it is that of theta_0, plus c."""
        return self.project(tensors) / self.units.square()

    def lift(self, coefficients: torch.Tensor) -> list[torch.Tensor]:
        """Returns U (units * c) per parameter, shapes as in the layout; makes n numbers, `add_` does not."""
        tensors = [torch.zeros(shape, dtype=self.compute_dtype, device=self.device) for shape in self.layout.shapes]
        self.add_(tensors, coefficients)
        return tensors

    def matrix(self, index: int) -> torch.Tensor:
        """Returns U_p^T of shape `(d_p, numel)` of parameter `index`: orthonormal directions, without units."""
        parts = [columns for _, _, columns in self._columns(index, _COLUMNS)]
        return torch.cat(parts, dim=1)

    def as_matrix(self) -> torch.Tensor:
        """Returns U^T, without units, as one matrix of shape `(d, n)`: for small cases and tests."""
        full = torch.zeros(self.dim, self.layout.n, dtype=self.compute_dtype, device=self.device)
        offset = 0
        for index, ((first, last), numel) in enumerate(zip(self.spans, self.layout.numels, strict=True)):
            full[first:last, offset : offset + numel] = self.matrix(index)
            offset += numel
        return full

    def __deepcopy__(self: B, memo: dict[int, Any]) -> B:
        return self  # immutable, and possibly many gigabytes

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dim={self.dim}, n={self.layout.n}, dtype={self.dtype}, MB={self.nbytes / 1e6:.1f})"
        )

    # Files

    def _config(self) -> dict[str, Any]:
        return {
            "basis": self.kind,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout.to_dict(),
            "spans": [list(span) for span in self.spans],
            "provenance": self.provenance,
        }

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[B], pretrained_model_name_or_path: str | Path, *, mapped: bool = False, **where: Any
    ) -> B:
        """As [`HubFiles.from_pretrained`], with its further arguments.

        Args:
            mapped (`bool`, *optional*, defaults to `False`): As [`Basis.on_host`], but directions stay in the file
                and are read there at each use. Nobody may change it in place meanwhile.
        """
        made = super().from_pretrained(pretrained_model_name_or_path, mapped=mapped, **where)
        return host.stays(made) if mapped else made

    @classmethod
    def from_files(cls: type[B], config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> B:
        kind, kinds = config.get("basis"), Basis._kinds
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(
                f'config.json in {where} has "basis": {shown(kind)}, expected one of {sorted(kinds)}; is it a basis?'
            )
        if not issubclass(kinds[kind], cls):
            raise ValueError(f"{where} holds a {kind} basis, not a {cls.__name__}; load it with Basis.from_pretrained")
        try:
            made = kinds[kind]._load(config, tensors, where)
        except (KeyError, TypeError, ValueError, NotImplementedError) as error:
            if isinstance(error, ValueError) and where in str(error):
                raise
            raise ValueError(f"the basis in {where} is malformed: {error}; restore it from its source") from error
        found = str(made.dtype).removeprefix("torch.")
        if config["dtype"] != found:
            raise ValueError(
                f'config.json in {where} has "dtype": {shown(config["dtype"])}, its tensors are {found}; restore both '
                "from one source"
            )
        return made  # type: ignore[return-value]

    @classmethod
    @abstractmethod
    def _load(cls: type[B], config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> B: ...

    def card(self) -> dict[str, str]:
        made = "\n".join(f"- {key}: {value}" for key, value in self.provenance.items())
        return {
            "title": f"A {self.dim}-dimensional subspace",
            "summary": f"{self.dim} directions ({self.kind}, {self.dtype}) in the space of {self.layout.n:,} "
            f"parameters (first {self.layout.names[0]}).",
            "usage": 'from hf_sl2o import Basis\n\nbasis = Basis.from_pretrained("user/name")',
            "training": made,
            "limits": "It fits the model it was made for, at the weights where that run began, and no other.",
        }
