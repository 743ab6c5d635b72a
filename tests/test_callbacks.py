"""Snapshots while any Trainer trains, and subspace values in the usual logs, tensorboard included."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_sl2o import RandomBasis, SubspaceLogCallback, Trajectory, TrajectoryCallback, fit_basis

from .conftest import Tokens, random_dense, tiny_gpt2
from .test_trainer import run


def plain(tmp_path, callback, resume=None, **options):
    settings = {"report_to": "none", "per_device_train_batch_size": 8, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), **{**settings, **options})
    trainer = Trainer(tiny_gpt2(), args, train_dataset=Tokens(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_snapshots_by_steps_start_with_the_first_weights(tmp_path):
    trainer = plain(tmp_path, TrajectoryCallback(tmp_path / "t", every_steps=3), max_steps=7)
    trajectory = Trajectory(tmp_path / "t")
    assert trajectory.steps == [0, 3, 6]
    start = dict(tiny_gpt2().named_parameters())
    first, last = load_file(trajectory.path(0)), load_file(trajectory.path(6))
    assert set(first) == set(start) and "lm_head.weight" not in first  # tied
    assert all(torch.equal(first[name], start[name]) for name in start)
    assert not torch.equal(first["transformer.wte.weight"], last["transformer.wte.weight"])
    assert fit_basis(trajectory, 2, progress=False).dim == 2 and trainer.state.global_step == 7


def test_snapshots_by_epochs(tmp_path):
    plain(tmp_path, TrajectoryCallback(tmp_path / "t"), num_train_epochs=2)
    assert Trajectory(tmp_path / "t").steps == [0, 8, 16]


def test_a_resumed_run_completes_the_trajectory(tmp_path):
    callback = lambda name: TrajectoryCallback(tmp_path / name, every_steps=2)  # noqa: E731
    plain(tmp_path / "a", callback("ta"), max_steps=8, save_strategy="steps", save_steps=3)
    shutil.copytree(tmp_path / "ta", tmp_path / "tb")
    plain(tmp_path / "a", callback("tb"), max_steps=8, resume=str(tmp_path / "a" / "checkpoint-3"))
    for step in (0, 2, 4, 6, 8):
        a, b = (load_file(Trajectory(tmp_path / name).path(step)) for name in ("ta", "tb"))
        assert all(torch.equal(a[name], b[name]) for name in a), step


def test_an_earlier_trajectory_is_not_overwritten_unasked(tmp_path):
    plain(tmp_path, TrajectoryCallback(tmp_path / "t", every_steps=1), max_steps=2)
    with pytest.raises(ValueError, match="holds 3 snapshots of an earlier run.*overwrite=True"):
        plain(tmp_path, TrajectoryCallback(tmp_path / "t", every_steps=1), max_steps=2)
    plain(tmp_path, TrajectoryCallback(tmp_path / "t", every_steps=1, overwrite=True), max_steps=1)
    assert Trajectory(tmp_path / "t").steps == [0, 1]
    with pytest.raises(ValueError, match="not both"):
        TrajectoryCallback("x", every_steps=1, every_epochs=1)
    with pytest.raises(ValueError, match="at least 1"):
        TrajectoryCallback("x", every_steps=0)


def test_logged_values_are_right(tmp_path):
    trainer = run(tmp_path, logging_steps=2)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    optimizer = trainer.subspace_optimizer
    last = entries[-1]
    assert last["sl2o_coefficients_norm"] == pytest.approx(float(optimizer.coefficients.norm()))
    assert last["sl2o_delta_norm"] == pytest.approx(float(optimizer.last_delta.norm()))
    assert last["sl2o_skipped_steps"] == 0 and all(0 < entry["sl2o_gradient_share"] < 1 for entry in entries)


def test_share_of_a_random_basis_is_about_d_over_n(tmp_path):
    model = tiny_gpt2()
    layout = random_dense(model.named_parameters()).layout
    from hf_sl2o import SL2OTrainer, SL2OTrainingArguments

    args = SL2OTrainingArguments(
        str(tmp_path), optim="subspace_sgd", max_steps=8, logging_steps=1, report_to="none", use_cpu=True
    )
    trainer = SL2OTrainer(model, args, train_dataset=Tokens(), basis=RandomBasis(layout, 400).to_dense())
    trainer.train()
    shares = [entry["sl2o_gradient_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(shares) / len(shares) == pytest.approx(400 / layout.n, rel=0.35)


@pytest.mark.parametrize("own", [True, False], ids=["SL2OTrainer", "attached to a plain Trainer"])
def test_tensorboard_gets_them(tmp_path, own):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if own:
        run(tmp_path / "out", report_to="tensorboard")
    else:
        model = tiny_gpt2()
        random_dense(model.named_parameters()).save_pretrained(tmp_path / "basis")
        args = TrainingArguments(
            str(tmp_path / "out"),
            optim="subspace_sgd",
            optim_args=f"basis={tmp_path}/basis",
            max_steps=3,
            logging_steps=1,
            use_cpu=True,
            report_to="tensorboard",
        )
        trainer = Trainer(model, args, train_dataset=Tokens())
        SubspaceLogCallback.attach(trainer)
        trainer.train()
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    for name in ("coefficients_norm", "delta_norm", "gradient_share", "skipped_steps"):
        assert f"train/sl2o_{name}" in tags, tags
