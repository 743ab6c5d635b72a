"""Which parameters a subspace covers, in which order, with which shapes.

n is the number of covered scalars. A layout is plain data: it is saved with every basis and trajectory, and it is
what refuses a model that a basis was not made for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .names import find_names

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_INTEGER = re.compile(r"\.\d+\.")


def plain_name(name: str) -> str:
    """Returns `name` without what DDP puts in front of it, and `torch.compile` in front or in the middle.

    Example:

    ```python
    >>> from hf_sl2o.subspace.layout import plain_name
    >>> plain_name("module._orig_mod.h.0._orig_mod.weight")
    'h.0.weight'
    ```
    """
    while name.startswith(_WRAPPER_PREFIXES):
        name = name[name.index(".") + 1 :]
    return name.replace("._orig_mod.", ".")


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the covered parameters, in order; a tied weight appears once, under its first name.

    Args:
        names (`tuple[str, ...]`): Parameter names as in `model.named_parameters()`.
        shapes (`tuple[tuple[int, ...], ...]`): Their shapes.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout
    >>> layout = Layout.from_named_parameters(torch.nn.Linear(3, 2).named_parameters())
    >>> layout.names, layout.n
    (('weight', 'bias'), 8)
    ```
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "shapes", tuple(tuple(int(s) for s in shape) for shape in self.shapes))
        if not self.names:
            raise ValueError("a layout needs at least one parameter and got none; is anything trainable?")
        if len(self.names) != len(self.shapes):
            raise ValueError(f"a layout needs one shape a name, and got {len(self.names)} and {len(self.shapes)}")
        if len(set(self.names)) != len(self.names):
            raise ValueError("a layout needs distinct parameter names")

    @classmethod
    def from_named_parameters(cls, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> Layout:
        """Makes the layout of all trainable parameters (`requires_grad`); tied weights count once.

        A parameter without elements has nothing to move and is left out.

        Raises:
            `ValueError`: nothing is trainable; a parameter is complex, or on the meta device (named).
        """
        names, shapes, seen = [], [], set()
        for name, parameter in named_parameters:
            if parameter.requires_grad and parameter.numel() and id(parameter) not in seen:
                check_real(plain_name(name), parameter)
                seen.add(id(parameter))
                names.append(plain_name(name))
                shapes.append(tuple(parameter.shape))
        return cls(tuple(names), tuple(shapes))

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of scalars of each parameter."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def n(self) -> int:
        """Number of covered scalars."""
        return sum(self.numels)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any name, shape or the order."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        """Makes the layout that `to_dict` wrote.

        Raises:
            `ValueError`: `data` is something else; says which entry.
        """
        if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("names", "shapes")):
            raise ValueError(f"a layout is {_shown(data)}, expected lists under the keys 'names' and 'shapes'")
        for name in data["names"]:
            if not isinstance(name, str):
                raise ValueError(f"a layout has the parameter name {_shown(name)}, expected text")
        for shape in data["shapes"]:
            # bool is an int, and True is no size
            if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
                raise ValueError(f"a layout has the shape {_shown(shape)}, expected a list of integers of at least 0")
        return cls(tuple(data["names"]), tuple(tuple(shape) for shape in data["shapes"]))

    def select(
        self, named_parameters: Iterable[tuple[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
        """Finds the covered parameters among `named_parameters` and checks them.

        Where PEFT names the same parameter otherwise (another adapter name; `get_peft_model` against
        `model.add_adapter`) and only one trainable parameter of the same shape fits each name, that one is taken,
        with a word in the log.

        Returns:
            The covered parameters in the order of the layout, and the trainable ones outside it as (name, parameter).

        Raises:
            `ValueError`: a covered parameter is missing or has another shape (the first one is named, with the likely
                reason); it belongs to an adapter that is not active; it is complex, or on the meta device.
            `NotImplementedError`: a parameter is sharded.
        """
        model: dict[str, torch.Tensor] = {}
        for name, parameter in named_parameters:
            model.setdefault(plain_name(name), parameter)
        found = find_names(dict(zip(self.names, self.shapes, strict=True)), model)
        parameters = [model[found[name]] for name in self.names]
        self.check_tensors(parameters)
        covered = {id(parameter) for parameter in parameters}
        outside = [
            (name, parameter)
            for name, parameter in model.items()
            if parameter.requires_grad and parameter.numel() and id(parameter) not in covered
        ]
        return parameters, outside

    def check_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises `ValueError` where `tensors` do not fit the layout; names the first one.

        Raises:
            `ValueError`: another number of tensors; another shape; complex, quantised or meta tensors.
            `NotImplementedError`: a tensor is sharded.
        """
        if len(tensors) != len(self.names):
            raise ValueError(
                f"the basis covers {len(self.names)} tensors (first {self.names[0]!r}, last {self.names[-1]!r}) and "
                f"got {len(tensors)}; pass `model.named_parameters()`, so that they are matched by name"
            )
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            if isinstance(tensor, DTensor):
                raise NotImplementedError(
                    f"parameter {name!r} is sharded (DTensor); sharded models are not supported yet, train with DDP"
                )
            check_real(name, tensor)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(tensor.shape)}, the basis was fitted for {shape}; fit a new "
                    "basis, or undo what changed the shape (`resize_token_embeddings`, another head, another rank)"
                )

    def blocks(self, granularity: str) -> list[list[int]]:
        """Groups parameter indices: one group (`"global"`), or one a layer (`"layer"`).

        A layer is everything up to the first number in a name (`transformer.h.3`); parameters without a number are
        grouped by their module (`transformer.ln_f`).
        """
        if granularity == "global":
            return [list(range(len(self.names)))]
        if granularity != "layer":
            raise ValueError(f'blocks is {granularity!r}, expected "global" or "layer"')
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            number = _INTEGER.search(name)
            key = name[: number.end() - 1] if number else name.rpartition(".")[0]
            groups.setdefault(key, []).append(index)
        return list(groups.values())


def check_real(name: str, tensor: torch.Tensor) -> None:
    """Raises `ValueError` for a parameter that a basis cannot move: complex, of integers, or without values."""
    if tensor.is_meta:
        raise ValueError(
            f"parameter {name!r} is on the meta device and has no values yet; materialise the model first "
            "(`model.to_empty(device=...)` and load its weights, or `from_pretrained`), then make the optimizer"
        )
    if tensor.is_complex():
        raise ValueError(
            f"parameter {name!r} is complex ({tensor.dtype}), and a basis moves real numbers; keep its real and "
            "imaginary part as two real parameters (`torch.view_as_real`, and `torch.complex` in `forward`)"
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"parameter {name!r} holds integers ({tensor.dtype}; is it quantised?), which a basis cannot move; train "
            "an adapter instead, or load the model in a floating-point dtype"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
