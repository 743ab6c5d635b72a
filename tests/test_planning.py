"""What a step will cost: formulas against small cases by hand, and against the bytes of what they stand for."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sl2o import Layout, RandomBasis, SubspaceOptimizer, fit_basis
from hf_sl2o.experiments.planning import (
    ALL_STORAGES,
    DEVICES,
    HOST_NORMALS,
    UTILISATION,
    Device,
    Model,
    Parameter,
    adamw_state,
    basis_bytes,
    live_gradients,
    plan,
    ring_bytes,
    sharded_memory,
    subspace_state,
    subspace_traffic,
    wire_bytes,
)
from hf_sl2o.subspace.quantized import BLOCK

from .conftest import random_dense, tiny_gpt2
from .test_storage import DIM, SHAPES, write_walk

#: Numbers that are easy by hand: 1 FLOP/s of 0.4 is used, 1 byte a second.
UNIT = Device("unit", {"bf16": 1 / UTILISATION, "fp32": 1 / UTILISATION}, 1.0, 1000.0, 1.0, 0.5)


def model_of(module):
    uses = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    return Model(
        tuple(
            Parameter(name, tuple(p.shape), p.element_size(), p.requires_grad, uses.count(id(p)) > 1)
            for name, p in module.named_parameters()
        )
    )


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def backward(module):
    module(torch.randn(16, 12).to(next(module.parameters()).dtype)).square().mean().backward()


def nbytes(tensors):
    return sum(t.nbytes for t in tensors if torch.is_tensor(t))


# What is kept, beside the real optimizers


def test_adamw_keeps_what_is_planned():
    for dtype in (torch.float32, torch.bfloat16):
        module = net(dtype)
        planned = adamw_state(model_of(module))
        copies = [] if dtype == torch.float32 else [p.detach().float() for p in module.parameters()]
        params = [nn.Parameter(one) for one in copies] or list(module.parameters())
        optimizer = torch.optim.AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        kept = nbytes(copies) + nbytes(value for state in optimizer.state.values() for value in state.values())
        assert planned == kept, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("average", [0.0, 4.0])
def test_subspace_optimizer_keeps_what_is_planned(dtype, average):
    module = net(dtype)
    basis = random_dense(module.named_parameters(), dim=6)
    optimizer = SubspaceOptimizer(module, basis, lambda c: torch.optim.SGD(c, lr=0.1), average=average)
    for _ in range(3):
        backward(module)
        optimizer.step()
        optimizer.zero_grad()
    kept = [(f.rounded_off, f.other, *(f.exchange or ())) for f in optimizer._weights.followers or []]
    planned = subspace_state(model_of(module), average=bool(average))
    assert planned == sum(map(nbytes, kept))
    assert planned != subspace_state(model_of(module), average=not average)
    # and nothing else of the model's size
    others = [t for t in vars(optimizer).values() if torch.is_tensor(t)]
    others += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert max(t.numel() for t in others) <= basis.dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_that_live_are_those_planned(dtype, streamed):
    module = net(dtype)
    basis = random_dense(module.named_parameters(), dim=6)
    optimizer = SubspaceOptimizer(module, basis, lambda c: torch.optim.SGD(c, lr=0.1), stream_gradients=streamed)
    most = 0

    def count(p):
        nonlocal most
        most = max(most, sum(q.grad.nbytes for q in module.parameters() if q.grad is not None))

    backward(module)  # the carrier's .grad stays from here on
    for p in module.parameters():  # ours before the optimizer's, so that a gradient is counted at its birth
        hooks = p._post_accumulate_grad_hooks
        known = dict(hooks) if hooks else {}
        if known:
            hooks.clear()
        p.register_post_accumulate_grad_hook(count)
        p._post_accumulate_grad_hooks.update(known)
    if not streamed:
        optimizer.zero_grad()
    backward(module)
    planned = live_gradients(model_of(module), streamed_dim=6 if streamed else None)
    assert planned == most
    assert planned != live_gradients(model_of(module), streamed_dim=None if streamed else 6)


def test_first_gradient_of_a_tied_weight_waits_for_the_second():
    made, alive = [], []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.view_as(w)

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            made.append(weakref.ref(gradient))
            return gradient

    weight, middle = nn.Parameter(torch.randn(50, 8)), nn.Linear(8, 8)
    middle.weight.register_post_accumulate_grad_hook(lambda p: alive.append([one() is not None for one in made]))
    x = middle(nn.functional.embedding(torch.arange(5), Seen.apply(weight)))
    (x @ Seen.apply(weight).T).logsumexp(-1).sum().backward()
    assert alive == [[True]] and len(made) == 2
    tied, untied = (Model((Parameter("w", (50, 8), 4, tied=tied),)) for tied in (True, False))
    assert live_gradients(tied) - live_gradients(untied) == weight.nbytes
    model = model_of(tiny_gpt2())
    assert [p.name for p in model.parameters if p.tied] == ["transformer.wte.weight"]


def test_buckets_of_ddp_are_a_copy_of_all_gradients(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net())
        for _ in range(2):
            backward(wrapped)
        sizes = wrapped._get_ddp_logging_data()["bucket_sizes"]
    finally:
        dist.destroy_process_group()
    model = model_of(net())
    assert (
        sum(map(int, sizes.split(",")))
        == live_gradients(model, ranks=2) - live_gradients(model, ranks=1)
        == 4 * model.n
    )


class _Moved(TorchDispatchMode):
    """Bytes that operations read and write; views move none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::detach", "aten::view", "aten::_unsafe_view", "aten::slice", "aten::reshape"):
            return out
        read = args[1:] if func._schema.name == "aten::copy_" else args
        tensors = [*tree_leaves(read), *tree_leaves(out)]
        self.bytes += nbytes(tensors)
        return out


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 7), (torch.bfloat16, 4)], ids=["fp32", "bf16"])
def test_passes_over_the_weights_back_to_the_last_step(dtype, passes, monkeypatch):
    monkeypatch.setattr("hf_sl2o.optim._weights.column_sums", lambda tensors: None)  # a compiled loop is not seen here
    module = nn.Linear(1220, 500, bias=False).to(dtype)  # of a multiple of 61, so that a sum reads each number once
    basis = RandomBasis(Layout.from_named_parameters(module.named_parameters()), 2)
    optimizer = SubspaceOptimizer(module, basis, lambda c: torch.optim.SGD(c, lr=0.1), average=4.0)
    for _ in range(2):
        optimizer.use_last()
        module(torch.ones(1, 1220, dtype=dtype)).sum().backward()
        optimizer.step()
    assert optimizer.at_average
    with _Moved() as moved:
        optimizer._weights.to_last(optimizer._c.detach() - optimizer._mean)
    size = module.weight.nbytes
    assert moved.bytes / size == pytest.approx(passes + 1, rel=0.01)  # and a sum to know it by
    beside = 9 if dtype == torch.float32 else 18  # publish 4 (8 below fp32), and what sees changes 5 (10)
    assert subspace_traffic(model_of(module), 0, average=True) / size - 1 == passes + beside


# Bases


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"))


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_bytes_of_a_basis_are_those_of_a_real_one(walk, storage):
    model = Model(tuple(Parameter(name, shape, 4) for name, shape in SHAPES.items()))
    layout = Layout(tuple(SHAPES), tuple(SHAPES.values()))
    assert model.layout == layout
    if storage == "random":
        made = RandomBasis(layout, DIM, seed=0)
    else:
        made = fit_basis(walk, DIM, storage=storage, progress=False)
    planned = basis_bytes(model, DIM, storage)
    assert made.nbytes <= planned if storage == "tucker" else made.nbytes == planned
    assert made.nbytes > 0.5 * planned  # a walk of low rank needs less


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_holds_its_rows_of_a_dense_basis(ranks):
    module = tiny_gpt2()
    model, dim = model_of(module), 5
    basis = random_dense(module.named_parameters(), dim=dim)
    cut = [
        basis.matrix(index).view(dim, *shape).chunk(ranks, dim=1)[0] for index, shape in enumerate(basis.layout.shapes)
    ]
    assert basis_bytes(model, dim, "fp32", ranks) == sum(4 * part.numel() for part in cut)
    assert basis_bytes(model, dim, "bf16", ranks) == sum(2 * part.numel() for part in cut)
    assert basis_bytes(model, dim, "random", ranks) == 4 * dim * dim
    assert basis_bytes(model, dim, "fp32", ranks) >= basis_bytes(model, dim, "fp32") / ranks


def test_a_share_of_tucker_by_hand():
    model, d, leading = Model((Parameter("w", (256, 96), 2), Parameter("b", (256,), 2))), 40, 8
    factors = 32 * 64 * 8 + 64 * (256 // 4) + 8 * 96  # cores, a quarter of the left factor, the right one
    whole = 32 * (256 // 4)  # the vector's, a quarter
    rounded = sum(leading * (-(-numel // 2) + 4 * -(-numel // BLOCK)) for numel in (64 * 96, 64))
    mixes = 4 * d * d + 4 * leading * leading
    assert basis_bytes(model, d, "tucker", 4) == 4 * (factors + whole) + rounded + mixes
    assert basis_bytes(model, d, "tucker", 4) > basis_bytes(model, d, "tucker") / 4  # cores are not cut


def test_shares_are_those_of_torch():
    for size in (1, 5, 50, 64):
        for ranks in (1, 2, 7, 64):
            own = Parameter("w", (size, 3), 4).shard(ranks)
            assert own.shape == tuple(torch.empty(size, 3).chunk(ranks)[0].shape)
    assert Parameter("scale", (), 4).shard(8).shape == ()


# The wire


def sent_by_a_ring(numbers, ranks):
    """Numbers that rank 0 sends in an all-reduce, and what all ranks have then."""
    held = [torch.arange(numbers, dtype=torch.float64) * (rank + 1) for rank in range(ranks)]
    parts, sent = [list(one.clone().chunk(ranks)) for one in held], 0
    for phase in range(2):  # reduce-scatter, then all-gather
        for step in range(ranks - 1):
            moving = [(rank, (rank - step + phase) % ranks) for rank in range(ranks)]
            data = [parts[rank][part].clone() for rank, part in moving]
            for (rank, part), one in zip(moving, data, strict=True):
                to = (rank + 1) % ranks
                parts[to][part] = one if phase else parts[to][part] + one
            sent += data[0].numel()
    return sent, [torch.cat(one) for one in parts], sum(held)


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_bytes_of_an_all_reduce_are_those_of_a_ring(ranks):
    numbers = 40 * ranks
    sent, have, expected = sent_by_a_ring(numbers, ranks)
    assert all(torch.equal(one, expected) for one in have)
    assert 2 * ring_bytes(4 * numbers, ranks) == 4 * sent


def test_wire_by_hand():
    model = Model((Parameter("w", (10, 10), 4), Parameter("frozen", (6, 10), 2, trained=False)))
    assert wire_bytes(model, 4, "DDP") == 2 * 3 * 400 // 4
    assert wire_bytes(model, 4, "DDP", streamed=True, dim=8) == 2 * 3 * 32 // 4
    gathered, scattered = 2 * 3 * (400 + 120) // 4, 3 * 400 // 4
    assert wire_bytes(model, 4, "FSDP2") == gathered + scattered
    assert wire_bytes(model, 4, "FSDP2", streamed=True, dim=8) == gathered + scattered + 2 * 3 * 32 // 4


# Rows


def test_a_sharded_rank_by_hand():
    layers = [Parameter(f"h.{i}.w", (8, 8), 4) for i in range(3)]
    model = Model((Parameter("wte", (20, 8), 4, tied=True), *layers, Parameter("ln", (8,), 4)))
    weights, kept = sharded_memory(model, 4, streamed=False)
    share = 5 * 8 + 3 * 2 * 8 + 2
    assert weights == 4 * (share + 20 * 8 + 8 + 2 * 64)  # root, and two of three layers
    whole, waiting = 20 * 8 + 8, 20 * 8
    assert kept == 4 * (whole + waiting + share)
    assert sharded_memory(model, 4, streamed=True)[1] == 4 * (whole + waiting + 5 * 8 + 2)


def row_of(rows, method, **wanted):
    found = [r for r in rows if r.method == method and all(getattr(r, key) == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("itemsize", [4, 2])
def test_rows_of_one_matrix_by_hand(itemsize):
    n, tokens, d = 100, 7, 3
    rows = plan(
        Model((Parameter("w", (10, 10), itemsize),), buffers=12), dim=d, tokens=tokens, gpus=[1, 2, 16], device=UNIT,
        dtype="fp32", storages=["fp32", "random"],
    )  # fmt: skip
    adamw = row_of(rows, "AdamW", gpus=1)
    state = (8 if itemsize == 4 else 12) * n + 4
    assert (adamw.weights, adamw.gradients, adamw.state, adamw.basis) == (itemsize * n + 12, itemsize * n, state, 0)
    assert adamw.total == 2 * itemsize * n + 12 + state and adamw.fits is (adamw.total <= 1000)
    assert adamw.seconds == {"compute": 6 * n * tokens, "wire": 0, "optimizer": 28 * n}
    assert adamw.step_s == 6 * n * tokens + 28 * n and adamw.bound == "compute"

    dense = row_of(rows, "SL2O", gpus=1, storage="fp32", streamed=True)
    copies, passes = (1, 16) if itemsize == 4 else (3, 22)
    assert dense.basis == 4 * d * n and dense.state == copies * itemsize * n
    assert dense.state - dense.average == (0 if itemsize == 4 else itemsize * n)
    assert dense.gradients == itemsize * n + 4 * n  # the only parameter is the carrier too
    assert dense.seconds["optimizer"] == 2 * dense.basis + (1 + passes) * itemsize * n

    made = row_of(rows, "SL2O", gpus=1, storage="random", streamed=True)
    rest = 2 * 4 * d * d + (1 + passes) * itemsize * n
    assert made.seconds["optimizer"] == pytest.approx(rest + 2 * d * n / HOST_NORMALS, rel=1e-12)

    two, many = (row_of(rows, "AdamW", gpus=count, spread="DDP") for count in (2, 16))
    assert two.seconds["wire"] == 2 * itemsize * n // 2 and two.gradients == 2 * itemsize * n
    assert many.seconds["wire"] == many.wire / 0.5  # over the network
    assert many.step_s == max(6 * n * tokens, many.wire / 0.5) + 28 * n


def test_frozen_weights_cost_four_operations_and_an_adapter_is_what_moves():
    frozen = Parameter("h.0.w", (10, 10), 2, trained=False)
    full, adapter = Model((frozen._replace(trained=True),)), Model((frozen, Parameter("h.0.lora_A", (2, 10), 4)))
    rows = plan(full, adapter, moved=adapter, dim=4, tokens=3, gpus=[1, 4], device=UNIT, storages=["fp32"])
    lora = row_of(rows, "LoRA + AdamW", gpus=1)
    assert lora.seconds["compute"] == 3 * (4 * 100 + 6 * 20) and lora.state == 8 * 20 + 4
    assert lora.weights == 2 * 100 + 4 * 20 and lora.gradients == 4 * 20
    assert row_of(rows, "SL2O", gpus=4, spread="DDP", streamed=True).basis == 4 * 4 * 20
    assert row_of(rows, "SL2O", gpus=4, spread="FSDP2", streamed=True).basis == 4 * 4 * 10
    assert row_of(rows, "LoRA + AdamW", gpus=4, spread="DDP").wire == 2 * 3 * 80 // 4


def test_every_way_is_planned_once():
    rows = plan(model_of(tiny_gpt2()), dim=4, gpus=[1, 8])
    ways = [(r.gpus, r.method, r.storage, r.spread, r.streamed) for r in rows]
    assert len(ways) == len(set(ways)) == 3 * (1 + 2 * len(ALL_STORAGES))
    for row in rows:
        assert row.total == row.weights + row.gradients + row.state + row.basis
        assert row.fits == (row.total <= DEVICES["h100"].memory)
        assert row.bound == max(row.seconds, key=row.seconds.get)


def test_without_an_average_a_step_keeps_and_moves_less():
    model = model_of(tiny_gpt2())
    kept, plain = (plan(model, dim=4, gpus=[1], average=average)[-1] for average in (True, False))
    assert plain.state == plain.average == 0 and kept.state == kept.average == 4 * model.n
    assert plain.step_s < kept.step_s


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 631}, "dim is 631, expected an integer from 1 to 630"),
        ({"dim": 0}, "dim is 0, expected an integer from 1"),
        ({"gpus": [8, 0]}, "gpus is 0, expected an integer from 1"),
        ({"tokens": 1.5}, "tokens is 1.5, expected an integer"),
        ({"storages": ["int2"]}, "storage is 'int2', expected one of"),
        ({"dtype": "fp8"}, "dtype is 'fp8', expected one of"),
        ({"dim": 620}, "the largest parameter has 600 numbers: streamed gradients need one that holds dim"),
    ],
)
def test_bad_input(options, words):
    model = Model((Parameter("w", (30, 20), 4), Parameter("b", (30,), 4)))
    with pytest.raises(ValueError, match=words):
        plan(model, **options)


def test_devices_and_models_without_numbers():
    with pytest.raises(ValueError, match="bandwidth of the device is -1.0, expected a finite number above 0"):
        Device("mine", {"bf16": 1.0}, -1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no parameter that is trained"):
        Model((Parameter("w", (3,), 4, trained=False),))
    for device in DEVICES.values():
        assert device.flops["bf16"] > device.flops["fp32"] and device.link >= device.network
