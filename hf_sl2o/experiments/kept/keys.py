"""Keys that tell one kept result from another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_DEEPEST = 12


def stamp(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest(*tensors: torch.Tensor) -> str:
    """Of their bytes, so that it is the same on any number of threads."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def key_of_batches(*batches: Any) -> str:
    """Tells batches of tensors, numbers and text, in lists and mappings, from others."""
    found = hashlib.sha256()
    for batch in batches:
        _add(found, batch)
    return found.hexdigest()[:16]


def fingerprint_of(rows: Any, most: int = 1000) -> str:
    """Tells one data set from another: its own fingerprint, or a hash of its first rows and of their number.

    Args:
        rows: A `datasets.Dataset`, or anything with a length and rows of tensors, arrays, numbers and text.
        most (`int`, *optional*, defaults to 1000): Rows that are hashed.

    Raises:
        `ValueError`: rows are not the same each time they are read, as those of a random crop.
    """
    own = getattr(rows, "_fingerprint", None)
    if isinstance(own, str):
        return own
    found = hashlib.sha256(str(len(rows)).encode())
    for index in range(min(most, len(rows))):
        _add(found, rows[index])
    first, again = hashlib.sha256(), hashlib.sha256()
    for of in (first, again):
        _add(of, rows[0])
    if first.digest() != again.digest():
        raise ValueError("row 0 differs each time it is read, so the data cannot be told from other data; give "
                         "Comparison an identity")  # fmt: skip
    return found.hexdigest()[:16]


def _add(found: Any, value: Any, depth: int = 0) -> None:
    """Hashes a value with its type and length, so that no two of them run into each other."""
    if depth > _DEEPEST:  # objects may hold each other
        found.update(f"{type(value).__qualname__};".encode())
        return
    if isinstance(value, Mapping):
        found.update(f"map {len(value)};".encode())
        for key in sorted(value, key=str):
            _add(found, key, depth + 1)
            _add(found, value[key], depth + 1)
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)};".encode())
        for entry in value:
            _add(found, entry, depth + 1)
    elif torch.is_tensor(value):
        if value.layout is not torch.strided:
            raise ValueError(f"a {value.layout} tensor cannot be told from others; give Comparison an identity")
        found.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        found.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, nn.Module):
        found.update(f"module {model_key(value)};".encode())
    elif callable(value):
        found.update(f"function {source_of(value)};".encode())
    elif hasattr(value, "tobytes"):  # arrays and images
        kind = [getattr(value, name, None) for name in ("dtype", "shape", "mode", "size")]
        palette = value.getpalette() if hasattr(value, "getpalette") else None
        found.update(f"array {kind} {palette};".encode())
        found.update(value.tobytes())
    elif dataclasses.is_dataclass(value) or type(value).__repr__ is object.__repr__:
        found.update(f"object {type(value).__qualname__};".encode())
        _add(found, {name: entry for name, entry in vars(value).items() if not callable(entry)}, depth + 1)
    else:
        text = _ADDRESS.sub("", repr(value))
        found.update(f"{type(value).__name__} {len(text)};{text}".encode())


def model_key(model: nn.Module) -> str:
    """Tells one model at its start from another: structure, code, configuration, weights, buffers, what is trained."""
    found = hashlib.sha256(_ADDRESS.sub("", repr(model)).encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        settings = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    classes = set()
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"}
        _add(found, [name, plain])
        if type(module).__module__.partition(".")[0] not in ("torch", "transformers", "peft"):
            classes.add(source_of(type(module).forward))
    _add(found, sorted(classes))
    _add(found, {name: p.requires_grad for name, p in model.named_parameters()})
    _add(found, {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)})
    return found.hexdigest()[:16]


def source_of(function: Any) -> str:
    """Tells one function from another: source code, defaults, what it encloses, bound arguments, an object's state.

    What it reads from elsewhere (global names, files) is not seen.
    """
    found = hashlib.sha256()
    if isinstance(function, functools.partial):
        found.update(source_of(function.func).encode())
        _add(found, [list(function.args), function.keywords])
        return found.hexdigest()[:16]
    if inspect.ismethod(function):
        found.update(source_of(function.__func__).encode())
        _add(found, _state_of(function.__self__))
        return found.hexdigest()[:16]
    plain = inspect.isroutine(function) or inspect.isclass(function)
    of = function if plain else type(function)
    found.update(f"{of.__module__}.{of.__qualname__}".encode())
    try:
        found.update(inspect.getsource(of).encode())
    except (OSError, TypeError):  # built in, or typed at a prompt
        code = getattr(of, "__code__", None)
        found.update(b"" if code is None else code.co_code + _ADDRESS.sub("", repr(code.co_consts)).encode())
    if not plain:
        _add(found, _state_of(function))
    _add(found, [getattr(of, "__defaults__", None), getattr(of, "__kwdefaults__", None)])
    for cell in getattr(of, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            continue
        if content is not function:
            _add(found, content)
    return found.hexdigest()[:16]


def _state_of(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value
    return {name: entry for name, entry in getattr(value, "__dict__", {}).items() if not callable(entry)}
