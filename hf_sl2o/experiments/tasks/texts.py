"""Problems on bytes of text that every Python ships with: a GRU, GPT-2 in several widths, Llama."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from .problem import Problem, lm_loss, seeded


def text_problem(
    texts: dict[str, str], build: Callable[[], nn.Module], loss: Callable[..., torch.Tensor], learning_rate: float,
    steps: int, targets: str = "", count: int = 16, width: int = 64,
) -> Problem:  # fmt: skip
    """Bytes of two parts of a text ("base", "held-back"), in windows; the last twentieth is for validation."""
    parts = {
        name: torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64) for name, text in texts.items()
    }
    parts["all"] = torch.cat([parts["base"], parts["held-back"]])
    cuts = {name: len(ids) - len(ids) // 20 for name, ids in parts.items()}

    def windows(ids: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = ids[starts[:, None] + torch.arange(width)]  # (batch, width)
        return {"input_ids": rows, "labels": rows}

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator, ids = torch.Generator().manual_seed(seed & 0x7FFF_FFFF), parts[part][: cuts[part]]
        while True:
            yield windows(ids, torch.randint(len(ids) - width, (count,), generator=generator))

    def eval_batches(part: str) -> Sequence[Any]:
        ids = parts[part][cuts[part] :]
        return [windows(ids, torch.linspace(0, len(ids) - width, 12 * count).long())]

    return Problem(seeded(build), batches, loss, eval_batches, learning_rate, steps, targets)


def python_docs(*, capitals: bool) -> dict[str, str]:
    """The help topics that every Python ships with; the half that is held back may be in capitals."""
    topics = sorted(pydoc_data.topics.topics.items())
    half = len(topics) // 2
    base, held_back = ("".join(text for _, text in part) for part in (topics[:half], topics[half:]))
    return {"base": base, "held-back": held_back.upper() if capitals else held_back}


def python_code() -> dict[str, str]:
    """Source code of the standard library: the base sees the email package, unittest is held back."""
    folder = Path(sysconfig.get_paths()["stdlib"])

    def text(package: str) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in sorted((folder / package).glob("*.py")))

    return {"base": text("email") + text("asyncio"), "held-back": text("unittest")}


class CharGRU(nn.Module):
    """Embedding, one GRU layer, linear head over 128 bytes."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 48)
        self.gru = nn.GRU(48, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(ids))[0])  # type: ignore[no-any-return]


def next_byte_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["input_ids"]
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def docs_gru(data: str) -> Problem:
    return text_problem(python_docs(capitals=False), CharGRU, next_byte_loss, 5e-3, 1200)


def docs_gpt2(
    data: str,
    width: int = 64,
    layers: int = 3,
    rate: float = 3e-3,
    steps: int = 1500,
    count: int = 16,
    window: int = 64,
) -> Problem:
    """GPT-2 on batches of `count` windows of so many bytes."""

    def build() -> nn.Module:
        sizes: dict[str, Any] = {"n_layer": layers, "n_head": 4, "n_embd": width, "n_positions": window}
        config = GPT2Config(vocab_size=128, bos_token_id=0, eos_token_id=0, **sizes)
        config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model

    texts, targets = python_docs(capitals=True), r".*(c_attn|c_proj|c_fc)"
    return text_problem(texts, build, lm_loss, rate, steps, targets, count, window)


def code_llama(data: str) -> Problem:
    def build() -> nn.Module:
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.loss_type = "ForCausalLM"
        return model

    return text_problem(
        python_code(), build, lm_loss, 3e-3, 1500, r".*(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"
    )
