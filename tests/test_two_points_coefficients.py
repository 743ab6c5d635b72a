"""Pruned ranks, coefficients that fit the weights, and bases of another start."""

import logging

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_sl2o import SL2OTrainer, Trajectory, TrajectoryCallback, fit_basis

from .conftest import Tokens, tiny_gpt2
from .two_points_cases import EVALUATED, LOW, NAMED, ROWS, Calls, Net, arguments, copies, trainer_of


class Allocates(TrainerCallback):
    def __init__(self, hook):
        setattr(self, hook, self.allocate)

    def allocate(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("hook", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_ranks_that_adalora_prunes_are_zero_in_what_is_evaluated_and_saved(tmp_path, hook):
    config = AdaLoraConfig(
        init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=12, target_modules=["c_attn"],
        fan_in_fan_out=True, beta1=0.5, beta2=0.5, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_gpt2(), config)
    args = arguments(
        tmp_path, Trainer, False, max_steps=12, save_strategy="steps", save_steps=12, per_device_train_batch_size=8
    )
    trainer = Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(8), callbacks=[Allocates(hook)])
    trainer.train()
    factors = {name: p.detach() for name, p in model.named_parameters() if "lora_E" in name}
    assert len(factors) == 2 and sum(p.numel() for p in factors.values()) == 12
    # in on_pre_optimizer_step the optimizer's step comes after the mask, as AdamW's does: see the values before it
    zero = sum(int((p == 0).sum()) for p in factors.values())
    saved = load_file(tmp_path / "out" / "checkpoint-12" / "adapter_model.safetensors")
    in_file = torch.cat([value.flatten() for name, value in saved.items() if "lora_E" in name])
    alive = torch.cat([p[p != 0].flatten() for p in factors.values()])
    if hook == "on_optimizer_step":
        assert zero == 8 and torch.equal(in_file, alive)  # a file has the ranks that are left
        trainer.optimizer.train()
        assert sum(int((p == 0).sum()) for p in factors.values()) == 8


def fits(weights, start, basis, c, atol):
    for p, old, way in zip(weights, start, basis.lift(c), strict=True):
        torch.testing.assert_close(p.double(), old.double() + way.double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}), (torch.float32, {"best": True}), (torch.float32, {"best": True, "removed": True}),
        (torch.float32, {"save_only_model": True}), (torch.float32, {"best": True, "save_only_model": True}),
        (torch.bfloat16, {"best": True, "removed": True}), (torch.bfloat16, {"save_only_model": True}),
        (torch.float64, {"best": True, "removed": True}),
    ],
)  # fmt: skip
def test_saved_coefficients_fit_the_saved_weights(tmp_path, options, dtype):
    """theta = theta_0 + lift(c), in memory and in every checkpoint, after other weights were loaded too."""
    start, options = copies(Net(dtype=dtype)), dict(options)
    atol = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float64: 1e-6}[dtype]
    best, removed = options.pop("best", False), options.pop("removed", False)
    if best:
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}

    def remove(state, control, model):
        if removed:
            (tmp_path / "out" / f"checkpoint-{state.global_step}" / "coefficients.safetensors").unlink()

    def of_file(folder):
        tensors = load_file(folder / "model.safetensors")
        c = load_file(folder / "coefficients.safetensors")["coefficients"]
        fits([tensors[name] for name, _ in NAMED], start, basis, c, atol)
        return c

    make = lambda **more: trainer_of(  # noqa: E731
        tmp_path, SL2OTrainer, True, [Calls("on_save", remove)], model=Net(dtype=dtype), **EVALUATED, **options, **more
    )
    trainer = make()
    trainer.train()
    basis = trainer.subspace_optimizer.basis
    fits(copies(trainer.model), start, basis, trainer.subspace_optimizer.coefficients, atol)
    trainer.save_model(tmp_path / "mine")
    mine = of_file(tmp_path / "mine")
    if not removed:
        course = [of_file(tmp_path / "out" / f"checkpoint-{at}") for at in range(1, 7)]
        assert not torch.equal(course[0], course[-1])
        assert torch.equal(mine, course[-1]) != best
    trainer.train()
    fits(copies(trainer.model), start, basis, trainer.subspace_optimizer.coefficients, atol)
    if options.get("save_only_model"):
        resumed = make(max_steps=8)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        of_file(tmp_path / "out" / "checkpoint-8")
        fits(copies(resumed.model), start, basis, resumed.subspace_optimizer.coefficients, atol)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("recorded"), Net()
    recorder = TrajectoryCallback(folder / "trajectory", every_steps=2)
    args = arguments(folder, Trainer, False, optim="adamw_torch", optim_args=None, learning_rate=1e-2, max_steps=20)
    Trainer(model, args, train_dataset=ROWS, callbacks=[recorder]).train()
    fit_basis(Trajectory(folder / "trajectory"), 4, progress=False).save_pretrained(folder / "basis")
    return folder, copies(model)


def starts_warned(caplog):
    return [record for record in caplog.records if "not those that the basis was made from" in record.getMessage()]


@pytest.mark.parametrize("kind", [Trainer, SL2OTrainer])
def test_another_start_than_the_basis_was_made_from_is_named_once(tmp_path, kind, fitted, caplog):
    caplog.set_level(logging.WARNING, logger="hf_sl2o")
    folder, end = fitted
    (tmp_path / "basis").symlink_to(folder / "basis")

    def go(model, resume=None, **options):
        caplog.clear()
        trainer = trainer_of(tmp_path, kind, True, model=model, **options)
        trainer.train(resume_from_checkpoint=resume)
        return len(starts_warned(caplog))

    assert go(Net(), save_strategy="steps", save_steps=3) == 0
    assert go(Net(), str(tmp_path / "out" / "checkpoint-3")) == 0
    assert go(Net(5), str(tmp_path / "out" / "checkpoint-3")) == 0  # a resumed run has its weights from there
    for dtype in LOW:
        assert go(Net(dtype=dtype)) == 0
    model = Net()
    with torch.no_grad():
        for p, q in zip(model.parameters(), end, strict=True):
            p.copy_(q)
    assert go(model) == 0  # the end of the recorded run
    assert go(Net(5)) == 1
    model = Net()
    nn.init.normal_(model.b.weight)
    assert go(model) == 1
    assert "b.weight" in starts_warned(caplog)[0].getMessage()
