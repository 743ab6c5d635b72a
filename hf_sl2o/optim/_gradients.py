"""The projected gradient of a step, and how much of the whole one it is."""

from __future__ import annotations

import torch

from ..subspace.shards import own_part
from ._common import refuse_sparse, trains
from ._kept import KeepsCoefficients


class ProjectsGradients(KeepsCoefficients):
    """The part of [`SubspaceOptimizer`] that comes before its step."""

    @property
    def _has_gradient(self) -> bool:
        if self._streamer is not None:
            return self._streamer.gradient is not None
        return any(p.grad is not None and trains(p) for p in self.param_groups[0]["params"])

    @torch.no_grad()
    def projected_gradient(self) -> torch.Tensor:
        """Returns g = project(gradients), of shape `(d,)`, unclipped; a parameter without gradient counts as zero."""
        if self._streamer is not None:
            g = self._streamer.gradient
            return torch.zeros_like(self._c, requires_grad=False) if g is None else g.clone()
        gradients = [p.grad if trains(p) else None for p in self.param_groups[0]["params"]]
        refuse_sparse(gradients)
        self._follow()
        return self.basis.project(gradients)

    @torch.no_grad()
    def gradient_share(self) -> torch.Tensor:
        """Returns |U U^T grad|^2 / |grad|^2 over the covered parameters, 0-d: how much of it the subspace holds.

        Raises:
            `NotImplementedError`: gradients are streamed, and the whole one is gone.
        """
        if self._streamer is not None:
            raise NotImplementedError(
                "with stream_gradients only the projected gradient is kept; leave it out for this"
            )
        inside = torch.linalg.vector_norm(self.projected_gradient() / self.basis.units)
        norms = [torch.linalg.vector_norm(p.grad) for p in self.param_groups[0]["params"] if p.grad is not None]
        whole = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
        return (inside / whole.clamp_min(1e-37)) ** 2

    @torch.no_grad()
    def clip_projected(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients of the covered parameters in place, so that the norm of the projected one is at most
        `max_norm`; 0: only measures. A `max_grad_norm` of the optimizer does this in `step`, without touching them.

        Returns:
            The norm of the projected gradient before clipping, 0-d.
        """
        norm = torch.linalg.vector_norm(self.projected_gradient())
        if max_norm > 0:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    own_part(p.grad).mul_(clipped(norm, max_norm))
        return norm


def clipped(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What a gradient of this norm is multiplied by, 0-d."""
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)
