"""What a problem is: a network on data, from which tasks are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Problem:
    """A network on data. `part` of a batch function: "base" or "held-back" (LoRA), or "all"."""

    build_model: Callable[[], nn.Module]
    batches: Callable[[str, int], Iterator[Any]]  # (part, seed), endless
    loss: Callable[[nn.Module, Any], torch.Tensor]
    eval_batches: Callable[[str], Sequence[Any]]
    learning_rate: float  # AdamW's, of the run that is recorded or makes the base; linear decay
    steps: int  # of that run; 0: the model's own weights are the base
    lora_targets: str = ""  # regular expression over module names
    heads: tuple[str, ...] = ()  # new modules, trained whole beside LoRA


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return model


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def lm_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def labels_of(part: str, classes: int) -> list[int]:
    """The last third of the classes is held back."""
    first = classes - classes // 3
    return {"base": list(range(first)), "held-back": list(range(first, classes)), "all": list(range(classes))}[part]
