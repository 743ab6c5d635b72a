"""Keys that tell one kept result from another."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch


def stamp(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest(*tensors: torch.Tensor) -> str:
    """Of their bytes, so that it is the same on any number of threads."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def fingerprint_of(rows: Any, most: int = 1000) -> str:
    """Tells one data set from another: its own fingerprint, or a hash of its first rows and of their number.

    Args:
        rows: A `datasets.Dataset`, or anything with a length and rows of tensors, arrays, numbers and text.
        most (`int`, *optional*, defaults to 1000): Rows that are hashed.
    """
    own = getattr(rows, "_fingerprint", None)
    if isinstance(own, str):
        return own
    found = hashlib.sha256(str(len(rows)).encode())
    for index in range(min(most, len(rows))):
        _add(found, rows[index])
    return found.hexdigest()[:16]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(str(key).encode())
            _add(found, value[key])
    elif isinstance(value, list | tuple):
        for entry in value:
            _add(found, entry)
    elif torch.is_tensor(value):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif hasattr(value, "tobytes"):  # arrays and images
        found.update(value.tobytes())
    else:
        found.update(repr(value).encode())


def source_of(function: Any) -> str:
    """Tells one function from another: its name and its source code where that can be had."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        return stamp(name, inspect.getsource(function))
    except (OSError, TypeError):
        return stamp(name)
