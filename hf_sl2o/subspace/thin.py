"""Directions of one matrix that share thin factors: U_k = A S_k B^T."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .quantized import BLOCK
from .storage import matrix_shape

# Columns handled at a time where a temporary of their size is needed.
_COLUMNS = 1 << 18


class Factors(NamedTuple):
    """Directions of one parameter as a matrix of shape (m, q).

    Args:
        core (`torch.Tensor` of shape `(d', r1, r2)`): fp32.
        left (`torch.Tensor` of shape `(m, r1)`, *optional*): Without one r1 = m.
        right (`torch.Tensor` of shape `(q, r2)`, *optional*): Without one r2 = q.
    """

    core: torch.Tensor
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def matrix_shape(self) -> tuple[int, int]:
        """(m, q)."""
        m = self.core.shape[1] if self.left is None else len(self.left)
        return m, self.core.shape[2] if self.right is None else len(self.right)

    def reduce(self, matrix: torch.Tensor, first: int = 0) -> torch.Tensor:
        """A^T M B of rows `first`, ... of a matrix: `(..., rows, q)` to `(..., r1, r2)`, fp32.

        Without a left factor the rows stay as they are.
        """
        left = None if self.left is None else self.left[first : first + matrix.shape[-2]]
        if self.right is None:
            return matrix if left is None else left.T @ matrix
        if left is not None and left.shape[1] < self.right.shape[1]:
            return (left.T @ matrix) @ self.right
        half = matrix @ self.right
        return half if left is None else left.T @ half

    def project(self, flat: torch.Tensor) -> torch.Tensor:
        """Products of the d' directions with a gradient of shape `(m * q,)`: `(d',)`."""
        matrix = flat.view(self.matrix_shape())
        if matrix.dtype == self.core.dtype:
            small = self.reduce(matrix)
        else:  # no copy of the whole gradient in another dtype
            step = max(1, _COLUMNS // max(matrix.shape[1], 1))
            parts = [
                self.reduce(matrix[first : first + step].to(self.core.dtype), first)
                for first in range(0, len(matrix), step)
            ]
            small = torch.cat(parts) if self.left is None else torch.stack(parts).sum(0)
        return self.core.flatten(1) @ small.reshape(-1)

    def thin(self, c: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Two matrices, (m, r) and (r, q), whose product is the sum of the directions times c (d',); or None, and it.

        In the dtype of c.
        """
        middle = (c @ self.core.flatten(1).to(c.dtype)).view(self.core.shape[1:])
        left = None if self.left is None else self.left.to(c.dtype)
        right = None if self.right is None else self.right.to(c.dtype).T
        if left is None or right is None:
            return (middle, right) if right is not None else (left, middle)
        return (left, middle @ right) if left.shape[1] < right.shape[0] else (left @ middle, right)

    @property
    def wide(self) -> torch.Tensor | None:
        """The right factor as rows, (r, q), where a compiled loop can take it, with what [`Factors.tall`] returns."""
        fits = self.right is not None and len(self.right) % BLOCK == 0
        fits = fits and (self.left is None or self.left.shape[1] >= self.core.shape[2])
        return self.right.T if fits and self.right is not None else None

    def tall(self, c: torch.Tensor) -> torch.Tensor:
        """(m, r), whose product with `wide` is the sum of the directions times c (d',)."""
        middle = (c @ self.core.flatten(1)).view(self.core.shape[1:])
        return middle if self.left is None else self.left @ middle

    @staticmethod
    def add_thin_(flat: torch.Tensor, thin: tuple[torch.Tensor | None, torch.Tensor], start: int = 0) -> None:
        """Adds the product of what [`Factors.thin`] returned to whole rows of it, from column `start`, in place."""
        tall, wide = thin
        matrix = flat.view(-1, wide.shape[1])
        rows = slice(start // wide.shape[1], start // wide.shape[1] + len(matrix))
        if tall is None:
            matrix.add_(wide[rows])
        else:
            matrix.addmm_(tall[rows], wide)

    def whole(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of the directions: `(d', rows * q)`."""
        left = None if self.left is None else self.left[first:last]
        middle = self.core[:, first:last] if left is None else left @ self.core
        return (middle if self.right is None else middle @ self.right.T).flatten(1)


def check_factors(name: str, shape: tuple[int, ...], rows: int, of: Factors) -> None:
    """Raises `ValueError` where factors do not fit a parameter of a shape, with `rows` directions."""
    m, q = matrix_shape(shape)
    core = tuple(of.core.shape)
    fits = len(core) == 3 and core[0] == rows >= 1 and core[1] >= 1 and core[2] >= 1
    fits = fits and (core[1] == m if of.left is None else tuple(of.left.shape) == (m, core[1]))
    fits = fits and (core[2] == q if of.right is None else tuple(of.right.shape) == (q, core[2]))
    if not fits or any(t.dtype != torch.float32 for t in of.tensors):
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in of.tensors)
        raise ValueError(
            f"the factors of {name!r} are {found}; expected fp32, a core of {rows} directions, and factors whose "
            f"product has shape {(m, q)}"
        )
