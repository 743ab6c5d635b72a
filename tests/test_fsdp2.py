"""Parameters that FSDP2 has cut train as whole ones do, and all processes stay alike."""

import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from hf_sl2o import SL2OTrainer, SL2OTrainingArguments, SubspaceOptimizerFactory, Trajectory
from hf_sl2o.training.build import refuse_sharding
from hf_sl2o.training.resume import has_optimizer_state, last_complete_checkpoint

from . import fsdp2_worker as worker
from .conftest import tiny_gpt2
from .ranks_worker import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """What two processes end with, by rank; all cases in one pair of processes."""
    codes, errors = launch("tests.fsdp2_worker", folder, timeout=240)
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    """Runs of one process over whole parameters, by case."""
    known = {}

    def run(case):
        if case not in known:
            known[case] = worker.run(1, 0, **worker.options_of(case))
        return known[case]

    return run


def farthest(a, b, keys=("weights", "c", "norm", "losses")):
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in keys if a[key].numel())


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


# Loops


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_train_as_one(two, one, case):
    first, second = two[0][case], two[1][case]
    assert same(first, second)
    # gradients of bf16 are rounded in each process
    tolerance = 2e-2 if case == "bf16 weights" else 2e-6
    assert farthest(first, one(case)) < tolerance and float(first["c"].abs().max()) > 0.1
    assert torch.equal(first["skipped"], one(case)["skipped"])
    if case in ("clipped", "rule", "outside", "changed on one, no average"):  # each changes the run
        assert farthest(first, one("plain"), ("c",)) > 1e-4
    if case == "NaN on one":
        assert first["skipped"] == 1


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)])
@pytest.mark.parametrize("case", ["average", "streamed"])
def test_replicas_of_shards_train_as_one(two, one, case, mesh):
    first, second = (rank[f"{case}, mesh {mesh}"] for rank in two)
    assert same(first, second) and farthest(first, one(case)) < 2e-6


def test_without_the_sum_processes_part(two, one):
    for name, case in (("no sum", "plain"), ("streamed, no sum", "streamed")):
        first, second = (rank["broken"][name] for rank in two)
        assert not torch.equal(first["c"], second["c"])
        assert farthest(first, one(case), ("c",)) > 1e-2


@pytest.mark.parametrize("name", ["gathered stays", "gathered first"])
def test_weights_that_move_after_they_were_gathered_train_another_run(two, one, name):
    """What an evaluation leaves gathered would be trained at the average: 100 times what rounding makes."""
    assert farthest(two[0]["broken"][name], one("average"), ("c",)) > 1e-4 > 100 * 2e-7


def test_a_state_between_forward_and_step_is_that_of_the_average(two):
    alone = worker.in_the_middle(1, 0)
    assert farthest(two[0]["in the middle"], alone, ("weights", "last")) < 2e-6
    of_last = alone["last"].numel()
    assert float((alone["last"] - alone["weights"][:of_last]).abs().max()) > 1e-3


def test_parts_are_those_of_the_whole(two):
    for rank in two:
        found = dict(rank["differences"])
        assert {found.pop(name) for name in ("start", "first state", "entries", "on the host")} == {0.0}
        assert found.pop("bytes") < 0.1  # odd rows are in the first half
        assert max(found.values()) < 1e-6 and len(found) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no basis", "NotImplementedError: the parameters are sharded .* or train with DDP"),
        ("tucker", "NotImplementedError: a tucker basis cannot be cut .* use a dense, int8 or int4 one"),
        ("average of names", r"ValueError: an average over sharded parameters needs the model.*sl2o_average=0"),
        ("other bases", "ValueError: basis.directions is .* on rank 0 and .* on rank 1"),
        ("other d", "ValueError: basis.dim is 6 on rank 0 and 7 on rank 1"),
        ("no carrier", "ValueError: stream_gradients keeps .* leave it out"),
        ("columns of int8", "NotImplementedError: parameter 'w' is not cut along its first dimension"),
    ],
)
def test_refusals_say_what_to_do_on_every_rank(two, name, text):
    for rank in two:
        assert re.match(text, rank["refused"][name]), rank["refused"][name]


# Trainers


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of one process, and where their files are."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {name: worker.train(folder, name) for name in ("full", "best")}
    return {**runs, "half": worker.train(folder / "half", "full", rows=4)}, folder


KEYS = ("weights", "c", "loss", "grad_norm", "eval_loss")


@pytest.mark.parametrize("name", [name for name, (_, earlier) in worker.TRAININGS.items() if earlier is None])
def test_trainers_of_two_processes_train_as_one(two, alone, name):
    first, second = (rank["trainings"][name] for rank in two)
    expected = alone[0]["best" if name == "best" else "full"]
    assert same(first, second) and farthest(first, expected, KEYS) < 2e-6
    assert farthest(first, alone[0]["half"], ("c",)) > 1e-3  # the break: what one process sees of the batches


@pytest.mark.parametrize("name", [name for name, (_, earlier) in worker.TRAININGS.items() if earlier is not None])
def test_resumed_trainers_end_at_the_same_bits(two, name):
    whole, resumed = (two[0]["trainings"][key] for key in (name.split(",")[0], name))
    assert same(whole, resumed)  # logs of the first steps come from the checkpoint


def test_snapshots_hold_whole_parameters(two, alone, folder):
    ours, theirs = Trajectory(folder / "trajectory of sharded"), Trajectory(alone[1] / "trajectory of full")
    assert ours.steps == theirs.steps == [0, 3, 6] and ours.layout == theirs.layout
    for step in ours.steps:
        a, b = load_file(ours.path(step)), load_file(theirs.path(step))
        assert max(float((a[name] - b[name]).abs().max()) for name in b) < 2e-6


@pytest.mark.parametrize(
    ("name", "lost"),
    [("full", "optimizer.bin"), ("full", "pytorch_model_fsdp.bin"), ("sharded", "optimizer_0/.metadata")],
)
def test_the_last_whole_checkpoint_is_found(two, folder, tmp_path, name, lost, caplog):
    copied = tmp_path / name
    shutil.copytree(folder / name, copied)
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-6")
    assert has_optimizer_state(copied / "checkpoint-6") and not has_optimizer_state(copied)
    (copied / "checkpoint-6" / lost).unlink()
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-3")
    assert "is not complete" in caplog.text


# Refusals


class Plugin:
    def __init__(self, version):
        self.fsdp_version = version


def test_what_is_sharded_by_others_is_refused(monkeypatch):
    def said(**options):
        with pytest.raises(NotImplementedError) as refusal:
            refuse_sharding(**options)
        return str(refusal.value)

    assert "FSDP2" in said(deepspeed={"zero_optimization": {"stage": 1}}) and "DDP" in said(deepspeed=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
    assert "leave fsdp out" in said(fsdp=True, with_basis=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin(1))
    assert "FSDP1 flattens" in said(with_basis=True) and "use FSDP2" in said(with_basis=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin(2))
    refuse_sharding(with_basis=True)
    assert "Pass a basis" in said()
    with pytest.raises(NotImplementedError, match="Pass a basis"):
        SubspaceOptimizerFactory()(tiny_gpt2())


def test_a_warm_up_is_refused(tmp_path):
    args = SL2OTrainingArguments(
        str(tmp_path), use_cpu=True, sl2o_warmup_steps=9, sl2o_snapshots=5, sl2o_dim=3, report_to="none"
    )
    trainer = SL2OTrainer(tiny_gpt2(), args, train_dataset=[])
    trainer.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match="record a run with TrajectoryCallback"):
        trainer.train()
