"""What a step of training costs a rank, in bytes and seconds, before anything is made: formulas over shapes.

Counted: weights, gradients, what the optimizer keeps, the basis, bytes on the wire. Not counted: activations,
temporary tensors of a step, and tensors of d numbers. Times are a roofline (Williams et al. 2009): bytes at the full
bandwidth, products at an assumed share of the peak.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..foundation.checked import check_integer, check_number
from ..subspace.layout import Layout
from ..subspace.storage import STORAGES, Ranks, factor_ranks, matrix_shape, storage_bytes

#: Share of the peak that products reach: Llama 3 was trained at 38 to 43 % (arXiv:2407.21783, table 4).
UTILISATION = 0.4
#: Normal numbers a second that one thread of `torch.randn` makes (seen: 0.9e8 to 1.7e8). A random basis is made on the
#: host, whatever the device.
HOST_NORMALS = 1.5e8
PER_NODE = 8  # devices that share the fast link
ALL_STORAGES = (*STORAGES, "random")
_NUMBERED = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Device:
    """Peaks of a device: FLOP/s of dense products by dtype, bytes a second and bytes of its memory, and bytes a second
    that it sends within a node of 8 (`link`) and to another node (`network`).

    Raises:
        `ValueError`: one is not a finite number above 0.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    link: float
    network: float

    def __post_init__(self) -> None:
        peaks = {f"flops ({dtype})": peak for dtype, peak in self.flops.items()}
        for name in ("bandwidth", "memory", "link", "network"):
            peaks[name] = getattr(self, name)
        for name, value in peaks.items():
            check_number(f"{name} of the device", value, above=0.0)


#: NVIDIA's data sheets: dense peaks (half of those "with sparsity"), NVLink one way (half of the total), and the
#: network card of each GPU in a DGX. fp32 without TF32, as is torch's default.
DEVICES = {
    # A100 80GB SXM data sheet: 312 and 19.5 TFLOPS, 2,039 GB/s, NVLink 600 GB/s; DGX A100: ConnectX-6, 200 Gb/s.
    "a100": Device("a100", {"bf16": 312e12, "fp32": 19.5e12}, 2.039e12, 80e9, 300e9, 25e9),
    # H100 SXM data sheet: 989 and 67 TFLOPS, 3.35 TB/s, NVLink 900 GB/s; DGX H100: ConnectX-7, 400 Gb/s.
    "h100": Device("h100", {"bf16": 989e12, "fp32": 67e12}, 3.35e12, 80e9, 450e9, 50e9),
    # H200 SXM data sheet: the H100's with 141 GB at 4.8 TB/s; DGX H200 as DGX H100.
    "h200": Device("h200", {"bf16": 989e12, "fp32": 67e12}, 4.8e12, 141e9, 450e9, 50e9),
    # One of the two Xeon Platinum 8480C of a DGX H100: 56 cores at 2.0 GHz (base) of 64 fp32 operations a cycle (two
    # AVX-512 FMA units) and 2,048 of bf16 (AMX), 8 channels of DDR5-4800, half of 2 TB, and one 400 Gb/s card.
    "cpu": Device("cpu", {"bf16": 56 * 2.0e9 * 2048, "fp32": 56 * 2.0e9 * 64}, 307.2e9, 1e12, 50e9, 50e9),
}


class Parameter(NamedTuple):
    """One parameter of a model: name, shape, bytes a number, whether it is trained, and whether it is used twice."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool = True
    tied: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def shard(self, ranks: int) -> Parameter:
        """The first rank's share, which is the largest: FSDP2 cuts the first dimension."""
        return self._replace(shape=(-(-self.shape[0] // ranks), *self.shape[1:])) if self.shape else self


@dataclass(frozen=True)
class Model:
    """A model's parameters, each once.

    Args:
        parameters (`tuple[Parameter, ...]`): Also those that are frozen.
        buffers (`int`, *optional*, defaults to 0): Bytes of its buffers.

    Raises:
        `ValueError`: nothing is trained.

    Example:

    ```python
    >>> from hf_sl2o.experiments.planning import Model, Parameter
    >>> model = Model((Parameter("w", (30, 20), 4), Parameter("b", (30,), 4)))
    >>> model.n, model.shard(8).n
    (630, 84)
    ```
    """

    parameters: tuple[Parameter, ...]
    buffers: int = 0

    def __post_init__(self) -> None:
        if not self.n:
            raise ValueError("the model has no parameter that is trained, and there is nothing to plan")

    @property
    def trained(self) -> list[Parameter]:
        return [p for p in self.parameters if p.trained and p.numel]

    @property
    def n(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel for p in self.trained)

    @property
    def layout(self) -> Layout:
        """Of what is trained."""
        return Layout(tuple(p.name for p in self.trained), tuple(p.shape for p in self.trained))

    def shard(self, ranks: int) -> Model:
        """What the first rank of FSDP2 holds."""
        return Model(tuple(p.shard(ranks) for p in self.parameters), self.buffers)

    def units(self) -> tuple[list[Parameter], list[list[Parameter]]]:
        """What FSDP2 gathers at a time: the parameters outside all layers, and those of each layer."""
        root: list[Parameter] = []
        layers: dict[str, list[Parameter]] = {}
        for p in self.parameters:
            found = _NUMBERED.search(p.name)
            (layers.setdefault(p.name[: found.end()], []) if found else root).append(p)
        return root, list(layers.values())


@dataclass(frozen=True)
class Row:
    """One way to train on a number of devices; bytes and seconds are those of the fullest rank, of one step.

    `state` is what the optimizer keeps beside the basis; `average` is the part of it that is for the running average.
    Under FSDP2 weights and gradients include what is gathered at a time. `seconds` are those of `"compute"`, `"wire"`
    and `"optimizer"`; `bound` names the largest. `step_s` is `max(compute, wire) + optimizer`, since gradients are
    sent while backward goes on.
    """

    gpus: int
    method: str
    storage: str | None
    spread: str
    streamed: bool
    weights: int
    gradients: int
    state: int
    average: int
    basis: int
    total: int
    fits: bool
    wire: int
    seconds: dict[str, float]
    step_s: float
    bound: str


# Bytes


def adamw_state(model: Model) -> int:
    """Two fp32 moments, an fp32 step of each parameter, and an fp32 copy of weights below that precision.

    16 bytes a number with weights and gradients, in fp32 or mixed (Rajbhandari et al., ZeRO, arXiv:1910.02054).
    """
    return sum(p.numel * (8 if p.itemsize >= 4 else 12) + 4 for p in model.trained)


def subspace_state(model: Model, *, average: bool) -> int:
    """Of `SubspaceOptimizer`: what was rounded off weights below fp32, a number each; nothing of others.

    With an average also the way from one point to the other; of rounded weights the other point and its rest.
    """
    copies = {True: (1, 3), False: (0, 1)}[average]
    return sum(p.nbytes * copies[p.itemsize < 4] for p in model.trained)


def waiting_gradient(model: Model) -> int:
    """The first gradient of a parameter that is used twice waits in autograd until the second one is made."""
    return sum(p.nbytes for p in model.trained if p.tied)


def live_gradients(model: Model, *, ranks: int = 1, streamed_dim: int | None = None) -> int:
    """Bytes of gradients that live at most, without FSDP2.

    Kept: all, and under DDP its buckets, a copy of all. Streamed: the largest, and the fp32 `.grad` of the smallest
    parameter that holds d numbers.

    Raises:
        `ValueError`: none holds `streamed_dim` numbers.
    """
    if streamed_dim is None:
        return sum(p.nbytes for p in model.trained) * (1 if ranks == 1 else 2) + waiting_gradient(model)
    carriers = [(p.itemsize < 4, p.numel) for p in model.trained if p.numel >= streamed_dim]
    if not carriers:
        raise ValueError(
            f"dim is {streamed_dim}, and the largest parameter has {max(p.numel for p in model.trained)} numbers: "
            "streamed gradients need one that holds dim; choose a smaller dim"
        )
    return max(p.nbytes for p in model.trained) + 4 * min(carriers)[1] + waiting_gradient(model)


def sharded_memory(model: Model, ranks: int, *, streamed: bool) -> tuple[int, int]:
    """Bytes of weights and gradients of the fullest rank of FSDP2, which gathers again for backward.

    Gathered are the parameters outside all layers, the layer that is used and the next one. Whole gradients are those
    of one unit, sharded ones those of all, or streamed of one.
    """
    shard, (root, layers) = model.shard(ranks), model.units()

    def size(group: Iterable[Parameter], trained: bool = False) -> int:
        return sum(p.nbytes for p in group if p.trained or not trained)

    weights = sum(p.nbytes for p in shard.parameters) + model.buffers
    weights += size(root) + sum(sorted(map(size, layers))[-2:])
    whole = max(size(unit, trained=True) for unit in (root, *layers))
    kept = [size((p.shard(ranks) for p in unit), trained=True) for unit in (root, *layers)]
    return weights, whole + waiting_gradient(model) + (max(kept) if streamed else sum(kept))


def basis_bytes(model: Model, dim: int, storage: str, ranks: int = 1) -> int:
    """Bytes of a rank's share of a basis whose rows are cut as FSDP2 cuts the weights; whole with one rank.

    Of Tucker the left factors and what is kept whole are cut; cores and right factors are on each rank.
    """
    if ranks == 1 or storage == "random":
        return storage_bytes(model.layout, dim, storage)
    shards = model.shard(ranks).layout
    if storage != "tucker":
        return storage_bytes(shards, dim, storage)
    sizes = Ranks()
    whole = sizes.of_leading(dim)
    total = 4 * dim * dim + (storage_bytes(shards, whole, f"int{sizes.bits}") if whole else 0)
    for shape, own in zip(model.layout.shapes, shards.shapes, strict=True):
        (m, q), (rows, _) = matrix_shape(shape), matrix_shape(own)
        chosen = factor_ranks(shape, dim - whole, sizes)
        if chosen is None:
            total += 4 * (dim - whole) * math.prod(own)
            continue
        left, right = chosen
        total += 4 * (dim - whole) * (left if left < m else rows) * right
        total += 4 * ((left * rows if left < m else 0) + (right * q if right < q else 0))
    return total


def ring_bytes(payload: float, ranks: int) -> int:
    """Bytes a rank sends in a ring all-gather or reduce-scatter; an all-reduce is both (Patarasuk and Yuan 2009)."""
    return round(payload * (ranks - 1) / ranks)


def wire_bytes(model: Model, ranks: int, spread: str, *, streamed: bool = False, dim: int = 0) -> int:
    """Bytes that a rank sends a step: all gradients under DDP, or d fp32 numbers where they are streamed.

    FSDP2 gathers the weights twice, scatters the gradients, and then sums d numbers, streamed or not.
    """
    numbers = 2 * ring_bytes(4 * dim, ranks)
    gradients = sum(p.nbytes for p in model.trained)
    if spread == "FSDP2":
        weights = sum(p.nbytes for p in model.parameters)
        return ring_bytes(2 * weights + gradients, ranks) + numbers
    return numbers if streamed else 2 * ring_bytes(gradients, ranks)


def subspace_traffic(model: Model, basis: int, *, average: bool) -> int:
    """Bytes that a step in a subspace moves: U to project and U to lift, gradients, and passes over the weights.

    As `optim._weights` makes them for weights of fp32, and (below) of less: read and write 2 (with what was rounded
    off 4). With an average 16 (22): to publish the weights and the way, 4 (8); to go back to the last step, 7 (4);
    three sums, and on a GPU a product, that see whether somebody changed the weights, 5 (10).
    """
    passes = {True: (16, 22), False: (2, 4)}[average]
    return 2 * basis + sum(p.nbytes * (1 + passes[p.itemsize < 4]) for p in model.trained)


# The plan


def plan(
    full: Model,
    adapter: Model | None = None,
    *,
    moved: Model | None = None,
    dim: int = 40,
    tokens: int = 4096,
    gpus: Sequence[int] = (1, 8, 64),
    device: Device = DEVICES["h100"],
    dtype: str = "bf16",
    storages: Sequence[str] = ALL_STORAGES,
    average: bool = True,
) -> list[Row]:
    """Plans AdamW over all weights and over an adapter, and SL2O with each storage of its basis.

    Args:
        full, adapter ([`Model`]): With all weights trained; with the factors of LoRA alone, where there are any.
        moved ([`Model`], *optional*, defaults to `full`): What SL2O moves.
        dim (`int`, *optional*, defaults to 40): d, the paper's number of directions.
        tokens, gpus: Tokens of a rank's batch; numbers of devices.
        device ([`Device`]), dtype (`str`): What trains, and the dtype of its products.
        storages (`Sequence[str]`, *optional*): Of the basis; by default all.
        average (`bool`, *optional*, defaults to `True`): Whether a running average is kept, as by the rule `default`.

    Returns:
        `list[Row]`: DDP and FSDP2, gradients kept and streamed; on one device neither is needed.

    Raises:
        `ValueError`: an unknown storage or dtype, a number out of its range, `dim` above n.

    Example:

    ```python
    >>> from hf_sl2o.experiments.planning import Model, Parameter, plan
    >>> model = Model((Parameter("w", (30, 20), 4), Parameter("b", (30,), 4)))
    >>> rows = plan(model, dim=4, gpus=[8], dtype="fp32", storages=["fp32"])
    >>> {(row.method, row.streamed): row.wire for row in rows if row.spread == "DDP"}
    {('AdamW', False): 4410, ('SL2O', False): 4410, ('SL2O', True): 28}
    ```
    """
    moved = full if moved is None else moved
    check_integer("dim", dim, 1, moved.n)
    check_integer("tokens", tokens, 1)
    for name, value, known in [
        ("dtype", dtype, tuple(device.flops)),
        *(("storage", s, ALL_STORAGES) for s in storages),
    ]:
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    rows, rate = [], device.flops[dtype] * UTILISATION
    for count in gpus:
        check_integer("gpus", count, 1)
        for spread in ("",) if count == 1 else ("DDP", "FSDP2"):
            common = _Common(count, spread, tokens, rate, device, dim, average)
            rows.append(common.row("AdamW", full, None, streamed=False))
            if adapter is not None:
                rows.append(common.row("LoRA + AdamW", adapter, None, streamed=False))
            rows += [common.row("SL2O", moved, s, streamed=flag) for s in storages for flag in (False, True)]
    return rows


class _Common(NamedTuple):
    """What rows of one number of devices share; `rate` is the FLOP/s that products reach."""

    gpus: int
    spread: str
    tokens: int
    rate: float
    device: Device
    dim: int
    average: bool

    def row(self, method: str, model: Model, storage: str | None, *, streamed: bool) -> Row:
        gpus, sharded, dim = self.gpus, self.spread == "FSDP2", self.dim if storage else 0
        own = model.shard(gpus) if sharded else model
        if sharded:
            weights, gradients = sharded_memory(model, gpus, streamed=streamed)
        else:
            weights = sum(p.nbytes for p in model.parameters) + model.buffers
            gradients = live_gradients(model, ranks=gpus, streamed_dim=dim if streamed else None)
        basis, average = 0, 0
        if storage is None:
            # AdamW reads g, m, v and the weights, writes m, v and the weights: 7 fp32 numbers. With bf16 weights and
            # gradients it reads the fp32 copy, and writes both: 28 bytes too.
            state, traffic = adamw_state(own), 28 * own.n
        else:
            state = subspace_state(own, average=self.average)
            average = state - subspace_state(own, average=False)
            basis = basis_bytes(model, dim, storage, gpus if sharded else 1)
            traffic = subspace_traffic(own, basis, average=self.average)
        total = weights + gradients + state + basis
        wire = 0 if gpus == 1 else wire_bytes(model, gpus, self.spread, streamed=streamed, dim=dim)
        # backward forms no gradient of a frozen weight: 4 operations a token instead of 6 (Kaplan et al. 2020)
        times = {
            "compute": (4 * sum(p.numel for p in model.parameters) + 2 * model.n) * self.tokens / self.rate,
            "wire": wire / (self.device.link if gpus <= PER_NODE else self.device.network),
            "optimizer": traffic / self.device.bandwidth,
        }
        if storage == "random":  # each rank makes all directions, to project and to lift
            times["optimizer"] += 2 * dim * model.n / HOST_NORMALS
        step = max(times["compute"], times["wire"]) + times["optimizer"]
        return Row(
            gpus, method, storage, self.spread, streamed, weights, gradients, state, average, basis, total,
            total <= self.device.memory, wire, times, step, max(times, key=lambda name: times[name]),
        )  # fmt: skip
