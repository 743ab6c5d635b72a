"""Any torch optimizer, or a learned rule, over the coefficients of a basis.

n parameters covered, d coefficients c, theta = theta_0 + lift(c), g = project(gradients).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..rules.config import check_average
from ..rules.rule import Rule
from ..subspace import Basis
from ..subspace.shards import is_sharded
from ._common import average_weight, check_group, check_number, is_finite, trains
from ._gradients import ProjectsGradients, clipped
from ._inner import check_inner, covered_by, warn_of_another_start
from ._sharded_streaming import ShardedStreamer
from ._streaming import Streamer
from ._two_points import HINT, parameters_of
from .learned import LearnedOptimizer

logger = logging.getLogger(__name__)

Inner = Callable[[list[torch.Tensor]], Optimizer]


class SubspaceOptimizer(ProjectsGradients):
    """Trains a model by moving the d coefficients of a basis with any torch optimizer or a learned rule.

    g = project(gradients); c = inner step on (c, g); theta = theta + lift(c_new - c_old). Its param group holds the
    model's parameters, so that schedulers, Accelerate and GradScaler work; the coefficients belong to the inner
    optimizer. Weights are moved in place, in the wider of their precision and the basis'; those below it keep what was
    rounded off, since increments below a bf16 unit would vanish (costs one copy of the weights). What a user changes
    in the weights stays; a parameter that is frozen stays as it is.

    A step whose gradient holds NaN or Inf, inside or outside the basis, changes nothing and is counted; three in a row
    raise `FloatingPointError`. Weight decay of an inner optimizer acts on c, towards the start. `state_dict` holds a
    `step` for each parameter and the d-sized tensors under the first one, never the basis. Parameters outside the
    basis stay as they are unless `outside` is given.

    With an `average` a run has two points: the last step, where it trains, and the running average of c. An optimizer
    that was given the model leaves the weights at the average after each step, and takes them to the last step before
    a forward pass for training, so that whoever evaluates or saves has the average (costs n numbers, and no second
    pass over the basis). One that was given named parameters leaves them at the last step; `use_average` (or `eval`)
    and `use_last` (or `train`) go from one to the other. Where a user replaces the weights, both points begin anew.

    Parameters that FSDP2 shards (`fully_shard` before the optimizer is made, or Accelerate after it) are moved in
    parts: each process keeps its part of the basis, and d numbers are summed. All processes have to call what moves or
    measures the weights. An average then needs the model.

    Args:
        params: A model; or `model.named_parameters()`, checked against the basis by name and shape; or plain tensors
            in the order of the basis, checked by shape.
        basis ([`Basis`]): The subspace; moved to the parameters' device.
        inner ([`Rule`], or a callable `[c] -> torch.optim.Optimizer`): What moves c, an fp32 tensor of shape `(d,)`.
        max_grad_norm (`float`, *optional*, defaults to 0.0): Clip the *projected* gradient to this norm; 0: never.
        average (`float`, *optional*, defaults to 0.0): eta of a running average of c, in which step t weighs as t^eta.
            0: none.
        outside (callable `[parameters] -> torch.optim.Optimizer`, *optional*): Trains the trainable parameters outside
            the basis (a new head) in a second param group. By default they are left alone, and named in a warning.
        stream_gradients (`bool`, *optional*, defaults to `False`): Project each gradient as backward makes it, and
            free it: no more than one parameter's gradient lives at a time, and processes send d numbers instead of n.
            Needs the model, before it is wrapped by DDP. All that is left in `.grad` is the projected gradient, in one
            small parameter. A copy or pickle of the optimizer goes without.

    Raises:
        `ValueError`: the model's names or shapes differ from the basis (the first difference is named); a parameter
            that the basis moves is frozen, complex or on the meta device; a number that is NaN, infinite or negative;
            an average beside `capturable=True`.
        `NotImplementedError`: an inner optimizer that needs a closure (LBFGS), or `differentiable=True`; sharded
            parameters, and a basis that cannot be cut (Tucker), or another cut than that of FSDP2.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, SubspaceOptimizer
    >>> model = torch.nn.Linear(30, 20)
    >>> basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=4)
    >>> optimizer = SubspaceOptimizer(model.named_parameters(), basis, lambda c: torch.optim.SGD(c, lr=0.1))
    >>> model(torch.ones(2, 30)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.coefficients.shape
    torch.Size([4])
    ```
    """

    def __init__(
        self,
        params: Any,
        basis: Basis,
        inner: Rule | Inner,
        *,
        max_grad_norm: float = 0.0,
        average: float = 0.0,
        outside: Inner | None = None,
        stream_gradients: bool = False,
    ) -> None:
        check_average(average)
        check_number("max_grad_norm", max_grad_norm)
        params, model = parameters_of(params)
        names, covered, rest = covered_by(basis, list(params))
        device = covered[0].device
        self.basis = basis if is_sharded(covered) else basis.to(device=device)  # sharded: cut before it is moved
        self.max_grad_norm = max_grad_norm
        c = torch.nn.Parameter(torch.zeros(basis.dim, dtype=basis.compute_dtype, device=device))
        self._inner = LearnedOptimizer([c], inner) if isinstance(inner, Rule) else inner([c])
        check_inner(self._inner)
        if isinstance(self._inner, LearnedOptimizer):
            self._inner.tensor_shapes = self.basis.tensor_shapes
        self._outside: Optimizer | None = None
        self._delta = torch.zeros_like(c, requires_grad=False)  # (d,) the last movement of c
        self.average = average
        self._mean = torch.zeros_like(c, requires_grad=False) if average else None  # (d,)
        self._origin: torch.Tensor | None = None  # (d,) coordinates of theta_0, from the first step on
        self._at_average = False
        self._fresh = True  # no state or coefficients were loaded: the weights are theta_0
        self._building = True
        inner_group = {key: value for key, value in self._inner.param_groups[0].items() if key != "params"}
        inner_group.pop("param_names", None)
        if average and inner_group.get("capturable"):
            raise ValueError(
                "average counts steps on the host, which a captured graph does not run; leave one of average and "
                "capturable out"
            )
        group = {"params": covered if names is None else list(zip(names, covered, strict=True))}
        super().__init__([group], {**inner_group, "basis_fingerprint": self.basis.fingerprint})
        if rest and outside is not None:
            self._outside = outside([parameter for _, parameter in rest])
            for outside_group in self._outside.param_groups:
                check_group(outside_group)
            self.param_groups.append(self._outside.param_groups[0])
            if names is not None:
                self.param_groups[1]["param_names"] = [name for name, _ in rest]
            self._share_outside()
        elif rest:
            logger.warning(
                "%d trainable parameters are outside the basis and stay as they are (first: %s); to train them pass "
                'outside="adamw" (Trainer) or outside=torch.optim.AdamW',
                len(rest),
                rest[0][0],
            )
        self._reset()
        self._building = False
        if model is not None:
            self._model = weakref.ref(model)
        self._follow()
        if stream_gradients:
            if model is None:
                raise ValueError("stream_gradients puts hooks on the model: pass the model itself, not its parameters")
            kind = Streamer if self._shards is None else ShardedStreamer
            self._streamer = kind(model, covered, self._basis_here)
        if model is not None:
            self.attach(model)

    def _basis_here(self) -> Basis:
        self._follow()
        return self.basis

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not getattr(self, "_building", True):
            raise ValueError(
                "one basis is one param group; for further parameters use a second optimizer, or outside=..."
            )
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    # What it is at

    @property
    def inner(self) -> Optimizer:
        """The optimizer that moves the coefficients."""
        return self._inner

    @property
    def coefficients(self) -> torch.Tensor:
        """A copy of c, of shape `(d,)`, of the weights that are saved: at the average after `use_average`, and always
        if the optimizer knows the model. Of sharded weights, whatever one process may know of them, as of the last
        step: it can be read on one process alone."""
        if self._shards is None:
            self.notice()
        published = self._mean is not None and (self._at_average or self._attached)
        return (self._mean if published and self._mean is not None else self._c.detach()).clone()

    @property
    def last_delta(self) -> torch.Tensor:
        """The last movement of c, of shape `(d,)`."""
        return self._delta

    @property
    def grad_norm(self) -> torch.Tensor:
        """Norm of the last step's projected gradient before clipping, 0-d; the next step writes into it."""
        return self._norm

    @property
    def at_average(self) -> bool:
        """Whether the weights are at the running average."""
        return self._at_average

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because the gradient held NaN or Inf (reads the counter from the device)."""
        return self._non_finite.total

    # The running average

    @torch.no_grad()
    def use_average(self) -> None:
        """Moves the weights to the running average of c; nothing to do if they are there, or none is kept."""
        self.end_show()
        if self._mean is None or self._at_average:
            return
        self._follow()
        self._notice(read_device=self._on_host)
        self._weights.to_published(self._c.detach() - self._mean)
        self._at_average = True
        if self.state.get(self.param_groups[0]["params"][0]):
            self._publish_state()

    @torch.no_grad()
    def use_last(self) -> None:
        """Moves the weights back to c, from where training goes on."""
        self.end_show()
        self._from_last = self._asked = True
        if not self._at_average:
            return
        self._follow()
        self._notice(read_device=self._on_host)
        if not self._at_average:  # the weights are others, and training goes on from them
            return
        assert self._mean is not None
        same = None if self._on_host else self._weights.as_written()
        if same is not None:
            # changed behind torch's back, through .data: known on the device alone
            self._weights.stay(same)
            self._mean = torch.where(same, self._mean, self._c.detach())
            self._same = same if self._same is None else self._same & same
        self._weights.to_last(self._c.detach() - self._mean)
        self._at_average = False
        self._publish_state()

    @torch.no_grad()
    def published(self) -> dict[int, torch.Tensor]:
        """The average by `id` of its parameter while the weights of an attached model are at the last step."""
        if self._is_being_sharded():
            return {}  # the sharded model begins where its weights are
        if self._shards is None:
            self._notice(read_device=self._on_host)
        if not self._attached or self._at_average or self._mean is None:
            return {}
        return self._weights.published(self._c.detach() - self._mean)

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Does one update; returns the closure's loss."""
        loss = None
        if closure is not None:
            self.use_last()
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        self._follow_shards()
        gradients = [p.grad for other in self.param_groups[1:] for p in other["params"] if p.grad is not None]
        covered, outside = self._on_any(self._has_gradient, bool(gradients))
        if not covered and not outside:
            self.publish()
            return loss
        still = not torch.is_tensor(group["lr"]) and group["lr"] == 0
        self._notice(read_device=self._on_host)  # of what was done to the weights after the forward pass
        if covered and self._at_average:
            if not (self._from_last or still):
                raise RuntimeError(HINT)
            self.use_last()
        self._follow()
        g = None
        if covered:
            g = self.projected_gradient()  # (d,)
            self._norm.copy_(torch.linalg.vector_norm(g))
            if self.max_grad_norm > 0:
                g = g * clipped(self._norm, self.max_grad_norm)
        finite = is_finite([torch.zeros_like(self._norm) if g is None else g, *gradients])  # ()
        if outside and self._shards is not None:
            finite = self._shards.all(finite)
        self._non_finite.record(finite)
        if self._step_outside is not None:
            self._step_outside(finite)
        if g is not None:
            self._tell_frozen()
            self._step_inside(g, finite, still)
        self.publish()
        self._from_last = self._asked = False
        if not group.get("capturable"):
            self._non_finite.check()
        return loss

    def _step_inside(self, g: torch.Tensor, finite: torch.Tensor, still: bool) -> None:
        """Moves c along the projected gradient g of shape `(d,)`, and the weights with it."""
        group, inner_group = self.param_groups[0], self._inner.param_groups[0]
        inner_group.update({key: group[key] for key in inner_group if key not in ("params", "param_names")})
        c = self._c
        if self._origin is None:
            if self._fresh and not still:  # torch.distributed.checkpoint steps before it loads
                warn_of_another_start(self.basis, group["params"])
            self._origin = self.basis.coordinates(group["params"]) - c.detach()
            if isinstance(self._inner, LearnedOptimizer):
                self._inner.tensor_origin = self._origin
        self._fresh = self._fresh and still
        c_before = c.detach().clone()
        c.grad = torch.where(finite, g, 0)
        stepped = self._step_inner(finite)
        if stepped:
            # in fp64, where the weights are: theta_0 + lift(c) then holds to their last digit
            wide = torch.promote_types(c.dtype, self._widest)
            self._delta = c.detach().to(wide) - c_before.to(wide)  # (d,)
            step = self.state[group["params"][0]].get("step")
            t = 1.0 if step is None else step + 1
            moved = finite & (self._delta != 0).any()  # () a step at lr 0 is none
            if self._mean is not None:
                self._mean.lerp_(c.detach(), (moved * average_weight(t, self.average)).to(c.dtype))
            if still:  # not even the sign of a zero changes
                pass
            elif self._attached and self._mean is not None:
                self._weights.publish(self._delta, c.detach() - self._mean, moved)
                self._at_average = True
            else:
                self._weights.move(self._delta)
            self._publish_state()
            step = self.state[group["params"][0]]["step"]
            step += 1

    @property
    def _widest(self) -> torch.dtype:
        wide = any(p.dtype == torch.float64 for p in self.param_groups[0]["params"])
        return torch.float64 if wide else self._c.dtype

    def _tell_frozen(self) -> None:
        if not self._told_frozen and not all(trains(p) for p in self.param_groups[0]["params"]):
            self._told_frozen = True
            logger.warning(
                "a parameter that the basis moves was frozen after the optimizer was made: it stays as it is, and the "
                "weights are no longer at the coefficients of the whole basis"
            )
