"""The whole space as a basis: d = n, every scalar is a coefficient. LoRA factors are meta-trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .basis import Basis
from .layout import Layout


class IdentityBasis(Basis):
    """Coefficients that are the parameters themselves, concatenated: nothing is stored.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        device (*optional*): Where the coefficients live.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import IdentityBasis, Layout
    >>> layout = Layout.from_named_parameters(torch.nn.Linear(3, 2).named_parameters())
    >>> IdentityBasis(layout).project([torch.ones(2, 3), None])
    tensor([1., 1., 1., 1., 1., 1., 0., 0.])
    ```
    """

    kind = "identity"

    def __init__(self, layout: Layout, device: torch.device | str | None = None) -> None:
        ends = torch.tensor(layout.numels).cumsum(0).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        one = torch.ones(1, device=device).expand(layout.n)  # n ones in 4 bytes
        super().__init__(layout, spans, one, one)

    @torch.no_grad()
    def project(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        g = torch.zeros(self.dim, dtype=self.compute_dtype, device=self.device)
        for tensor, (start, stop) in zip(tensors, self.spans, strict=True):
            if tensor is not None:
                g[start:stop].copy_(tensor.reshape(-1))
        return g

    @torch.no_grad()
    def add_(self, tensors: Iterable[torch.Tensor], coefficients: torch.Tensor) -> None:
        for tensor, (start, stop) in zip(tensors, self.spans, strict=True):
            tensor.copy_(tensor + coefficients[start:stop].view(tensor.shape))

    def lift_rows(
        self, index: int, rows: torch.Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        start, stop = self.spans[index]
        yield 0, stop - start, rows[:, start:stop].to(self.compute_dtype if dtype is None else dtype)

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        start, stop = self.spans[index]
        yield 0, stop - start, torch.eye(stop - start, device=self.device)  # for `matrix`, of small cases

    @property
    def tensor_shapes(self) -> list[tuple[int, ...]]:
        return list(self.layout.shapes)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def fingerprint(self) -> str:
        return f"{self.kind}-{self.dim}-{self.layout.fingerprint}"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IdentityBasis:
        if dtype not in (None, torch.float32):
            raise ValueError(f"the identity basis computes in float32, got {dtype}")
        return IdentityBasis(self.layout, device or self.device)

    def with_units(self, units: str) -> IdentityBasis:
        self._units_named(units)  # every unit is 1
        return self

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        raise NotImplementedError("the identity basis has nothing to save; make it from the model's layout")

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> IdentityBasis:
        raise NotImplementedError("the identity basis is not saved; make it from the model's layout")
