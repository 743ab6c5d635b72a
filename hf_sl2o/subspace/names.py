"""Which parameter of a model a recorded name means, where PEFT names the same parameter in another way.

`get_peft_model` puts `base_model.model.` in front of every name, transformers' `model.add_adapter` does not; and
the name of the adapter is part of its parameters' names (`lora_A.default.weight`).
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable, Mapping

import torch

logger = logging.getLogger(__name__)

_PEFT = "base_model.model."
_ANY = "*"


def find_names(recorded: Mapping[str, tuple[int, ...]], model: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Finds each recorded parameter in a model.

    Args:
        recorded (`Mapping[str, tuple]`): Names and shapes that a basis was made for.
        model (`Mapping[str, torch.Tensor]`): Its parameters by name, without the prefixes of wrappers.

    Returns:
        `dict`: The model's name of each recorded one: the same, or the only trainable parameter of the same shape that
            differs in PEFT's prefix and the adapter's name alone.

    Raises:
        `ValueError`: a name fits nothing, or several; or its adapter is not the active one.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.subspace.names import find_names
    >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
    >>> find_names({"q.lora_A.default.weight": (2, 3)}, {"base_model.model.q.lora_A.mine.weight": weight})
    {'q.lora_A.default.weight': 'base_model.model.q.lora_A.mine.weight'}
    ```
    """
    exact = {name for name in recorded if name in model}
    if len(exact) == len(recorded) and all(model[name].requires_grad for name in exact):
        return {name: name for name in recorded}
    alike: dict[str, list[str]] = {}  # the model's parameters that are not recorded, by what they are but for PEFT
    for name in model:
        if name not in exact:
            alike.setdefault(_canonical(name)[0], []).append(name)
    found = {}
    for name in recorded:
        others = alike.get(_canonical(name)[0], [])
        active = [other for other in others if model[other].requires_grad]
        if name in exact:
            if active and not model[name].requires_grad:
                raise ValueError(_inactive(name, active[0]))
            found[name] = name
            continue
        fitting = [other for other in active if tuple(model[other].shape) == recorded[name]]
        if len(fitting) != 1 or fitting[0] in found.values():
            raise ValueError(_missing(name, recorded, others, active, fitting, exact, model))
        found[name] = fitting[0]
    changed = [name for name in recorded if found[name] != name]
    if changed:
        _say_once(changed[0], found[changed[0]], len(changed))
    return found


def _canonical(name: str) -> tuple[str, str | None]:
    """Returns the name without PEFT's prefix and with "*" for the adapter, and the adapter."""
    parts = name.removeprefix(_PEFT).split(".")
    for index, part in enumerate(parts[:-1]):
        if part.startswith(_adapter_prefixes()):
            adapter = parts[index + 1]
            return ".".join([*parts[: index + 1], _ANY, *parts[index + 2 :]]), adapter
    return ".".join(parts), None


@functools.cache
def _adapter_prefixes() -> tuple[str, ...]:
    """How modules begin whose children are adapters, by the adapter's name."""
    try:
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # takes a second, and only PEFT's models need it

        kinds = sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()))
    except ImportError:
        kinds = ["lora_"]
    return (*kinds, "modules_to_save", "prompt_encoder")


def _is_of_peft(names: Iterable[str]) -> bool:
    return any(name.startswith(_PEFT) or _canonical(name)[1] is not None for name in names)


def _inactive(name: str, active: str) -> str:
    ours, other = _canonical(name)[1], _canonical(active)[1]
    return (
        f"the basis was fitted for a parameter {name!r} of the adapter {ours!r}, which is frozen, while the adapter "
        f"{other!r} is active; call model.set_adapter({ours!r}), or fit a basis for the other one"
    )


def _missing(
    name: str,
    recorded: Mapping[str, tuple[int, ...]],
    others: list[str],
    active: list[str],
    fitting: list[str],
    exact: set[str],
    model: Mapping[str, torch.Tensor],
) -> str:
    """Says what is missing, what the model has instead, and why that may be."""
    left = [other for other in model if other not in exact]
    trainable = [other for other in left if model[other].requires_grad]
    closest = difflib.get_close_matches(name, others or trainable or left, n=1, cutoff=0.0)
    have = repr(closest[0]) if closest else "nothing outside the basis"
    shape = recorded[name]
    if len(fitting) > 1:
        reason = f"{len(fitting)} active adapters fit, such as {fitting[1]!r}; leave one of them active"
    elif fitting:
        reason = "that one fits two parameters of the basis; use the model the basis was made from"
    elif active:
        reason = f"it has shape {tuple(model[active[0]].shape)}, the basis was fitted for {shape} (another rank?)"
    elif others:
        reason = "that one is frozen: make its adapter the active one (`model.set_adapter`), or set requires_grad"
    elif _is_of_peft(recorded) and not _is_of_peft(model):
        reason = "the basis is one of a PEFT adapter, and the model has none; add the adapter first"
    elif _is_of_peft(model) and not _is_of_peft(recorded):
        reason = "this is a PEFT model, and the basis was made from one without adapters"
    elif _is_of_peft(model):
        reason = "both are PEFT models, with adapters of another kind or on other modules"
    else:
        reason = "use the model the basis was made from, or fit a new basis"
    return (
        f"the basis was fitted for a parameter {name!r}, which the model does not have (the model has {have} "
        f"instead): {reason}"
    )


@functools.lru_cache(maxsize=64)
def _say_once(recorded: str, found: str, count: int) -> None:
    logger.warning(
        "%d parameters of the basis have another name in this model, and are taken for the same: %s is %s",
        count,
        recorded,
        found,
    )
