"""The problems on which rules are meta-trained and judged: small networks and data that is at hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ..data.cifar import batches as image_batches
from ..data.cifar import load_cifar, normalize, parquet_file
from ..data.e2e import E2EDataset, collate, endless_batches, load_rows, train_tokenizer
from .networks import resnet8, resnet20, small_vit
from .problem import Problem, cross_entropy, labels_of, lm_loss, seeded
from .texts import code_llama, docs_gpt2, docs_gru

VIT_MATRICES = r".*(query|key|value|dense|q_proj|k_proj|v_proj|o_proj|fc1|fc2)"


# Synthetic


def quadratic(data: str) -> Problem:
    """0.5 |A x - b|^2 / rows with noisy b: eigenvalues of A^T A fall as 1 / i^2, as Hessians of networks do."""
    n, rows = 400, 64
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    scale = 1.0 / torch.arange(1, n + 1)
    optimum = torch.randn(n, generator=generator)

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(n))

    def rows_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(rows, n, generator=generator) * scale @ rotation.T  # (rows, n)
        return a, a @ optimum + 0.1 * torch.randn(rows, generator=generator)

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            yield rows_of(generator)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return 0.5 * (batch[0] @ model.x - batch[1]).square().mean()

    evals = [rows_of(torch.Generator().manual_seed(99 + i)) for i in range(8)]
    return Problem(seeded(Point), batches, loss, lambda part: evals, 0.1, 600)


def teacher(data: str) -> Problem:
    """Labels of a random network on Gaussian inputs, a fifth of them drawn at random: noise that no fit removes."""
    generator = torch.Generator().manual_seed(7)
    first, second = torch.randn(32, 32, generator=generator) / 32**0.5, torch.randn(32, 10, generator=generator)

    def rows_of(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, 32, generator=generator)
        labels = (torch.tanh(2 * x @ first) @ second).argmax(dim=1)
        random = torch.randint(10, (rows,), generator=generator)
        return x, torch.where(torch.rand(rows, generator=generator) < 0.2, random, labels)

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            yield rows_of(64, generator)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    evals = [rows_of(2000, torch.Generator().manual_seed(98))]
    return Problem(seeded(build), batches, cross_entropy, lambda part: evals, 3e-3, 1200)


# Images


def digits_mlp(data: str, width: int = 48, layers: int = 2, new_head: bool = False) -> Problem:
    """scikit-learn's 8 x 8 digits, two hidden layers or more; with a new head LoRA adapts the layers below it."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    train, held_out = order[:1400], order[1400:]

    def chosen(part: str, rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.isin(y[rows], torch.tensor(labels_of(part, 10)))]

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator, rows = torch.Generator().manual_seed(seed & 0x7FFF_FFFF), chosen(part, train)
        while True:
            take = rows[torch.randint(len(rows), (64,), generator=generator)]
            yield x[take] + 0.3 * torch.randn(64, 64, generator=generator), y[take]

    def build() -> nn.Module:
        hidden = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))

    evals = lambda part: [(x[chosen(part, held_out)], y[chosen(part, held_out)])]  # noqa: E731
    linear = [str(2 * layer) for layer in range(layers + 1)]
    adapted, heads = (linear[:-1], (linear[-1],)) if new_head else (linear, ())
    rate = 3e-3 * min(1.0, 48 / width)
    return Problem(seeded(build), batches, cross_entropy, evals, rate, 900, f"({'|'.join(adapted)})", heads)


def with_batch_statistics(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Running statistics of BatchNorm do not live in a subspace and lag behind fast steps: batches use their own."""

    def model() -> nn.Module:
        network = build()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return network

    return model


def noisy(labels: torch.Tensor, classes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """A fifth of the labels becomes a random one of these classes."""
    random = torch.tensor(classes)[torch.randint(len(classes), labels.shape, generator=generator)]
    return torch.where(torch.rand(labels.shape, generator=generator) < 0.2, random, labels)


def figures(build: Callable[[], nn.Module], learning_rate: float, steps: int, side: int, targets: str = "") -> Problem:
    """Generated figures of `side` x `side` pixels, batches of 64; a fifth of the labels is random."""

    def part_of(split: str, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = cached_cifar("embedded", split, tuple(labels_of(part, 10)))
        return nn.functional.avg_pool2d(normalize(images), 32 // side), labels

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        x, y = part_of("train", part)
        while True:
            take = torch.randint(len(y), (64,), generator=generator)
            yield x[take], noisy(y[take], labels_of(part, 10), generator)

    def eval_batches(part: str) -> Sequence[Any]:
        x, y = part_of("test", part)
        return [(x[:1000], noisy(y[:1000], labels_of(part, 10), torch.Generator().manual_seed(97)))]

    return Problem(seeded(build), batches, cross_entropy, eval_batches, learning_rate, steps, targets)


def figures_cnn(data: str) -> Problem:
    """Figures of 16 x 16 pixels, four convolutions with BatchNorm."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 12, 1), (12, 12, 1), (12, 24, 2), (24, 24, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))

    return figures(with_batch_statistics(build), 1e-2, 1200, 16)


def figures_vit(data: str) -> Problem:
    """Figures of 32 x 32 pixels, a ViT of 17 tokens."""
    return figures(functools.partial(small_vit, width=48, layers=3, patch=8), 1e-3, 600, 32, VIT_MATRICES)


@functools.cache
def cached_cifar(source: str, split: str, classes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return load_cifar(source, split, classes=classes)


def cifar(
    build: Callable[[], nn.Module], learning_rate: float, steps: int, targets: str = ""
) -> Callable[[str], Problem]:
    def problem(data: str) -> Problem:
        source = data if data == "embedded" else str(Path(data) / "cifar10")

        def batches(part: str, seed: int) -> Iterator[Any]:
            images, labels = cached_cifar(source, "train", tuple(labels_of(part, 10)))
            return image_batches(images, labels, 64, seed)

        def eval_batches(part: str) -> Sequence[Any]:
            images, labels = cached_cifar(source, "test", tuple(labels_of(part, 10)))
            return [(normalize(images[i : i + 500]), labels[i : i + 500]) for i in (0, 500)]

        return Problem(seeded(build), batches, cross_entropy, eval_batches, learning_rate, steps, targets)

    return problem


# Text


def e2e_rows(data: str) -> tuple[dict[tuple[str, str], list[Any]], Any]:
    """Rows of E2E by split and part, and a tokenizer trained on it; restaurants near something are held back."""
    source = data if data == "embedded" else str(Path(data) / "e2e_nlg")
    rows = {split: load_rows(source, split) for split in ("train", "validation")}
    parts = {
        (split, part): [row for row in of_split if ("near[" in row["mr"]) == wanted]
        for split, of_split in rows.items() for part, wanted in (("base", False), ("held-back", True))
    }  # fmt: skip
    return parts, train_tokenizer(rows["train"])


def e2e_evaluation(dataset: E2EDataset, stride: int = 40) -> list[Any]:
    """Four batches of at most 64 rows, each of every `stride`-th row of the set."""
    return [collate(dataset.examples[i::stride][:64]) for i in range(4)]


def e2e_gpt2(data: str) -> Problem:
    """A GPT-2 of two layers on E2E; restaurants near something are held back."""
    rows, tokenizer = e2e_rows(data)
    sets = {key: E2EDataset(chosen, tokenizer) for key, chosen in rows.items()}
    for split in ("train", "validation"):
        sets[split, "all"] = copy.copy(sets[split, "base"])
        sets[split, "all"].examples = sets[split, "base"].examples + sets[split, "held-back"].examples

    def build() -> nn.Module:
        special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=64, n_positions=128, **special)
        config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model

    return Problem(
        seeded(build),
        lambda part, seed: endless_batches(sets["train", part], 32, seed),
        lm_loss,
        lambda part: e2e_evaluation(sets["validation", part]),
        3e-3,
        1200,
        r".*(c_attn|c_proj|c_fc)",
    )


def check_data(names: Sequence[str], data: str, adapted: Sequence[bool]) -> None:
    """Raises where what the problems read is not in the folder `data`, or one has nothing that can be adapted."""
    for name, lora in zip(names, adapted, strict=True):
        if lora and name in NO_ADAPTERS:
            raise ValueError(f"{name!r} cannot be adapted by LoRA: it has no matrices for it; give another task")
        if data == "embedded":
            continue
        if not Path(data).is_dir():
            raise FileNotFoundError(f"--data is {data!r}, expected embedded, or a folder with e2e_nlg and cifar10")
        if name == "e2e-gpt2" or name.startswith("minilm-"):
            for split in ("train", "validation"):
                load_rows(str(Path(data) / "e2e_nlg"), split)
        elif "cifar" in name:
            for split in ("train", "test"):
                parquet_file(str(Path(data) / "cifar10"), split, ("img", "label"))


#: Without a regular expression of matrices that LoRA adapts.
NO_ADAPTERS = ("quadratic", "teacher", "figures-cnn", "docs-gru", "cifar-resnet8", "cifar-resnet20")

PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "quadratic": quadratic,
    "teacher": teacher,
    "digits-mlp": digits_mlp,
    "digits-mlp-of-384": functools.partial(digits_mlp, width=384, new_head=True),
    "digits-mlp-of-96": functools.partial(digits_mlp, width=96, layers=4, new_head=True),
    "figures-cnn": figures_cnn,
    "figures-vit": figures_vit,
    "e2e-gpt2": e2e_gpt2,
    "docs-gpt2": docs_gpt2,
    "docs-gpt2-of-32": functools.partial(docs_gpt2, width=32, layers=1, count=8, window=24),
    "docs-gpt2-of-256": functools.partial(docs_gpt2, width=256, layers=2, rate=1e-3, count=8, window=32),
    "docs-gpt2-of-768": functools.partial(docs_gpt2, width=768, layers=2, rate=3e-4, steps=800, count=4, window=32),
    "docs-gru": docs_gru,
    "code-llama": code_llama,
    "cifar-resnet8": cifar(with_batch_statistics(resnet8), 1e-2, 1200),
    "cifar-resnet20": cifar(with_batch_statistics(resnet20), 1e-2, 1200),
    **{  # the same network in two widths
        f"cifar-vit-of-{width}": cifar(
            functools.partial(small_vit, width=width, patch=8), 1e-3, 600, r".*(query|value|q_proj|v_proj)"
        )
        for width in (64, 192)
    },
    "cifar-vit": cifar(small_vit, 3e-3, 1500, VIT_MATRICES),
}
