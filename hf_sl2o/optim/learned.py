"""A learned rule as a torch optimizer over any tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..rules.config import check_average
from ..rules.rule import Rule, RuleState
from ._common import (
    NonFiniteGuard,
    average_weight,
    check_group,
    check_number,
    check_one_device,
    is_finite,
    real,
    refuse_meta,
    refuse_sharded,
    refuse_sparse,
    trains,
)
from ._piece import Piece, of_all_tensors
from ._state import check_entry, check_same, check_state, load_keeping_dtypes, warn_of_another_rate
from ._two_points import HINT, TwoPoints, parameters_of

Part = tuple[dict[str, Any], list[torch.Tensor]]  # a group, and parameters of it that are stepped at once


class LearnedOptimizer(TwoPoints):
    """A learned rule as a `torch.optim.Optimizer` over any tensors, such as LoRA factors or a small network.

    theta = theta - lr * rule(g): every scalar is a coordinate of the rule. For a rule that finds its own scale, such
    as `default-lora`, lr is where it begins to look, between 0.1 and 10 times its first guess; what a schedule
    multiplies lr by counts in full. A coordinate that never had a gradient does not move. State is fp32; use fp32
    weights, or increments below a bf16 unit vanish (a basis has no such limit, see [`SubspaceOptimizer`]). A step
    whose gradient holds NaN or Inf anywhere changes nothing and is counted; three in a row raise `FloatingPointError`.

    With an `average` a run has two points: the last step, where it trains, and the running average. An optimizer that
    was given the model leaves the weights at the average after each step, and takes them to the last step before a
    forward pass for training, so that whoever evaluates or saves has the average. One that was given tensors leaves
    them at the last step; `use_average` (or `eval`) and `use_last` (or `train`) go from one to the other. What a user
    changes in the weights is changed in both points.

    Args:
        params: A model, of which all trainable parameters are taken; or tensors, (name, tensor) pairs, param groups.
        rule ([`Rule`]): The update rule; it is moved to the parameters' device.
        lr (`float` or 0-d `torch.Tensor`, *optional*, defaults to 1.0): Multiplies the rule's output; 1.0 is the scale
            it was meta-trained at.
        betas (`tuple[float, float]`, *optional*): Defaults to the rule's own.
        eps (`float`, *optional*): Defaults to the rule's own.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled: theta shrinks by lr * weight_decay
            times the length of a step of the rule, as by AdamW's lr * weight_decay at a step size of the rule's.
        foreach (`bool`, *optional*): None or True: one computation over all tensors of a group; False: a tensor at a
            time. A rule that finds its own scale compares all tensors all the same.
        maximize (`bool`, *optional*, defaults to `False`): Ascend.
        capturable (`bool`, *optional*, defaults to `False`): Nothing is ever read back to the host; three non-finite
            steps in a row then do not raise.
        differentiable (`bool`, *optional*, defaults to `False`): Autograd runs through `step`, for non-leaf tensors.
        total_steps (`int`, *optional*): Steps of the whole run, for a rule that sees the share that is done.
        average (`float`, *optional*, defaults to 0.0): eta of the running average, in which step t weighs as t^eta.
            0: none.

    Raises:
        `TypeError`: `rule` is no rule.
        `ValueError`: a number that is NaN, infinite or negative; `betas` outside [0, 1); an `eps` of 0;
            an average beside `differentiable=True`; a parameter on the meta device; a model with nothing to train.
        `NotImplementedError`: the parameters are sharded (FSDP2).

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import LearnedOptimizer, LSTMRule
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = LearnedOptimizer(model.parameters(), LSTMRule(), lr=0.1)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    ```
    """

    def __init__(
        self,
        params: Any,
        rule: Rule,
        lr: float | torch.Tensor = 1.0,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        total_steps: int | None = None,
        average: float = 0.0,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule is a {type(rule).__name__}, expected a Rule such as LSTMRule")
        check_average(average)
        if average and differentiable:
            raise ValueError("an average is kept in place, which autograd cannot follow; leave one of them out")
        params, model = parameters_of(params)
        if model is not None:
            params = [(name, p) for name, p in params if p.requires_grad]
            if not params:
                raise ValueError("no parameter of the model is trainable; set requires_grad, or add an adapter")
        defaults = {
            "lr": lr,
            "betas": (rule.config.beta1, rule.config.beta2) if betas is None else tuple(betas),
            "eps": rule.config.eps if eps is None else eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "total_steps": total_steps,
            "rule_fingerprint": rule.fingerprint,
        }
        self.rule, self.average = rule, average
        #: Of a parameter that is several tensors in one: their shapes, and what they are where it is zero, (N,).
        self.tensor_shapes: list[tuple[int, ...]] | None = None
        self.tensor_origin: torch.Tensor | None = None
        self._at_average = False
        self._reset()
        super().__init__(params, defaults)
        self._device: torch.device | None = None
        self._follow()
        if model is not None:
            self.attach(model)

    def _follow(self) -> None:
        """A model may be moved after its optimizer was made (`Accelerator.prepare`): rule and state go after it."""
        device = self.param_groups[0]["params"][0].device
        if self._device == device:
            return
        self.rule.to(device)
        for p, state in self.state.items():
            state.update({name: value.to(p.device) for name, value in state.items() if torch.is_tensor(value)})
        self._device = device
        self._pieces.clear()

    def _reset(self) -> None:
        self._pieces: dict[tuple[int, ...], Piece] = {}
        self._non_finite = NonFiniteGuard()
        self._from_last = False  # whether the gradients to come are of the last step's weights

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "tensor_shapes", "tensor_origin", "average", "_at_average")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._device = None
        self._reset()  # the pieces are made again from the state of each parameter

    @property
    def at_average(self) -> bool:
        """Whether the weights are at the running average."""
        return self._at_average

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because the gradient held NaN or Inf (reads the counter from the device)."""
        return self._non_finite.total

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        whole = {**self.defaults, **param_group}
        check_group(whole)
        check_number("eps", whole["eps"], above_zero=True)  # a gradient of zero is divided by it
        super().add_param_group(param_group)
        refuse_sharded(self.param_groups[-1]["params"])
        refuse_meta(self.param_groups[-1]["params"])

    def _shapes(self, p: torch.Tensor) -> list[tuple[int, ...]]:
        return self.tensor_shapes or [tuple(real(p).shape)]

    def _sizes(self, p: torch.Tensor) -> list[int]:
        return [math.prod(shape) for shape in self._shapes(p)]

    # State

    def state_dict(self) -> dict[str, Any]:
        """As torch's; beside a model that is saved at its average it holds the last step, too."""
        state_dict = super().state_dict()
        if self._attached and not self._at_average:  # the model's state_dict() is that of the average
            params = {id(p): p for group in self.param_groups for p in group["params"]}
            keys = {id(p): i for i, p in enumerate(params.values())}
            for piece in self._all_pieces():
                average, now = piece.carried(), piece.weights()
                for p, mean, last in zip(piece.params, piece.views(average), piece.views(now), strict=True):
                    entry = state_dict["state"][keys[id(p)]]
                    state_dict["state"][keys[id(p)]] = {**entry, "average": mean, "last": last}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(self, state_dict, "rule_fingerprint")
        check_same("rule", self.rule.fingerprint, state_dict, "rule_fingerprint")
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(indices, params, strict=True):
            if entry := state_dict["state"].get(index):
                self._check_entry(entry, p, f"parameter {index}")
        warn_of_another_rate(self, state_dict)
        total_steps = [group["total_steps"] for group in self.param_groups]
        load_keeping_dtypes(self, super().load_state_dict, state_dict)
        for group, steps in zip(self.param_groups, total_steps, strict=True):
            if steps is not None:  # of this run, which may be longer than the one that was saved
                group["total_steps"] = steps
        for p, state in self.state.items():
            if state:
                state["step"] = state["step"].detach().clone().to(p.device)
        self._pieces, self._device, self._from_last = {}, None, False
        self._follow()
        self._at_average = any("last" in state for state in self.state.values())

    def _check_entry(self, entry: dict[str, Any], p: torch.Tensor, what: str) -> None:
        if "last" in entry and not self.average:
            raise ValueError(
                "the saved weights are at their running average, and this optimizer keeps none; resume with the same "
                "average=... (sl2o_average)"
            )
        shapes = {name: tuple(value.shape) for name, value in self._fresh(p, device="meta").items()}
        shapes |= {name: tuple(real(p).shape) for name in ("average", "last") if name in entry}
        check_entry(entry, shapes, what)
        if bool(entry["step"] < 0) or bool((entry["exp_avg_sq"] < 0).any()):
            raise ValueError(f"the saved optimizer state of {what} has a negative step or exp_avg_sq; restore it")

    def _piece(self, params: Sequence[torch.Tensor], group: dict[str, Any]) -> Piece:
        """What is kept of `params` as one; each parameter's own state is a view of it."""
        key = tuple(id(p) for p in params)
        if key not in self._pieces:
            refuse_sharded(params)
            check_one_device(params)
            for p in params:
                self._begin(p, group)
            piece = Piece(params, self.state, self._sizes, with_average=bool(self.average))
            self._pieces = {known: old for known, old in self._pieces.items() if not set(known) & set(key)}
            self._pieces[key] = piece
        return self._pieces[key]

    def _fresh(self, p: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        """The rule's state of a parameter before its first step; without what a rule keeps nothing in."""
        flat = real(p.detach()).reshape(-1) + (0 if self.tensor_origin is None else self.tensor_origin.to(p.device))
        flat = flat.to(options["device"])
        tensors = [part.view(shape) for part, shape in zip(flat.split(self._sizes(p)), self._shapes(p), strict=True)]
        state = self.rule.init_state(flat.numel(), weights=[t for t in tensors if t.numel()], **options)._asdict()
        if not state["tensors"].shape[1]:
            del state["tensors"]
        return state

    def _begin(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """Makes the state of a parameter when it is first met."""
        state = self.state[p]
        if not state:
            weights = next(self.rule.parameters(), None)
            dtype = torch.promote_types(real(p).dtype, torch.float32) if weights is None else weights.dtype
            rate = group.get("initial_lr", group["lr"])  # a scheduler's warm-up may begin at 0
            state.update(self._fresh(p, device=p.device, dtype=dtype, rate=rate))
        if self.average and "average" not in state:
            state["average"] = real(p.detach()).to(torch.promote_types(real(p).dtype, torch.float32), copy=True)

    def _all_pieces(self) -> list[Piece]:
        """Every parameter that has a state, in exactly one piece."""
        known = {number for key in self._pieces for number in key}
        others = [p for p, state in self.state.items() if state and id(p) not in known]
        if others:
            self._piece(others, self.param_groups[0])
        return list(self._pieces.values())

    # The running average

    @torch.no_grad()
    def use_average(self) -> None:
        """Puts the running average in the place of each tensor; nothing to do if it is there, or none is kept."""
        self._to_average(in_step=False)

    @torch.no_grad()
    def _to_average(self, *, in_step: bool) -> None:
        self.end_show()
        if self.average and not self._at_average and self.state:
            self._follow()
            for piece in self._all_pieces():
                piece.to_average(self.state, in_step=in_step)
            self._at_average = True

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Training goes on from the weights as they are: both points are there."""
        for piece in self._all_pieces():
            piece.begin_anew()

    @torch.no_grad()
    def use_last(self) -> None:
        """Puts each tensor back to where training goes on."""
        self.end_show()
        self._from_last = self._asked = True
        if self._at_average:
            self._follow()
            for piece in self._all_pieces():
                piece.to_last(self.state)
            self._at_average = False

    @torch.no_grad()
    def published(self) -> dict[int, torch.Tensor]:
        """The average by `id` of its parameter while the weights of an attached model are at the last step."""
        if not self._attached or self._at_average:
            return {}
        return {
            id(p): (torch.view_as_complex(view) if p.is_complex() else view).to(p.dtype, copy=True)
            for piece in self._all_pieces()
            for p, view in zip(piece.params, piece.views(piece.carried()), strict=True)
        }

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Does one update; returns the closure's loss."""
        loss = None
        if closure is not None:
            self.use_last()
            with torch.enable_grad():
                loss = closure()
        self._follow()
        parts = [(group, params) for group in self.param_groups for params in self._with_gradient(group)]
        gradients = [p.grad for _, params in parts for p in params if p.grad is not None]
        if not gradients:
            self.publish()
            return loss
        if self._at_average:
            still = all(not torch.is_tensor(group["lr"]) and group["lr"] == 0 for group in self.param_groups)
            if not (self._from_last or still):
                raise RuntimeError(HINT)
            self.use_last()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            refuse_sparse(gradients)
            if not self.defaults["differentiable"]:
                finite = is_finite(gradients)  # () of the whole step, not of a group
                self._non_finite.record(finite)
            if self.defaults["differentiable"]:
                for group, (p,) in parts:
                    self._differentiable_update(p, group)
            else:  # a rule that finds its own scale compares all tensors
                for together in [parts] if self.rule.own_scale else [[part] for part in parts]:
                    self._update(together, finite)
        self._from_last = self._asked = False
        if self._attached:
            self._to_average(in_step=True)
        if not self.defaults["capturable"] and not self.defaults["differentiable"]:
            self._non_finite.check()
        return loss

    def _with_gradient(self, group: dict[str, Any]) -> list[list[torch.Tensor]]:
        """The parameters of a group that are stepped, in what is one computation each: all together, or one by one."""
        params = [p for p in group["params"] if p.grad is not None and p.numel() and trains(p)]
        if group["foreach"] is False or self.defaults["differentiable"]:
            return [[p] for p in params]
        return [params] if params else []

    def _update(self, parts: Sequence[Part], finite: torch.Tensor) -> None:
        """One step of the parameters of one or more groups; nothing changes where `finite` is false."""
        groups, pieces = [group for group, _ in parts], [self._piece(params, group) for group, params in parts]
        if self.average:
            for piece in pieces:
                piece.take_changes()
        gradients = [piece.gradient(group["maximize"]) for piece, group in zip(pieces, groups, strict=True)]
        found = of_all_tensors(self.rule, pieces, gradients, groups)
        for piece, group, g, of_tensors in zip(pieces, groups, gradients, found, strict=True):
            state, lr, decay = piece.state, self._factor(group), group["weight_decay"]
            options = {name: group[name] for name in ("betas", "eps", "total_steps")}
            self.rule.update_(g, state, finite=finite, sizes=piece.tensor_sizes, of_tensors=of_tensors, **options)
            lengths = self.rule.lengths(state.tensors, group["lr"]) if decay else ()
            for i, (p, delta) in enumerate(zip(piece.params, piece.views(g), strict=True)):
                weights = real(p.detach())
                if decay:
                    weights.mul_(1 - lr * lengths[i] * decay * finite)
                weights.sub_((lr * delta).to(weights.dtype))
            if self.average:
                piece.average_(finite * average_weight(state.step, self.average))

    def _factor(self, group: dict[str, Any]) -> float | torch.Tensor:
        """What delta is multiplied by: a rule that finds its own scale has the rate in it."""
        return 1.0 if self.rule.own_scale else group["lr"]  # type: ignore[no-any-return]

    def _differentiable_update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        self._begin(p, group)
        kept = {"tensors": p.new_zeros(1, 0), **self.state[p]}
        state = RuleState(**{name: kept[name] for name in RuleState._fields})
        assert p.grad is not None
        g = p.grad.reshape(-1).to(state.exp_avg_sq.dtype)
        options = {name: group[name] for name in ("betas", "eps", "total_steps")}
        delta, state = self.rule(-g if group["maximize"] else g, state, rate=group["lr"], **options)
        self.state[p].update({name: value for name, value in state._asdict().items() if name in self.state[p]})
        lr = self._factor(group)
        if group["weight_decay"]:
            p.mul_(1 - lr * self.rule.lengths(state.tensors, group["lr"])[0] * group["weight_decay"])
        p.sub_((lr * delta).view_as(p).to(p.dtype))
