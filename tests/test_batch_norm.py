"""BatchNorm in a subspace: recalibrated statistics, what it costs not to, the callback in a Trainer, bad input."""

import copy
import gc
import pickle
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_sl2o import (
    BatchNormCallback,
    Layout,
    RandomBasis,
    SL2OTrainer,
    SL2OTrainingArguments,
    recalibrate_batch_norm,
)
from hf_sl2o.training.batch_norm import has_running_statistics


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3)
        )
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.norm(self.body(x)).mean(dim=(2, 3)))
        return (
            {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits
        )


def net():
    torch.manual_seed(0)
    return Net()


def data(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    labels = (x[:, 0].mean(dim=(1, 2)) > 0).long()
    return x * 3 + 1, labels


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_equals_torchs_own_update(kind):
    model, (x, labels) = net(), data()
    model.body[3].p = 0.0  # torch's runs dropout too
    expected = copy.deepcopy(model)
    update_bn([x[:32], x[32:]], expected)
    pick = {
        "tensor": lambda rows: x[rows],
        "tuple": lambda rows: (x[rows], labels[rows]),
        "mapping": lambda rows: {"x": x[rows], "labels": labels[rows]},
    }[kind]
    assert recalibrate_batch_norm(model, [pick(slice(0, 32)), pick(slice(32, 64))]) == 2
    for name, value in statistics(expected).items():
        torch.testing.assert_close(statistics(model)[name], value)
        assert not torch.allclose(statistics(net())[name], value, atol=1e-2)  # the break: not recalibrated


def test_modes_momenta_weights_and_random_numbers_stay():
    model, (x, _) = net(), data()
    model.train()
    model.body[1].eval()
    model.norm.momentum = 0.3
    before, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    recalibrate_batch_norm(model, [x])
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and not model.body[1].training and model.norm.training and model.norm.momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert recalibrate_batch_norm(nn.Linear(2, 2), []) == 0
    statistics = model.norm.running_mean.clone()
    with pytest.raises(ValueError, match="no batches to recalibrate"):
        recalibrate_batch_norm(model, [])
    assert torch.equal(model.norm.running_mean, statistics) and statistics.abs().sum() > 0


class Rows(torch.utils.data.Dataset):
    def __init__(self, seed):
        self.x, self.labels = data(seed=seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.labels[i]}


def trained(folder, callbacks, **options):
    """A run that moves far in few steps, as learned optimizers do."""
    model = net()
    basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=30).to_dense()
    args = SL2OTrainingArguments(
        str(folder), optim="subspace_sgd", learning_rate=100.0, max_steps=6, report_to="none", use_cpu=True,
        per_device_train_batch_size=32, eval_strategy="steps", eval_steps=3, save_steps=3, disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = SL2OTrainer(
        model,
        args,
        basis=basis,
        train_dataset=Rows(0),
        eval_dataset=Rows(1),
        callbacks=list(callbacks),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer, [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_the_callback_serves_evaluation_checkpoints_and_the_end(tmp_path):
    batches = [{"x": Rows(0).x[:32]}, {"x": Rows(0).x[32:]}]
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            model = copy.deepcopy(kwargs["model"])
            held = statistics(model)
            recalibrate_batch_norm(model, batches)
            seen.append(all(torch.equal(held[name], value) for name, value in statistics(model).items()))

    trainer, accuracies = trained(tmp_path / "with", [BatchNormCallback(batches), Watch()], eval_on_start=True)
    assert seen == [True] * 3
    last = statistics(trainer.model)
    again = net()
    again.load_state_dict(load_file(tmp_path / "with" / "checkpoint-6" / "model.safetensors"))
    assert all(torch.equal(statistics(again)[name], value) for name, value in last.items())
    seen.clear()
    _, without = trained(tmp_path / "without", [Watch()], eval_on_start=True)
    assert seen == [False] * 3
    assert accuracies[-1] > without[-1] + 0.1  # what is lost without it


def test_batch_statistics_in_evaluation_are_refused(tmp_path):
    class Stuck(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.train()
            return self

    torch.manual_seed(0)
    model = Stuck()
    args = SL2OTrainingArguments(str(tmp_path), optim="adamw_torch", report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = SL2OTrainer(model, args, eval_dataset=Rows(1), callbacks=[BatchNormCallback([{"x": Rows(0).x}])])
    for judge in (trainer.evaluate, lambda: trainer.predict(Rows(1)), trainer.evaluate):
        with pytest.raises(ValueError, match="norm is a BatchNorm that uses the statistics of the batch"):
            judge()
    with pytest.raises(ValueError, match="no batches"):
        BatchNormCallback([])


# Whoever reads them, they are right

BATCHES = [{"x": Rows(0).x[:32]}, {"x": Rows(0).x[32:]}]


def right(model):
    """Whether the statistics are those at the weights as they are; the model is not touched."""
    again = net()
    again.load_state_dict({name: value.clone() for name, value in plain_state(model).items()})
    recalibrate_batch_norm(again, BATCHES)
    held = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    return all(torch.equal(held[name], value) for name, value in statistics(again).items())


def plain_state(model):
    """What `state_dict` gives, without its hooks."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def file_is_right(path):
    model = net()
    model.load_state_dict(load_file(path))
    return right(model)


class Asks(TrainerCallback):
    """Calls a function in one event of one step, and looks at what every evaluation had."""

    def __init__(self, event, action, step=2):
        self.seen, self.step, self.asking = [], step, False
        setattr(self, event, lambda args, state, control, **k: self.ask(action, state, control))

    def ask(self, action, state, control):
        if state.global_step == self.step and not self.asking:  # an evaluation logs, too
            self.asking = True
            action(self.trainer, control)
            self.asking = False
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(right(kwargs["model"]))


def trainer_of(folder, *callbacks, model=None, **options):
    settings = {
        "optim": "subspace_sgd", "learning_rate": 20.0, "max_steps": 4, "logging_steps": 2, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 32, "disable_tqdm": True, **options,
    }  # fmt: skip
    model = net() if model is None else model
    basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=30).to_dense()
    trainer = SL2OTrainer(
        model, SL2OTrainingArguments(str(folder), **settings), basis=basis, train_dataset=Rows(0),
        eval_dataset=Rows(1), callbacks=list(callbacks),
    )  # fmt: skip
    for one in callbacks:
        one.trainer = trainer
    return trainer


def evaluate(trainer, control):
    trainer.evaluate()


def ask_for(name):
    return lambda trainer, control: setattr(control, name, True)


@pytest.mark.parametrize(
    ("event", "action"),
    [
        *((event, evaluate) for event in ("on_log", "on_step_end", "on_epoch_end", "on_step_begin")),
        *((event, ask_for("should_evaluate")) for event in ("on_log", "on_step_end", "on_epoch_end")),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_evaluations_that_a_callback_asks_for_or_does(tmp_path, event, action, before):
    for good in (True, False):
        asks = Asks(event, action)
        keeps = [BatchNormCallback(BATCHES)] * good
        trainer = trainer_of(tmp_path, *([asks, *keeps] if before else [*keeps, asks]))
        trainer.train()
        assert asks.seen == [good]
        evaluate(trainer, None)
        assert asks.seen == [good, good]  # after the end


@pytest.mark.parametrize("event", ["on_log", "on_step_end"])
def test_what_a_callback_saves_or_asks_to_save(tmp_path, event):
    def save(trainer, control):
        trainer.save_model(str(tmp_path / "saved"))

    trainer_of(tmp_path, Asks(event, save), BatchNormCallback(BATCHES)).train()
    assert file_is_right(tmp_path / "saved" / "model.safetensors")
    trainer_of(tmp_path, Asks(event, ask_for("should_save")), BatchNormCallback(BATCHES)).train()
    assert file_is_right(tmp_path / "checkpoint-2" / "model.safetensors")
    trainer_of(tmp_path / "without", Asks(event, ask_for("should_save"))).train()  # the break
    assert not file_is_right(tmp_path / "without" / "checkpoint-2" / "model.safetensors")


@pytest.mark.parametrize("good", [True, False])
def test_the_checkpoint_of_a_signal(tmp_path, good):
    def kill(trainer, control):
        (of_signals,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, JITCheckpointCallback))
        of_signals.jit_manager.kill_wait = 0.0
        signal.raise_signal(signal.SIGTERM)
        while not of_signals.jit_manager.is_checkpoint_requested:
            time.sleep(0.01)

    kept = signal.getsignal(signal.SIGTERM)
    try:
        callbacks = [Asks("on_step_begin", kill, step=1), *[BatchNormCallback(BATCHES)] * good]
        trainer_of(tmp_path, *callbacks, enable_jit_checkpoint=True, max_steps=9).train()
    finally:
        signal.signal(signal.SIGTERM, kept)
    (path,) = tmp_path.glob("checkpoint-*/model.safetensors")
    assert file_is_right(path) == good


def test_a_callback_added_between_two_runs(tmp_path):
    asks = Asks("on_log", evaluate)
    trainer = trainer_of(tmp_path, asks, sl2o_average=4.0)
    trainer.train()
    trainer.add_callback(BatchNormCallback(BATCHES))
    trainer.train()
    evaluate(trainer, None)
    assert asks.seen == [False, True, True]


def test_the_model_is_copied_and_pickled_in_training_and_left_alone_after_it(tmp_path):
    copies = []

    def take(trainer, control):
        torch.save(trainer.model, tmp_path / "model.pt")
        copies.extend([copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))])
        copies.append(torch.load(tmp_path / "model.pt", weights_only=False))

    trainer = trainer_of(tmp_path, Asks("on_step_end", take), BatchNormCallback(BATCHES))
    trainer.train()
    for model in [*copies, trainer.model]:
        before = statistics(model)
        model.train()
        model(Rows(0).x * 3)
        assert not all(torch.equal(before[name], value) for name, value in statistics(model).items())
        moved = statistics(model)
        model.eval()
        model(Rows(0).x)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in moved.items())  # nobody sets them any more
    assert not trainer.model._forward_pre_hooks and not trainer.model._state_dict_pre_hooks


def test_a_run_that_is_broken_off_leaves_a_model_that_can_be_trained_again(tmp_path):
    def stop(trainer, control):
        raise KeyboardInterrupt

    asks = Asks("on_step_end", stop)
    trainer = trainer_of(tmp_path, asks, BatchNormCallback(BATCHES))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    evaluate(trainer, None)
    asks.step = -1
    trainer.train()
    evaluate(trainer, None)
    assert asks.seen == [True, True] and not trainer.model._forward_pre_hooks
    model = trainer_of(tmp_path, Asks("on_step_end", stop), BatchNormCallback(BATCHES))
    with pytest.raises(KeyboardInterrupt):
        model.train()
    model = model.model
    gc.collect()  # the callback is gone, and its hooks do nothing
    before = statistics(model.eval())
    model(Rows(0).x)
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())


def test_a_compiled_model_trains_and_is_right_where_it_is_asked_for(tmp_path):
    asks = Asks("on_step_end", ask_for("should_evaluate"))
    trainer = trainer_of(tmp_path, asks, BatchNormCallback(BATCHES), torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert asks.seen == [True]


def test_which_models_have_running_statistics():
    for layer in (nn.BatchNorm2d(3), nn.LazyBatchNorm1d(), nn.SyncBatchNorm(3)):
        assert has_running_statistics(nn.Sequential(nn.Linear(2, 2), layer))
    assert has_running_statistics(nn.InstanceNorm1d(3, track_running_stats=True))
    for layer in (nn.InstanceNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3)):
        assert not has_running_statistics(nn.Sequential(nn.Linear(2, 2), layer))


def test_instance_and_lazy_norms_are_recalibrated():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8) * 2 + 1
    for norm in (nn.InstanceNorm1d(3, track_running_stats=True), nn.LazyBatchNorm1d()):
        model = nn.Sequential(nn.Conv1d(3, 3, 1), norm)
        assert recalibrate_batch_norm(model, [x[:2], x[2:]]) == 1
        y = model[0](x).detach()
        torch.testing.assert_close(model[1].running_mean, y.mean(dim=(0, 2)))
        assert float(model[1].running_var.std()) > 0
