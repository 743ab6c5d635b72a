"""Any torch optimizer, or a learned rule, over the coefficients of a basis.

n parameters covered, d coefficients c, theta = theta_0 + lift(c), g = project(gradients).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ..rule import Rule
from ..rule_config import check_average
from ..subspace import Basis
from ._common import GuardedStep, NonFiniteGuard, average_weight, check_same, is_finite, load_keeping_dtypes
from ._inner import anchors_of, check_inner, check_trainable
from .learned import LearnedOptimizer

logger = logging.getLogger(__name__)

Inner = Callable[[list[torch.Tensor]], Optimizer]


class SubspaceOptimizer(Optimizer):
    """Trains a model by moving the d coefficients of a basis with any torch optimizer or a learned rule.

    g = project(gradients); c = inner step on (c, g); theta = theta + lift(c_new - c_old). Its param group holds the
    model's parameters, so that schedulers, Accelerate and GradScaler work; the coefficients belong to the inner
    optimizer. fp32 weights are moved in place; weights below fp32 are written as anchor + lift(c), rounded once, since
    increments below a bf16 unit would vanish (costs one copy of the weights).

    A step whose gradient holds NaN or Inf, inside or outside the basis, changes nothing and is counted; three in a row
    raise `FloatingPointError`. Weight decay acts on c, towards the anchor. `state_dict` holds a `step` for each
    parameter and the d-sized tensors under the first one, never the basis. Parameters outside the basis stay as they
    are unless `outside` is given.

    Args:
        params: `model.named_parameters()`, checked against the basis by name and shape; or plain tensors in the order
            of the basis, checked by shape.
        basis ([`Basis`]): The subspace; moved to the parameters' device.
        inner ([`Rule`], or a callable `[c] -> torch.optim.Optimizer`): What moves c, an fp32 tensor of shape `(d,)`.
        max_grad_norm (`float`, *optional*, defaults to 0.0): Clip the *projected* gradient to this norm; 0: never.
        average (`float`, *optional*, defaults to 0.0): eta of a running average of c, in which step t weighs as t^eta;
            `use_average` moves the weights there for evaluation or saving, `use_last` back. It costs d numbers, not n.
            0: none.
        outside (callable `[parameters] -> torch.optim.Optimizer`, *optional*): Trains the trainable parameters outside
            the basis (a new head) in a second param group. By default they are left alone, and named in a warning.

    Raises:
        `ValueError`: the model's names or shapes differ from the basis (the first difference is named); a parameter
            that the basis moves is frozen; a negative `average`, or one beside `capturable=True`.
        `NotImplementedError`: an inner optimizer that needs a closure (LBFGS), or `differentiable=True`.

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
        params: Iterable[Any],
        basis: Basis,
        inner: Rule | Inner,
        *,
        max_grad_norm: float = 0.0,
        average: float = 0.0,
        outside: Inner | None = None,
    ) -> None:
        check_average(average)
        params = list(params)
        if params and isinstance(params[0], dict):
            raise ValueError(
                "SubspaceOptimizer takes model.named_parameters(), not param groups: one basis, one group"
            )
        names: list[str] | None = None
        rest: list[tuple[str, torch.Tensor]] = []
        if params and isinstance(params[0], tuple):
            covered, rest = basis.layout.select(params)
            names = list(basis.layout.names)
            check_trainable(names, covered)
        else:
            basis.layout.check_tensors(params)
            covered = params
        self.basis = basis.to(device=covered[0].device)
        self.max_grad_norm = max_grad_norm
        c = torch.nn.Parameter(torch.zeros(basis.dim, dtype=basis.compute_dtype, device=covered[0].device))
        self._inner = LearnedOptimizer([c], inner) if isinstance(inner, Rule) else inner([c])
        check_inner(self._inner)
        if isinstance(self._inner, LearnedOptimizer):
            self._inner.tensor_shapes = self.basis.tensor_shapes
        self._outside: Optimizer | None = None
        self._anchors: list[torch.Tensor] | None = None
        self._pending: torch.Tensor | None = None  # (d,) the clipped projected gradient, made ahead of `step`
        self._delta = torch.zeros_like(c)  # (d,) the last movement of c
        self.average = average
        self._mean = torch.zeros_like(c, requires_grad=False) if average else None  # (d,)
        self._at_average = False  # where the weights are
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
        self._reset_guards()
        self._building = False

    def _share_outside(self) -> None:
        # Both optimizers then read and write the same state and the same group: schedulers and checkpoints just work.
        if self._outside is not None:
            self._outside.state = self.state
            self._outside.param_groups = [self.param_groups[1]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not getattr(self, "_building", True):
            raise ValueError(
                "one basis is one param group; for further parameters use a second optimizer, or outside=..."
            )
        super().add_param_group(param_group)

    # State

    _OWN = (
        "basis", "max_grad_norm", "average", "_inner", "_outside", "_anchors", "_delta", "_mean", "_at_average",
        "_building",
    )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pending = None
        self._reset_guards()

    def _reset_guards(self) -> None:
        self._non_finite = NonFiniteGuard()
        self._step_inner = GuardedStep(self._inner)
        self._step_outside = None if self._outside is None else GuardedStep(self._outside)

    def _follow(self) -> None:
        """A model may be moved after its optimizer was made (`Accelerator.prepare`): what is kept here follows."""
        device = self.param_groups[0]["params"][0].device
        if self._c.device != device:
            self._to(device)

    def _to(self, device: torch.device) -> None:
        self.basis = self.basis.to(device=device)
        self._delta = self._delta.to(device)
        self._mean = None if self._mean is None else self._mean.to(device)
        self._pending = None if self._pending is None else self._pending.to(device)
        self._anchors = None if self._anchors is None else [anchor.to(device) for anchor in self._anchors]
        state = self._inner.state_dict()
        self._inner.param_groups[0]["params"] = [torch.nn.Parameter(self._c.detach().to(device))]
        self._inner.state.clear()
        self._inner.load_state_dict(state)  # puts it where the parameter is, and a step where it belongs
        self._step_inner = GuardedStep(self._inner)

    @property
    def _c(self) -> torch.Tensor:
        return self._inner.param_groups[0]["params"][0]

    @property
    def inner(self) -> Optimizer:
        """The optimizer that moves the coefficients."""
        return self._inner

    @property
    def _here(self) -> torch.Tensor:
        return self._mean if self._at_average and self._mean is not None else self._c.detach()

    @property
    def coefficients(self) -> torch.Tensor:
        """A copy of c, of shape `(d,)`, where the weights are: after `use_average` that of the average."""
        return self._here.clone()

    @property
    def last_delta(self) -> torch.Tensor:
        """The last movement of c, of shape `(d,)`."""
        return self._delta

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because the gradient held NaN or Inf (reads the counter from the device)."""
        return self._non_finite.total

    def _publish(self) -> None:
        """Writes the d-sized tensors where `state_dict` finds them: tensors only, under the first parameter."""
        params = self.param_groups[0]["params"]
        first = self.state[params[0]]
        if "step" not in first:
            step = torch.zeros((), dtype=torch.float32)
            for p in params:  # an entry for each parameter, or sharded loading refuses the state
                self.state[p]["step"] = step
        first["coefficients"] = self._c.detach()
        if self._mean is not None:
            first["average"] = self._mean
            first["at_average"] = torch.tensor(float(self._at_average))
        for key, value in self._inner.state[self._c].items():
            if torch.is_tensor(value):
                first["inner_step" if key == "step" else key] = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same("basis", self.basis.fingerprint, state_dict, "basis_fingerprint")
        if isinstance(self._inner, LearnedOptimizer):
            check_same("rule", self._inner.rule.fingerprint, state_dict, "rule_fingerprint")
        total_steps = self.param_groups[0].get("total_steps")
        load_keeping_dtypes(self, super().load_state_dict, state_dict)
        if total_steps is not None:  # of this run, which may be longer than the one that was saved
            self.param_groups[0]["total_steps"] = total_steps
        self._follow()
        params = self.param_groups[0]["params"]
        first = self.state[params[0]]
        self._anchors = self._pending = None  # derived from the weights at the next step
        inner_state = {}
        if first:
            step = first["step"].detach().clone().cpu()
            for p in params:
                self.state[p]["step"] = step
            own = ("step", "coefficients", "average", "at_average")
            inner_state = {key: value for key, value in first.items() if key not in own}
            if "inner_step" in inner_state:
                inner_state["step"] = inner_state.pop("inner_step").detach().clone()
        with torch.no_grad():
            self._c.copy_(first["coefficients"] if first else torch.zeros_like(self._c))
            if self._mean is not None:  # a state without one: the average begins at its coefficients
                self._mean = first.get("average", self._c.detach()).clone() if first else torch.zeros_like(self._mean)
        self._at_average = bool(first.get("at_average", 0.0)) if first else False
        if self._at_average and self._mean is None:
            raise ValueError(
                "the saved weights are at the average of the coefficients, and this optimizer keeps none; resume with "
                "the same average=... (sl2o_average)"
            )
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": {0: inner_state} if inner_state else {}, "param_groups": groups})
        if first:
            self._publish()
        self._share_outside()

    @torch.no_grad()
    def load_coefficients(self, coefficients: torch.Tensor, *, move_weights: bool = True) -> None:
        """Sets c; with `move_weights` the weights follow, else they are taken to be at `coefficients` already."""
        if coefficients.shape != self._c.shape:
            raise ValueError(f"got coefficients of shape {tuple(coefficients.shape)}, expected {tuple(self._c.shape)}")
        self._follow()
        coefficients = coefficients.to(self._c)
        if move_weights:
            self._keep_anchors()
            self._move(coefficients - self._here, coefficients)
        else:
            self._anchors = None
        self._c.copy_(coefficients)
        self._at_average = False
        if self._mean is not None:
            self._mean = coefficients.clone()

    # The running average

    def use_average(self) -> None:
        """Moves the weights to the running average of c; nothing to do if they are there, or none is kept."""
        if self._mean is not None:
            self._go(True)

    def use_last(self) -> None:
        """Moves the weights back to c, from where training goes on."""
        self._go(False)

    @torch.no_grad()
    def _go(self, to_average: bool) -> None:
        if self._at_average == to_average:
            return
        self._follow()
        self._keep_anchors()
        before = self._here.clone()
        self._at_average = to_average
        self._move(self._here - before, self._here)
        if self.state[self.param_groups[0]["params"][0]]:
            self._publish()

    # The step

    @torch.no_grad()
    def projected_gradient(self) -> torch.Tensor:
        """Returns g = project(gradients), of shape `(d,)`, unclipped; a parameter without gradient counts as zero."""
        gradients = [p.grad for p in self.param_groups[0]["params"]]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            raise NotImplementedError("a gradient is sparse; set sparse=False on the embedding")
        self._follow()
        return self.basis.project(gradients)

    @torch.no_grad()
    def gradient_share(self) -> torch.Tensor:
        """Returns |U U^T grad|^2 / |grad|^2 over the covered parameters, 0-d: how much of it the subspace holds."""
        inside = torch.linalg.vector_norm(self.projected_gradient() / self.basis.units)
        norms = [torch.linalg.vector_norm(p.grad) for p in self.param_groups[0]["params"] if p.grad is not None]
        whole = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
        return (inside / whole.clamp_min(1e-37)) ** 2

    @torch.no_grad()
    def clip_projected(self, max_norm: float) -> torch.Tensor:
        """Projects and clips ahead of `step`, which then uses the result.

        Returns:
            The norm of the projected gradient before clipping, 0-d.
        """
        g = self.projected_gradient()
        norm = torch.linalg.vector_norm(g)
        self._pending = g * (max_norm / (norm + 1e-6)).clamp_max(1.0) if max_norm > 0 else g
        return norm

    def _keep_anchors(self) -> None:
        if self._anchors is None:
            self._anchors = anchors_of(self.param_groups[0]["params"], self.basis, self._here)

    def _move(self, delta: torch.Tensor, coefficients: torch.Tensor) -> None:
        params = self.param_groups[0]["params"]
        if self._anchors:
            self.basis.assign_(params, self._anchors, coefficients)
        else:
            self.basis.add_(params, delta)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Does one update; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        covered = any(p.grad is not None for p in group["params"])
        gradients = [p.grad for other in self.param_groups[1:] for p in other["params"] if p.grad is not None]
        if not covered and not gradients:
            return loss
        if covered and self._at_average:
            raise RuntimeError(
                "the weights are at the average of the coefficients, and so is this gradient; call use_last() before "
                "the forward pass"
            )
        self._follow()
        if covered and self._pending is None:
            self.clip_projected(self.max_grad_norm)
        g, self._pending = self._pending, None  # (d,)
        finite = is_finite(gradients if g is None else [g, *gradients])  # ()
        self._non_finite.record(finite)
        if self._step_outside is not None:
            self._step_outside(finite)
        if g is not None:
            self._step_inside(g, finite)
        if not group.get("capturable"):
            self._non_finite.check()
        return loss

    def _step_inside(self, g: torch.Tensor, finite: torch.Tensor) -> None:
        """Moves c along the projected gradient g of shape `(d,)`, and the weights with it."""
        group, inner_group = self.param_groups[0], self._inner.param_groups[0]
        inner_group.update({key: group[key] for key in inner_group if key not in ("params", "param_names")})
        self._keep_anchors()
        c = self._c
        c_before = c.detach().clone()
        c.grad = torch.where(finite, g, 0)
        if not self._step_inner(finite):
            return
        self._delta = c.detach() - c_before  # (d,)
        if torch.is_tensor(group["lr"]) or group["lr"] != 0:  # at lr 0 not even the sign of a zero changes
            self._move(self._delta, c.detach())
        self._publish()
        step = self.state[group["params"][0]]["step"]
        step += 1
        if self._mean is not None:
            self._mean.lerp_(c.detach(), float(average_weight(step, self.average)))
