"""A meta-training that is stopped anywhere goes on to the bit; what a checkpoint is for."""

import logging

import pytest
import torch

from hf_sl2o import (
    PES,
    Estimator,
    FirstOrder,
    MetaTrainer,
    Rule,
    SecondOrder,
)
from hf_sl2o.foundation.files import load_json, save_json
from hf_sl2o.meta.checkpoints import MANIFEST, Checkpoints
from hf_sl2o.meta.episodes import Episode
from hf_sl2o.meta.task import InnerRun

from .meta_cases import end_of, episodes, exploding_task, make, same, scores, small_rule, two_tasks
from .test_meta import comparable, loss, make_task


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of the default settings."""
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


class Killed(Exception):
    pass


def kill_after(monkeypatch, meta_steps):
    original, left = MetaTrainer._meta_step, {"n": meta_steps}

    def dying(self, **options):
        if left["n"] == 0:
            raise Killed
        left["n"] -= 1
        return original(self, **options)

    monkeypatch.setattr(MetaTrainer, "_meta_step", dying)


# Stopping and going on

ESTIMATORS = {
    "first-order": (FirstOrder(), {}),
    "scaled": (FirstOrder(), {"random_scaling": 1.0, "lr_scheduler_type": "linear"}),
    "coordinates": (FirstOrder(coordinates=2), {"meta_lr_scheduler_type": "cosine"}),
    "pes": (PES(sigma=0.05), {"curriculum": (10, 15)}),
    "second-order": (SecondOrder(), {"max_grad_norm": 0.1, "episodes_per_task": 2}),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_killed_in_an_episode_it_goes_on_to_the_bit(tmp_path, monkeypatch, name):
    estimator, options = ESTIMATORS[name]
    whole = make(tmp_path / "whole", estimator=estimator, save_steps=1, **options)
    before = whole.rule.fingerprint
    whole.train()
    expected = end_of(tmp_path / "whole")
    assert not same(expected, {**expected, **{f"rule.{k}": v for k, v in small_rule().state_dict().items()}})
    assert whole.rule.fingerprint != before or whole.best == scores(whole)[0]

    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            make(tmp_path / "parts", estimator=estimator, save_steps=1, **options).train()
    manifest = load_json(tmp_path / "parts" / "checkpoint.json")
    assert manifest["progress"]["in_episode"] and manifest["progress"]["meta_step"] == 1
    with monkeypatch.context() as patch:
        kill_after(patch, 3)  # now in the second meta-epoch
        with pytest.raises(Killed):
            make(tmp_path / "parts", estimator=estimator, save_steps=1, **options).train()
    rest = make(tmp_path / "parts", estimator=estimator, save_steps=1, **options)
    rest.train()
    assert same(end_of(tmp_path / "parts"), expected)
    assert rest.rule.fingerprint == whole.rule.fingerprint and rest.best == whole.best
    assert comparable(rest.log_history) == comparable(whole.log_history)
    assert comparable(load_json(tmp_path / "parts" / "log.json")) == comparable(whole.log_history)
    folders = [path.name for path in (tmp_path / "parts").glob("checkpoint-*")]
    assert folders == [load_json(tmp_path / "parts" / "checkpoint.json")["folder"]]  # older ones are gone


@pytest.mark.parametrize("forgotten", ["rng.0", "hidden", "parameter.0"])
def test_what_a_checkpoint_forgets_changes_the_result(tmp_path, monkeypatch, forgotten, whole):
    kill_after(monkeypatch, 1)
    with pytest.raises(Killed):
        make(tmp_path / "parts", save_steps=1).train()
    monkeypatch.undo()
    load, load_run = Episode.load, InnerRun.load_state_dict

    def forgetful_load(self, path):
        load(self, path)
        if forgotten in self.carry:
            self.carry[forgotten] = torch.zeros_like(self.carry[forgotten])

    def forgetful_run(self, tensors):
        fresh = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        load_run(self, {**tensors, **({forgotten: fresh[forgotten]} if forgotten in fresh else {})})

    monkeypatch.setattr(Episode, "load", forgetful_load)
    monkeypatch.setattr(InnerRun, "load_state_dict", forgetful_run)
    make(tmp_path / "parts", save_steps=1).train()
    assert not same(end_of(tmp_path / "parts"), end_of(whole.folder))


def test_killed_between_checkpoints_it_repeats_the_steps_in_between(tmp_path, monkeypatch, whole):
    for after in (1, 3, 2):
        with monkeypatch.context() as patch:
            kill_after(patch, after)
            with pytest.raises(Killed):
                make(tmp_path / "parts", save_steps=2).train()
    rest = make(tmp_path / "parts", save_steps=2)
    rest.train()
    assert same(end_of(tmp_path / "parts"), end_of(whole.folder))
    assert comparable(rest.log_history) == comparable(whole.log_history)


def test_max_seconds_stops_and_more_of_them_finish(tmp_path, caplog, whole):
    starts = 0
    with caplog.at_level(logging.WARNING, "hf_sl2o"):
        while True:
            part = make(tmp_path / "parts", max_seconds=0.0)
            part.train()
            starts += 1
            if part.epoch == 2:
                break
            assert part.should_stop and starts < 10
            assert Rule.from_pretrained(tmp_path / "parts").fingerprint == part.rule.fingerprint
            if starts == 3:  # the rest in one go
                last = make(tmp_path / "parts", max_seconds=1e9)
                last.train()
                part = last
                break
    assert starts == 3 and "a new start goes on" in caplog.text
    assert same(end_of(tmp_path / "parts"), end_of(whole.folder))
    assert comparable(part.log_history) == comparable(whole.log_history)
    assert part.rule.fingerprint == whole.rule.fingerprint


def test_one_meta_step_a_start_is_enough_to_finish(tmp_path, whole):
    for _ in range(9):
        part = make(tmp_path / "parts", max_seconds=0.0)
        part.train()
    assert part.epoch == 2 and same(end_of(tmp_path / "parts"), end_of(whole.folder))
    assert comparable(part.log_history) == comparable(whole.log_history)


def test_the_same_trainer_goes_on_after_it_stopped(tmp_path, whole):
    part = make(tmp_path / "parts", max_seconds=0.0)
    part.train()
    assert part.epoch == 0
    part.args.max_seconds = None
    part.train()
    assert part.epoch == 2 and comparable(part.log_history) == comparable(whole.log_history)
    assert part.rule.fingerprint == whole.rule.fingerprint


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    first = make(tmp_path)
    first.train()
    end, again = end_of(tmp_path), make(tmp_path)
    again.train()
    assert same(end_of(tmp_path), end) and again.rule.fingerprint == first.rule.fingerprint
    assert comparable(again.log_history) == comparable(first.log_history)


def test_what_a_kill_during_a_write_left_behind_does_no_harm(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            make(tmp_path / "parts", save_steps=1).train()
    torn = tmp_path / "parts" / "checkpoint-0000002"
    torn.mkdir()
    (torn / ".episode-0.safetensors.4711.partial").write_bytes(b"half")
    (torn / "episode-1.safetensors").write_bytes(b"of a start that was killed")
    rest = make(tmp_path / "parts", save_steps=1)
    rest.train()
    assert same(end_of(tmp_path / "parts"), end_of(whole.folder))


def test_a_random_loss_gives_the_same_log_after_a_stop(tmp_path):
    def noisy(model, batch):
        return loss(model, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))

    logs = []
    for folder, max_seconds in (("whole", None), ("parts", 0.0)):
        for _ in range(1 if max_seconds is None else 8):
            trainer = make(tmp_path / folder, tasks=two_tasks(loss=noisy), max_seconds=max_seconds)
            torch.rand(3)  # the randomness outside is none of its business
            trainer.train()
        logs.append(comparable(trainer.log_history))
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "meta_optimizer",
    [
        lambda weights: torch.optim.SGD(weights, lr=0.1),
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        lambda weights: torch.optim.AdamW(weights, lr=0.01, amsgrad=True),
        lambda weights: torch.optim.RMSprop([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], lr=0.01),
    ],
    ids=["sgd", "momentum", "amsgrad", "groups"],
)
def test_any_meta_optimizer_goes_on(tmp_path, meta_optimizer):
    whole = make(tmp_path / "whole", meta_optimizer=meta_optimizer)
    whole.train()
    for _ in range(2):
        make(tmp_path / "parts", meta_optimizer=meta_optimizer, max_seconds=0.0).train()
    make(tmp_path / "parts", meta_optimizer=meta_optimizer).train()
    end = end_of(tmp_path / "whole")
    assert same(end_of(tmp_path / "parts"), end)
    assert not torch.equal(end["rule.head.weight"], small_rule().state_dict()["head.weight"])


def test_a_diverged_episode_stays_diverged_after_a_stop(tmp_path):
    tasks = lambda: [make_task(), exploding_task()]  # noqa: E731
    whole = make(tmp_path / "whole", tasks=tasks())
    whole.train()
    for _ in range(2):
        make(tmp_path / "parts", tasks=tasks(), max_seconds=0.0).train()
    rest = make(tmp_path / "parts", tasks=tasks())
    rest.train()
    assert any(entry["diverged"] for entry in episodes(rest))
    assert comparable(rest.log_history) == comparable(whole.log_history)
    assert same(end_of(tmp_path / "parts"), end_of(tmp_path / "whole"))


# What a checkpoint is for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unroll_length": 3}, "unroll_length was 5, this run has 3"),
        ({"seed": 4}, "seed was 0, this run has 4"),
        ({"curriculum": (10, 15)}, "curriculum was"),
        ({"rule": "hidden"}, "hidden_size was 4, this run has 3"),
        ({"rule": "momenta"}, r"momenta was \[\], this run has \[0.5\]"),
        ({"estimator": PES(sigma=0.05)}, r"estimator was 'FirstOrder\(.*this run has 'PES\(sigma=0.05\)'"),
        ({"estimator": FirstOrder(coordinates=3)}, "estimator was .*coordinates=None.*coordinates=3"),
        ({"tasks": "one"}, "tasks was"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, changes, message):
    make(tmp_path, max_seconds=0.0).train()
    rules = {"hidden": {"hidden_size": 3}, "momenta": {"momenta": (0.5,)}}
    if "rule" in changes:
        changes = {"rule": small_rule(**rules[changes["rule"]])}
    if "tasks" in changes:
        changes = {"tasks": two_tasks()[:1]}
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path, **changes).train()
    assert "made with other settings" in str(caught.value) and "use another output_dir" in str(caught.value)


def test_what_does_not_change_the_result_may_change(tmp_path, whole):
    make(tmp_path / "parts", max_seconds=0.0).train()
    rest = make(tmp_path / "parts", save_steps=1, logging_steps=3, process_timeout=60.0, meta_epochs=2)
    rest.train()
    assert same(end_of(tmp_path / "parts"), end_of(whole.folder))


def test_an_estimator_of_the_users_goes_on(tmp_path):
    class Halved(Estimator):  # an Estimator that says nothing of how it prints
        def window(self, *args, **options):
            window = FirstOrder().window(*args, **options)
            return window._replace(gradients=[gradient / 2 for gradient in window.gradients])

    make(tmp_path / "whole", estimator=Halved()).train()
    make(tmp_path / "parts", estimator=Halved(), max_seconds=0.0).train()
    make(tmp_path / "parts", estimator=Halved()).train()
    assert same(end_of(tmp_path / "parts"), end_of(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["/etc", "../elsewhere", "checkpoint-1/../../elsewhere"])
def test_a_manifest_cannot_lead_to_another_folder(tmp_path, name):
    """It may come from anyone, and the checkpoint that it names is deleted in the end."""
    (tmp_path / "elsewhere").mkdir()
    checkpoints = Checkpoints(tmp_path / "run", {"seed": 1})
    checkpoints.write(1, "rule", {"a": torch.zeros(1)})
    checkpoints.complete(1, {})
    manifest = load_json(tmp_path / "run" / MANIFEST)
    save_json(tmp_path / "run" / MANIFEST, {**manifest, "folder": name})
    for act in (checkpoints.newest, lambda: checkpoints.complete(2, {})):
        with pytest.raises(ValueError, match="expected checkpoint-NUMBER"):
            act()
    assert (tmp_path / "elsewhere").is_dir()


def test_a_setting_that_was_added_later_does_not_keep_an_old_run_from_going_on(tmp_path):
    stamp = {"rule": {"beta1": 0.9, "agreement": False}, "args": {"seed": 0}}
    old = {"rule": {"beta1": 0.9}, "args": {"seed": 0}}
    later = {"rule": {"agreement": False, "average": 0.0}}
    checkpoints = Checkpoints(tmp_path, old)
    checkpoints.write(1, "meta", {"x": torch.ones(1)})
    checkpoints.complete(1, {"epoch": 0})
    assert Checkpoints(tmp_path, stamp, later).newest().progress == {"epoch": 0}
    changed = {**stamp, "rule": {"beta1": 0.9, "agreement": True}}
    with pytest.raises(ValueError, match="agreement was False, this run has True"):
        Checkpoints(tmp_path, changed, later).newest()
    with pytest.raises(ValueError, match="agreement was None, this run has False"):
        Checkpoints(tmp_path, stamp).newest()
