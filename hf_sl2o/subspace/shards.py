"""Parameters that FSDP2 has cut: which part of each is here, and sums over the processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .basis import SAMPLED


def is_sharded(params: Iterable[torch.Tensor]) -> bool:
    """Whether any of the parameters is a `DTensor`."""
    return any(isinstance(p, DTensor) for p in params)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has; changes in place reach the whole. A plain tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole_parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns `model.named_parameters()`, of sharded ones whole copies on the host: all processes have to ask."""
    return [
        (name, p.full_tensor().detach().cpu().requires_grad_(p.requires_grad) if isinstance(p, DTensor) else p)
        for name, p in model.named_parameters()
    ]


class Shards:
    """Which part of each parameter is here, and sums over the parts.

    Parameters that are no `DTensor` are taken to be whole on each process, and count once.

    Args:
        names (`Sequence[str]`): Of the parameters, for messages.
        params (`Sequence[torch.Tensor]`): At least one of them a `DTensor`.

    Raises:
        `NotImplementedError`: a parameter is cut in a way that FSDP2 alone does not do, such as by tensor parallelism.
    """

    def __init__(self, names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
        meshes = {p.device_mesh: name for name, p in zip(names, params, strict=True) if isinstance(p, DTensor)}
        (mesh, first), *others = meshes.items()
        if others:
            raise NotImplementedError(
                f"{first!r} and {others[0][1]!r} are sharded over different meshes, but d numbers are summed over "
                "one; shard all trainable parameters by one fully_shard mesh, or train with DDP"
            )
        self._device_type, self._group = mesh.device_type, None
        if mesh.size() < dist.get_world_size():
            if mesh.ndim > 1:
                raise NotImplementedError(
                    f"the parameters are sharded over {mesh.size()} of {dist.get_world_size()} processes by a mesh of "
                    f"{mesh.ndim} dimensions; use a mesh of all processes, or of one dimension"
                )
            self._group = mesh.get_group()
        #: Of each parameter the slices of the whole that are here, and what its sums over all processes count.
        self.slices: list[tuple[slice, ...]] = []
        self.shares: list[float] = []
        for name, p in zip(names, params, strict=True):
            slices, parts = _slices(name, p)
            self.slices.append(slices)
            self.shares.append(parts / mesh.size())
        self.is_world = mesh.size() == dist.get_world_size()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all processes, the same bits on each."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def any(self, *flags: bool) -> list[bool]:
        """Returns which of the flags are true on any process: what all decide alike."""
        return [bool(flag) for flag in self._reduced(torch.tensor(flags, dtype=torch.int32), dist.ReduceOp.MAX)]

    def all(self, flag: torch.Tensor) -> torch.Tensor:
        """Returns whether a 0-d bool is true on all processes, on its device."""
        return self._reduced(flag.int(), dist.ReduceOp.MIN).bool()

    def _reduced(self, tensor: torch.Tensor, how: Any) -> torch.Tensor:
        device = torch.device(self._device_type)
        here = tensor.detach().to(device, copy=True).contiguous()  # weights may be kept on the host, NCCL is not there
        dist.all_reduce(here, op=how, group=self._group)
        return here.to(tensor.device)

    def sum_of_each(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns what 0-d values of each parameter's part add up to over parameters and processes, 0-d."""
        return self.sum(torch.stack([share * value for share, value in zip(self.shares, values, strict=True)]).sum())

    def start_sample(self, params: Sequence[torch.Tensor]) -> torch.Tensor:
        """[`~hf_sl2o.subspace.basis.start_sample`] of the whole parameters."""
        sample = torch.zeros(len(params), SAMPLED)
        for row, p, slices, share in zip(sample, params, self.slices, self.shares, strict=True):
            whole, part = p.shape, own_part(p.detach()).reshape(-1)
            places, numbers = [], []
            for number in range(min(SAMPLED, whole.numel())):
                place = _place(number, whole, slices)
                if place is not None:
                    places.append(place)
                    numbers.append(number)
            if places:
                row[numbers] = share * part[places].float().cpu()
        return self.sum(sample)


def _slices(name: str, p: torch.Tensor) -> tuple[tuple[slice, ...], int]:
    """The slices of a parameter that are here, and into how many parts it is cut."""
    if not isinstance(p, DTensor):
        return tuple(slice(0, size) for size in p.shape), 1
    cuts = [dimension for dimension, kind in enumerate(p.placements) if type(kind) is Shard]
    if len(cuts) > 1 or any(type(kind) not in (Shard, Replicate) for kind in p.placements):
        raise NotImplementedError(
            f"parameter {name!r} is placed as {p.placements}, and a basis follows the cuts of FSDP2 alone; train "
            "without tensor parallelism, or with DDP"
        )
    shape, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    slices = tuple(slice(first, first + size) for first, size in zip(offsets, shape, strict=True))
    if own_part(p).numel() != torch.Size(shape).numel():
        raise NotImplementedError(
            f"parameter {name!r} has {own_part(p).numel()} numbers here, expected {tuple(shape)} of "
            f"{tuple(p.shape)} from its placement {p.placements}; train with DDP"
        )
    return slices, p.device_mesh.size(cuts[0]) if cuts else 1


def _place(number: int, shape: torch.Size, slices: Sequence[slice]) -> int | None:
    """Where entry `number` of the flat whole is in the flat part that is here; None: it is not."""
    place, step = 0, 1
    for size, cut in zip(reversed(shape), reversed(slices), strict=True):
        number, along = divmod(number, size)
        if not cut.start <= along < cut.stop:
            return None
        place, step = place + step * (along - cut.start), step * (cut.stop - cut.start)
    return place
