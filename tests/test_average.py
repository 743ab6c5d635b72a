"""The running average of the coefficients: against the definition, in a loop, in Trainers, resumed, in `train_on`."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_sl2o import (
    Layout,
    LearnedOptimizer,
    LSTMRule,
    RandomBasis,
    RuleConfig,
    SL2OTrainer,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    Task,
    TrajectoryCallback,
    train_on,
)
from hf_sl2o.optim import average_weight
from hf_sl2o.training.build import build_optimizer
from tests.conftest import Tokens, random_dense, tiny_gpt2


def small(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20).to(dtype)
    return model, RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=4).to_dense()


def optimizer_of(model, basis, **options):
    return SubspaceOptimizer(
        model.named_parameters(), basis, lambda c: torch.optim.SGD(c, lr=0.1, momentum=0.9), **options
    )


def batch(step):
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(step))


def run(model, optimizer, steps, start=0):
    course = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(step).to(model.weight.dtype)).square().mean().backward()
        optimizer.step()
        course.append(optimizer.coefficients)
    return course


@pytest.mark.parametrize("eta", [0.5, 4.0])
def test_the_average_is_that_of_the_definition_and_the_run_is_not_changed(eta):
    model, basis = small()
    optimizer = optimizer_of(model, basis, average=eta)
    course = run(model, optimizer, 12)
    expected = torch.zeros(4)
    for t, c in enumerate(course, 1):
        expected = expected + (eta + 1) / (t + eta) * (c - expected)
    weights = torch.arange(1, 13) ** eta  # step i weighs about as i^eta
    assert (expected - (weights @ torch.stack(course)) / weights.sum()).norm() < 0.2 * expected.norm()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.use_average()
    torch.testing.assert_close(optimizer.coefficients, expected)
    moved = [p - old for p, old in zip(model.parameters(), before, strict=True)]
    torch.testing.assert_close(basis.project(moved), (expected - course[-1]) * basis.units**2, rtol=1e-3, atol=1e-5)
    optimizer.use_average()  # nothing to do
    optimizer.use_last()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, old, rtol=0, atol=1e-6)
    plain, same = small()
    for ours, theirs in zip(course, run(plain, optimizer_of(plain, same), 12), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_below_fp32_come_back_to_the_bit():
    model, basis = small(torch.bfloat16)
    optimizer = optimizer_of(model, basis, average=4.0)
    run(model, optimizer, 5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.use_average()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.use_last()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("at_average", [False, True])
def test_a_saved_run_goes_on_where_it_was(at_average):
    model, basis = small()
    optimizer = optimizer_of(model, basis, average=4.0)
    run(model, optimizer, 5)
    if at_average:
        optimizer.use_average()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    other, same = small()
    other.load_state_dict(weights)
    resumed = optimizer_of(other, same, average=4.0)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.coefficients, optimizer.coefficients)
    for part in (optimizer, resumed):
        part.use_last()
    for ours, theirs in zip(run(model, optimizer, 4, 5), run(other, resumed, 4, 5), strict=True):
        assert torch.equal(ours, theirs)
    for part in (optimizer, resumed):
        part.use_average()
    assert torch.equal(resumed.coefficients, optimizer.coefficients)
    if at_average:
        with pytest.raises(ValueError, match="this optimizer keeps none; resume with the same average"):
            optimizer_of(other, same).load_state_dict(state)


def test_what_cannot_be_averaged():
    model, basis = small()
    with pytest.raises(ValueError, match="average is -1"):
        optimizer_of(model, basis, average=-1)
    with pytest.raises(ValueError, match="sl2o_average is -2"):
        SL2OTrainingArguments("out", sl2o_average=-2, use_cpu=True)
    with pytest.raises(ValueError, match="average is -1"):
        RuleConfig(average=-1)
    rule = LSTMRule()
    with pytest.raises(ValueError, match="which autograd cannot follow"):
        LearnedOptimizer(model.parameters(), rule, average=4.0, differentiable=True)
    with pytest.raises(ValueError, match="average counts steps on the host"):
        inner = lambda c: LearnedOptimizer(c, rule, capturable=True)  # noqa: E731
        SubspaceOptimizer(model.named_parameters(), basis, inner, average=4.0)
    optimizer = optimizer_of(model, basis, average=4.0)
    run(model, optimizer, 2)
    optimizer.use_average()
    with pytest.raises(RuntimeError, match=r"call use_last\(\) before the forward pass"):
        run(model, optimizer, 1, 2)
    plain = optimizer_of(model, basis)
    plain.use_average()  # none is kept: nothing happens
    assert average_weight(torch.tensor(1.0), 7.0) == 1.0


# Of plain tensors, without a basis


def learned(model, **options):
    torch.manual_seed(3)
    return LearnedOptimizer(model.parameters(), LSTMRule(), lr=0.01, **options)


def tensors(model):
    return [p.detach().clone() for p in model.parameters()]


def run_learned(model, optimizer, steps, start=0):
    course = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(step).to(model.weight.dtype)).square().mean().backward()
        optimizer.step()
        course.append(tensors(model))
    return course


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("foreach", [None, False])
def test_tensors_are_averaged_as_defined_and_come_back_to_the_bit(dtype, foreach):
    model, _ = small(dtype)
    optimizer = learned(model, average=4.0, foreach=foreach)
    course = run_learned(model, optimizer, 7)
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in course[0]]
    for t, weights in enumerate(course, 1):
        expected = [e + 5 / (t + 4) * (p.float() - e) for e, p in zip(expected, weights, strict=True)]
    for _ in range(2):  # doing it again changes nothing
        optimizer.use_average()
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.float(), e, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
    assert any(not torch.equal(p, last) for p, last in zip(model.parameters(), course[-1], strict=True))
    with pytest.raises(RuntimeError, match=r"call use_last\(\) before the forward pass"):
        run_learned(model, optimizer, 1, 7)
    for _ in range(2):
        optimizer.use_last()
        assert all(torch.equal(p, last) for p, last in zip(model.parameters(), course[-1], strict=True))
    plain, _ = small(dtype)
    for ours, theirs in zip(course, run_learned(plain, learned(plain, foreach=foreach), 7), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_skipped_step_does_not_count_in_the_average():
    model, same = small()[0], small()[0]
    ours, theirs = learned(model, average=4.0), learned(same, average=4.0)
    for start in (0, 3):  # before the first step too
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        ours.step()
        run_learned(model, ours, 3, start)
        run_learned(same, theirs, 3, start)
    for optimizer in (ours, theirs):
        optimizer.use_average()
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("at_average", [False, True])
def test_a_saved_run_of_plain_tensors_goes_on_where_it_was(at_average, tmp_path):
    model, other = small()[0], small()[0]
    optimizer = learned(model, average=4.0)
    run_learned(model, optimizer, 5)
    if at_average:
        optimizer.use_average()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(model.state_dict())
    resumed, state = learned(other, average=4.0), torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    for part in (optimizer, resumed):
        part.use_last()
    for ours, theirs in zip(run_learned(model, optimizer, 4, 5), run_learned(other, resumed, 4, 5), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for part in (optimizer, resumed):
        part.use_average()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if at_average:
        with pytest.raises(ValueError, match="this optimizer keeps none; resume with the same average"):
            learned(other).load_state_dict(state)


def test_the_rule_says_whether_a_trainer_averages_and_its_user_decides(tmp_path):
    model, basis = small()
    averaged = LSTMRule(RuleConfig(average=9.0))
    for given in ({"basis": basis}, {}):
        assert build_optimizer(model, rule=averaged, **given).average == 9.0
        assert build_optimizer(model, rule=averaged, average=0, **given).average == 0
        assert build_optimizer(model, rule=LSTMRule(), **given).average == 0
        shipped = build_optimizer(model, total_steps=10, **given)
        assert shipped.average == (4.0 if given else 9.0)
        # one that does not know the model leaves the weights at the last step, and keeps no average unless asked
        assert build_optimizer(model.named_parameters(), rule=averaged, **given).average == 0
        assert build_optimizer(model.named_parameters(), rule=averaged, average=9.0, **given).average == 9.0
    assert build_optimizer(model.named_parameters(), "subspace_adamw", basis=basis).average == 0
    averaged.save_pretrained(tmp_path / "rule")
    again = LSTMRule.from_pretrained(tmp_path / "rule")
    assert again.config.average == 9.0
    plain = LSTMRule(RuleConfig())
    plain.load_state_dict(averaged.state_dict())
    assert plain.fingerprint == again.fingerprint  # the update is the same


def at_average(optimizer):
    if isinstance(optimizer, SubspaceOptimizer):
        return optimizer.at_average
    return any("last" in state for state in optimizer.state.values())


class Watch(TrainerCallback):
    """Notes where the weights are when others look."""

    def __init__(self):
        self.seen = []

    def note(self, what, step, model, optimizer):
        inner = getattr(optimizer, "optimizer", optimizer)
        self.seen.append(
            (what, step, at_average(inner), sum(p.detach().double().sum().item() for p in model.parameters()))
        )

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.note("step", state.global_step, model, optimizer)

    def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.note("evaluate", state.global_step, model, optimizer)

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.note("save", state.global_step, model, optimizer)


def train(folder, kind=SL2OTrainer, resume=None, max_steps=6, with_basis=True, **options):
    model = tiny_gpt2(seed=0)
    basis = random_dense(model.named_parameters()) if with_basis else None
    settings = {"max_steps": max_steps, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "eval_steps": 2}
    settings |= {"eval_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, "optim": "subspace_sgd"}
    settings |= {"learning_rate": 20.0, "lr_scheduler_type": "constant", "logging_steps": 1}
    watch, objects = Watch(), {"train_dataset": Tokens(), "eval_dataset": Tokens()}
    if not with_basis:
        settings |= {"optim": "sl2o", "learning_rate": 0.01}
        torch.manual_seed(3)
        objects["rule"] = LSTMRule(RuleConfig(average=4.0))
    if kind is SL2OTrainer:
        args = SL2OTrainingArguments(str(folder), **settings, **options)
        trainer = SL2OTrainer(model, args, basis=basis, callbacks=[watch], **objects)
    else:
        basis.save_pretrained(folder / "basis")
        words = f"basis={folder / 'basis'}" + "".join(f",{key}={value}" for key, value in options.items())
        args = TrainingArguments(str(folder), optim_args=words, **settings)
        trainer = kind(model, args, callbacks=[watch], **objects)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.seen


def test_without_a_basis_too_a_trainer_evaluates_saves_and_ends_at_the_average_of_its_rule(tmp_path):
    trainer, noted = train(tmp_path / "one", with_basis=False)
    seen = list(noted)
    assert all(there or (what, step) == ("step", 0) for what, step, there, _ in seen)  # whoever looks
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], abs=1e-6)
    plain, _ = train(tmp_path / "two", with_basis=False, sl2o_average=0)
    others = [entry["eval_loss"] for entry in plain.state.log_history if "eval_loss" in entry]
    assert max(abs(a - b) for a, b in zip(losses, others, strict=True)) > 1e-4
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert not torch.equal(ours, theirs)
    train(tmp_path / "part", with_basis=False, max_steps=3)
    resumed, again = train(tmp_path / "part", with_basis=False, resume=True)
    assert again == seen[-len(again) :]
    for ours, theirs in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [SL2OTrainer, Trainer])
def test_trainers_evaluate_and_save_at_the_average_and_train_at_the_last(tmp_path, kind):
    options = {"sl2o_average": 4.0} if kind is SL2OTrainer else {"average": 4.0}
    trainer, seen = train(tmp_path / "one", kind, **options)
    assert all(there or (what, step) == ("step", 0) for what, step, there, _ in seen)  # whoever looks
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], abs=1e-6)  # it ends there
    plain, _ = train(tmp_path / "two", kind)
    trained = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, plain)]
    assert trained[0] == pytest.approx(trained[1], abs=1e-5)  # evaluation does not change the run
    others = [entry["eval_loss"] for entry in plain.state.log_history if "eval_loss" in entry]
    assert max(abs(a - b) for a, b in zip(losses, others, strict=True)) > 1e-4


class AsksFor(TrainerCallback):
    """Asks for the end, or a checkpoint, in its own `on_step_end`, as a time limit does."""

    def __init__(self, what, step):
        self.what, self.step = what, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.what, True)


@pytest.mark.parametrize("what", ["should_training_stop", "should_save"])
def test_what_other_callbacks_ask_for_is_at_the_average_and_what_they_record_is_not(tmp_path, what):
    runs, snapshots = [], []
    for average in (4.0, 0.0):
        folder = tmp_path / f"{average:g}"
        recorder = TrajectoryCallback(folder / "trajectory", every_steps=1)
        model = tiny_gpt2(seed=0)
        args = SL2OTrainingArguments(
            str(folder), max_steps=5, optim="subspace_sgd", learning_rate=20.0, report_to="none", use_cpu=True,
            sl2o_average=average, disable_tqdm=True, save_strategy="steps", save_steps=100,
        )  # fmt: skip
        callbacks = [AsksFor(what, 3), recorder]
        basis = random_dense(model.named_parameters())
        trainer = SL2OTrainer(model, args, basis=basis, train_dataset=Tokens(), callbacks=callbacks)
        trainer.train()
        files = sorted((folder / "trajectory").glob("snapshot-*"))
        snapshots.append([load_file(path) for path in files])
        runs.append(trainer)
    assert at_average(runs[0].subspace_optimizer)
    assert runs[0].state.global_step == (3 if what == "should_training_stop" else 5)
    if what == "should_save":
        saved = load_file(tmp_path / "4" / "checkpoint-3" / "coefficients.safetensors")["coefficients"]
        kept = torch.load(tmp_path / "4" / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"][0]
        assert torch.equal(saved, kept["average"]) and not torch.equal(saved, kept["coefficients"])
    for averaged, plain in zip(*snapshots, strict=True):
        for name in plain:
            torch.testing.assert_close(averaged[name], plain[name], rtol=0, atol=1e-5)


def test_stop_and_resume_at_a_checkpoint_is_one_run(tmp_path):
    whole, seen = train(tmp_path / "whole", sl2o_average=4.0)
    train(tmp_path / "part", sl2o_average=4.0, max_steps=3)
    resumed, again = train(tmp_path / "part", sl2o_average=4.0, resume=True)
    assert again == seen[-len(again) :]
    assert torch.equal(whole.subspace_optimizer.coefficients, resumed.subspace_optimizer.coefficients)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_train_on_evaluates_at_the_average():
    model, basis = small()

    def batches(seed):
        step = 0
        while True:
            yield batch(step)
            step += 1

    task = Task("regression", lambda: small()[0], batches, lambda net, x: net(x).square().mean(), basis, [batch(99)])
    sgd = lambda c: torch.optim.SGD(c, lr=0.1, momentum=0.9)  # noqa: E731
    plain = train_on(task, sgd, 9, evaluate_at=range(10))
    found = train_on(task, sgd, 9, evaluate_at=range(10), average=4.0)
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    optimizer = optimizer_of(model, basis, average=4.0)
    for step in range(10):
        if step:
            run(model, optimizer, 1, step - 1)
        optimizer.use_average()
        with torch.no_grad():
            expected = model(batch(99)).square().mean().item()
        optimizer.use_last()
        assert found["eval"][step][1] == pytest.approx(expected, rel=1e-4)
    assert abs(found["eval"][9][1] - plain["eval"][9][1]) > 1e-4 * plain["eval"][9][1]
