"""With a running average a run has two points: the last step, where it trains, and the average, which is published.

An optimizer that knows the model leaves its weights at the published point after each step, so that whoever reads
them reads that one. They are at the last step only from a forward pass for training to the step that follows: the
hooks here take them there, and a `state_dict()` taken in between holds the published ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

HINT = (
    "the weights are at their running average, and so is this gradient; call use_last() before the forward pass (or "
    "train(), its other name), or give the optimizer the model itself, which does it"
)


class TwoPoints(Protocol):
    """What the hooks need of an optimizer."""

    def use_last(self) -> None: ...

    def published(self) -> dict[int, torch.Tensor]:
        """The published weights by `id` of their parameter, where the weights are not there themselves."""
        ...


def parameters_of(params: Any) -> tuple[Any, nn.Module | None]:
    """Returns what an optimizer takes, named parameters of a model, and the model if one was given."""
    return (params.named_parameters(), params) if isinstance(params, nn.Module) else (params, None)


class _Hook:
    """A hook on a module that holds its optimizer weakly; a copied or pickled module is without it."""

    def __init__(self, optimizer: Any = None) -> None:
        self._of: Callable[[], Any] = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _ToTheLast(_Hook):
    """Before a forward pass for training."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        # In a compiled forward nothing may move under the compiler's eyes; a Trainer has called train() before.
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if (optimizer := self._of()) is not None:
            optimizer.use_last()


class _Published(_Hook):
    """After `state_dict()`: the entries are the published weights, wherever those of the module are."""

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        optimizer = self._of()
        published = {} if optimizer is None else optimizer.published()
        if published:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if id(parameter) in published and prefix + name in state_dict:
                    state_dict[prefix + name] = published[id(parameter)]


def attach(optimizer: TwoPoints, model: nn.Module) -> None:
    """Hooks the optimizer into the model whose parameters it has."""
    handles = [
        model.register_forward_pre_hook(_ToTheLast(optimizer)),
        model.register_state_dict_post_hook(_Published(optimizer)),
    ]
    weakref.finalize(optimizer, _remove, handles)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        if handle is not None:
            handle.remove()
