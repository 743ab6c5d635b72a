"""A learned rule as a torch optimizer over any tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..rule import Rule, RuleState
from ..rule_config import check_average
from ._common import NonFiniteGuard, average_weight, check_same, is_finite, load_keeping_dtypes


class LearnedOptimizer(Optimizer):
    """A learned rule as a `torch.optim.Optimizer` over any tensors, such as LoRA factors or a small network.

    theta = theta - lr * step_factor * rule(g): every scalar is a coordinate of the rule. `step_factor` is 1, or what
    the rule asks for over wide matrices. State is fp32; use fp32 weights, or increments below a bf16 unit vanish (a
    basis has no such limit, see [`SubspaceOptimizer`]). A step whose gradient holds NaN or Inf changes nothing and is
    counted; three in a row raise `FloatingPointError`.

    Args:
        params: Tensors, (name, tensor) pairs, or param group dicts.
        rule ([`Rule`]): The update rule; it is moved to the parameters' device.
        lr (`float` or 0-d `torch.Tensor`, *optional*, defaults to 1.0): Multiplies the rule's output; 1.0 is the scale
            it was meta-trained at.
        betas (`tuple[float, float]`, *optional*): Defaults to the rule's own.
        eps (`float`, *optional*): Defaults to the rule's own.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled, as in AdamW.
        foreach (`bool`, *optional*): None or True: one computation over all tensors of a group; False: a tensor at a
            time.
        maximize (`bool`, *optional*, defaults to `False`): Ascend.
        capturable (`bool`, *optional*, defaults to `False`): Nothing is ever read back to the host; three non-finite
            steps in a row then do not raise.
        differentiable (`bool`, *optional*, defaults to `False`): Autograd runs through `step`, for non-leaf tensors.
        total_steps (`int`, *optional*): Steps of the whole run, for a rule that sees the share that is done.
        average (`float`, *optional*, defaults to 0.0): eta of a running average of the tensors, in which step t weighs
            as t^eta; `use_average` puts it in their place for evaluation or saving, `use_last` ends that. 0: none.

    Raises:
        `TypeError`: `rule` is no rule.
        `ValueError`: a negative `lr`, `weight_decay` or `average`, `betas` outside [0, 1), an `eps` that is not
            positive; an average beside `differentiable=True`.

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
        if not torch.is_tensor(lr) and lr < 0:
            raise ValueError(f"lr is {lr}, expected a number >= 0")
        if weight_decay < 0:
            raise ValueError(f"weight_decay is {weight_decay}, expected a number >= 0")
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected two numbers in [0, 1)")
        if eps is not None and not eps > 0:
            raise ValueError(f"eps is {eps}, expected a number > 0: a gradient of zero is divided by it")
        check_average(average)
        if average and differentiable:
            raise ValueError(
                "an average is kept in place, which autograd cannot follow; leave differentiable or it out"
            )
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
        #: Shapes of the tensors that a parameter holds, where it is several in one (coefficients of an identity).
        self.tensor_shapes: list[tuple[int, ...]] | None = None
        self._reset()
        super().__init__(params, defaults)
        self._device: torch.device | None = None
        self._follow()

    def _follow(self) -> None:
        """A model may be moved after its optimizer was made (`Accelerator.prepare`): rule and state go after it."""
        device = self.param_groups[0]["params"][0].device
        if self._device == device:
            return
        self.rule.to(device)
        for p, state in self.state.items():
            state.update({name: value.to(p.device) for name, value in state.items() if torch.is_tensor(value)})
        self._device = device
        self._flat.clear()

    def _reset(self) -> None:
        self._flat: dict[tuple[int, ...], RuleState] = {}
        self._step_factor: float | None = None
        self._non_finite = NonFiniteGuard()

    def __getstate__(self) -> dict[str, Any]:
        own = {"rule": self.rule, "tensor_shapes": self.tensor_shapes, "average": self.average}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._device = None
        self._reset()  # the flat buffers are made again from the state of each parameter

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because the gradient held NaN or Inf (reads the counter from the device)."""
        return self._non_finite.total

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._step_factor = None

    @property
    def step_factor(self) -> float:
        """What the rule's steps are multiplied by for tensors of this width; see [`RuleConfig.step_factor`]."""
        if self._step_factor is None:
            params = [p for group in self.param_groups for p in group["params"]]
            shapes = [shape for p in params for shape in self.tensor_shapes or [p.shape]]
            self._step_factor = self.rule.config.step_factor(shapes)
        return self._step_factor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same("rule", self.rule.fingerprint, state_dict, "rule_fingerprint")
        total_steps = [group["total_steps"] for group in self.param_groups]
        load_keeping_dtypes(self, super().load_state_dict, state_dict)
        for group, steps in zip(self.param_groups, total_steps, strict=True):
            if steps is not None:  # of this run, which may be longer than the one that was saved
                group["total_steps"] = steps
        for p, state in self.state.items():
            state["step"] = state["step"].detach().clone().to(p.device)
        self._flat = {}
        self._follow()
        if not self.average and any("last" in state for state in self.state.values()):
            raise ValueError(
                "the saved weights are at their running average, and this optimizer keeps none; resume with the same "
                "average=... (sl2o_average)"
            )

    # The running average

    @torch.no_grad()
    def use_average(self) -> None:
        """Puts the running average in the place of each tensor; nothing to do if it is there, or none is kept."""
        for p, state in self.state.items():
            if "average" in state and "last" not in state:
                state["last"] = p.detach().clone()
                p.copy_(state["average"])

    @torch.no_grad()
    def use_last(self) -> None:
        """Puts each tensor back to where training goes on."""
        for p, state in self.state.items():
            if "last" in state:
                p.copy_(state.pop("last"))

    # The step

    def _dtype(self, p: torch.Tensor) -> torch.dtype:
        weights = next(self.rule.parameters(), None)
        return torch.promote_types(p.dtype, torch.float32) if weights is None else weights.dtype

    def _state_of(self, p: torch.Tensor) -> RuleState:
        """The state of one parameter, made when it is first met."""
        state = self.state[p]
        if not state:
            fresh = self.rule.init_state(p.numel(), device=p.device, dtype=self._dtype(p))
            state.update(fresh._asdict())
        if self.average and "average" not in state:
            state["average"] = p.detach().to(self._dtype(p), copy=True)
        return RuleState(**{name: state[name] for name in RuleState._fields})

    def _flat_state(self, params: Sequence[torch.Tensor]) -> RuleState:
        """One state over the concatenation of `params`; each parameter's own state is a view of it."""
        key = tuple(id(p) for p in params)
        if key not in self._flat:
            states = [self._state_of(p) for p in params]
            flat = [torch.cat([state[i] for state in states]) for i in range(1, len(RuleState._fields))]
            steps = torch.stack([state.step for state in states])
            # Parameters that missed gradients are at another step, so their bias correction differs. Read once, here.
            uniform = bool((steps == steps[0]).all())
            sizes = torch.tensor([p.numel() for p in params], device=steps.device)
            step = steps[0].clone() if uniform else steps.repeat_interleave(sizes)
            whole, offset = RuleState(step, *flat), 0
            for p in params:
                part = slice(offset, offset + p.numel())
                views = [tensor[part] for tensor in whole[1:]]
                self.state[p].update(RuleState(step if uniform else step[offset], *views)._asdict())
                offset += p.numel()
            self._flat = {known: flat for known, flat in self._flat.items() if not set(known) & set(key)}
            self._flat[key] = whole
        return self._flat[key]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Does one update; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        if any("last" in state for state in self.state.values()):
            raise RuntimeError(
                "the weights are at their running average, and so is this gradient; call use_last() before the "
                "forward pass"
            )
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                for p in params:
                    if p.grad.is_sparse:
                        raise NotImplementedError("the gradient is sparse; set sparse=False on the embedding")
                if group["differentiable"]:
                    for p in params:
                        self._differentiable_update(p, group)
                elif group["foreach"] is False:
                    for p in params:
                        self._update([p], group)
                elif params:
                    self._update(params, group)
        if not self.defaults["capturable"] and not self.defaults["differentiable"]:
            self._non_finite.check()
        return loss

    def _update(self, params: Sequence[torch.Tensor], group: dict[str, Any]) -> None:
        """One computation over the concatenation of `params`."""
        state = self._flat_state(params)
        # The border: from here on everything is in the dtype of the rule (fp32), whatever the model's.
        g = torch.cat([p.grad.reshape(-1).to(state.exp_avg.dtype) for p in params if p.grad is not None])  # (N,)
        if group["maximize"]:
            g = -g
        finite = is_finite([g])  # ()
        self._non_finite.record(finite)
        options = {name: group[name] for name in ("betas", "eps", "total_steps")}
        sizes = [math.prod(shape) for p in params for shape in self.tensor_shapes or [p.shape]]
        self.rule.update_(g, state, finite=finite, sizes=sizes, **options)
        lr, factor, offset = group["lr"], self.step_factor, 0
        for p in params:
            delta = g[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"] * finite)
            p.sub_((lr * factor * delta).to(p.dtype))
            if self.average:
                kept = self.state[p]
                weight = finite * average_weight(kept["step"], self.average)  # ()
                kept["average"].lerp_(p.to(kept["average"].dtype), weight)

    def _differentiable_update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(p)
        assert p.grad is not None
        g = p.grad.reshape(-1).to(state.exp_avg.dtype)
        options = {name: group[name] for name in ("betas", "eps", "total_steps")}
        delta, state = self.rule(-g if group["maximize"] else g, state, **options)
        self.state[p].update(state._asdict())
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_((group["lr"] * self.step_factor * delta).view_as(p).to(p.dtype))
