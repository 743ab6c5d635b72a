"""Whether all processes of a distributed run were started alike; where not, the first difference is named on each.

A learned optimizer keeps its state on every process by itself: ranks with another basis, rule or rate would train
apart without a word, and ranks with another number of steps would wait for each other for ever.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer

from .native import loops_fact

_POLL_SECONDS = 0.02
_GOODBYE_SECONDS = 5.0
_SHOWN = 80

_calls: dict[str, int] = {}  # comparisons that ended, by what was compared


def check_same_on_all_ranks(facts: Mapping[str, Any], what: str, timeout: float = 300.0) -> None:
    """Raises on every rank where `facts` differ between the ranks; without several processes it does nothing.

    The facts go through the key-value store of the default process group, not through a collective: a rank that never
    comes here is noticed, and cannot meet another collective of its own in this one.

    Args:
        facts (`Mapping`): JSON values (numbers, text, None, lists and dicts of them), the same keys on each rank.
        what (`str`): What is compared, such as `"training"`; part of the messages. Calls with the same `what` are
            paired in their order.
        timeout (`float`, *optional*, defaults to 300.0): Seconds to wait for the other ranks.

    Raises:
        `ValueError`: a difference; the first one is named with its values and ranks.
        `RuntimeError`: a rank did not get here in time, or the process that holds the store is gone.

    Example:

    ```python
    >>> from hf_sl2o.foundation.ranks import check_same_on_all_ranks
    >>> check_same_on_all_ranks({"learning_rate": 1.0}, "training")  # one process: nothing to compare
    ```
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    store = _default_store()
    if store is None:  # another torch, or a backend without a store: a collective is better than nothing
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, json.loads(json.dumps(facts)))
    else:
        everyone = _exchange(store, json.dumps(facts), what, timeout)
    if text := first_difference(everyone):
        raise ValueError(f"{text}; the processes of a run need the same {what} settings: start all of them alike")


def _default_store() -> Any:
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()


def _exchange(store: Any, text: str, what: str, timeout: float) -> list[Any]:
    """Returns what each rank wrote, in order; a comparison that timed out may be tried again by all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # A store may outlive the processes that torchrun starts again; they have numbers of their own then.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    head = f"hf_sl2o/{what}/{attempt}/{_calls.get(what, 0)}"
    facts_of, seen_by = ([f"{head}/{kind}/{r}" for r in range(world)] for kind in ("facts", "seen"))
    try:
        store.set(facts_of[rank], text)
        missing = _wait(store, facts_of, timeout)
        if missing:
            store.delete_key(facts_of[rank])  # who comes too late does not go on alone
            raise _absent(missing, what, timeout)
        everyone = [json.loads(store.get(key)) for key in facts_of]
    except dist.DistError as error:
        raise RuntimeError(
            f"rank {rank} cannot compare its {what} settings with the other ranks, since the process that holds the "
            f"store is gone ({str(error).splitlines()[0]}); its own output says why"
        ) from error
    _calls[what] = _calls.get(what, 0) + 1
    try:  # nobody leaves, and takes the store along, before all have read
        store.set(seen_by[rank], "")
        if not _wait(store, seen_by, min(timeout, _GOODBYE_SECONDS)):
            store.delete_key(facts_of[rank])
    except dist.DistError:
        pass  # the one with the store was the last to wait for
    return everyone


def _wait(store: Any, keys: list[str], timeout: float) -> list[int]:
    """Returns indices of the keys that are not there after `timeout` seconds; asks, so that the store stays free."""
    end = time.monotonic() + timeout
    while not store.check(keys):
        if time.monotonic() > end:
            return [index for index, key in enumerate(keys) if not store.check([key])]
        time.sleep(_POLL_SECONDS)
    return []


def _absent(ranks: list[int], what: str, timeout: float) -> RuntimeError:
    return RuntimeError(
        f"{_named(ranks)} did not get here within {timeout:g} s to compare its {what} settings: did it start with "
        "another optim, or stop with an error of its own? Start all processes with the same command"
    )


def first_difference(everyone: list[Any]) -> str | None:
    """Says where the dictionaries first differ, by rank; None if they are the same.

    Example:

    ```python
    >>> from hf_sl2o.foundation.ranks import first_difference
    >>> first_difference([{"seed": 1, "lr": 1.0}, {"seed": 1, "lr": 0.5}])
    'lr is 1.0 on rank 0 and 0.5 on rank 1'
    ```
    """
    flat = [dict(_leaves(facts)) for facts in everyone]
    for name in dict.fromkeys(name for facts in flat for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(flat):
            ranks.setdefault(_shown(facts, name), []).append(rank)
        if len(ranks) > 1:
            return f"{name} is " + " and ".join(f"{value} on {_named(those)}" for value, those in ranks.items())
    return None


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not name):
        for key, below in value.items():
            yield from _leaves(below, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(facts: dict[str, Any], name: str) -> str:
    if name not in facts:
        return "not given"
    text = json.dumps(facts[name])
    # what is cut off has a digest, so that two long values do not read the same
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({_digest(text)})"


def _named(ranks: list[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


# What a run is started with, as JSON values


def optimizer_facts(optimizer: Optimizer) -> dict[str, Any]:
    """Returns what makes an optimizer's steps: its class, basis, rule, hyperparameters, and what it moves.

    Args:
        optimizer (`Optimizer`): Any; Accelerate's wrapper is looked through. Of the parameters only names, shapes and
            their number count, since a DistributedDataParallel model begins with the first rank's values.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.foundation.ranks import optimizer_facts
    >>> facts = optimizer_facts(torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.5))
    >>> facts["optimizer"], facts["lr"], facts["parameters"]
    ('SGD', 0.5, 2)
    ```
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    facts: dict[str, Any] = {"optimizer": type(optimizer).__name__, "compiled loops": loops_fact()}
    if (basis := getattr(optimizer, "basis", None)) is not None:
        facts["basis"] = basis_facts(basis)
    inner = getattr(optimizer, "inner", None)
    if inner is not None:
        facts["inner"] = type(inner).__name__
    if (rule := getattr(optimizer if inner is None else inner, "rule", None)) is not None:
        facts["rule"] = rule_facts(rule)
    facts |= {
        name: as_json(getattr(optimizer, name)) for name in ("average", "max_grad_norm") if hasattr(optimizer, name)
    }
    described = []
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "param_names", "basis_fingerprint", "rule_fingerprint"):
                facts[f"group {index}'s {key}" if index else key] = as_json(value)
        names = group.get("param_names", [None] * len(group["params"]))
        described += [[name, list(p.shape), str(p.dtype)] for name, p in zip(names, group["params"], strict=True)]
    return {**facts, "parameters": len(described), "names_and_shapes": _digest(json.dumps(described))}


def basis_facts(basis: Any) -> dict[str, Any]:
    """Returns what tells one [`Basis`] from another; of stored directions a few columns of each parameter are read."""
    facts = {"dim": basis.dim, "fingerprint": basis.fingerprint}
    if basis.kind == "dense":
        digest = hashlib.sha256()
        for index in range(len(basis.layout.names)):
            for _, _, columns in basis._columns(index, 16):
                digest.update(columns[:, :16].double().cpu().contiguous().numpy().tobytes())
                break
        facts["directions"] = digest.hexdigest()[:16]
    return facts


def rule_facts(rule: Any, *, weights: bool = True) -> dict[str, Any]:
    """Returns what tells one [`Rule`] from another: class, configuration, and (unless `weights=False`) fingerprint."""
    facts = {"kind": type(rule).__name__, "config": as_json(rule.config)}
    return {**facts, "fingerprint": rule.fingerprint} if weights else facts


def as_json(value: Any) -> Any:
    """As JSON values, the same in each process: no addresses, no iteration order of sets."""
    if isinstance(value, enum.Enum):
        return as_json(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if torch.is_tensor(value):
        return value.tolist() if value.numel() <= 16 else {"shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {str(as_json(key)): as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(one) for one in value), key=json.dumps)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name, None)) for field in dataclasses.fields(value)}
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
