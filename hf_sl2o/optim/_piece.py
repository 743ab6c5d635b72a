"""Parameters that a rule steps together, as one vector, and the two points of a run with a running average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from ..rules.rule import Rule, RuleState
from ._common import real, trains
from ._two_points import REPLACES


class Piece:
    """The concatenation of what is kept of some parameters; each one's own state is made a view of it.

    N is the number of their scalars (a complex one counts twice). The average is at least fp32, whatever the weights.

    Args:
        params: The parameters, each with a state.
        states: What an optimizer keeps of each; changed in place.
        sizes_of: Maps a parameter to the sizes of the tensors in it: mostly its own.
        with_average (`bool`): Whether there is a running average.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        states: Mapping[torch.Tensor, dict[str, Any]],
        sizes_of: Callable[[torch.Tensor], Sequence[int]],
        *,
        with_average: bool,
    ) -> None:
        self.params = list(params)
        self.tensor_sizes = [size for p in self.params for size in sizes_of(p) if size]
        of = [states[p] for p in self.params]
        self.sizes = [real(p).numel() for p in self.params]
        self.dtype = reduce(torch.promote_types, (real(p).dtype for p in self.params), torch.float32)
        steps = torch.stack([state["step"] for state in of])
        # Parameters that missed gradients are at another step, so their bias correction differs. Read once, here.
        uniform = bool((steps == steps[0]).all())
        counts = torch.tensor(self.sizes, device=steps.device)
        per_coordinate = RuleState._fields[1:-1]
        self.state = RuleState(
            step=steps[0].clone() if uniform else steps.repeat_interleave(counts),
            # A rule that keeps nothing of whole tensors has no entry for it
            tensors=torch.cat([state.get("tensors", steps.new_zeros(1, 0)) for state in of]),
            **{name: torch.cat([state[name] for state in of]) for name in per_coordinate},
        )
        #: (N,) the published point, and the last step as it was written to the weights (None: not known).
        self.average: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self.just_averaged = False
        if with_average:
            self.average = torch.cat([state["average"].reshape(-1).to(self.dtype) for state in of])
            if all("last" in state for state in of):
                self.last = torch.cat([state["last"].reshape(-1).to(self.dtype) for state in of])
        offset = row = 0
        for p, state, size in zip(self.params, of, self.sizes, strict=True):
            part = slice(offset, offset + size)
            step = self.state.step if uniform else (self.state.step[offset] if size else state["step"])
            state["step"] = step
            state.update({name: getattr(self.state, name)[part] for name in per_coordinate})
            if "tensors" in state:
                rows = len(state["tensors"])
                state["tensors"] = self.state.tensors[row : row + rows]
                row += rows
            for name, flat in (("average", self.average), ("last", self.last)):
                if flat is not None and name in state:
                    state[name] = flat[part].view(real(p).shape)
            offset += size

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Splits (N,) into a tensor of each parameter's shape."""
        parts = flat.split(self.sizes)
        return [part.view(real(p).shape) for p, part in zip(self.params, parts, strict=True)]

    def gradient(self, maximize: bool) -> torch.Tensor:
        """The gradient, (N,), in the dtype of the rule (fp32), whatever the model's: from here on all is in it."""
        dtype = self.state.exp_avg_sq.dtype
        g = torch.cat([real(p.grad).reshape(-1).to(dtype) for p in self.params if p.grad is not None])
        return -g if maximize else g

    def weights(self) -> torch.Tensor:
        """The weights as they are, (N,)."""
        return torch.cat([real(p.detach()).reshape(-1).to(self.dtype) for p in self.params])

    def write(self, flat: torch.Tensor) -> None:
        """Writes (N,) to the weights; those that were frozen since stay."""
        pairs = [(real(p.detach()), v) for p, v in zip(self.params, self.views(flat), strict=True) if trains(p)]
        if pairs:
            torch._foreach_copy_([weights for weights, _ in pairs], [view for _, view in pairs])

    def _as_written(self, flat: torch.Tensor) -> torch.Tensor:
        """(N,) as the weights hold it: rounded where they are below fp32."""
        if all(real(p).dtype == self.dtype for p in self.params):
            return flat
        views = zip(self.params, self.views(flat), strict=True)
        return torch.cat([view.to(real(p).dtype).to(self.dtype).reshape(-1) for p, view in views])

    def carried(self) -> torch.Tensor:
        """The average while the weights are at the last step, (N,): what was changed in them is changed in it, too."""
        assert self.average is not None
        if self.last is None:
            return self.average
        average = self.average.clone()
        _carry(self.weights(), self.last, self.last.clone(), average)
        return average

    def take_changes(self) -> None:
        """Before a step: what was changed in the weights since they were written is taken over into the average."""
        assert self.average is not None
        now = self.weights()
        if self.last is not None:
            _carry(now, self.last, self.last, self.average)
        self._keep(now)
        self.just_averaged = False

    def _keep(self, now: torch.Tensor) -> None:
        """Takes the weights as they are for the last step's; on a device in place, as a captured graph needs it."""
        if self.last is None or _is_host(now):
            self.last = now
        else:
            self.last.copy_(now)

    def average_(self, weight: torch.Tensor) -> None:
        """After a step: moves the average by `weight`, () or (N,); not at all if no weight has moved."""
        assert self.average is not None and self.last is not None
        now = self.weights()
        moved = now.new_tensor(float(not torch.equal(now, self.last))) if _is_host(now) else (now != self.last).any()
        self.average.lerp_(now, (weight * moved).to(self.dtype))  # a step at lr 0 moves none
        self._keep(now)
        self.just_averaged = True

    def to_average(self, states: Mapping[torch.Tensor, dict[str, Any]], *, in_step: bool = False) -> None:
        """Puts the average in the place of the weights; `in_step`: nobody else has changed any since `average_`."""
        if not (in_step and self.just_averaged):
            self.take_changes()
        assert self.average is not None and self.last is not None
        for p, last in zip(self.params, self.views(self.last), strict=True):
            states[p]["last"] = last
        self.write(self.average)

    def begin_anew(self) -> None:
        """Both points are at the weights as they are."""
        now = self.weights()
        if self.average is not None:
            self.average.copy_(now)
        if self.last is not None:
            self.last.copy_(now)

    def to_last(self, states: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        """What was changed in the weights while they were at the average is taken over into both points."""
        assert self.average is not None
        now = self.weights()
        self.last = now.clone() if self.last is None else self.last
        _carry(now, self._as_written(self.average), self.average, self.last)
        for p, last, view in zip(self.params, self.views(self.last), self.views(now), strict=True):
            if not trains(p):  # frozen since, at the average
                last.copy_(view)
            states[p].pop("last", None)
        self.write(self.last)
        self.just_averaged = False


def of_all_tensors(
    rule: Rule, pieces: Sequence[Piece], gradients: Sequence[torch.Tensor], groups: Sequence[dict[str, Any]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a rule finds for the tensors of each piece, which it compares with one another.

    Returns:
        Of each piece what [`~hf_sl2o.rules.Rule.tensor_step`] returns for its k tensors: (k, o) and (k, s).
    """
    many = list(zip(pieces, gradients, groups, strict=True))
    facts = [rule.tensor_inputs(g, piece.state, piece.tensor_sizes, betas=group["betas"]) for piece, g, group in many]
    kept = [piece.state.tensors for piece in pieces]
    rates = [group["lr"] for group in groups]
    if len(pieces) > 1:
        rates = [torch.cat([_filled(rate, of[:, 0]) for rate, of in zip(rates, facts, strict=True)])]  # (k,)
    found, following = rule.tensor_step(torch.cat(facts), torch.cat(kept), rates[0])
    of_piece = found.split([len(of) for of in facts])
    return list(zip(of_piece, following.split([len(of) for of in kept]), strict=True))


def _filled(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.to(like).expand_as(like) if torch.is_tensor(value) else torch.full_like(like, value)


def _is_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _carry(now: torch.Tensor, written: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> None:
    """Takes a change of the weights over into both points, all (N,): they move alike, so that training goes on.

    A weight that was set to 0 (pruned) is 0 in both. Where the change is a twentieth of the weights, and further than
    from one point to the other, the weights were replaced, and both points are there. On a CPU one pass tells that
    nothing has changed, as mostly; elsewhere nothing is read back.

    Args:
        now, written: The weights as they are, and as they were written.
        here, there: The point that they were at, and the other one; changed in place.
    """
    if _is_host(now) and torch.equal(now, written):
        return
    changed, pruned = now != written, (now == 0) & (written != 0)
    change = (now - written).masked_fill_(pruned, 0)
    norm = torch.linalg.vector_norm
    replaced = norm(change) > torch.maximum(norm(there - here), REPLACES * norm(written))  # ()
    carried = torch.where(pruned, now, there + change)
    there.copy_(torch.where(replaced, now, torch.where(changed, carried, there)))
    here.copy_(torch.where(changed, now, here))
