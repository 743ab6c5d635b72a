"""Streamed gradients of parameters that FSDP2 has cut: each part is projected and freed when it has been reduced.

FSDP2 adds a new gradient to what a parameter's `.grad` holds. So the carrier's is put aside when a backward pass
begins, and is back when it ends, with the sum of that pass. Its first d entries hold g / sqrt(parts) on each process:
the norm over all parts is that of g, and whatever scales all gradients scales it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves

from ..subspace import Basis
from ..subspace.shards import own_part
from ._common import refuse_sparse
from ._streaming import OF, BeforeForward, Hook, Project, Streamer, remove
from ._weights import like_whole


class ShardedStreamer(Streamer):
    """A [`Streamer`] over sharded parameters; its arguments are those.

    Raises:
        `ValueError`: no parameter can carry d numbers on each process.
    """

    def __init__(self, model: nn.Module, params: Sequence[torch.Tensor], basis: Callable[[], Basis]) -> None:
        self._basis, self._params = basis, list(params)
        self.waits = None
        self.index, parts = _carrier_of(self._params, basis().dim)
        self.carrier, self._scale = self._params[self.index], parts**-0.5
        self._sum: torch.Tensor | None = None  # (d,) products of the backward pass that runs
        self._aside: torch.Tensor | None = None  # what the carrier held before it
        self._running = -1  # the number of that pass
        itself = weakref.ref(self)
        for p in self._params:
            if (known := OF.get(p)) is not None and (other := known()) is not None:
                other.close()
            OF[p] = itself
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(Project(itself, index)) for index, p in enumerate(self._params)
        ]
        self._handles += [
            model.register_forward_pre_hook(BeforeForward(itself)),
            model.register_forward_hook(_AfterForward(itself)),
        ]
        weakref.finalize(self, remove, self._handles)

    def before_forward(self) -> None:
        """Sums of a backward pass that did not end (out of memory) are forgotten, with those that it added to."""
        if self._running >= 0 and torch._C._current_graph_task_id() == -1:
            self._sum, self._aside, self._running = None, None, -1

    @torch.no_grad()
    def begin(self) -> None:
        """Of a backward pass through what the model returned: puts aside what the carrier holds."""
        number = torch._C._current_graph_task_id()
        if self._running >= 0 or number == -1:
            return
        self._running, self._aside, self.carrier.grad = number, self.carrier.grad, None
        engine = torch.autograd.Variable._execution_engine
        # after FSDP2's own, which waits for the last gradients
        engine.queue_callback(lambda: engine.queue_callback(lambda: self._end(number)))

    @torch.no_grad()
    def add(self, index: int, gradient: torch.Tensor) -> None:
        refuse_sparse([gradient])
        if self._running < 0:
            raise RuntimeError(
                "a backward pass with stream_gradients began at none of the tensors that the sharded model returned; "
                "return the loss, or what it is made of, from the model's forward, or leave stream_gradients out"
            )
        basis = self._basis()
        if self._sum is None:
            self._sum = torch.zeros(basis.dim, dtype=basis.compute_dtype, device=own_part(self.carrier).device)
        first, last = basis.spans[index]
        self._sum[first:last] += basis.project_part(index, gradient)

    @torch.no_grad()
    def _end(self, number: int) -> None:
        if number != self._running:
            return
        basis, carrier, aside = self._basis(), self.carrier, self._aside
        products, self._sum, self._aside, self._running = self._sum, None, None, -1
        if products is None:  # of an accumulated batch whose gradients FSDP2 keeps until its last part
            carrier.grad = aside
            return
        g = basis.from_products(products)  # the sum over all processes
        if aside is None:
            part = torch.zeros_like(own_part(carrier))
            aside = like_whole(part, carrier)
        held = own_part(aside).view(-1)[: g.numel()]
        held += (self._scale * g).to(held.dtype)
        carrier.grad = aside

    @property
    def gradient(self) -> torch.Tensor | None:
        basis, held = self._basis(), self.carrier.grad
        return None if held is None else own_part(held).reshape(-1)[: basis.dim].to(basis.compute_dtype) / self._scale


def _carrier_of(params: Sequence[torch.Tensor], dim: int) -> tuple[int, int]:
    """The smallest parameter of fp32 whose part is large enough on each process, and its number of parts.

    It follows from shapes alone, so that all processes take the same.
    """
    fitting, most = [], 0
    for index, p in enumerate(params):
        if not isinstance(p, DTensor) or p.dtype not in (torch.float32, torch.float64):
            continue
        for number, kind in enumerate(p.placements):
            if isinstance(kind, Shard):
                parts, along = p.device_mesh.size(number), p.shape[kind.dim]
                smallest = max(0, along - (parts - 1) * -(-along // parts)) * (p.numel() // max(along, 1))
                most = max(most, smallest)
                if smallest >= dim and p.requires_grad:
                    fitting.append((p.numel(), index, parts))
    if not fitting:
        raise ValueError(
            f"stream_gradients keeps the projected gradient in the .grad of one sharded fp32 parameter with d = {dim} "
            f"numbers on each process, and the most that one has is {most}; leave it out (FSDP2 keeps a process' "
            "part of the gradients alone), or keep the parameters in fp32 and compute in bf16 (mixed precision)"
        )
    _, index, parts = min(fitting)
    return index, parts


class _AfterForward(Hook):
    """Asks the tensors that a model returns to say when a backward pass begins."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            of = self.of
            for leaf in tree_leaves(output):
                if torch.is_tensor(leaf) and leaf.requires_grad:
                    leaf.register_hook(lambda gradient, of=of: _begin(of))


def _begin(of: Callable[[], Any]) -> None:
    if (streamer := of()) is not None:
        streamer.begin()
