"""What changes where FSDP2 has cut the parameters: the basis is cut alike, and all processes decide alike."""

from __future__ import annotations

import torch

from ..foundation.ranks import check_same_on_all_ranks, optimizer_facts
from ..subspace import Basis
from ..subspace.sharded import ShardedBasis
from ..subspace.shards import Shards, is_sharded, own_part
from ._sharded_streaming import ShardedStreamer
from ._streaming import Streamer
from ._two_points import TwoPoints, reshard
from ._weights import Weights


class Sharding(TwoPoints):
    """The part of [`SubspaceOptimizer`] that deals with sharded parameters.

    Whatever all processes have to do alike (a sum, a move of the weights) must not depend on what one of them alone
    knows: flags go through `_on_any`, norms and sums through `Shards`.
    """

    basis: Basis
    _weights: Weights
    _streamer: Streamer | None = None  # not copied: the copy of a model is without hooks
    _followed: list[torch.Tensor] | None = None  # the list of parameters that was looked through last

    @property
    def _shards(self) -> Shards | None:
        return self.basis.shards if isinstance(self.basis, ShardedBasis) else None

    def _on_any(self, *flags: bool) -> list[bool]:
        """The flags, each true where it is on any process."""
        return list(flags) if self._shards is None else self._shards.any(*flags)

    def _follow_shards(self) -> None:
        """Accelerate puts sharded parameters in the place of those that an optimizer was made with."""
        params = self.param_groups[0]["params"]
        if params is self._followed:
            return
        if is_sharded(params) and self._shards is None:
            self._shard(params)
        self._followed = params

    def _shard(self, params: list[torch.Tensor]) -> None:
        model = self._model()
        if self.average and model is None:
            raise ValueError(
                "an average over sharded parameters needs the model, whose gathered copies of the weights have to go "
                "when they move: pass the model itself (after fully_shard), or average=0 (sl2o_average=0)"
            )
        cut = ShardedBasis.cut(self.basis, params)
        if cut.shards.is_world:
            check_same_on_all_ranks(optimizer_facts(self), "optimizer")
        self.basis = self._weights.basis = cut
        self._weights.forget()
        self._weights.before_move = self._reshard
        self._state_of(params)
        if self._attached and model is not None:
            self._hook(model)
        if self._streamer is not None and model is not None:
            self._streamer.close()
            self._streamer = ShardedStreamer(model, params, lambda: self.basis)

    def _is_being_sharded(self) -> bool:
        """Whether Accelerate has put stand-ins in the place of the parameters, or sharded ones that are new here."""
        params, shapes = self.param_groups[0]["params"], self.basis.layout.shapes
        if any(tuple(p.shape) != shape for p, shape in zip(params, shapes, strict=True)):
            return True
        return self._shards is None and is_sharded(params)

    def _state_of(self, params: list[torch.Tensor]) -> None:
        """State of parameters that are gone is that of those in their place."""
        known = {id(p) for group in self.param_groups for p in group["params"]}
        gone = [self.state.pop(p) for p in list(self.state) if id(p) not in known]
        entries = [entry for entry in gone if "step" in entry]
        for p, entry in zip(params, entries, strict=False):
            self.state[p].update(entry)

    def _reshard(self) -> None:
        if self._shards is not None and (model := self._model()) is not None:
            reshard(model)

    def _norm_of_gradients(self, gradients: list[torch.Tensor | None]) -> torch.Tensor:
        """Norm over all processes, 0-d, fp32."""
        zero = torch.zeros((), device=self.basis.device)
        norms = [zero if g is None else torch.linalg.vector_norm(own_part(g)).float() for g in gradients]
        if self._shards is None:
            return torch.linalg.vector_norm(torch.stack(norms))
        return self._shards.sum_of_each([norm.square() for norm in norms]).sqrt()
