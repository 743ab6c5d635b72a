"""Which weights a fine-tune starts from: told by their sha256, so that d numbers are never added to others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..subspace import Layout
from ..subspace.layout import plain_name


def digest_of_weights(tensors: Iterable[torch.Tensor]) -> str:
    """The sha256 of dtypes, shapes and bytes of tensors, in their order; 0.6 GB a second on one core."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{_name_of(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Start:
    """The weights that a fine-tune starts from.

    Args:
        tensors (`list[torch.Tensor]`): theta_0, in the order of the basis.
        others (`Mapping[str, str]`): The sha256 of each other parameter and saved buffer, by its name.
        name (`str`, *optional*): Of the base model, as it was loaded.
        revision (`str`, *optional*): The commit of its repository.
    """

    tensors: list[torch.Tensor]
    others: Mapping[str, str]
    name: str | None = None
    revision: str | None = None

    @property
    def dtypes(self) -> str:
        """Names of the dtypes of theta_0, such as `"float32"`."""
        return "+".join(sorted({_name_of(tensor.dtype) for tensor in self.tensors}))

    @property
    def rest(self) -> str:
        """One sha256 of all that is outside the basis, whatever PEFT puts in front of the names."""
        return hashlib.sha256("".join(digest for _, digest in sorted(self.others.items())).encode()).hexdigest()


def start_of(model: nn.Module, layout: Layout) -> Start:
    """Returns the start that a model is, without a copy.

    Raises:
        `ValueError`, `NotImplementedError`: as [`Layout.select`].
    """
    covered, _ = layout.select(model.named_parameters())
    known = {id(tensor) for tensor in covered}
    others = {name: digest_of_weights([tensor]) for name, tensor in _saved(model) if id(tensor) not in known}
    return Start(covered, others, *_origin(model))


class KeptStart:
    """A copy, on the CPU, of what a model trains, made before its weights move.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        self._others: dict[str, str] = {}
        self._origin = _origin(model)
        for name, tensor in _saved(model):
            if tensor.requires_grad:
                self._copies[name] = tensor.detach().cpu().clone().requires_grad_()
            else:
                self._others[name] = digest_of_weights([tensor])

    def start(self, layout: Layout) -> Start:
        """The start for the basis of a layout; raises as [`Layout.select`]."""
        covered, _ = layout.select(self._copies.items())
        known = {id(tensor) for tensor in covered}
        beside = {name: digest_of_weights([t]) for name, t in self._copies.items() if id(t) not in known}
        return Start(covered, {**self._others, **beside}, *self._origin)


def _saved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each parameter and each buffer that is saved with a model, once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield plain_name(f"{prefix}.{name}" if prefix else name), tensor


def _origin(model: nn.Module) -> tuple[str | None, str | None]:
    """Name and commit of a model as it was loaded; of a folder its name alone, which says nothing of the machine."""
    config: Any = getattr(model, "config", None)
    name, revision = (getattr(config, key, None) for key in ("_name_or_path", "_commit_hash"))
    if not isinstance(name, str) or not name:
        return None, None
    if Path(name).is_absolute() or Path(name).exists():
        return Path(name).resolve().name, None
    return name, revision if isinstance(revision, str) else None
