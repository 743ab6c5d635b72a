"""Gradients that are projected as backward makes them, and freed: d numbers are kept and sent instead of n.

Each covered parameter has a hook that projects its gradient. At the end of a backward pass the sum is averaged over
the processes and added to the first d entries of one parameter's `.grad`, the carrier's, which are all that is left of
the gradients: clipping, a logged norm and a GradScaler see the projected gradient, and `zero_grad` forgets it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..subspace import Basis
from ._common import refuse_sparse

# The streamer of each parameter: of two over one model, the later one gets the gradients.
OF = WeakIdKeyDictionary()  # weak references to streamers


class Streamer:
    """Hooks on the covered parameters of a model, from which the projected gradient comes.

    Args:
        model (`nn.Module`): Not wrapped: its `DistributedDataParallel` is made later, and leaves the parameters alone.
        params (`Sequence[torch.Tensor]`): The covered ones, in the order of the basis.
        basis (`Callable`): Returns the basis, on the parameters' device.

    Raises:
        `ValueError`: no parameter can carry d numbers.
    """

    def __init__(self, model: nn.Module, params: Sequence[torch.Tensor], basis: Callable[[], Basis]) -> None:
        self._basis, self._params = basis, list(params)
        #: Whether the sum of a backward pass waits for later ones before it is sent; None: it is sent at once.
        self.waits: Callable[[], bool] | None = None
        self._pending: dict[int, torch.Tensor] = {}  # by the number of the backward pass: (d,), products with U
        self._is_local = False  # whether the carrier holds sums that were not averaged over the processes
        self._same_start = False
        self.index = carrier_of(self._params, basis().dim)
        self.carrier = self._params[self.index]
        if self.carrier.dtype not in (torch.float32, torch.float64):
            self.carrier.grad_dtype = torch.float32
        self._node = torch.autograd.graph.get_gradient_edge(self.carrier).node
        for p in self._params:
            if (known := OF.get(p)) is not None and (other := known()) is not None:
                other.close()
        itself = weakref.ref(self)
        for p in self._params:
            OF[p] = itself
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(Project(itself, index))
            for index, p in enumerate(self._params)
            if p is not self.carrier
        ]
        self._handles += [
            self.carrier.register_hook(_ProjectCarrier(itself)),
            model.register_forward_pre_hook(BeforeForward(itself)),
        ]
        weakref.finalize(self, remove, self._handles)
        _leave_to_us(model, self._params, self.carrier)

    def close(self) -> None:
        """Takes the hooks away: gradients are again left where backward puts them."""
        remove(self._handles)

    # What the hooks do

    @torch.no_grad()
    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Adds a gradient of parameter `index` to the sum of the backward pass that runs."""
        refuse_sparse([gradient])
        number, basis = torch._C._current_graph_task_id(), self._basis()
        if number not in self._pending:
            zeros = torch.zeros(basis.dim, dtype=basis.compute_dtype, device=self.carrier.device)
            self._pending[number] = zeros
            # the one that averages comes after those of others that are queued now, such as DDP's own
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(lambda: self._end(number)))
        first, last = basis.spans[index]
        self._pending[number][first:last] += basis.project_part(index, gradient)

    @torch.no_grad()
    def _end(self, number: int) -> None:
        """Of a backward pass: its sum joins what the carrier has."""
        pending = self._pending.pop(number, None)
        if pending is None:
            return
        g, carrier = self._basis().from_products(pending), self.carrier
        if carrier.grad is None:  # it had no gradient of its own
            carrier.grad = torch.zeros_like(carrier, dtype=carrier.grad_dtype)
            self._is_local = False
        held = carrier.grad.view(-1)[: g.numel()]
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self.waits is not None and self.waits():
            self._is_local = True
        elif several and self._is_local:
            g = _mean(g + held.to(g.dtype))
            held.zero_()
            self._is_local = False
        elif several:
            g = _mean(g)
        held += g.to(held.dtype)

    def before_forward(self) -> None:
        """Sums of a backward pass that did not end (out of memory) are forgotten."""
        self._pending.clear()
        self._basis()  # where the parameters were sharded since, another streamer takes over
        if not self._handles:
            return
        if not self._same_start:
            self.begin_alike()

    def begin_alike(self) -> None:
        """All processes begin with the first one's weights; DDP, told to leave them alone, does not see to it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for p in self._params:
                dist.broadcast(p.detach(), 0)
            self._same_start = True

    @property
    def gradient(self) -> torch.Tensor | None:
        """The projected gradient since it was zeroed, (d,); None: there was none."""
        basis, held = self._basis(), self.carrier.grad
        return None if held is None else held.view(-1)[: basis.dim].to(basis.compute_dtype)


def carrier_of(params: Sequence[torch.Tensor], dim: int) -> int:
    """Which parameter's `.grad` holds the d numbers: the smallest that is large enough, of fp32 where there is one."""
    fitting = [
        (p.dtype not in (torch.float32, torch.float64), p.numel(), index)
        for index, p in enumerate(params)
        if p.numel() >= dim and p.is_contiguous() and p.requires_grad
    ]
    if not fitting:
        raise ValueError(
            f"stream_gradients keeps the projected gradient in the .grad of one parameter of at least d = {dim} "
            f"numbers, and the largest that is covered has {max(p.numel() for p in params)}; leave it out"
        )
    return min(fitting)[2]


def _mean(values: torch.Tensor) -> torch.Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


# Hooks hold their streamer weakly: it may go while the model stays, and a copy of the model is without them.


class Hook:
    def __init__(self, of: Callable[[], Streamer | None] = lambda: None, index: int = 0) -> None:
        self.of, self.index = of, index

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Project(Hook):
    def __call__(self, p: torch.Tensor) -> None:
        if (streamer := self.of()) is not None and p.grad is not None:
            streamer.add(self.index, p.grad)
            p.grad = None


class _ProjectCarrier(Hook):
    """Of the carrier's own gradient, before it is added to what the carrier holds."""

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        streamer = self.of()
        if streamer is None or not _is_accumulated(streamer._node):
            return None
        streamer.add(streamer.index, gradient)
        return torch.zeros_like(gradient, memory_format=torch.contiguous_format)


class BeforeForward(Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._go()
        else:
            self._outside_the_graph()

    @torch.compiler.disable
    def _outside_the_graph(self) -> None:
        self._go()

    def _go(self) -> None:
        if (streamer := self.of()) is not None:
            streamer.before_forward()


def _is_accumulated(node: Any) -> bool:
    """Whether the backward pass that runs adds to `.grad`: `torch.autograd.grad` returns the gradient instead."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer in autograd.grad
        return False


# DistributedDataParallel


def _leave_to_us(model: nn.Module, params: Sequence[torch.Tensor], carrier: torch.Tensor) -> None:
    """Tells DDP to leave the covered parameters alone, under all names of tied ones; it needs one, the carrier."""
    if not dist.is_available():
        return
    ours = {id(p) for p in params} - {id(carrier)}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ours}
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))


def send_nothing(model: Any, carrier: torch.Tensor) -> None:
    """Keeps a DDP that has the carrier alone from sending its gradient, which is zero there."""
    while model is not None and not isinstance(model, DistributedDataParallel):
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if model is None or model.logger is None:
        return
    ignored = model.parameters_to_ignore
    left = [p for name, p in model.module.named_parameters() if p.requires_grad and name not in ignored]
    if len(left) == 1 and left[0] is carrier:
        model.register_comm_hook(None, lambda state, bucket: _done_with(bucket.buffer()))


def _done_with(buffer: torch.Tensor) -> Any:
    done: Any = torch.futures.Future()
    done.set_result(buffer)
    return done
