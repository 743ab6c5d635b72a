"""`TrainingArguments(optim=...)`: names, parsing, refusals, pickles; also in processes that import nothing of ours."""

import copy
import dataclasses
import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_sl2o
from hf_sl2o import (
    LearnedOptimizer,
    LSTMRule,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    SubspaceOptimizerFactory,
    build_optimizer,
)

from .conftest import Tokens, random_dense, tiny_gpt2

NAMES = ["sl2o", "subspace_adamw", "subspace_sgd"]


@pytest.fixture
def saved(tmp_path, model):
    basis, rule = random_dense(model.named_parameters()), LSTMRule()
    basis.save_pretrained(tmp_path / "basis")
    rule.save_pretrained(tmp_path / "rule")
    return tmp_path / "basis", tmp_path / "rule"


def trainer(model, tmp_path, cls=TrainingArguments, **options):
    options = {"report_to": "none", "max_steps": 3, "save_strategy": "no", "use_cpu": True, **options}
    return Trainer(model, cls(str(tmp_path / "out"), **options), train_dataset=Tokens())


def test_registering_again_changes_nothing():
    before = list(OptimizerNames)
    hf_sl2o.register()
    assert list(OptimizerNames) == before and [OptimizerNames(name).value for name in NAMES] == NAMES
    with pytest.raises(ValueError):
        OptimizerNames("sl3o")


@pytest.mark.parametrize("name", NAMES)
def test_arguments_survive_every_way_of_copying(name):
    args = TrainingArguments("out", optim=name, use_cpu=True)
    assert args.optim is OptimizerNames(name) and args.to_dict()["optim"] == name
    assert json.loads(args.to_json_string())["optim"] == name
    for other in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert other.optim is args.optim
    assert TrainingArguments("out", optim="adamw_torch", use_cpu=True).optim != name


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments, SL2OTrainingArguments])
def test_command_line(cls):
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(
        ["--output_dir", "out", "--optim", "sl2o", "--use_cpu"]
    )
    assert str(args.optim.value) == "sl2o"
    (plain,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", "out", "--optim", "adafactor"])
    assert str(plain.optim.value) == "adafactor"


def test_plain_trainer_with_strings(model, saved, tmp_path):
    basis, rule = saved
    run = trainer(model, tmp_path, optim="sl2o", optim_args=f"basis={basis},rule={rule},units=orthonormal,lr=0.5")
    run.train()
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, SubspaceOptimizer) and isinstance(optimizer.inner, LearnedOptimizer)
    assert torch.equal(optimizer.basis.units, torch.ones(6)) and optimizer.param_groups[0]["initial_lr"] == 0.5
    assert optimizer.coefficients.any()


def test_escapes_in_optim_args(model, saved, tmp_path):
    basis, rule = saved
    odd = tmp_path / "a b=c"
    basis.rename(odd)
    text = str(odd).replace(" ", "%20").replace("=", "%3D")
    run = trainer(model, tmp_path, optim="sl2o", optim_args=f"basis={text},rule={rule}")
    assert isinstance(run.create_optimizer(), SubspaceOptimizer)


@pytest.mark.parametrize(
    "optim_args, message",
    [
        ("base=x", "unknown key 'base'; expected any of basis, rule, lr"),
        ("basis", "expected key=value pairs"),
        ("basis=a=b", "expected key=value pairs"),
        ("lr=fast", "lr='fast', expected a number"),
    ],
)
def test_bad_optim_args(model, tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path, optim="sl2o", optim_args=optim_args).train()


def test_missing_paths_and_bases(model, saved, tmp_path):
    basis, _ = saved
    with pytest.raises(FileNotFoundError, match="looked for a saved Basis at '.*nowhere'"):
        trainer(model, tmp_path, optim="sl2o", optim_args=f"basis={tmp_path}/nowhere").create_optimizer()
    with pytest.raises(FileNotFoundError, match="looked for a saved Rule at"):
        trainer(model, tmp_path, optim="sl2o", optim_args=f"basis={basis},rule={tmp_path}/norule").create_optimizer()
    with pytest.raises(ValueError, match='"subspace_sgd" needs a basis and got none'):
        trainer(model, tmp_path, optim="subspace_sgd").create_optimizer()
    with pytest.raises(ValueError, match="expected one of"):
        build_optimizer(model.named_parameters(), "adam")


def test_own_learning_rate_is_used_and_said_once(model, saved, tmp_path, caplog):
    basis, rule = saved
    options = f"basis={basis},rule={rule}"
    with caplog.at_level(logging.WARNING):
        optimizer = trainer(model, tmp_path, optim="sl2o", optim_args=options).create_optimizer()
    assert optimizer.param_groups[0]["lr"] == 1.0
    said = [record for record in caplog.records if "takes its own step size, 1" in record.getMessage()]
    assert len(said) == 1
    caplog.clear()
    optimizer = trainer(model, tmp_path, optim="sl2o", optim_args=options, learning_rate=0.2).create_optimizer()
    assert optimizer.param_groups[0]["lr"] == 0.2 and not caplog.records
    args = SL2OTrainingArguments("out", optim="subspace_adamw", use_cpu=True)
    assert not caplog.records  # it is said where the optimizer is made
    assert args.learning_rate == 0.3 and SL2OTrainingArguments("out", use_cpu=True).learning_rate == 1.0
    assert SL2OTrainingArguments("out", optim="adamw_torch", use_cpu=True).learning_rate == 5e-5
    for kind in (TrainingArguments, SL2OTrainingArguments):  # one for Adam
        words = {"optim": "subspace_adamw", "optim_args": f"basis={basis}", "learning_rate": 2e-5}
        own = Trainer(model, kind(str(tmp_path), use_cpu=True, report_to="none", **words)).create_optimizer()
        assert own.param_groups[0]["lr"] == 0.3
    assert SL2OTrainingArguments("out", optim="adamw_torch", learning_rate=2e-5, use_cpu=True).learning_rate == 2e-5


def test_refusals(model, saved, tmp_path, monkeypatch):
    basis, rule = saved
    trainer(model, tmp_path)  # Accelerate has its state
    with pytest.raises(ValueError, match="weight_decay is 0.1, and with a basis only the coefficients move"):
        trainer(model, tmp_path, optim="sl2o", weight_decay=0.1, optim_args=f"basis={basis}").create_optimizer()
    for name, value, message in (("deepspeed", {"a": 1}, "DeepSpeed"), ("fsdp", True, "FSDP")):
        broken = trainer(model, tmp_path, optim="sl2o")
        setattr(broken.args, name, value)
        with pytest.raises(NotImplementedError, match=message):
            broken.create_optimizer()
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):  # what `accelerate launch` was told
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
        with pytest.raises(NotImplementedError, match="train with DDP"):
            SubspaceOptimizerFactory()(model, rule=LSTMRule())
    monkeypatch.undo()
    for optim, options, message in (
        ("subspace_adamw", {"basis": basis, "rule": rule}, "subspace_adamw has no rule"),
        ("sl2o", {"basis": basis, "momentum": 0.9}, "only subspace_sgd takes it"),
        ("sl2o", {"units": "std"}, "within a basis"),
        ("sl2o", {"outside": "adamw"}, "within a basis"),
        ("sl2o", {"max_grad_norm": 1.0}, "clip the gradients themselves"),
    ):
        with pytest.raises(ValueError, match=message):
            build_optimizer(model.named_parameters(), optim, **options)
    model.transformer.wte.weight = torch.nn.Parameter(torch.zeros(51, 16))
    with pytest.raises(ValueError, match="'transformer.wte.weight' has shape"):
        trainer(model, tmp_path, optim="sl2o", optim_args=f"basis={basis},rule={rule}").create_optimizer()
    for bad in ({"sl2o_units": "m"}, {"sl2o_outside": "sgd"}, {"sl2o_warmup_steps": 10}):
        with pytest.raises(ValueError, match="sl2o_"):
            SL2OTrainingArguments("out", use_cpu=True, **bad)


def test_the_users_max_grad_norm_stays_and_the_step_clips(model, saved, tmp_path):
    basis, _ = saved
    words = {"optim": "subspace_sgd", "optim_args": f"basis={basis}", "lr_scheduler_type": "constant", "max_steps": 1}
    ours = trainer(model, tmp_path, max_grad_norm=1e-3, learning_rate=1.0, **words)
    ours.train()
    assert ours.args.max_grad_norm == 1e-3
    assert ours.optimizer.optimizer.coefficients.norm().item() == pytest.approx(1e-3, rel=1e-2)
    same = copy.copy(ours.args)
    same.max_grad_norm = 0.0
    free = Trainer(tiny_gpt2(), same, train_dataset=Tokens())
    free.train()
    assert free.optimizer.optimizer.coefficients.norm().item() > 1e-2


def test_a_transformers_that_has_moved_what_is_hooked_into_is_named(monkeypatch):
    monkeypatch.delattr(hf_sl2o.training.registration.trainer_optimizer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(ImportError, match="no longer has _OPTIMIZER_HANDLERS.*upgrade hf_sl2o"):
        hf_sl2o.register()


def test_factory_without_registration(model, tmp_path):
    basis, rule = random_dense(model.named_parameters()), LSTMRule()
    reference = tiny_gpt2()
    run = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), report_to="none", max_steps=2, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True
        ),
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {"basis": basis, "rule": rule, "lr": 1.0}),
    )
    run.train()
    names = trainer(reference, tmp_path, optimizers=None) if False else None
    assert names is None
    other = Trainer(
        reference,
        TrainingArguments(
            str(tmp_path), report_to="none", max_steps=2, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True
        ),
        train_dataset=Tokens(),
        optimizers=(SubspaceOptimizer(reference.named_parameters(), basis, rule), None),
    )
    other.train()
    for p, q, start in zip(model.parameters(), reference.parameters(), tiny_gpt2().parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, start)


def test_unpickling_imports_the_package_by_itself(tmp_path):
    path = tmp_path / "training_args.bin"
    torch.save(TrainingArguments("out", optim="subspace_sgd", use_cpu=True), path)
    code = f"import torch; a = torch.load({str(path)!r}, weights_only=False); print(a.optim.value)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "subspace_sgd"


def test_runner_gives_an_unmodified_script_our_names(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from transformers import HfArgumentParser, TrainingArguments\n"
        "(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
        "print(__name__, args.optim.value)\n"
    )
    command = ["script.py", "--output_dir", str(tmp_path), "--optim", "sl2o", "--use_cpu"]
    ours, plain, usage = (
        subprocess.run([sys.executable, *line], capture_output=True, text=True, cwd=tmp_path)
        for line in (["-m", "hf_sl2o.run", *command], command, ["-m", "hf_sl2o.run", "absent.py"])
    )
    assert ours.returncode == 0 and ours.stdout.strip() == "__main__ sl2o", ours.stderr
    assert plain.returncode == 2 and "invalid choice" in plain.stderr
    assert usage.returncode == 1 and "expected a Python script and found 'absent.py'" in usage.stderr


@pytest.mark.parametrize("with_basis", [True, False])
def test_a_rule_that_sees_its_progress_is_told_the_length_of_a_run_in_epochs(tmp_path, saved, with_basis):
    """Epochs and the same number of steps give the same weights; another length gives others."""
    torch.manual_seed(1)
    LSTMRule(hf_sl2o.RuleConfig(progress=True, output_scale=0.1)).save_pretrained(tmp_path / "seeing")
    optim_args = f"rule={tmp_path / 'seeing'}" + (f",basis={saved[0]}" if with_basis else "")

    def trained(**length):
        of = trainer(
            tiny_gpt2(), tmp_path, optim="sl2o", optim_args=optim_args, disable_tqdm=True,
            lr_scheduler_type="constant", logging_strategy="no", **length,
        )  # fmt: skip
        of.train()
        steps = of.state.global_step
        assert of.optimizer.param_groups[0]["total_steps"] == steps
        return steps, torch.cat([p.detach().flatten() for p in of.model.parameters()])

    steps, epochs = trained(max_steps=-1, num_train_epochs=2)
    assert steps > 2
    assert torch.equal(trained(max_steps=steps)[1], epochs)
    half = trained(max_steps=-1, num_train_epochs=1)
    assert half[0] == steps // 2 and not torch.equal(half[1], epochs)


@pytest.mark.parametrize("with_basis", [True, False])
def test_a_second_run_of_the_same_trainer_comes_on_top_of_the_first(tmp_path, saved, with_basis):
    words = f"rule={saved[1]}" + (f",basis={saved[0]}" if with_basis else "")
    twice = trainer(tiny_gpt2(), tmp_path, optim="sl2o", optim_args=words, disable_tqdm=True)
    for total in (3, 6):
        twice.train()
        assert twice.optimizer.param_groups[0]["total_steps"] == total
