"""With a running average a run has two points: the last step, where it trains, and the average, which is published.

An optimizer that knows the model leaves its weights at the published point after each step, so that whoever reads
them reads that one. They are at the last step only from a forward pass for training to the step that follows: the
hooks here take them there, and a `state_dict()` taken in between holds the published ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ..subspace.shards import is_sharded, own_part

#: A change of the weights by this share of them, and further than from one point to the other, replaces them.
REPLACES = 0.05

HINT = (
    "the weights are at their running average, and so is this gradient; give the optimizer the model itself and put "
    "that into train mode (model.train()), or call use_last() before the forward pass (or train(), its other name)"
)


def parameters_of(params: Any) -> tuple[Any, nn.Module | None]:
    """Returns what an optimizer takes, named parameters of a model, and the model if one was given."""
    if not isinstance(params, nn.Module):
        return params, None
    reshard(params)
    return params.named_parameters(), params


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered of a model: it leaves some of it after an evaluation, which then stays as it was
    when the weights move, and stands in the place of the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class _Hook:
    """A hook on a module that holds its optimizer weakly; a copied or pickled module is without it."""

    def __init__(self, optimizer: Any = None) -> None:
        self._of: Callable[[], Any] = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _BeforeForward(_Hook):
    """Takes the weights to the last step before a forward pass for training, and to the average before another one."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self._outside_the_graph(module)  # nothing may move under the compiler's eyes
        else:
            self._go(module)

    @torch.compiler.disable
    def _outside_the_graph(self, module: nn.Module) -> None:
        self._go(module)

    def _go(self, module: nn.Module) -> None:
        optimizer = self._of()
        # a replica of DataParallel was copied before: a Trainer has called train() by then, a loop hears of it in step
        if optimizer is None or not optimizer.listens or getattr(module, "_is_replica", False):
            return
        asked = optimizer._asked
        if module.training and torch.is_grad_enabled():
            optimizer.use_last()
            optimizer._asked = asked
        elif not module.training and not torch.is_grad_enabled():
            optimizer.show_average()
        elif not module.training and not asked:
            optimizer.use_average()
            optimizer._from_last = False  # gradients that come of this are not of the last step


class _AfterForward(_Hook):
    """Ends what [`_BeforeForward`] began for a forward pass in evaluation mode."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._outside_the_graph()
        else:
            self._end()

    @torch.compiler.disable
    def _outside_the_graph(self) -> None:
        self._end()

    def _end(self) -> None:
        if (optimizer := self._of()) is not None:
            optimizer.end_show()


class _Published(_Hook):
    """After `state_dict()`: the entries are the published weights, wherever those of the module are."""

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        optimizer = self._of()
        published = {} if optimizer is None else optimizer.published()
        if published:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if id(parameter) in published and prefix + name in state_dict:
                    state_dict[prefix + name] = published[id(parameter)]


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()


class TwoPoints(Optimizer):
    """What an optimizer with a running average does about the model whose weights it has."""

    _attached = False
    #: Whether forward passes of the model are this optimizer's; a Trainer says so only while it trains.
    listens = True
    _handles: list[Any]
    _from_last = False  # whether the gradients to come are of the last step's weights
    _asked = False  # whether somebody, not a forward pass, went to the last step since the last one was made
    _shown: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # weights of the last step, while others are shown
    average: float
    _model: Callable[[], nn.Module | None] = staticmethod(lambda: None)  # weak

    def use_last(self) -> None:
        raise NotImplementedError

    def use_average(self) -> None:
        raise NotImplementedError

    def published(self) -> dict[int, torch.Tensor]:
        raise NotImplementedError

    def train(self) -> None:
        """`use_last` by the name that a Trainer and Accelerate call before a training step."""
        self.use_last()

    def eval(self) -> None:
        """`use_average` by the name that a Trainer and Accelerate call before an evaluation."""
        self.use_average()

    def attach(self, model: nn.Module) -> None:
        """Tells the optimizer the model, where it was not given one: the weights then are where they are read.

        Nothing to do without an average, or if it is known. Another one of ours over the same weights lets go of it;
        before an optimizer that is not ours takes over in a loop, call `detach`.
        """
        self._model = weakref.ref(model)
        self._follow()
        if not self.average or self._attached:
            return
        ours = {id(p) for group in self.param_groups for p in group["params"]}
        others = [other for ref in _ATTACHED.get(model, []) if (other := ref()) is not None]
        for other in others:
            if ours & {id(p) for group in other.param_groups for p in group["params"]}:
                other.detach()
        _ATTACHED[model] = [weakref.ref(other) for other in (*others, self) if other is self or other._attached]
        self._handles = []
        self._hook(model)
        weakref.finalize(self, _remove, self._handles)
        self._attached = True

    def _hook(self, model: nn.Module) -> None:
        """Puts hooks on the model in the place of those that are there.

        FSDP2 gathers weights in a hook before the forward pass: ours, which moves them, has to come before it.
        """
        _remove(self._handles)
        first = is_sharded(p for group in self.param_groups for p in group["params"])
        self._handles[:] = [
            model.register_forward_pre_hook(_BeforeForward(self), prepend=first),
            model.register_forward_hook(_AfterForward(self), always_call=True),
            model.register_state_dict_post_hook(_Published(self)),
        ]

    def _follow(self) -> None:
        raise NotImplementedError

    def _reshard(self) -> None:
        """Before the weights move: sharded ones that were gathered go."""

    def detach(self) -> None:
        """Lets go of the model, whose weights stay at the average."""
        self.use_average()
        if self._attached:
            _remove(self._handles)
            self._attached = False

    def publish(self) -> None:
        """After a step, or when training ends, whatever became of it: an attached model is at its average."""
        if self._attached:
            self.use_average()

    @torch.no_grad()
    def show_average(self) -> None:
        """Before a forward pass in evaluation mode: the model has the weights that are published, until it ends.

        It may be in the middle of a training step, whose backward pass needs those of the last step: torch does not
        notice that they were away.
        """
        published = self.published() if self._shown is None else {}
        params = [p for group in self.param_groups for p in group["params"] if id(p) in published]
        self._shown = [(p, own_part(p).data.clone()) for p in params] or None
        if params:
            self._reshard()
        for p in params:
            own_part(p).data.copy_(own_part(published[id(p)]))

    @torch.no_grad()
    def end_show(self) -> None:
        if self._shown:
            self._reshard()
        for p, last in self._shown or ():
            own_part(p).data.copy_(last)
        self._shown = None


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        if handle is not None:
            handle.remove()
