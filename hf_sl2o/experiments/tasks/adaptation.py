"""A pretrained network and the rows on which it goes on: runs of one kind, from one start.

`adaptation("e2e-gpt2", data, folder)`: GPT-2 after the restaurants near nothing, on those near something;
`adaptation("cifar-vit", data, folder)`: a ViT after seven classes of CIFAR-10, on the other three. Each takes any of
its rows, and slices: restaurants of one kitchen, images that were turned or made negative.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...foundation.files import load_tensors, save_tensors
from ...meta import Task
from ...subspace import Basis, DenseBasis, IdentityBasis, Layout, Trajectory, fit_basis
from ..data.cifar import batches as image_batches
from ..data.cifar import normalize
from ..data.e2e import E2EDataset, endless_batches
from ..kept.files import made_once
from . import problems
from .named import pretrained_base
from .problem import Problem, labels_of
from .recorded import record
from .texts import python_docs

NAMES = ("e2e-gpt2", "cifar-vit")
JUDGED, SIZE = 2, 500  # batches of test images whose loss chooses, and their rows; the others give the accuracy
FOODS = ("Chinese", "English", "French", "Indian", "Italian", "Japanese")
TOPICS = "help topics"  # of Python: text of another kind
FIGURES = "figures"  # generated images of the same size and number of classes

#: Slices of the images: what is done to each, `(N, 3, 32, 32)` uint8.
TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "upright": lambda images: images,
    "rotated": lambda images: images.rot90(1, (2, 3)),
    "upside down": lambda images: images.flip(2),
    "negative": lambda images: 255 - images,
    "blurred": lambda images: nn.functional.avg_pool2d(images.float(), 4).repeat_interleave(4, 2)
    .repeat_interleave(4, 3).to(torch.uint8),
}  # fmt: skip


@dataclass(frozen=True)
class Adaptation:
    """A start, and rows to go on with.

    Args:
        name (`str`): Of the problem, and the slice.
        build (`Callable`): Returns the network with the weights of its base.
        lora (`Callable`): The same with LoRA factors, r = 8; of images the head is trained too.
        loss (`Callable`): Mean loss of a batch.
        count (`int`): Rows.
        batches (`Callable`): Maps rows (a list of indices) and a seed to endless batches.
        eval_batches (`Sequence`): Held out.
        accuracy (`Callable`, *optional*): Of a network, on images that nothing was chosen by.
        relabelled (`Callable`, *optional*): Maps a seed to the same with a fifth of the labels drawn at random.
    """

    name: str
    build: Callable[[], nn.Module]
    lora: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    count: int
    batches: Callable[[Sequence[int], int], Iterator[Any]]
    eval_batches: Sequence[Any]
    accuracy: Callable[[nn.Module], float] | None = None
    relabelled: Callable[[int], Adaptation] | None = None

    def task(self, rows: Sequence[int], basis: Basis | None = None, *, lora: bool = False, name: str = "") -> Task:
        """A task on these rows; without a basis every scalar of the weights, or of the factors, is a coordinate."""
        build = self.lora if lora else self.build
        if basis is None:
            basis = IdentityBasis(Layout.from_named_parameters(build().named_parameters()))
        return Task(
            name or self.name, build, lambda seed: self.batches(rows, seed), self.loss, basis, self.eval_batches
        )


@dataclass(frozen=True)
class Earlier:
    """What an earlier run leaves: its basis, its weights, and what fitting the basis took."""

    basis: DenseBasis
    weights: Mapping[str, torch.Tensor]
    seconds_of_fit: float


def earlier_run(
    of: Adaptation, rows: Sequence[int], where: Path, *, learning_rate: float, steps: int, dim: int = 40
) -> Earlier:
    """Trains all weights by AdamW with linear decay, once, and keeps a basis of the run and its weights in `where`."""

    def work() -> dict[str, Any]:
        trajectory = Trajectory(where / "trajectory")
        trajectory.clear()
        model = record(
            trajectory, of.build, of.loss, lambda seed: of.batches(rows, seed), learning_rate=learning_rate,
            steps=steps, name=f"{of.name}, the first run",
        )  # fmt: skip
        start = time.perf_counter()
        fit_basis(trajectory, dim, progress=False).save_pretrained(where / "made")
        seconds = time.perf_counter() - start
        save_tensors(where / "made" / "final.safetensors", dict(model.named_parameters()))
        trajectory.delete()
        return {"seconds_of_fit": seconds}

    key = f"{of.name} {learning_rate:g} {steps} {dim} {len(rows)}"
    known = made_once(where / "done.json", key, work, where / "made")
    basis = Basis.from_pretrained(where / "made")
    assert isinstance(basis, DenseBasis)
    weights = load_tensors(where / "made" / "final.safetensors")
    return Earlier(basis, weights, known["seconds_of_fit"])


def with_weights(of: Adaptation, weights: Mapping[str, torch.Tensor]) -> Adaptation:
    """The same from other weights."""

    def build() -> nn.Module:
        model = of.build()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        return model

    return dataclasses.replace(of, build=build)


def adaptation(name: str, data: str, folder: Path, of: str = "") -> Adaptation:
    """Returns the adaptation of a problem, its base made once in `folder`; `of`: a slice of it.

    Raises:
        `ValueError`: there is no such problem or slice.
    """
    if name not in NAMES:
        raise ValueError(f"there is no adaptation {name!r}, expected one of {', '.join(NAMES)}")
    slices = ("", *((*FOODS, TOPICS) if name == "e2e-gpt2" else (*TRANSFORMS, FIGURES)))
    if of not in slices:
        raise ValueError(f"{name} has no slice {of!r}, expected one of {', '.join(slices[1:])}")
    problem, _, weights = pretrained_base(name, data, folder)

    def build() -> nn.Module:
        model = problem.build_model()
        model.load_state_dict(weights, strict=False)  # a tied weight is in the file once
        return model

    make = _texts if name == "e2e-gpt2" else _images
    return make(f"{name}, {of}" if of else name, data, of, problem, build)


def _lora(build: Callable[[], nn.Module], problem: Problem, **options: Any) -> Callable[[], nn.Module]:
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        model = build()
        torch.manual_seed(1)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=problem.lora_targets, **options)
        return get_peft_model(model, config)  # type: ignore[arg-type, no-any-return]

    return adapted


def _texts(name: str, data: str, of: str, problem: Problem, build: Callable[[], nn.Module]) -> Adaptation:
    rows, tokenizer = problems.e2e_rows(data)
    topics = python_docs(capitals=False)["base"]
    pieces = [topics[start : start + 200] for start in range(0, len(topics), 200)]

    def chosen(split: str) -> list[dict[str, str]]:
        if of == TOPICS:
            kept = [piece for place, piece in enumerate(pieces) if (place % 10 == 0) == (split == "validation")]
            return [{"mr": "", "ref": piece} for piece in kept]
        return [row for row in rows[split, "held-back"] if not of or f"food[{of}]" in row["mr"]]

    train, held_out = E2EDataset(chosen("train"), tokenizer), chosen("validation")

    def batches(indices: Sequence[int], seed: int) -> Iterator[Any]:
        part = copy.copy(train)
        part.examples = [train.examples[index] for index in indices]
        return endless_batches(part, 32, seed)

    lora = _lora(build, problem, fan_in_fan_out=True)  # GPT-2's Conv1D keeps its weights transposed
    # The validation split has some of the kitchens alone; a slice is small.
    evals = problems.e2e_evaluation(E2EDataset(held_out, tokenizer), 10 if of else 40) if held_out else []
    return Adaptation(name, build, lora, problem.loss, len(train), batches, evals)


def _images(name: str, data: str, of: str, problem: Problem, build: Callable[[], nn.Module]) -> Adaptation:
    source = "embedded" if of == FIGURES or data == "embedded" else str(Path(data) / "cifar10")
    classes = tuple(labels_of("held-back", 10))
    transform = TRANSFORMS.get(of, TRANSFORMS["upright"])
    sets = {split: problems.cached_cifar(source, split, classes) for split in ("train", "test")}
    images, clean = transform(sets["train"][0]), sets["train"][1]
    tests = transform(sets["test"][0])
    order = torch.randperm(len(tests), generator=torch.Generator().manual_seed(3))  # the classes may be sorted
    parts = [(normalize(tests[rows]), sets["test"][1][rows]) for rows in order.split(SIZE)]

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        right = [model(x).argmax(1) == y for x, y in parts[JUDGED:]]
        return float(torch.cat(right).float().mean())

    def of_labels(labels: torch.Tensor) -> Adaptation:
        def batches(indices: Sequence[int], seed: int) -> Iterator[Any]:
            rows = torch.as_tensor(indices)
            return image_batches(images[rows], labels[rows], 64, seed)

        def relabelled(seed: int) -> Adaptation:
            return of_labels(problems.noisy(clean, classes, torch.Generator().manual_seed(seed)))

        lora = _lora(build, problem, modules_to_save=["classifier"])
        return Adaptation(
            name, build, lora, problem.loss, len(clean), batches, parts[:JUDGED], accuracy, relabelled,
        )  # fmt: skip

    return of_labels(clean)
