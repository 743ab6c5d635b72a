"""What each of two gloo processes of test_fsdp2 runs: loops over a model that FSDP2 has cut."""

import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_sl2o import Layout, LearnedOptimizer, LSTMRule, QuantizedBasis, RandomBasis, RuleConfig, SubspaceOptimizer
from hf_sl2o.optim import _two_points
from hf_sl2o.subspace.basis import start_sample
from hf_sl2o.subspace.sharded import ShardedBasis
from hf_sl2o.subspace.shards import Shards, own_part
from hf_sl2o.subspace.tucker import Factors, TuckerBasis

from .conftest import random_dense

STEPS, DIM = 5, 6


class Net(nn.Module):
    """Rows that two processes cannot halve, one row alone, and an embedding that is also the head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(63, 9)
        self.inner = nn.Sequential(nn.Linear(9, 501), nn.Tanh(), nn.Linear(501, 9))
        self.gain = nn.Parameter(torch.ones(1, 9))
        self.head = nn.Linear(9, 63, bias=True)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)) * self.gain)


def batch(step, rows=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 63, (rows, 2), generator=generator)


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids[:, 0]), ids[:, 1])


def rule():
    torch.manual_seed(3)
    return LSTMRule(RuleConfig(output_scale=0.3))


def sharded(model, mesh=None, **options):
    fully_shard(model.inner, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def lower_half(model):
    """The rows of the embedding that the second of two processes has; all that one process has of them."""
    part = own_part(model.embedding.weight)
    return part if len(part) < 63 else part[32:]


def basis_of(named, kind="fp32"):
    if kind == "random":
        return RandomBasis(Layout.from_named_parameters(named), DIM, seed=4)
    dense = random_dense(named, dim=DIM, dtype=torch.float64 if kind == "fp64" else torch.float32)
    if kind in ("int8", "int4"):
        return QuantizedBasis.from_dense(dense, bits=int(kind[3:]))
    if kind == "host":
        return dense.on_host()
    return dense.to(dtype=torch.bfloat16) if kind == "bf16" else dense


def adamw(c):
    return torch.optim.AdamW(c, lr=0.3, weight_decay=0.0)


def adamw_outside(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def change_some(step, model, here):
    """What the last process does alone: behind torch's back, and before its eyes."""
    with torch.no_grad():
        if here and step == 1:
            lower_half(model).data.mul_(1.01)
        if here and step == 3:
            lower_half(model).mul_(0.99)


def spoil(step, model, here):
    if here and step == 2:
        own_part(model.inner[2].weight.grad)[-1, -1] = float("nan")


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(tensors):
    return torch.cat([whole(tensor).detach().reshape(-1).float() for tensor in tensors])


def run(
    world,
    rank,
    kind="fp32",
    mesh=None,
    micro=1,
    evaluate=False,
    clip=None,
    head=False,
    dtype=torch.float32,
    meddle=None,
    later=False,
    whole_here=False,
    **options,
):
    """Trains; returns the weights and coefficients that are saved, and losses of evaluations."""
    model = Net().to(dtype)
    named = [(name, p) for name, p in model.named_parameters() if not (head and name.startswith("inner.2"))]
    basis = basis_of(named, kind)
    if world > 1 and not later:
        sharded(model, mesh, ignored_params={model.gain} if whole_here else None)
    optimizer = SubspaceOptimizer(model, basis, options.pop("inner", adamw), **options)
    losses = []
    for step in range(STEPS):
        part = batch(step).chunk(world)[rank]
        if later and step == 0:
            part = batch(step)  # nobody averages yet
        if later and step == 1 and world > 1:  # as Accelerate does it
            sharded(model)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        for one in part.chunk(micro):
            (loss_of(model, one) / micro).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if meddle is not None:
            meddle(step, model, world - rank == 1)
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            model.eval()
            with torch.no_grad():
                losses.append(loss_of(model, batch(99)))
            model.train()
    return {
        "weights": flat(model.state_dict().values()),
        "c": optimizer.coefficients,
        "norm": optimizer.grad_norm[None],
        "skipped": torch.tensor([optimizer.skipped_steps]),
        "losses": torch.tensor(losses),
    }


#: By name what `run` is called with.
CASES = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.01},
    "accumulated": {"micro": 2},
    "rule": {"inner": "rule"},
    "average": {"average": 9.0, "evaluate": True},
    "fp64 basis": {"kind": "fp64"},
    "bf16 basis": {"kind": "bf16"},
    "int8 basis": {"kind": "int8"},
    "int4 basis": {"kind": "int4"},
    "basis on the host": {"kind": "host"},
    "random basis": {"kind": "random"},
    "streamed": {"stream_gradients": True},
    "streamed, accumulated, clipped": {"stream_gradients": True, "micro": 2, "clip": 0.01, "average": 9.0},
    "outside": {"head": True, "outside": adamw_outside},
    "whole gain": {"whole_here": True},
    "changed on one": {"meddle": change_some, "average": 9.0, "evaluate": True},
    "changed on one, no average": {"meddle": change_some},
    "sharded later": {"later": True, "average": 9.0},
    "streamed, sharded later": {"later": True, "stream_gradients": True},
    "NaN on one": {"meddle": spoil, "head": True, "outside": adamw_outside},
    "bf16 weights": {"dtype": torch.bfloat16, "average": 9.0},
}


def options_of(case):
    options = dict(CASES[case])
    return {**options, "inner": rule()} if "inner" in options else options


def report_accelerators():
    """Accelerate shards on accelerators alone: it is told that there are some, and that their device is the CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


#: By name: what a Trainer is called with, and the run (by name) from whose third step it goes on.
TRAININGS = {
    "full": ({"state_dict_type": "FULL_STATE_DICT"}, None),
    "full, resumed": ({"state_dict_type": "FULL_STATE_DICT"}, "full"),
    "sharded": ({"state_dict_type": "SHARDED_STATE_DICT"}, None),
    "sharded, resumed": ({"state_dict_type": "SHARDED_STATE_DICT"}, "sharded"),
    "streaming": ({"state_dict_type": "SHARDED_STATE_DICT"}, None),
    "streaming, resumed": ({"state_dict_type": "SHARDED_STATE_DICT"}, "streaming"),
    "best": ({"state_dict_type": "SHARDED_STATE_DICT"}, None),
    "one loads": ({"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True}, None),
}


def train(folder, name, world=1, rank=0, rows=8):
    """A short run of a Trainer; returns what it ends with."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer

    from hf_sl2o import SL2OTrainer, SL2OTrainingArguments, TrajectoryCallback
    from hf_sl2o.training.callbacks import unwrap_optimizer

    from .conftest import Tokens, tiny_gpt2

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    model, (config, earlier) = tiny_gpt2(), TRAININGS[name]
    basis = random_dense(model.named_parameters(), units=torch.linspace(5.0, 20.0, 6))
    if config.get("cpu_ram_efficient_loading") and rank:
        for p in model.parameters():
            p.data.fill_(float("nan"))  # from_pretrained leaves them empty on all but the first process
    options, objects, kind = {}, {"basis": basis, "rule": rule()}, SL2OTrainer
    if world > 1:
        options = {"fsdp": True, "fsdp_config": {"version": 2, **config}}
    if name.startswith("streaming"):  # a plain Trainer, and files
        places = {"sl2o_basis": folder / "basis", "sl2o_rule": folder / "rule"}
        if rank == 0:
            basis.save_pretrained(places["sl2o_basis"])
            objects["rule"].save_pretrained(places["sl2o_rule"])
        if world > 1:
            dist.barrier()
        options |= {key: str(place) for key, place in places.items()}
        options["sl2o_stream_gradients"] = True
        objects, kind = {}, Trainer
    if name == "best":
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    args = SL2OTrainingArguments(
        str(folder / name.split(",")[0]), max_steps=6, save_strategy="steps", save_steps=3, eval_strategy="steps",
        eval_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, sl2o_average=4.0,
        per_device_train_batch_size=rows // world, per_device_eval_batch_size=8 // world, max_grad_norm=0.05,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = kind(
        model, args, train_dataset=Tokens(), eval_dataset=Tokens(rows=8, seed=5),
        callbacks=[TrajectoryCallback(folder / f"trajectory of {name}", every_steps=3)], **objects,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if earlier is None else str(folder / earlier / "checkpoint-3"))
    optimizer, logs = unwrap_optimizer(trainer.optimizer), trainer.state.log_history
    said = {"weights": flat(p for _, p in trainer.model.named_parameters()), "c": optimizer.coefficients}
    for key in ("loss", "grad_norm", "eval_loss"):
        said[key] = torch.tensor([float(entry[key]) for entry in logs if key in entry])
    return said


def refused(action):
    """What an action is refused with; "" if it is not."""
    try:
        action()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank):
    model = sharded(Net())
    named = list(model.named_parameters())
    layout = Layout(tuple(name for name, _ in named), tuple(tuple(p.shape) for _, p in named))
    factors = [Factors(torch.zeros(1, *_matrix(shape))) for shape in layout.shapes]
    factors[0].core[0, 0, 0] = 1.0
    tucker = TuckerBasis(layout, factors, torch.eye(1), torch.ones(1))
    plain = list(Net().named_parameters())

    def make(params=model, basis=None, **options):
        return lambda: SubspaceOptimizer(params, basis_of(plain) if basis is None else basis, adamw, **options)

    yield "no basis", lambda: LearnedOptimizer(model, rule())
    yield "tucker", make(basis=tucker)
    yield "average of names", make(named, average=4.0)
    yield "other bases", make(basis=random_dense(plain, dim=DIM, seed=rank))
    yield "other d", make(basis=random_dense(plain, dim=DIM + rank))
    yield "no carrier", make(sharded(Net().bfloat16()), stream_gradients=True)
    tiled = nn.ParameterDict({"w": distribute_tensor(torch.zeros(4, 256), model.head.bias.device_mesh, [Shard(1)])})
    quantized = basis_of([("w", nn.Parameter(torch.zeros(4, 256)))], "int8")
    yield "columns of int8", make(tiled, basis=quantized)


def _matrix(shape):
    return (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, *shape)


def differences(rank):
    """What must be zero."""
    plain, model = Net(), sharded(Net())
    basis, params = basis_of(list(plain.named_parameters())), list(model.parameters())
    shards = Shards(basis.layout.names, params)
    yield "start", shards.start_sample(params) - start_sample(list(plain.parameters()))
    cut = ShardedBasis.cut(basis, params)
    yield "coordinates", cut.coordinates(params) - basis.coordinates(list(plain.parameters()))
    c = torch.arange(1.0, DIM + 1)
    lifted = [own.reshape(-1) - part for own, part in zip(_parts(basis.lift(c), params), cut.lift(c), strict=True)]
    yield "lift", torch.cat(lifted)
    on_host = [ShardedBasis.cut(one, params)._here.stays_on_host for one in (basis.on_host(), basis)]
    yield "on the host", torch.tensor(float(on_host != [True, False]))
    yield "bytes", torch.tensor(max(cut.nbytes / basis.nbytes - 0.51, 0.0))
    columns = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    of_columns = basis_of([("w", nn.Parameter(columns))])
    tiled = [nn.Parameter(distribute_tensor(columns, params[0].device_mesh, [Shard(1)]))]
    yield "cut along columns", ShardedBasis.cut(of_columns, tiled).project(tiled) - of_columns.project([columns])
    # torch.distributed.checkpoint steps with gradients of zero, so that there is a state to load into
    optimizer = SubspaceOptimizer(model, basis, rule())
    state = get_optimizer_state_dict(model, optimizer)
    yield "first state", torch.cat([flat(params) - flat(plain.parameters()), optimizer.coefficients])
    yield "entries", torch.tensor(len(state["state"]) - len(params))


def _parts(tensors, params):
    for tensor, p in zip(tensors, params, strict=True):
        yield own_part(distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None))


def in_the_middle(world, rank):
    """The model's state between a forward pass and its step is that of the average."""
    model = Net()
    basis = basis_of(list(model.named_parameters()))
    optimizer = SubspaceOptimizer(sharded(model) if world > 1 else model, basis, adamw, average=9.0)
    for step in range(3):
        loss_of(model, batch(step).chunk(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model, batch(3).chunk(world)[rank])
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options) if world > 1 else model.state_dict()
    return {"weights": flat(state.values()) if state else torch.zeros(0), "last": flat(model.parameters())}


def broken(rank):
    """Runs without what makes them right."""
    with mock.patch.object(Shards, "sum", lambda self, tensor: tensor.clone()):
        yield "no sum", run(2, rank)
    with mock.patch.object(SubspaceOptimizer, "_reshard", lambda self: None):
        yield "gathered stays", run(2, rank, **options_of("average"))
    with mock.patch.object(_two_points, "is_sharded", lambda params: False):
        yield "gathered first", run(2, rank, **options_of("average"))
    with mock.patch.object(ShardedBasis, "from_products", lambda self, raw: raw * self.units):
        yield "streamed, no sum", run(2, rank, **options_of("streamed"))


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said = {case: run(2, rank, **options_of(case)) for case in CASES}
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        for case in ("average", "streamed"):
            said[f"{case}, mesh {shape}"] = run(2, rank, mesh=mesh, **options_of(case))
    said["in the middle"] = in_the_middle(2, rank)
    said["broken"] = dict(broken(rank))
    said["refused"] = {name: refused(action) for name, action in refusals(rank)}
    said["differences"] = {name: float(difference.abs().max()) for name, difference in differences(rank)}
    report_accelerators()
    said["trainings"] = {name: train(folder, name, 2, rank) for name in TRAININGS}
    torch.save(said, folder / f"{rank}.pt")
    dist.barrier()
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


if __name__ == "__main__":
    main(Path(sys.argv[1]))
