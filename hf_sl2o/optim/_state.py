"""Saved states of the optimizers: checked before anything of them is taken, and loaded in their own precision."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ._common import check_group

logger = logging.getLogger(__name__)


def load_keeping_dtypes(optimizer: Optimizer, load: Callable[[Any], None], state_dict: dict[str, Any]) -> None:
    """Runs torch's `load_state_dict`, then undoes its cast of fp32 state to the dtype of a bf16 parameter."""
    load(state_dict)
    saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(saved_ids, parameters, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if torch.is_tensor(value) and key != "step":  # where a step belongs, torch decides
                optimizer.state[p][key] = value.detach().clone().to(p.device)


def check_state(optimizer: Optimizer, state_dict: Any, fingerprint: str) -> None:
    """Raises `ValueError` where a state is not one of this kind of optimizer over these parameters, or is damaged.

    Args:
        optimizer (`Optimizer`): Into which it shall be loaded.
        state_dict: What was saved.
        fingerprint (`str`): The key that groups of this kind of optimizer have.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"the optimizer state is a {type(state_dict).__name__}, expected what state_dict() returned")
    state, groups, ours = state_dict["state"], state_dict["param_groups"], optimizer.param_groups
    if not isinstance(state, dict) or not isinstance(groups, list | tuple):
        raise ValueError("the optimizer state is damaged: 'state' is no dict or 'param_groups' no list; restore it")
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list | tuple) for group in groups):
        raise ValueError("the optimizer state is damaged: a param group lists no 'params'; restore the checkpoint")
    if not groups or fingerprint not in groups[0]:
        raise ValueError(
            f"the saved optimizer state is not one of {type(optimizer).__name__}: the run was trained with another "
            "optim. To go on from its weights with this one, start a new run from the checkpoint's weights "
            "(from_pretrained) instead of resuming it; to resume it, keep its optim"
        )
    sizes, wanted = ([len(group["params"]) for group in some] for some in (groups, ours))
    if sizes != wanted:
        raise ValueError(
            f"the saved optimizer state is of param groups of {sizes} parameters, this optimizer has {wanted}; resume "
            "with the model and the trainable parameters of that run"
        )
    indices = [index for group in groups for index in group["params"]]
    # numbers, or names, which torch.distributed.checkpoint puts in their place
    if not all(isinstance(index, int | str) for index in indices) or len(set(indices)) < len(indices):
        raise ValueError("the optimizer state is damaged: its parameters are not told apart; restore the checkpoint")
    for index, entry in state.items():
        if index not in indices or not isinstance(entry, dict):
            raise ValueError(f"the optimizer state is damaged: it has an entry {index!r} of no parameter; restore it")
        for key, value in entry.items():
            check_tensor(key, value)
    for group in groups:
        try:
            check_group(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimizer state is damaged ({error}); restore the checkpoint") from error


def check_tensor(key: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a finite number, or a tensor of such."""
    if torch.is_tensor(value):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"{key!r} of the saved optimizer state holds NaN or Inf; resume from an earlier checkpoint"
            )
    elif not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key!r} of the saved optimizer state is {value!r:.60}, expected a tensor; restore it")


def check_entry(entry: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises `ValueError` where an entry lacks a tensor of `shapes`, or has one of another shape or of integers."""
    for key, shape in shapes.items():
        found = entry.get(key)
        if not torch.is_tensor(found):
            raise ValueError(f"the saved optimizer state of {what} lacks {key!r}; restore the checkpoint")
        if tuple(found.shape) != shape or not found.is_floating_point():
            raise ValueError(
                f"{key!r} of the saved optimizer state of {what} is {found.dtype} of shape {tuple(found.shape)}, "
                f"expected floats of shape {shape}; resume with the model and settings of that run"
            )


def check_same(what: str, ours: Any, state_dict: dict[str, Any], key: str) -> None:
    for group in state_dict["param_groups"]:
        if key in group and group[key] != ours:
            raise ValueError(
                f"the saved optimizer state was made with another {what} ({group[key]}, this one is {ours}); resume "
                f"with the {what} of that run, or start a new run"
            )


def warn_of_another_rate(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A resumed run keeps the rate it was begun with, as any torch optimizer does: say so if another one was asked."""
    for ours, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        asked, kept = (group.get("initial_lr", group.get("lr")) for group in (ours, saved))
        if asked is not None and kept is not None and float(asked) != float(kept):
            logger.warning(
                "the run that is resumed began with learning rate %g, which it keeps; %g, given now, has no effect",
                float(kept),
                float(asked),
            )
            return
