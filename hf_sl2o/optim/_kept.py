"""What an optimizer over coefficients keeps: in its state, in copies and pickles, and when its model moves."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim import Optimizer

from ..subspace import Basis
from ._common import GuardedStep, NonFiniteGuard
from ._sharding import Sharding
from ._state import check_entry, check_same, check_state, load_keeping_dtypes, warn_of_another_rate
from ._streaming import Streamer
from ._two_points import REPLACES
from ._weights import Weights
from .learned import LearnedOptimizer

logger = logging.getLogger(__name__)


class KeepsCoefficients(Sharding):
    """The part of [`SubspaceOptimizer`] that is saved, loaded, copied and moved."""

    basis: Basis
    max_grad_norm: float
    average: float
    _inner: Optimizer
    _outside: Optimizer | None
    _delta: torch.Tensor  # (d,) the last movement of c
    _mean: torch.Tensor | None  # (d,) the running average of c
    _origin: torch.Tensor | None  # (d,) coordinates of theta_0
    _at_average: bool  # where the weights are
    _fresh: bool
    _OWN = (
        "basis", "max_grad_norm", "average", "_inner", "_outside", "_delta", "_mean", "_origin", "_at_average",
        "_fresh", "_building",
    )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in self._OWN}
        return {**super().__getstate__(), **own, "_followers": self._weights.followers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        followers = state.pop("_followers", None)
        super().__setstate__(state)
        self._reset()
        self._weights.followers = followers

    def _reset(self) -> None:
        self._non_finite = NonFiniteGuard()
        self._step_inner = GuardedStep(self._inner)
        self._step_outside = None if self._outside is None else GuardedStep(self._outside)
        self._weights = Weights(self.basis, lambda: self.param_groups[0]["params"], two_points=bool(self.average))
        self._weights.before_move = self._reshard
        self._norm = torch.zeros((), dtype=self.basis.compute_dtype, device=self._c.device)
        self._from_last = self._told_frozen = False
        self._same: torch.Tensor | None = None  # 0-d, on a GPU: whether all weights were as written, as far as read

    @property
    def streamer(self) -> Streamer | None:
        """What projects gradients as they are born, with `stream_gradients`."""
        return self._streamer

    def detach(self) -> None:
        """Lets go of the model, whose weights stay at the average, and whose gradients stay where backward puts them.

        A streaming optimizer cannot step after that.
        """
        super().detach()
        if self._streamer is not None:
            self._streamer.close()

    def _follow(self) -> None:
        """A model may be moved or sharded after its optimizer was made (`Accelerator.prepare`): what is kept here
        follows."""
        self._follow_shards()
        device = self.param_groups[0]["params"][0].device
        if self._c.device != device:
            self._to(device)

    def _to(self, device: torch.device) -> None:
        self.basis = self._weights.basis = self.basis.to(device=device)
        self._delta, self._norm = self._delta.to(device), self._norm.to(device)
        self._mean = None if self._mean is None else self._mean.to(device)
        self._origin = None if self._origin is None else self._origin.to(device)
        state = self._inner.state_dict()
        self._inner.param_groups[0]["params"] = [torch.nn.Parameter(self._c.detach().to(device))]
        self._inner.state.clear()
        self._inner.load_state_dict(state)  # puts it where the parameter is, and a step where it belongs
        self._step_inner = GuardedStep(self._inner)
        self._weights.to(device)

    @property
    def _c(self) -> torch.Tensor:
        return self._inner.param_groups[0]["params"][0]

    def _share_outside(self) -> None:
        # Both optimizers then read and write the same state and the same group: schedulers and checkpoints just work.
        if self._outside is not None:
            self._outside.state = self.state
            self._outside.param_groups = [self.param_groups[1]]

    def _publish_state(self) -> None:
        """Writes the d-sized tensors where `state_dict` finds them: tensors only, under the first parameter."""
        params = self.param_groups[0]["params"]
        first = self.state[params[0]]
        if "step" not in first:
            step = torch.zeros((), dtype=torch.float32)
            for p in params:  # an entry for each parameter, or sharded loading refuses the state
                self.state[p]["step"] = step
        first["coefficients"] = self._c.detach()
        if self._origin is not None:
            first["origin"] = self._origin
        if self._mean is not None:
            first["average"] = self._mean
            first["at_average"] = torch.tensor(float(self._at_average or self._attached))
        for key, value in self._inner.state[self._c].items():
            if torch.is_tensor(value):
                first["inner_step" if key == "step" else key] = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(self, state_dict, "basis_fingerprint")
        check_same("basis", self.basis.fingerprint, state_dict, "basis_fingerprint")
        if isinstance(self._inner, LearnedOptimizer):
            check_same("rule", self._inner.rule.fingerprint, state_dict, "rule_fingerprint")
        check_entry_of(self, state_dict)
        warn_of_another_rate(self, state_dict)
        total_steps = self.param_groups[0].get("total_steps")
        load_keeping_dtypes(self, super().load_state_dict, state_dict)
        if total_steps is not None:  # of this run, which may be longer than the one that was saved
            self.param_groups[0]["total_steps"] = total_steps
        self._follow()
        self._weights.forget()
        params = self.param_groups[0]["params"]
        first = self.state.get(params[0], {})  # an entry that is empty would be one to torch.distributed.checkpoint
        inner_state = {}
        if first:
            self._fresh = False
            step = first["step"].detach().clone().cpu()
            for p in params:
                self.state[p]["step"] = step
            own = ("step", "coefficients", "average", "at_average", "origin")
            inner_state = {key: value for key, value in first.items() if key not in own}
            if "inner_step" in inner_state:
                inner_state["step"] = inner_state.pop("inner_step").detach().clone()
        self._origin = first.get("origin") if first else None
        with torch.no_grad():
            self._c.copy_(first["coefficients"] if first else torch.zeros_like(self._c))
            if self._mean is not None:  # a state without one: the average begins at its coefficients
                self._mean = first.get("average", self._c.detach()).clone() if first else torch.zeros_like(self._mean)
        self._at_average = bool(first.get("at_average", 0.0)) if first else False
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": {0: inner_state} if inner_state else {}, "param_groups": groups})
        if first:
            self._publish_state()
        self._share_outside()

    # Weights that somebody else has set

    @torch.no_grad()
    def load_coefficients(self, coefficients: torch.Tensor, *, move_weights: bool = True) -> None:
        """Sets c; with `move_weights` the weights follow, else they are taken to be at `coefficients` already.

        Raises:
            `ValueError`: another shape than `(d,)`, NaN or Inf.
        """
        if coefficients.shape != self._c.shape:
            raise ValueError(f"got coefficients of shape {tuple(coefficients.shape)}, expected {tuple(self._c.shape)}")
        if not bool(torch.isfinite(coefficients).all()):
            raise ValueError("the coefficients hold NaN or Inf; restore them from where they came from")
        self._follow()
        coefficients = coefficients.to(self._c)
        if move_weights:
            here = self._mean if self._at_average and self._mean is not None else self._c.detach()
            self._weights.move(coefficients - here)
        else:
            self._origin = None  # measured at the next step
        self._begin_at(coefficients)

    def _begin_at(self, coefficients: torch.Tensor) -> None:
        """Both points are at the weights as they are, which are at `coefficients`."""
        self._fresh = False
        self._weights.begin_anew()
        self._c.detach().copy_(coefficients)
        self._at_average = False
        if self._mean is not None:
            self._mean = coefficients.clone()

    def notice(self) -> None:
        """Takes over what somebody has changed in the weights since they were written.

        Both points move by the change; where it is a twentieth of the weights, and further than from one point to the
        other, the weights were replaced, and both begin anew there. A step, and whoever asks for `coefficients`,
        notices by itself.
        """
        self._follow()
        self._notice(read_device=True)

    @property
    def _on_host(self) -> bool:
        """Whether to look at the weights does not wait for a device."""
        return self.basis.device.type == "cpu"

    @torch.no_grad()
    def _notice(self, *, read_device: bool) -> None:
        changed = self._weights.changed()
        if changed or read_device:
            same = self._weights.as_written()
            changed = changed if same is None else not bool(same)  # a write that changed no number is none
        if read_device and self._same is not None:
            changed, self._same = changed or not bool(self._same), None
        if changed:
            self._take_over()
        elif self._weights.changed():
            self._weights.seen_again()

    def _take_over(self) -> None:
        measured, change = self._measured(), self._weights.change()
        c, mean = self._c.detach(), self._mean
        at = mean if self._at_average and mean is not None else c
        if mean is None or change is None:
            self._begin_at(measured)
        elif bool(
            (change > torch.linalg.vector_norm((c - mean) * self.basis.units))
            & (change > REPLACES * self._weights.norm())
        ):
            self._begin_at(measured)
            logger.info("the weights were replaced after a step: training and its average go on from them")
        else:
            moved = measured - at
            c.add_(moved)
            mean.add_(moved)
            self._weights.seen_again()
            self._weights.forget_published(at_last=not self._at_average)

    def _measured(self) -> torch.Tensor:
        """c of the weights as they are, (d,)."""
        if self._origin is None:
            return self._mean if self._at_average and self._mean is not None else self._c.detach()
        return self.basis.coordinates(self.param_groups[0]["params"]) - self._origin

    def begin_anew(self) -> None:
        """Training goes on from the weights as they are: both points are there."""
        self.measure()

    @torch.no_grad()
    def measure(self) -> torch.Tensor:
        """Sets c to that of the weights as they are, such as those of a checkpoint that were loaded into the model.

        Returns:
            c of shape `(d,)`, to rounding; where the weights are outside the subspace, that of the nearest point.
        """
        self._follow()
        self._begin_at(self._measured())
        return self._c.detach().clone()


def check_entry_of(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Raises `ValueError` where the entry of a basis' coefficients is missing, damaged or of other sizes."""
    state, indices = state_dict["state"], state_dict["param_groups"][0]["params"]
    first = state.get(indices[0])
    if not first:
        if any(state.get(index) for index in indices):
            raise ValueError(
                "the saved optimizer state lacks the entry of the first parameter, which holds the coefficients; "
                "restore the checkpoint"
            )
        return
    dim = optimizer.basis.dim
    shapes: dict[str, tuple[int, ...]] = {"step": (), "coefficients": (dim,)}
    shapes |= {name: (dim,) for name in ("average", "origin") if name in first}
    shapes |= {"at_average": ()} if "at_average" in first else {}
    inner = optimizer.inner
    if isinstance(inner, LearnedOptimizer) and len(first) > len(shapes):
        of_rule = inner._fresh(inner.param_groups[0]["params"][0], device="meta")
        shapes |= {"inner_step" if k == "step" else k: tuple(v.shape) for k, v in of_rule.items()}
    check_entry(first, shapes, "the coefficients")
    for key, value in first.items():  # an inner optimizer's: one number a coefficient, or one in all
        if key not in shapes and torch.is_tensor(value) and value.numel() not in (1, dim):
            raise ValueError(
                f"{key!r} of the saved optimizer state has {value.numel()} numbers, expected {dim} or 1; resume with "
                "the basis and optim of that run"
            )
        if key in ("exp_avg_sq", "step", "inner_step", "max_exp_avg_sq") and bool((value < 0).any()):
            raise ValueError(f"{key!r} of the saved optimizer state is negative; restore the checkpoint")
    if bool(first.get("at_average", torch.tensor(0.0))) and not optimizer.average:
        raise ValueError(
            "the saved weights are at the average of the coefficients, and this optimizer keeps none; resume with "
            "the same average=... (sl2o_average)"
        )
