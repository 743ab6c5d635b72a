"""What each option of meta-training does; divergence; what is refused."""

import copy
import json
import logging
import math

import pytest
import torch

import hf_sl2o.meta.trainer
from hf_sl2o import (
    PES,
    FirstOrder,
    LearnedOptimizer,
    Rule,
    SecondOrder,
    train_on,
)
from hf_sl2o.meta.episodes import Episode
from hf_sl2o.meta.task import InnerRun

from .meta_cases import dropout_network, end_of, episodes, exploding_task, make, same, scores, small_rule, two_tasks
from .test_meta import comparable, data, loss, make_task


def test_curriculum_sets_the_steps_of_each_meta_epoch(tmp_path):
    trainer = make(tmp_path, curriculum=[10, 15, 20], meta_epochs=6)
    trainer.train()
    steps = {entry["meta_epoch"]: entry["steps"] for entry in episodes(trainer)}
    assert steps == {0: 10, 1: 10, 2: 15, 3: 15, 4: 20, 5: 20}
    assert trainer.meta_step == 2 * (2 + 3 + 4)


def test_random_scaling_changes_the_result_and_is_reproducible(tmp_path):
    ends = []
    for folder, s in (("plain", 0.0), ("scaled", 1.0), ("again", 1.0), ("wider", 2.0)):
        make(tmp_path / folder, random_scaling=s).train()
        ends.append(end_of(tmp_path / folder))
    assert same(ends[1], ends[2]) and not same(ends[0], ends[1]) and not same(ends[1], ends[3])


def test_random_scaling_lies_in_its_range_and_differs_between_episodes():
    args = {"steps": 10, "random_scaling": 2.0, "device": torch.device("cpu"), "autocast": None}
    drawn = [Episode(0, make_task(), FirstOrder(), seed=seed, **args).runs[0]._scales for seed in range(40)]
    logs = torch.stack(drawn).log()
    assert logs.abs().max() <= 2 and logs.max() > 1.5 and logs.min() < -1.5 and len(torch.unique(logs, dim=0)) == 40
    pair = Episode(0, make_task(), PES(), seed=0, **args).runs
    assert torch.equal(pair[0]._scales, pair[1]._scales)


class Recording(torch.optim.SGD):
    """Writes down each learning rate and gradient."""

    def __init__(self, weights, lr):
        super().__init__(weights, lr=lr)
        self.rates, self.gradients = [], []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        self.gradients.append(torch.cat([p.grad.reshape(-1).clone() for p in self.param_groups[0]["params"]]))
        return super().step(closure)


def recorded(folder, lr=0.1, **options):
    trainer = make(folder, meta_optimizer=lambda weights: Recording(weights, lr), **options)
    trainer.train()
    return trainer.optimizer


@pytest.mark.parametrize("steps", [15, 17, 16])
def test_cosine_meta_learning_rate(tmp_path, steps):
    rates = recorded(tmp_path / "cosine", meta_lr_scheduler_type="cosine", inner_steps=steps, meta_epochs=3).rates
    total = len(rates)
    expected = [0.05 * (1 + math.cos(math.pi * k / total)) for k in range(total)]
    assert total == 3 * math.ceil((steps - 1) / 5)
    assert rates == pytest.approx(expected) and rates[0] == 0.1
    assert set(recorded(tmp_path / "constant", inner_steps=steps).rates) == {0.1}


def test_clipping_keeps_the_direction(tmp_path):
    options = {"inner_steps": 5, "meta_epochs": 1}
    free = recorded(tmp_path / "free", **options).gradients[0]
    clipped = recorded(tmp_path / "clipped", max_grad_norm=1e-3, **options).gradients[0]
    loose = recorded(tmp_path / "loose", max_grad_norm=1e3, **options).gradients[0]
    assert free.norm() > 1e-2 and clipped.norm() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
    assert torch.equal(loose, free)


def test_the_meta_gradient_is_the_mean_over_tasks_each_divided_by_its_first_loss(tmp_path):
    options = {"inner_steps": 5, "meta_epochs": 1}
    tasks = two_tasks()
    alone = make(tmp_path / "one", tasks=tasks[:1], meta_optimizer=lambda w: Recording(w, 0.1), **options)
    alone.train()
    both = recorded(tmp_path / "both", tasks=tasks, **options).gradients[0]
    loud = [tasks[0], make_task(name="dropout", build_model=dropout_network, basis=tasks[1].basis, loss=louder)]
    assert torch.allclose(recorded(tmp_path / "loud", tasks=loud, **options).gradients[0], both, rtol=1e-4, atol=1e-6)
    # by hand: the first task's part is its own gradient, halved
    rule, run = small_rule(), InnerRun(tasks[0], 0)
    c, state = torch.zeros(5), rule.init_state(5)
    surrogate, _, _, losses = hf_sl2o.unroll(rule, run, c, state, steps=5)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(surrogate, list(rule.parameters()))]) / losses[0]
    torch.testing.assert_close(alone.optimizer.gradients[0], gradient)
    assert (both - gradient).norm() > 1e-3


def test_the_logarithmic_meta_loss_divides_each_steps_part_by_the_level_of_the_losses(tmp_path):
    """By hand: a running mean, of all losses of the window at first, later of about ten."""
    options = {"inner_steps": 30, "unroll_length": 15, "meta_epochs": 1, "tasks": two_tasks()[:1]}
    summed = recorded(tmp_path / "sum", lr=0.0, **options).gradients
    logarithmic = recorded(tmp_path / "log", lr=0.0, meta_loss="log", **options).gradients
    run, rule = InnerRun(two_tasks()[0], 0), small_rule()
    c, state = torch.zeros(5), rule.init_state(5)
    for window in (0, 1):
        c, state, mean, surrogate = c.detach(), state.detach(), 0.0, torch.zeros(())
        for step in range(15):
            loss, g = run.gradient()
            mean += max(1 / (step + 1), 0.1) * (float(loss) - mean)
            surrogate = surrogate + torch.dot(g, c) / mean
            delta, state = rule(g, state)
            c = c - delta
            run.move(-delta.detach())
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(surrogate, list(rule.parameters()))])
        torch.testing.assert_close(logarithmic[window], expected, rtol=1e-3, atol=1e-6)
        scaled = summed[window] * logarithmic[window].norm() / summed[window].norm()
        assert not torch.allclose(logarithmic[window], scaled, rtol=1e-2)  # the break: one unit for all steps
    with pytest.raises(ValueError, match='meta_loss is \'product\', expected "sum" or "log"'):
        make(tmp_path / "bad", meta_loss="product")


def louder(model, batch):
    return 1000 * loss(model, batch)


@pytest.mark.parametrize(
    ("inner_steps", "done", "meta_steps", "message"),
    [(15, 15, 3, None), (17, 17, 4, "the last window has 2 steps"), (16, 15, 3, "the last step is left out")],
)
def test_steps_that_are_no_multiple_of_the_window(tmp_path, caplog, inner_steps, done, meta_steps, message):
    with caplog.at_level(logging.WARNING, "hf_sl2o"):
        trainer = make(tmp_path, inner_steps=inner_steps, meta_epochs=1)
    assert (message is None) == ("not a multiple" not in caplog.text) and (message or "") in caplog.text
    trainer.train()
    assert [entry["steps"] for entry in episodes(trainer)] == [done, done] and trainer.meta_step == meta_steps


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_network_runs_in_bf16_and_the_rule_does_not(tmp_path, precision):
    seen = set()

    def watched(model, batch):
        out = model(batch[0])
        seen.add(out.dtype)
        return (out.float() - batch[1]).square().mean()

    for estimator in (FirstOrder(), FirstOrder(coordinates=2), PES(sigma=0.05), SecondOrder()):
        seen.clear()
        folder = tmp_path / type(estimator).__name__ / str(getattr(estimator, "coordinates", ""))
        trainer = make(
            folder, tasks=two_tasks(loss=watched), estimator=estimator, mixed_precision=precision, max_seconds=0.0
        )
        trainer.train()
        assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert {p.dtype for p in trainer.rule.parameters()} == {torch.float32}
        for episode in trainer.episodes:
            assert episode.done == 5 and {p.dtype for p in episode.runs[0].parameters} == {torch.float32}
            assert {value.dtype for value in episode.carry.values()} == {torch.float32}
        assert not torch.equal(end_of(folder)["rule.head.weight"], small_rule().state_dict()["head.weight"])


@pytest.mark.parametrize("kind", ["far above its start", "not a number"])
def test_a_diverging_episode_ends_alone(tmp_path, caplog, kind):
    bad = exploding_task() if kind == "far above its start" else exploding_task(growth=1.0, nan_at=7)
    with caplog.at_level(logging.WARNING, "hf_sl2o"):
        trainer = make(tmp_path, tasks=[make_task(), bad], eval_tasks=[make_task()])
        trainer.train()
    by_task = {(entry["task"], entry["diverged"]) for entry in episodes(trainer)}
    assert by_task == {("toy", False), ("exploding", True)}
    assert all(entry["steps"] == (15 if entry["task"] == "toy" else entry["steps"]) for entry in episodes(trainer))
    assert all(entry["steps"] < 15 for entry in episodes(trainer) if entry["diverged"])
    assert "'exploding' diverged after" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in end_of(tmp_path).values())
    assert trainer.meta_step == 6


def test_the_last_meta_gradient_of_a_diverging_episode_is_not_used(tmp_path):
    options = {"inner_steps": 5, "meta_epochs": 1, "eval_tasks": [make_task()]}
    alone = recorded(tmp_path / "alone", tasks=[make_task()], **options).gradients
    beside = recorded(tmp_path / "beside", tasks=[make_task(), exploding_task(growth=64.0)], **options).gradients
    assert len(alone) == len(beside) == 1 and torch.equal(alone[0], beside[0]) and alone[0].norm() > 1e-3
    mild = recorded(tmp_path / "mild", tasks=[make_task(), exploding_task(growth=1.0)], **options).gradients
    assert not torch.allclose(alone[0], mild[0])


def test_callbacks_see_every_entry_and_can_stop(tmp_path):
    seen = []

    def watch(trainer, entry):
        seen.append(entry)

    def stop(trainer, entry):
        if entry["meta_epoch"] == 1 and "score" in entry:
            trainer.should_stop = True

    free = make(tmp_path / "free", meta_epochs=3, callbacks=[watch])
    free.train()
    assert seen == free.log_history and len(seen) == 4 + 3 * 2
    seen.clear()
    stopped = make(tmp_path / "stopped", meta_epochs=3, callbacks=[watch, stop])
    stopped.train()
    assert seen == stopped.log_history and stopped.epoch == 1
    rest = make(tmp_path / "stopped", meta_epochs=3, callbacks=[watch])
    rest.train()
    assert same(end_of(tmp_path / "stopped"), end_of(tmp_path / "free"))
    assert comparable(seen) == comparable(free.log_history)  # none twice


def test_tensorboard_gets_an_event_file(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(tmp_path, report_to="tensorboard", logging_steps=2)
    trainer.train()
    (path,) = [path for path in tmp_path.rglob("events.out.tfevents*") if "hparams" not in str(path.parent.name)][:1]
    accumulator = EventAccumulator(str(path.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"toy/last_loss", "dropout/last_loss", "meta_grad_norm", "validation_loss"} <= tags
    assert [event.step for event in accumulator.Scalars("meta_grad_norm")] == [0, 2, 4]
    logged = [event.value for event in accumulator.Scalars("validation_loss")]
    expected = [entry["validation_loss"] for entry in trainer.log_history if "score" in entry]
    assert logged == pytest.approx(expected, rel=1e-5)


def test_the_best_rule_is_chosen_on_held_out_batches(tmp_path):
    opposite = [(x, -y) for x, y in data(7, batches=2)]
    ends = {}
    for name, held_out in (("agree", list(data(7, batches=2))), ("oppose", opposite)):
        tasks = [make_task(eval_batches=held_out)]
        trainer = make(tmp_path / name, tasks=tasks, inner_steps=30, meta_epochs=4, unroll_length=10)
        ends[name] = trainer, trainer.train()
    first = small_rule()
    for name, (trainer, rule) in ends.items():
        values = scores(trainer)
        moved = end_of(tmp_path / name)
        assert not torch.equal(moved["rule.head.weight"], first.state_dict()["head.weight"])
        assert trainer.best == min(values)
        assert (rule.fingerprint == first.fingerprint) == (values.index(min(values)) == 0)
        assert torch.equal(rule.state_dict()["head.weight"], moved["best.head.weight"])
        assert Rule.from_pretrained(tmp_path / name).fingerprint == rule.fingerprint
    # The same training; only what is held out differs.
    assert all(
        torch.equal(end_of(tmp_path / "agree")[key], end_of(tmp_path / "oppose")[key])
        for key in end_of(tmp_path / "agree")
        if not key.startswith("best.")
    )
    assert ends["agree"][1].fingerprint != ends["oppose"][1].fingerprint


def test_the_score_is_the_geometric_mean_of_relative_losses_on_the_eval_tasks(tmp_path):
    loud = make_task(name="loud", loss=louder)
    plain = make(tmp_path / "a", tasks=[make_task()], eval_tasks=[make_task(name="x")], meta_epochs=1)
    mixed = make(tmp_path / "b", tasks=[make_task()], eval_tasks=[make_task(name="x"), loud], meta_epochs=1)
    plain.train()
    mixed.train()
    assert set(mixed.log_history[0]["validation"]) == {"x", "loud"}
    # The same problem a thousand times as loud does not drown the other: its relative loss is nearly the same.
    assert scores(mixed) == pytest.approx(scores(plain), rel=1e-3) and scores(plain)[0] != scores(plain)[1]
    assert mixed.log_history[0]["validation_loss"] > 100 * plain.log_history[0]["validation_loss"]
    # by hand: the geometric mean over 1/8, 1/4, 1/2 and all of a run
    task, rule = make_task(name="x"), small_rule()
    run = train_on(task, lambda c: LearnedOptimizer(c, rule), 15, seed=999_983, evaluate_at={0, 1, 3, 7, 15})
    first, *points = [value for _, value in run["eval"]]
    expected = math.exp(sum(math.log(point / first) for point in points) / 4)
    assert scores(plain)[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - sum(points) / first / 4) > 1e-4  # not the arithmetic mean


# What is refused


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"named \['toy', 'toy'\]; give each a name of its own"):
        make(tmp_path, tasks=[make_task(), make_task()])
    with pytest.raises(ValueError, match="give each a name"):
        make(tmp_path, eval_tasks=[make_task(), make_task()])
    for options, message in (
        ({"curriculum": (10, 3)}, "inner_steps 3 is below unroll_length 5"),
        (
            {"meta_lr_scheduler_type": "linear"},
            'meta_lr_scheduler_type is \'linear\', expected "constant" or "cosine"',
        ),
        ({"lr_scheduler_type": "cosine"}, 'schedule is \'cosine\', expected "constant" or "linear"'),
        ({"mixed_precision": "fp16"}, 'mixed_precision is \'fp16\', expected "no" or "bf16"'),
        ({"episodes_per_task": 0}, "episodes_per_task, save_steps and logging_steps must be at least 1"),
        ({"save_steps": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **options)
    monkeypatch.setattr(hf_sl2o.meta.trainer.Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(ValueError, match="3 processes share 2 episodes.*raise episodes_per_task"):
        make(tmp_path)
    make(tmp_path, episodes_per_task=2)


def test_batches_get_seeds_that_any_generator_takes(tmp_path):
    seeds = []

    def batches(seed):
        seeds.append(seed)
        return data(seed)

    make(tmp_path, tasks=two_tasks(batches=batches), episodes_per_task=2, max_seconds=0.0).train()
    assert len(set(seeds)) == 5 and min(seeds) >= 0  # numpy refuses a negative one


def test_a_task_that_raises_is_named(tmp_path):
    def failing(model, batch):
        raise IndexError("boom")

    with pytest.raises(RuntimeError, match="task 'second' failed at batch 1: IndexError: boom"):
        make(tmp_path, tasks=[make_task(), make_task(name="second", loss=failing)], eval_tasks=[make_task()]).train()


def test_a_lost_process_is_reported_wherever_it_is_missed(tmp_path, monkeypatch):
    """Also where processes only wait for one another."""

    def gone(self):
        raise RuntimeError("[gloo] Connection closed by peer\nmore")

    trainer = make(tmp_path, max_seconds=0.0)
    monkeypatch.setattr(type(trainer.accelerator), "wait_for_everyone", gone)
    with pytest.raises(RuntimeError, match="process 0 waits for one that is gone.*Connection closed by peer"):
        trainer.train()


def test_settings_survive_json(tmp_path):
    trainer = make(tmp_path, curriculum=[10, 15], max_seconds=0.0)
    trainer.train()
    stamp = json.loads((tmp_path / "checkpoint.json").read_text())["stamp"]
    assert stamp["args"]["curriculum"] == [10, 15] == trainer.args.curriculum
    assert copy.deepcopy(trainer.args) == trainer.args
