"""The two points in Trainers: evaluations, checkpoints and callbacks have the average, whenever they are made."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, get_constant_schedule
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_sl2o import SL2OTrainer, build_optimizer
from hf_sl2o.training.callbacks import unwrap_optimizer

from .two_points_cases import (
    EVALUATED,
    NAMED,
    ROWS,
    Calls,
    Net,
    arguments,
    copies,
    far,
    replace,
    same,
    states,
    trainer_of,
)

BOTH = pytest.mark.parametrize("kind, with_basis", [(SL2OTrainer, True), (Trainer, False)])


ALL = pytest.mark.parametrize("kind, with_basis", [(Trainer, True), (SL2OTrainer, True), (Trainer, False)])


def read(folder, step):
    return [load_file(folder / "out" / f"checkpoint-{step}" / "model.safetensors")[name] for name, _ in NAMED]


READING = ["on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_begin", "on_epoch_end"]


@ALL
def test_callbacks_in_every_hook_read_what_is_evaluated_and_saved(tmp_path, kind, with_basis):
    seen = {hook: [] for hook in [*READING, "on_train_end", "on_substep_end", "on_pre_optimizer_step"]}
    callbacks = [
        Calls(hook, lambda state, control, model, hook=hook: seen[hook].append(
            (state.global_step, copies(model), states(model))
        ))
        for hook in seen
    ]  # fmt: skip
    options = {**EVALUATED, "logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, kind, with_basis, callbacks, **options)
    trainer.train()
    saved = {at: read(tmp_path, at) for at in range(1, 7)}
    saved[0] = copies(Net())
    for hook, notes in seen.items():
        assert len(notes) >= (1 if "train" in hook or "epoch" in hook else 6), hook
        for at, weights, state in notes:
            assert same(state, saved[at]), (hook, at)
            if hook in READING or hook == "on_train_end":
                assert same(weights, saved[at]), (hook, at)
    assert any(not same(weights, saved[at]) for at, weights, _ in seen["on_substep_end"])  # there it trains
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for at, loss in enumerate(losses, 1):
        model = Net()
        model.load_state_dict(dict(zip([name for name, _ in NAMED], saved[at], strict=True)))
        args = arguments(tmp_path, Trainer, False, optim="adamw_torch", optim_args=None)
        assert Trainer(model, args, eval_dataset=ROWS[:32]).evaluate()["eval_loss"] == loss
    assert trainer.evaluate()["eval_loss"] == trainer.predict(ROWS[:32]).metrics["test_loss"] == losses[-1]
    trainer.save_model(tmp_path / "mine")
    assert same([load_file(tmp_path / "mine" / "model.safetensors")[name] for name, _ in NAMED], saved[6])
    without = trainer_of(tmp_path / "other", kind, with_basis, average=False, **options)
    without.train()
    assert far(copies(without.model), saved[6]) > 1e-4


@BOTH
@pytest.mark.parametrize("hook", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log"])
def test_evaluating_and_saving_in_a_hook_is_of_the_same_weights_and_changes_nothing(tmp_path, kind, with_basis, hook):
    options = {"gradient_accumulation_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    reference = trainer_of(tmp_path, kind, with_basis, **EVALUATED, **options)
    reference.train()
    losses = {e["step"]: e["eval_loss"] for e in reference.state.log_history if "eval_loss" in e}
    found, called = [], []

    def call(state, control, model):
        if state.global_step == 3 and not called:
            called.append(True)
            found.append(trainer.evaluate()["eval_loss"])
            found.append(trainer.predict(ROWS[:32]).metrics["test_loss"])
            trainer.save_model(tmp_path / "mine")
            found.append(states(model))

    trainer = trainer_of(tmp_path, kind, with_basis, [Calls(hook, call)], **options)
    trainer.train()
    assert found[0] == found[1] == losses[3] and losses[3] != losses[2]
    assert same(found[2], read(tmp_path, 3))
    saved = load_file(tmp_path / "mine" / "model.safetensors")
    assert same([saved[name] for name, _ in NAMED], read(tmp_path, 3))
    assert same(copies(trainer.model), copies(reference.model))


@BOTH
def test_a_state_dict_in_compute_loss_is_published(tmp_path, kind, with_basis):
    found = {}

    class Mine(kind):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training:
                found[self.state.global_step] = states(model), copies(model)
            return loss

    trainer = trainer_of(tmp_path, Mine, with_basis, **EVALUATED)
    trainer.train()
    for at in range(1, 6):
        assert same(found[at][0], read(tmp_path, at)) and (at == 1 or not same(found[at][1], read(tmp_path, at)))


@BOTH
@pytest.mark.parametrize("what", ["should_training_stop", "should_epoch_stop"])
def test_a_run_that_is_stopped_between_micro_batches_ends_at_the_average(tmp_path, kind, with_basis, what):
    def stop(state, control, model):
        if state.global_step == 3:
            setattr(control, what, True)
            control.should_training_stop = True

    ends = []
    callbacks = [Calls("on_substep_end", stop), Calls("on_train_end", lambda s, c, model: ends.append(copies(model)))]
    trainer = trainer_of(tmp_path, kind, with_basis, callbacks, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 3
    assert same(copies(trainer.model), states(trainer.model))
    assert same(ends[0], states(trainer.model))


@BOTH
def test_batches_that_a_subclass_skips(tmp_path, kind, with_basis):
    class Mine(kind):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 3:
                return torch.tensor(0.0)  # no forward pass, no gradient
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = trainer_of(tmp_path, Mine, with_basis, **EVALUATED)
    trainer.train()
    assert trainer.state.global_step == 6 and same(read(tmp_path, 3), read(tmp_path, 4))
    assert not same(read(tmp_path, 4), read(tmp_path, 5))


@BOTH
@pytest.mark.parametrize("hook", ["on_pre_optimizer_step", "on_step_end", "on_epoch_end"])
def test_a_checkpoint_on_sigterm_resumes_to_the_uninterrupted_run(tmp_path, kind, with_basis, hook):
    whole = trainer_of(tmp_path, kind, with_basis)
    whole.train()
    at = 5 if hook == "on_epoch_end" else 3

    def request(state, control, model):
        if state.global_step == at:
            manager = next(
                one.jit_manager for one in trainer.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)
            )
            manager.is_checkpoint_requested = True  # what the handler of the signal does
            control.should_epoch_stop = hook == "on_epoch_end"

    early = "on_step_end" if hook == "on_epoch_end" else hook
    trainer = trainer_of(tmp_path, kind, with_basis, [Calls(early, request)], enable_jit_checkpoint=True)
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda one: isinstance(one, JITCheckpointCallback))  # after the request
    trainer.train()
    folders = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(folders) == 1 and folders[0].name == f"checkpoint-{at}"
    if hook in ("on_step_end", "on_epoch_end"):
        assert same(copies(trainer.model), read(tmp_path, at))
    resumed = trainer_of(tmp_path, kind, with_basis)
    resumed.train(resume_from_checkpoint=str(folders[0]))
    assert same(copies(resumed.model), copies(whole.model))


@pytest.mark.parametrize(
    "kind, with_basis, options",
    [
        (Trainer, True, {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}),
        (SL2OTrainer, True, {}),
        (Trainer, False, {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}),
    ],
)  # fmt: skip
def test_resumed_at_any_checkpoint_is_the_uninterrupted_run_to_the_bit(tmp_path, kind, with_basis, options):
    whole = trainer_of(tmp_path, kind, with_basis, **EVALUATED, **options)
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    for at in (1, 2, 5):
        resumed = trainer_of(tmp_path / "again", kind, with_basis, model=Net(3), **EVALUATED, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert same(copies(resumed.model), copies(whole.model)), at
        assert [e["eval_loss"] for e in resumed.state.log_history if "eval_loss" in e] == losses, at


def test_lora_resumed_at_any_checkpoint_is_the_uninterrupted_run_to_the_bit(tmp_path):
    def go(folder, resume=None):
        torch.manual_seed(4)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["a", "b"], lora_dropout=0.1))
        trainer = trainer_of(folder, Trainer, False, model=model, max_steps=5, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return copies(trainer.model)

    whole = go(tmp_path)
    for at in (1, 4):
        assert same(go(tmp_path / "again", str(tmp_path / "out" / f"checkpoint-{at}")), whole), at


@BOTH
def test_a_callback_added_between_two_runs(tmp_path, kind, with_basis):
    trainer = trainer_of(tmp_path, kind, with_basis, max_steps=3)
    trainer.train()
    first, seen = copies(trainer.model), []
    trainer.add_callback(Calls("on_step_end", lambda s, c, model: seen.append((copies(model), states(model)))))
    trainer.add_callback(Calls("on_step_begin", lambda s, c, model: seen.append((copies(model), states(model)))))
    trainer.train()
    assert len(seen) == 6 and all(same(a, b) for a, b in seen)
    assert same(seen[0][0], first) and same(seen[-1][0], copies(trainer.model))


@BOTH
@pytest.mark.parametrize("how", ["best", "load_state_dict", "data.copy_", "data ="])
def test_a_second_run_goes_on_from_the_weights_that_are_there(tmp_path, kind, with_basis, how):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, kind, with_basis, **(EVALUATED | options if how == "best" else {}))
    trainer.train()
    if how == "best":
        best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        assert best < 6 and same(copies(trainer.model), read(tmp_path, best))
    else:
        replace(trainer.model, how)
    given, seen = copies(trainer.model), []
    begins = Calls("on_pre_optimizer_step", lambda s, c, model: seen.append((copies(model), states(model))))
    trainer.add_callback(begins)
    trainer.train()
    assert same(seen[0][0], given) and same(seen[0][1], given)
    assert not same(copies(trainer.model), given)


@pytest.mark.parametrize("with_basis", [True, False])
@pytest.mark.parametrize("second", ["adamw_torch", "sl2o"])
def test_a_second_trainer_of_the_same_model_begins_where_the_first_one_ended(tmp_path, with_basis, second):
    """SFT, then another phase with a Trainer of its own; the first one is not deleted."""
    model = Net()
    first = trainer_of(tmp_path, Trainer, with_basis, model=model)
    first.train()
    start, seen = copies(model), []
    other = Net()
    other.load_state_dict(model.state_dict())
    options = {"optim": second, "save_strategy": "steps", "save_steps": 6}
    if second == "adamw_torch":
        options |= {"optim_args": None, "learning_rate": 1e-2}
    begins = Calls("on_pre_optimizer_step", lambda s, c, model: seen.append(copies(model)))
    again = trainer_of(tmp_path, Trainer, with_basis, [begins], model=model, **options)
    again.train()
    assert same(seen[0], start)
    assert same(read(tmp_path, 6), copies(model)) and not same(copies(model), start)
    alone = trainer_of(tmp_path / "alone", Trainer, with_basis, model=other, **options)
    alone.train()
    assert far(copies(model), copies(other)) < 1e-6 and first.model is model


@BOTH
@pytest.mark.parametrize(
    "own, length",
    [
        ("create_scheduler", {}), ("create_scheduler", {"max_steps": -1, "num_train_epochs": 1}),
        ("training_step", {}), ("compute_loss", {}), ("optimizers", {}),
        ("optimizers", {"max_steps": -1, "num_train_epochs": 1}),
    ],
)  # fmt: skip
def test_subclasses_with_steps_of_their_own(tmp_path, kind, with_basis, own, length):
    class Mine(kind):
        if own == "create_scheduler":

            def create_scheduler(self, num_training_steps, optimizer=None):
                self.lr_scheduler = get_constant_schedule(self.optimizer if optimizer is None else optimizer)
                return self.lr_scheduler

        if own == "training_step":

            def training_step(self, model, inputs, num_items_in_batch=None):
                model.train()
                loss = model(**self._prepare_inputs(inputs))["loss"]
                self.accelerator.backward(loss)
                return loss.detach()

        if own == "compute_loss":

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                y = model(**inputs)
                loss = (y["logits"] - inputs["labels"]).square().mean()
                return (loss, y) if return_outputs else loss

    reference = trainer_of(tmp_path, kind, with_basis, **length)
    reference.train()
    model, objects = Net(), {}
    if own == "optimizers":
        basis = {"basis": str(tmp_path / "basis"), "lr": 5.0, "average": 4.0} if with_basis else {"average": 9.0}
        optimizer = build_optimizer(list(model.named_parameters()), "sl2o", total_steps=6, **basis)
        objects["optimizers"] = (optimizer, get_constant_schedule(optimizer))
    trainer = trainer_of(tmp_path / "own", Mine, with_basis, model=model, objects=objects, **length)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer.average > 0 and optimizer.at_average
    assert far(copies(trainer.model), copies(reference.model)) < 1e-6
    assert same(states(trainer.model), copies(trainer.model))


@BOTH
@pytest.mark.parametrize("where", ["callback", "pre_hook"])
def test_gradients_that_are_changed_before_the_step_count(tmp_path, kind, with_basis, where):
    def zero(*args):
        for p in trainer.model.parameters():
            p.grad.zero_()

    trainer = trainer_of(tmp_path, kind, with_basis, [Calls("on_pre_optimizer_step", zero)] * (where == "callback"))
    if where == "pre_hook":
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(lambda *args: zero())
    trainer.train()
    assert same(copies(trainer.model), copies(Net()))
    trainer = trainer_of(tmp_path, kind, with_basis)
    trainer.train()
    assert not same(copies(trainer.model), copies(Net()))
