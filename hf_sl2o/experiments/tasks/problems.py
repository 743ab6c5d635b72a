"""The problems on which rules are meta-trained and judged: small networks and data that is at hand."""

from __future__ import annotations

import copy
import functools
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ..data.cifar import batches as image_batches
from ..data.cifar import load_cifar, normalize, parquet_file
from ..data.e2e import E2EDataset, collate, endless_batches, load_rows, train_tokenizer
from .networks import resnet8, resnet20, small_vit

VIT_MATRICES = r".*(query|key|value|dense|q_proj|k_proj|v_proj|o_proj|fc1|fc2)"


@dataclass(frozen=True)
class Problem:
    """A network on data. `part` of a batch function: "base" or "held-back" (LoRA), or "all"."""

    build_model: Callable[[], nn.Module]
    batches: Callable[[str, int], Iterator[Any]]  # (part, seed), endless
    loss: Callable[[nn.Module, Any], torch.Tensor]
    eval_batches: Callable[[str], Sequence[Any]]
    learning_rate: float  # AdamW's, of the run that is recorded or makes the base; linear decay
    steps: int  # of that run
    lora_targets: str = ""  # regular expression over module names


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


def digits_mlp(data: str) -> Problem:
    """scikit-learn's 8 x 8 digits, two hidden layers."""
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
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))

    evals = lambda part: [(x[chosen(part, held_out)], y[chosen(part, held_out)])]  # noqa: E731
    return Problem(seeded(build), batches, cross_entropy, evals, 3e-3, 900, r"[024]")


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


def e2e_gpt2(data: str) -> Problem:
    """A GPT-2 of two layers on E2E; restaurants near something are held back."""
    source = data if data == "embedded" else str(Path(data) / "e2e_nlg")
    rows = {split: load_rows(source, split) for split in ("train", "validation")}
    tokenizer = train_tokenizer(rows["train"])
    sets = {}
    for split, of_split in rows.items():
        for part, wanted in (("base", False), ("held-back", True)):
            sets[split, part] = E2EDataset([row for row in of_split if ("near[" in row["mr"]) == wanted], tokenizer)
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
        lambda part: [collate(sets["validation", part].examples[i::40][:64]) for i in range(4)],
        3e-3,
        1200,
        r".*(c_attn|c_proj|c_fc)",
    )


def text_problem(
    texts: dict[str, str], build: Callable[[], nn.Module], loss: Callable[..., torch.Tensor], learning_rate: float,
    steps: int, targets: str = "",
) -> Problem:  # fmt: skip
    """Bytes of two parts of a text ("base", "held-back"), in windows of 64; the last twentieth is for validation."""
    parts = {
        name: torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64) for name, text in texts.items()
    }
    parts["all"] = torch.cat([parts["base"], parts["held-back"]])
    cuts = {name: len(ids) - len(ids) // 20 for name, ids in parts.items()}

    def windows(ids: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = ids[starts[:, None] + torch.arange(64)]  # (batch, 64)
        return {"input_ids": rows, "labels": rows}

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator, ids = torch.Generator().manual_seed(seed & 0x7FFF_FFFF), parts[part][: cuts[part]]
        while True:
            yield windows(ids, torch.randint(len(ids) - 64, (16,), generator=generator))

    def eval_batches(part: str) -> Sequence[Any]:
        ids = parts[part][cuts[part] :]
        return [windows(ids, torch.linspace(0, len(ids) - 64, 192).long())]

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


def docs_gpt2(data: str) -> Problem:
    def build() -> nn.Module:
        config = GPT2Config(
            vocab_size=128, n_layer=3, n_head=4, n_embd=64, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model

    return text_problem(python_docs(capitals=True), build, lm_loss, 3e-3, 1500, r".*(c_attn|c_proj|c_fc)")


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


def check_data(names: Sequence[str], data: str, adapted: Sequence[bool]) -> None:
    """Raises where what the problems read is not in the folder `data`, or one has nothing that can be adapted."""
    for name, lora in zip(names, adapted, strict=True):
        if lora and name in NO_ADAPTERS:
            raise ValueError(f"{name!r} cannot be adapted by LoRA: it has no matrices for it; give another task")
        if data == "embedded":
            continue
        if not Path(data).is_dir():
            raise FileNotFoundError(f"--data is {data!r}, expected embedded, or a folder with e2e_nlg and cifar10")
        if name == "e2e-gpt2":
            for split in ("train", "validation"):
                load_rows(str(Path(data) / "e2e_nlg"), split)
        elif name.startswith("cifar-"):
            for split in ("train", "test"):
                parquet_file(str(Path(data) / "cifar10"), split, ("img", "label"))


#: Without a regular expression of matrices that LoRA adapts.
NO_ADAPTERS = ("quadratic", "teacher", "figures-cnn", "docs-gru", "cifar-resnet8", "cifar-resnet20")

PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "quadratic": quadratic,
    "teacher": teacher,
    "digits-mlp": digits_mlp,
    "figures-cnn": figures_cnn,
    "figures-vit": figures_vit,
    "e2e-gpt2": e2e_gpt2,
    "docs-gpt2": docs_gpt2,
    "docs-gru": docs_gru,
    "code-llama": code_llama,
    "cifar-resnet8": cifar(with_batch_statistics(resnet8), 1e-2, 1200),
    "cifar-resnet20": cifar(with_batch_statistics(resnet20), 1e-2, 1200),
    # The same network in two widths, for recipes/studies/width.py
    **{
        f"cifar-vit-of-{width}": cifar(
            functools.partial(small_vit, width=width, patch=8), 1e-3, 600, r".*(query|value|q_proj|v_proj)"
        )
        for width in (64, 192)
    },
    "cifar-vit": cifar(small_vit, 3e-3, 1500, VIT_MATRICES),
}
