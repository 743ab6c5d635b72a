"""The weights that follow the coefficients of a basis, and the two points of a run with a running average.

theta = theta_0 + lift(c). Moves are relative to the weights as they are, so that what a user changes in them stays.
Weights below the precision of the sums keep what was rounded off (a tensor of their size and dtype), so that small
moves add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..subspace import Basis
from ..subspace.compiled import SUMS, column_sums
from ..subspace.sharded import ShardedBasis
from ..subspace.shards import Shards, own_part
from ._common import trains


@dataclass
class _Follower:
    """One parameter: what is kept of it beside its weights."""

    #: What was rounded off, of its shape and dtype; None in the precision of the sums.
    rounded_off: torch.Tensor | None = None
    #: While the weights are published: the way to the last step. While they are at the last step: the published ones.
    other: torch.Tensor | None = None
    #: Of weights that are rounded: the other point and what was rounded off there; they are exchanged.
    exchange: tuple[torch.Tensor, torch.Tensor] | None = None


_Each = tuple[int, torch.Tensor, torch.Tensor, _Follower]


class Weights:
    """Moves parameters along a basis, between the last step and the published point.

    Of sharded parameters each process moves its own parts. What they decide together goes through all of them:
    `change`, `norm`, `changed` and `as_written` are called by all processes, or by none.

    Args:
        basis ([`Basis`]): On the parameters' device.
        params (`Callable`): Returns the parameters, in the order of the basis; they are read at each call.
        two_points (`bool`): Whether there is an average, so that it matters how far somebody else changes the weights.
    """

    def __init__(self, basis: Basis, params: Callable[[], Sequence[torch.Tensor]], *, two_points: bool) -> None:
        self.basis, self.params, self.two_points = basis, params, two_points
        self.followers: list[_Follower] | None = None
        self._seen: list[tuple[int, int, torch.device]] | None = None  # what the weights were when written
        self._sums: torch.Tensor | None = None
        #: Called before weights are moved that others may hold copies of.
        self.before_move: Callable[[], None] = lambda: None

    @property
    def _shards(self) -> Shards | None:
        return self.basis.shards if isinstance(self.basis, ShardedBasis) else None

    def _parts(self) -> Sequence[torch.Tensor]:
        """The parameters, or the parts of them that are here."""
        params = self.params()
        return params if self._shards is None else [own_part(p) for p in params]

    def to(self, device: torch.device) -> None:
        """Moves what is kept to where the weights are."""
        for follower in self.followers or ():
            for name in ("rounded_off", "other"):
                if (value := getattr(follower, name)) is not None:
                    setattr(follower, name, value.to(device))
            if follower.exchange is not None:
                follower.exchange = (follower.exchange[0].to(device), follower.exchange[1].to(device))

    def forget(self) -> None:
        """Takes the weights as they are: nothing is rounded off, and there is no other point."""
        self.followers = self._seen = self._sums = None

    def begin_anew(self) -> None:
        """Takes the weights as they are for both points; what was rounded off stays where they are the same."""
        self._drop_other()
        self._seen = self._sums = None

    def _each(self) -> list[_Each]:
        """(index, parameter or part, its flat weights, what is kept) of those that are trained."""
        params, parts = self.params(), self._parts()
        if self.followers is None:
            self.followers = [_Follower() for _ in params]
        each = []
        for index, (whole, p, follower) in enumerate(zip(params, parts, self.followers, strict=True)):
            if trains(whole) and p.numel():
                flat = p.detach().reshape(-1)  # a copy where the memory is not contiguous
                if self._is_rounded(p) and follower.rounded_off is None:
                    follower.rounded_off = torch.zeros_like(flat)
                each.append((index, p, flat, follower))
        return each

    def _is_rounded(self, p: torch.Tensor) -> bool:
        return p.dtype != self._wide(p)

    def _wide(self, p: torch.Tensor) -> torch.dtype:
        """Precision of the sums."""
        return torch.promote_types(p.dtype, self.basis.compute_dtype)

    # Moves

    def move(self, delta: torch.Tensor) -> None:
        """theta = theta + lift(delta), delta of shape (d,)."""
        self.before_move()
        params = self.params()
        if all(trains(p) and not self._is_rounded(p) for p in params):
            self.basis.add_(params, delta)  # in place, no temporary
            self._drop_other()
            self._remember()
            return
        for index, p, flat, follower in self._each():
            for start, stop, lifted in self.basis.lift_rows(index, delta[None], self._wide(p)):
                part = slice(start, stop)
                _put(self._exactly(flat, follower, part) + lifted[0], flat, follower.rounded_off, part)
            _write_back(p, flat)
        self._drop_other()
        self._remember()

    def _drop_other(self) -> None:
        for follower in self.followers or ():
            follower.other = follower.exchange = None

    @staticmethod
    def _exactly(flat: torch.Tensor, follower: _Follower, part: slice) -> torch.Tensor:
        """Weights plus what was rounded off, unless they are others than those it was rounded off from."""
        weights, rest = flat[part], follower.rounded_off
        if rest is None:
            return weights
        wide = weights.float() if weights.dtype != torch.float32 else weights.double()
        exact = wide + rest[part].to(wide.dtype)
        return torch.where(exact.to(weights.dtype) == weights, exact, wide)

    def publish(self, delta: torch.Tensor, ahead: torch.Tensor, moved: torch.Tensor) -> None:
        """From the last step's weights by `delta` to the new ones, and from there back by `ahead` to the published.

        Args:
            delta, ahead (`torch.Tensor` of shape `(d,)`): How far c has moved; how far it is ahead of the average.
            moved (0-d bool `torch.Tensor`): Where false, the weights go back to the published point that they were at.
        """
        self.before_move()
        rows = torch.stack([delta, ahead])
        each = self._each()
        if all(follower.rounded_off is None for *_, follower in each) and self._publish_at_once(each, rows, moved):
            return
        for index, p, flat, follower in each:
            if follower.rounded_off is not None:
                self._publish_rounded(index, p, flat, follower, rows, moved)
                continue
            before, way = follower.other, torch.empty_like(flat)
            for start, stop, lifted in self.basis.lift_rows(index, rows, self._wide(p)):
                part = slice(start, stop)
                published = lifted[0].add_(flat[part]).sub_(lifted[1])  # lifted is a temporary
                if before is None:
                    flat[part] = published
                else:
                    torch.where(moved, published, before[part], out=flat[part])
                way[part] = lifted[1]
            follower.other = way
            _write_back(p, flat)
        self._remember()

    def _publish_at_once(self, each: list[_Each], rows: torch.Tensor, moved: torch.Tensor) -> bool:
        """`publish` for weights that are not rounded, by the basis' compiled loop where it has one."""
        if not self.basis.has_loops:
            return False
        weights = {index: flat for index, _, flat, _ in each}
        before = {index: follower.other for index, *_, follower in each}
        ways = {  # read, then written
            index: torch.empty_like(weights[index]) if way is None else way for index, way in before.items()
        }
        if not self.basis.publish_(self._listed(weights), self._listed(before), self._listed(ways), rows, moved):
            return False
        for index, p, flat, follower in each:
            follower.other = ways[index]
            _write_back(p, flat)
        self._remember()
        return True

    def _listed(self, tensors: dict[int, Any]) -> list[Any]:
        return [tensors.get(index) for index in range(len(self.basis.layout.names))]

    def _ways(self, each: list[_Each], rows: torch.Tensor) -> dict[int, torch.Tensor]:
        """lift(rows[1]) of those that are not rounded, flat, by the sums of `publish`: resuming changes no bit."""
        plain = [(index, p, flat) for index, p, flat, follower in each if follower.rounded_off is None]
        ways = {index: torch.empty_like(flat) for index, _, flat in plain}
        if plain and len(plain) == len(each) and self.basis.has_loops:
            copies, moved = {index: flat.clone() for index, _, flat in plain}, torch.ones_like(rows[0, 0]).bool()
            if self.basis.publish_(self._listed(copies), self._listed({}), self._listed(ways), rows, moved):
                return ways
        for index, p, _ in plain:
            for start, stop, lifted in self.basis.lift_rows(index, rows, self._wide(p)):
                ways[index][start:stop] = lifted[1]
        return ways

    def _publish_rounded(
        self,
        index: int,
        p: torch.Tensor,
        flat: torch.Tensor,
        follower: _Follower,
        rows: torch.Tensor,
        moved: torch.Tensor,
    ) -> None:
        rest, before = follower.rounded_off, follower.exchange
        assert rest is not None
        last, last_rest = torch.empty_like(flat), torch.empty_like(flat)
        for start, stop, lifted in self.basis.lift_rows(index, rows, self._wide(p)):
            part = slice(start, stop)
            exact = self._exactly(flat, follower, part) + lifted[0]
            _put(exact, last, last_rest, part)
            _put(exact - lifted[1], flat, rest, part)
            if before is not None:
                flat[part] = torch.where(moved, flat[part], before[0][part])
                rest[part] = torch.where(moved, rest[part], before[1][part])
        follower.exchange = (last, last_rest)
        _write_back(p, flat)

    def to_published(self, ahead: torch.Tensor) -> None:
        """From the last step's weights to the published ones, `ahead` of shape (d,) behind them, without a step."""
        self.before_move()
        rows, each = torch.stack([torch.zeros_like(ahead), ahead]), self._each()
        ways = self._ways(each, rows)
        for index, p, flat, follower in each:
            if follower.rounded_off is not None and follower.exchange is not None:
                _exchange(flat, follower)
            elif follower.rounded_off is not None:
                follower.exchange = (flat.clone(), follower.rounded_off.clone())
                for start, stop, lifted in self.basis.lift_rows(index, rows, self._wide(p)):
                    part = slice(start, stop)
                    _put(self._exactly(flat, follower, part) - lifted[1], flat, follower.rounded_off, part)
            else:
                flat.copy_(flat - ways[index] if follower.other is None else follower.other)
                follower.other = ways[index]
            _write_back(p, flat)
        self._remember()

    def to_last(self, ahead: torch.Tensor) -> None:
        """From the published weights to those of the last step, `ahead` of shape (d,) ahead of them."""
        self.before_move()
        rows, each = torch.stack([torch.zeros_like(ahead), ahead]), self._each()
        resumed = any(follower.rounded_off is None and follower.other is None for *_, follower in each)
        ways = self._ways(each, rows) if resumed else {}
        for index, p, flat, follower in each:
            if follower.rounded_off is not None and follower.exchange is not None:
                _exchange(flat, follower)
            elif follower.rounded_off is not None:
                published, kept = flat.clone(), follower.rounded_off.clone()
                for start, stop, lifted in self.basis.lift_rows(index, rows, self._wide(p)):
                    part = slice(start, stop)
                    _put(self._exactly(flat, follower, part) + lifted[1], flat, follower.rounded_off, part)
                follower.exchange = (published, kept)
            else:
                last = (ways[index] if follower.other is None else follower.other).add_(flat)
                follower.other = flat.clone()
                flat.copy_(last)
            _write_back(p, flat)
        self._remember()

    def published(self, ahead: torch.Tensor) -> dict[int, torch.Tensor]:
        """Copies of the published weights by `id` of their parameter, while these are at the last step.

        Of sharded ones a process forms its own parts; where it finds them changed, anew.
        """
        found, params = {}, self.params()
        known = self._shards is None or not self._changed_here()
        for index, p, flat, follower in self._each():
            if follower.exchange is not None and known:
                weights = follower.exchange[0].clone()
            elif follower.other is not None and known:
                weights = follower.other.clone()
            else:
                weights = torch.empty_like(flat)
                for start, stop, lifted in self.basis.lift_rows(index, ahead[None], self._wide(p)):
                    weights[start:stop] = self._exactly(flat, follower, slice(start, stop)) - lifted[0]
            found[id(params[index])] = like_whole(weights.view(p.shape), params[index])
        return found

    # Whether somebody else has changed them

    def _remember(self) -> None:
        self._seen = self._versions()
        self._sums = self._measure(self._parts()) if self.two_points else None

    def _versions(self) -> list[tuple[int, int, torch.device]]:
        return [(p.data_ptr(), p._version, p.device) for p in self._parts()]

    @staticmethod
    def _measure(params: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums that an exchange or a change of sign of some weights changes, too: (k, 61) of k parameters."""
        flat = [p.detach().reshape(-1) for p in params]
        sums = column_sums(flat)
        if sums is None:
            each = [_column_sums(one) for one in flat]
            sums = torch.stack([one.to(each[0]) for one in each])
        return sums

    def change(self) -> torch.Tensor | None:
        """About how far the weights are from where they were written, 0-d; None: not known."""
        return None if self._sums is None else self._norm_of(self._measure(self._parts()) - self._sums)

    def norm(self) -> torch.Tensor:
        """Norm of all weights as they are, 0-d."""
        parts = self._parts()
        norms = [torch.linalg.vector_norm(part.detach(), dtype=self._wide(part)) for part in parts]
        return self._norm_of(torch.stack([one.to(norms[0]) for one in norms]))

    def _norm_of(self, of_each: torch.Tensor) -> torch.Tensor:
        """Norm of numbers of each parameter (first dimension), over all processes."""
        if self._shards is None:
            return torch.linalg.vector_norm(of_each)
        return self._shards.sum_of_each([of_one.square().sum() for of_one in of_each]).sqrt()

    def changed(self) -> bool:
        """Whether the weights were replaced or changed in place since they were written, as far as the host
        knows: a change through `.data` shows in `as_written` alone."""
        here = self._changed_here()
        return here if self._shards is None else self._shards.any(here)[0]

    def _changed_here(self) -> bool:
        if self._seen is None:
            return False
        now = self._versions()
        if [device for *_, device in now] != [device for *_, device in self._seen]:
            self._seen, self._sums = now, None  # the model was moved, with all that is in it
        return now != self._seen

    def as_written(self) -> torch.Tensor | None:
        """0-d bool, on the device: whether published weights are those that were written; None: not known."""
        if self._sums is None:
            return None
        same = (self._measure(self._parts()) == self._sums).all()
        return same if self._shards is None else self._shards.all(same)

    def seen_again(self) -> None:
        """Takes the weights as they are for those that were written."""
        self._remember()

    def forget_published(self, *, at_last: bool) -> None:
        """Where the weights at the last step were changed: the published ones are to be formed anew."""
        if at_last:
            self._drop_other()

    def stay(self, same: torch.Tensor) -> None:
        """Where a 0-d `same` is false, the last step is at the published weights as they are now."""
        for _, _, flat, follower in self._each():
            if follower.exchange is not None and follower.rounded_off is not None:
                last, rest = follower.exchange
                last.copy_(torch.where(same, last, flat))
                rest.mul_(same)
            elif follower.other is not None:
                follower.other.mul_(same)


def _column_sums(flat: torch.Tensor) -> torch.Tensor:
    rows = len(flat) // SUMS
    dtype = torch.promote_types(flat.dtype, torch.float32)
    whole = flat[: rows * SUMS].view(rows, SUMS).sum(0, dtype=dtype)
    whole[: len(flat) - rows * SUMS] += flat[rows * SUMS :].to(dtype)
    return whole


def _put(exact: torch.Tensor, flat: torch.Tensor, rest: torch.Tensor | None, part: slice) -> None:
    """Rounds `exact` to the weights, and keeps the rest, a little less where it would round to other weights."""
    flat[part] = exact
    if rest is not None:
        wide = flat[part].to(exact.dtype)
        below = (exact - wide).to(rest.dtype)
        tie = (wide + below.to(exact.dtype)).to(rest.dtype) != flat[part]
        rest[part] = torch.where(tie, below * (1 - 2**-6), below)


def _exchange(flat: torch.Tensor, follower: _Follower) -> None:
    """Swaps the weights, and what was rounded off, with those of the other point."""
    assert follower.exchange is not None and follower.rounded_off is not None
    weights, rest = follower.exchange
    follower.exchange = (flat.clone(), follower.rounded_off)
    flat.copy_(weights)
    follower.rounded_off = rest


def like_whole(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A part as a `DTensor` like `whole`; as it is where that is none."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _write_back(p: torch.Tensor, flat: torch.Tensor) -> None:
    if flat.data_ptr() != p.data_ptr():
        p.detach().copy_(flat.view(p.shape))
