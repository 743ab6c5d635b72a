"""Files that an earlier version wrote still load, and what goes on from them ends where that version ended.

tests/fixtures has a file of each kind from commit 366488a, which knew no checksums in them, and what its code computed
(make.py there). Gradients are of ordinary size: there the arithmetic of both versions is meant to be the same, of
learned rules too. Beside each equality stands a file with one thing changed, which is refused or ends elsewhere.
"""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_sl2o import Basis, DenseBasis, LSTMRule, RandomBasis, Rule, SymbolicRule, Trajectory, fit_basis
from tests.fixtures import make

FILES = make.HERE
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
RULES = ["cubic", "gradient", "options", "paper-cnn", "paper-transformer", "small", "symbolic"]
BASES = {"dense": 3, "bf16": 3, "layers": 4, "random": 4, "given": 3}


def is_close(found, expected, **tolerance):
    assert found.keys() == expected.keys() and expected
    return all(torch.allclose(found[k].float(), expected[k].float(), **{**CLOSE, **tolerance}) for k in expected)


def copy_of(folder, tmp_path, name="copy"):
    return shutil.copytree(FILES / folder, tmp_path / name)


def flip_last_bit_of_a_number(path):
    """The sign of the last number of a safetensors file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(bytes(data))


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(path, change):
    """Rewrites a safetensors file of the earlier version, whose metadata stays."""
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=header["__metadata__"])


def test_no_file_has_a_checksum_of_today():
    paths = [path for path in FILES.rglob("*") if path.suffix in (".safetensors", ".json")]
    assert len(paths) > 60 and not any(b'"checksum"' in path.read_bytes() for path in paths)
    assert not list(FILES.rglob("training_args.bin")) and not list(FILES.rglob("checkpoint_files.json"))


# Rules


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_said(name, tmp_path):
    expected = load_file(FILES / "rules" / "expected.safetensors")
    assert sorted(expected) == RULES
    rule = Rule.from_pretrained(FILES / "rules" / name)
    assert type(rule) is (SymbolicRule if name in ("cubic", "symbolic") else LSTMRule)
    assert dict(make.rules())[name].config == rule.config
    assert torch.allclose(make.deltas(rule), expected[name], **CLOSE)

    folder = copy_of(f"rules/{name}", tmp_path)
    edit_json(folder / "config.json", lambda data: data["rule"].update(output_scale=data["rule"]["output_scale"] * 2))
    assert not torch.allclose(make.deltas(Rule.from_pretrained(folder)), expected[name], **CLOSE)
    if type(rule) is LSTMRule:
        flip_last_bit_of_a_number(folder / "model.safetensors")
        with pytest.raises(ValueError, match="sha256"):
            Rule.from_pretrained(folder)


def test_a_rule_whose_steps_depended_on_width_is_refused(tmp_path):
    """One that did not make that choice has saved it as 0, and loads."""
    source = json.loads((FILES / "rules" / "options" / "config.json").read_text())
    assert source["rule"]["base_width"] == 0
    rule = Rule.from_pretrained(FILES / "rules" / "options")
    folder = copy_of("rules/options", tmp_path)
    for width in (2, 64, -1, "64", None, [64]):
        edit_json(folder / "config.json", lambda data, width=width: data["rule"].update(base_width=width))
        with pytest.raises(ValueError, match="has base_width .*, which this version does not know.* Set it to 0"):
            Rule.from_pretrained(folder)
    edit_json(folder / "config.json", lambda data: data["rule"].pop("base_width"))
    assert Rule.from_pretrained(folder).fingerprint == rule.fingerprint
    rule.save_pretrained(tmp_path / "again")
    assert "base_width" not in json.loads((tmp_path / "again" / "config.json").read_text())["rule"]
    assert Rule.from_pretrained(tmp_path / "again").fingerprint == rule.fingerprint


# Bases and trajectories


def products_of(name):
    return make.at(load_file(FILES / "bases" / "expected.safetensors"), f"{name}.")


@pytest.mark.parametrize("name", BASES)
def test_a_basis_projects_and_lifts_as_it_did(name, tmp_path):
    basis = Basis.from_pretrained(FILES / "bases" / name)
    assert type(basis) is (RandomBasis if name == "random" else DenseBasis) and basis.dim == BASES[name]
    assert basis.dtype is (torch.bfloat16 if name == "bf16" else torch.float32)
    assert is_close(make.products(basis), products_of(name))

    folder = copy_of(f"bases/{name}", tmp_path)
    flip_last_bit_of_a_number(folder / "model.safetensors")
    with pytest.raises(ValueError, match="sha256"):
        Basis.from_pretrained(folder)
    if name != "random":
        shutil.copy(FILES / "bases" / name / "model.safetensors", folder)
        edit_tensors(folder / "model.safetensors", lambda tensors: tensors["units"].mul_(2))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        edit_json(folder / "config.json", lambda data: data.update(sha256=digest))
        assert not is_close(make.products(Basis.from_pretrained(folder)), products_of(name))


def fitted(folder, **options):
    return make.products(fit_basis(Trajectory(folder), 3, progress=False, **options))


def test_a_trajectory_is_read_fitted_and_goes_on(tmp_path):
    folder = copy_of("trajectory", tmp_path)
    trajectory, net = Trajectory(folder), make.Net()
    assert trajectory.steps == [0, 2, 4, 6, 8, 10]
    assert list(trajectory.layout.names) == [name for name, _ in net.named_parameters()]
    first, last = (load_file(trajectory.path(step)) for step in (0, 10))
    assert is_close(first, make.end_of(net)) and not is_close(last, make.end_of(net))
    assert is_close(fitted(folder), products_of("dense"), rtol=1e-3, atol=1e-4)
    assert is_close(fitted(folder, dtype=torch.bfloat16), products_of("bf16"), rtol=1e-2, atol=1e-2)

    trajectory.write(12, net.named_parameters())  # with a checksum, among those without
    assert Trajectory(folder).steps == [0, 2, 4, 6, 8, 10, 12]
    assert is_close(fitted(folder, steps=[0, 2, 4, 6, 8, 10]), products_of("dense"), rtol=1e-3, atol=1e-4)
    assert not is_close(fitted(folder), products_of("dense"), rtol=1e-3, atol=1e-4)


def test_changed_snapshots_are_refused_or_fitted_to_another_basis(tmp_path):
    folder = copy_of("trajectory", tmp_path)
    path = Trajectory(folder).path(6)
    flip_last_bit_of_a_number(path)
    assert not is_close(fitted(folder), products_of("dense"), rtol=1e-3, atol=1e-4)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        fitted(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        fitted(folder)


# Runs of a Trainer


class Watch(TrainerCallback):
    """What a run goes on from, and how many steps it takes."""

    def __init__(self):
        self.steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun_at = state.global_step
        self.weights = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}
        self.optimizer = copy.deepcopy(kwargs["optimizer"].state_dict())
        self.coefficients = getattr(kwargs["optimizer"].optimizer, "coefficients", None)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def resume(name, folder, **options):
    watch = Watch()
    trainer = make.trainer_of(name, folder, [watch], **options)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{make.SAVED_AT}"))
    return trainer, watch


def assert_state(found, saved):
    """Every tensor and setting that was saved is there, to the bit."""
    assert found["state"].keys() == saved["state"].keys() and saved["state"]
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            assert torch.equal(found["state"][index][key], value), (index, key)
    for ours, theirs in zip(found["param_groups"], saved["param_groups"], strict=True):
        assert {key: ours[key] for key in theirs} == theirs


def turn(state):
    """Changes the sign of what an optimizer remembers: of the rule's network, of the momentum."""
    for entry in state["state"].values():
        for key in ("hidden", "exp_avg", "momentum_buffer"):
            if key in entry:
                entry[key].neg_()


def edit_optimizer(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("name", make.RUNS)
def test_a_run_goes_on_and_ends_where_it_ended(name, tmp_path):
    folder, expected = copy_of(f"trainer/{name}", tmp_path), load_file(FILES / f"trainer/{name}/expected.safetensors")
    checkpoint = folder / f"checkpoint-{make.SAVED_AT}"
    saved, weights = (
        torch.load(checkpoint / "optimizer.pt", weights_only=True),
        load_file(checkpoint / "model.safetensors"),
    )
    loss = json.loads((folder / "expected.json").read_text())["loss"]
    trainer, watch = resume(name, folder)
    assert watch.begun_at == 3 and watch.steps == 3 and trainer.state.global_step == 6
    assert_state(watch.optimizer, saved)
    assert all(torch.equal(watch.weights[key], value) for key, value in weights.items())
    assert make.losses(trainer)[:3] == loss[:3] and make.losses(trainer) == pytest.approx(loss, rel=1e-4)
    assert is_close(make.end_of(trainer.model), expected)
    before, after = (make.Factors() if name == "tensors" else make.Net() for _ in range(2))
    before.load_state_dict(weights)
    after.load_state_dict(make.end_of(trainer.model))
    assert make.loss_of(after) < make.loss_of(before)
    if name == "warm-up":
        kept = load_file(checkpoint / "coefficients.safetensors")["coefficients"]
        assert torch.equal(watch.coefficients, kept) and kept.abs().min() > 0


@pytest.mark.parametrize("name", make.RUNS)
def test_a_run_with_a_changed_state_is_refused_or_ends_elsewhere(name, tmp_path):
    expected = load_file(FILES / f"trainer/{name}/expected.safetensors")
    folder = copy_of(f"trainer/{name}", tmp_path)
    path = folder / f"checkpoint-{make.SAVED_AT}" / "optimizer.pt"
    edit_optimizer(path, turn)
    assert not is_close(make.end_of(resume(name, folder)[0].model), expected, rtol=1e-3, atol=1e-3)
    edit_optimizer(path, lambda state: state["state"][0]["exp_avg"].fill_(torch.nan))
    with pytest.raises(ValueError, match="'exp_avg' of the saved optimizer state holds NaN"):
        resume(name, folder)
    shutil.copy(FILES / f"trainer/{name}" / path.parent.name / path.name, path)
    what = "rule" if name == "tensors" else "basis"
    edit_optimizer(path, lambda state: state["param_groups"][0].update({f"{what}_fingerprint": "another"}))
    with pytest.raises(ValueError, match=f"made with another {what}"):
        resume(name, folder)


def test_coefficients_alone_are_taken_where_the_optimizer_is_gone(tmp_path):
    """As after save_only_model: the model and its coefficients are there."""
    folder = copy_of("trainer/warm-up", tmp_path)
    checkpoint = folder / f"checkpoint-{make.SAVED_AT}"
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    kept = load_file(checkpoint / "coefficients.safetensors")["coefficients"]
    trainer, watch = resume("warm-up", folder)
    assert torch.equal(watch.coefficients, kept) and trainer.state.global_step == 6
    shutil.rmtree(folder / "checkpoint-6")
    edit_tensors(checkpoint / "coefficients.safetensors", lambda tensors: tensors.update(coefficients=torch.ones(2)))
    with pytest.raises(ValueError, match=r"no 'coefficients' of shape \(3,\)"):
        resume("warm-up", folder)


def test_a_run_that_was_killed_in_its_warm_up_goes_on(tmp_path):
    """It finishes the warm-up, fits the basis that the earlier version fitted, and ends where that one ended."""
    expected = load_file(FILES / "trainer" / "warm-up" / "expected.safetensors")
    basis = make.products(Basis.from_pretrained(FILES / "trainer" / "warm-up" / "basis"))
    for name, changed in (("as it was", False), ("changed", True)):
        folder = copy_of("trainer/in-warm-up", tmp_path, name)
        trainer = make.trainer_of("warm-up", folder)
        torch.save(trainer.args, folder / "warmup" / "checkpoint-4" / "training_args.bin")  # as every checkpoint has
        trajectory = Trajectory(folder / "warmup" / "trajectory")
        assert trajectory.steps == [0, 2, 4]
        if changed:
            flip_last_bit_of_a_number(trajectory.path(2))
        trainer.train(resume_from_checkpoint=True)
        assert Trajectory(trajectory.folder).steps == [0, 2, 4, 6] and trainer.state.global_step == 6
        tolerance = {"rtol": 1e-3, "atol": 1e-4}
        assert is_close(make.products(trainer.basis), basis, **tolerance) != changed
        assert is_close(make.end_of(trainer.model), expected, **tolerance) != changed


# Meta-training


def scores(trainer):
    return [entry["score"] for entry in trainer.log_history if "score" in entry]


@pytest.mark.parametrize("name", make.ESTIMATORS)
def test_meta_training_goes_on_in_the_middle_of_an_episode(name, tmp_path):
    folder, expected = copy_of(f"meta/{name}", tmp_path), load_file(FILES / f"meta/{name}/expected.safetensors")
    progress = json.loads((folder / "checkpoint.json").read_text())["progress"]
    assert progress["in_episode"] and (progress["epoch"], progress["window"], progress["meta_step"]) == (1, 2, 5)
    saved = load_file(folder / "checkpoint-0000005" / "meta.safetensors")
    trainer = make.meta_trainer(name, folder, kill_at=1)
    with pytest.raises(make.Killed):
        trainer.train()
    assert {key: getattr(trainer, key) for key in progress if key != "in_episode"} == {
        key: value for key, value in progress.items() if key != "in_episode"
    }
    for found, head in ((trainer.rule.state_dict(), "rule."), (trainer.best_weights, "best.")):
        assert all(torch.equal(found[key], value) for key, value in make.at(saved, head).items())
    entries = trainer.optimizer.state_dict()["state"]
    for key, value in make.at(saved, "optimizer.").items():
        number, _, what = key.partition(".")
        assert torch.equal(entries[int(number)][what], value) and int(entries[0]["step"]) == 5

    trainer = make.meta_trainer(name, folder)
    best = dict(trainer.train().state_dict())
    assert (trainer.epoch, trainer.meta_step) == (3, 9)
    assert is_close(best, expected, rtol=1e-4, atol=1e-5)
    assert scores(trainer) == pytest.approx(json.loads((folder / "expected.json").read_text())["score"], rel=1e-4)
    assert is_close(dict(Rule.from_pretrained(folder).state_dict()), best, rtol=0, atol=0)


@pytest.mark.parametrize("name", make.ESTIMATORS)
def test_meta_training_from_changed_files_is_refused_or_ends_elsewhere(name, tmp_path):
    expected = load_file(FILES / f"meta/{name}/expected.safetensors")
    for number, part in enumerate(("rule.head.weight", "optimizer.0.exp_avg")):
        folder = copy_of(f"meta/{name}", tmp_path, f"changed {number}")
        edit_tensors(
            folder / "checkpoint-0000005" / "meta.safetensors", lambda tensors, part=part: tensors[part].neg_()
        )
        best = dict(make.meta_trainer(name, folder).train().state_dict())
        assert not is_close(best, expected, rtol=1e-3, atol=1e-4)
    folder = copy_of(f"meta/{name}", tmp_path)
    edit_json(folder / "checkpoint.json", lambda data: data["stamp"]["args"].update(seed=1))
    with pytest.raises(ValueError, match="seed was 1, this run has 0"):
        make.meta_trainer(name, folder).train()
    shutil.copy(FILES / "meta" / name / "checkpoint.json", folder)
    path = folder / "checkpoint-0000005" / "episode-0.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        make.meta_trainer(name, folder).train()


# States of optimizers


def loaded(name, change=lambda state: None, optimizer=None):
    """Returns model and optimizer at a saved state, and the state."""
    saved = torch.load(FILES / "optimizers" / f"{name}.pt", weights_only=True)
    change(saved["optimizer"])
    model = make.network_for(name)
    model.load_state_dict(saved["model"])
    made = make.optimizer_of(optimizer or name, model)
    made.load_state_dict(copy.deepcopy(saved["optimizer"]))
    return model, made, saved


def both_points(model, optimizer):
    """The weights where training goes on, and at the running average."""
    optimizer.use_last()
    last = {f"last.{key}": value for key, value in make.end_of(model).items()}
    optimizer.use_average()
    return last | {f"average.{key}": value for key, value in make.end_of(model).items()}


@pytest.mark.parametrize("name", make.OPTIMIZERS)
def test_a_loop_goes_on_from_a_saved_state(name):
    expected = make.at(load_file(FILES / "optimizers" / "expected.safetensors"), f"{name}.")
    tolerance = {"atol": 2**-7} if "bf16" in name else {}  # a unit of bf16: what was rounded off was not saved
    model, optimizer, saved = loaded(name)
    assert_state(optimizer.state_dict(), saved["optimizer"])
    assert is_close(make.end_of(model), saved["model"], rtol=0, atol=0)
    make.go_on(model, optimizer, make.SAVED_AT, make.STEPS)
    found = both_points(model, optimizer)
    assert is_close(found, expected, **tolerance)
    if "average" in name:
        last, average = make.at(found, "last."), make.at(found, "average.")
        assert not is_close(last, average, rtol=1e-2, atol=1e-2)

    model, optimizer, _ = loaded(name, turn)
    make.go_on(model, optimizer, make.SAVED_AT, make.STEPS)
    assert not is_close(both_points(model, optimizer), expected, **(tolerance or {"rtol": 1e-3, "atol": 1e-4}))


def test_a_state_is_refused_by_an_optimizer_of_another_rule_or_without_its_average():
    for name, other, match in (
        ("learned", "learned-gradient", "another rule"),
        ("learned", "subspace-rule", "not one of SubspaceOptimizer"),
        ("subspace-rule", "learned", r"'exp_avg' .* of shape \(3,\), expected floats of shape \(20,\)"),
        ("learned-average", "learned", "at their running average"),
        ("subspace-rule-average", "subspace-rule", "at the average of the coefficients"),
        ("subspace-sgd-average", "subspace-sgd", "at the average of the coefficients"),
    ):
        with pytest.raises(ValueError, match=match):
            loaded(name, optimizer=other)
