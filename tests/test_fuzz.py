"""Thousands of damaged files: each is refused in one sentence that names it, or gives the numbers that were saved."""

import copy
import hashlib
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sl2o import (
    Basis,
    Layout,
    LearnedOptimizer,
    LSTMRule,
    RandomBasis,
    Rule,
    RuleConfig,
    SubspaceOptimizer,
    Trajectory,
    fit_basis,
)
from hf_sl2o.foundation.files import (
    checksum_of,
    json_checksum,
    load_metadata,
    load_tensors,
    save_json,
    save_tensors,
    sha256_of,
)

from .conftest import random_dense
from .meta_cases import make
from .mutations import bytes_changed, json_changed, state_changed, tensors_changed

SHAPES = {"a.weight": (3, 4), "a.bias": (5,), "scale": ()}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


class Kind:
    """What is saved in a folder: `write` makes it, `read` returns its numbers by name."""

    files: dict[str, int]  # mutations of each sort
    checked_on_load = True  # whether the loader knows which tensors there should be

    def write(self, folder):
        raise NotImplementedError

    def read(self, folder):
        raise NotImplementedError

    def reseal(self, folder):
        """Makes the checksums of a changed config.json and its weights right again."""
        path = folder / "config.json"
        config = json.loads(path.read_text())
        if isinstance(config, dict):
            config["sha256"] = sha256_of(folder / "model.safetensors")
            try:
                config["checksum"] = json_checksum(self.settings(config))
            except (AttributeError, KeyError, TypeError):  # "rule" is no object any more
                pass
            path.write_text(json.dumps(config))

    def settings(self, config):
        return config


class ARule(Kind):
    files = {"config.json": 60, "model.safetensors": 60}

    def write(self, folder):
        torch.manual_seed(5)
        LSTMRule(RuleConfig(hidden_size=3, embed_size=2, momenta=(0.5,), log_sign=10.0)).save_pretrained(folder)

    def read(self, folder):
        rule = Rule.from_pretrained(folder)
        return {**rule.state_dict(), "config": rule.config, "of": type(rule).__name__}

    def settings(self, config):
        return Rule.settings_of(config)


class ADenseBasis(Kind):
    files = {"config.json": 60, "model.safetensors": 60}

    def write(self, folder):
        basis = random_dense(parameters(), dim=3)
        start = torch.zeros(2, len(SHAPES), 16)
        type(basis)(
            basis.layout, basis._matrices, basis.units, provenance={"made": ["by hand", 0.5]}, start=start
        ).save_pretrained(folder)

    def read(self, folder):
        basis = Basis.from_pretrained(folder)
        shape = {"spans": str(basis.spans), "layout": str(basis.layout), "provenance": str(basis.provenance)}
        return {"u": basis.as_matrix(), "units": basis.units, "natural": basis.natural_units, **shape}


class ARandomBasis(ADenseBasis):
    def write(self, folder):
        RandomBasis(Layout.from_named_parameters(parameters()), 3, seed=4).save_pretrained(folder)


class Coefficients(Kind):
    files = {"coefficients.safetensors": 100}
    checked_on_load = False

    def write(self, folder):
        save_tensors(folder / "coefficients.safetensors", {"coefficients": torch.arange(6.0)}, basis="dense-6")

    def read(self, folder):
        return load_tensors(folder / "coefficients.safetensors")


class ATrajectory(Kind):
    files = {"trajectory.json": 60, "snapshot-000000002.safetensors": 60}

    def write(self, folder):
        recorded = Trajectory(folder)
        for step in range(4):
            recorded.write(step, parameters(seed=step))

    def read(self, folder):
        basis = fit_basis(folder, 2, progress=False)
        return {"u": basis.as_matrix(), "units": basis.units, "start": basis.start, "layout": str(basis.layout)}

    def reseal(self, folder):
        path = folder / "trajectory.json"
        manifest = json.loads(path.read_text())
        if isinstance(manifest, dict):
            path.write_text(json.dumps({**manifest, "checksum": json_checksum(manifest)}))


class MetaTraining(Kind):
    files = {"checkpoint.json": 60, "checkpoint/meta.safetensors": 60, "checkpoint/episode-0.safetensors": 60}

    def __init__(self):
        self.trainer = None

    def write(self, folder):
        self.trainer = make(folder, max_seconds=0.0)
        self.trainer.train()

    def read(self, folder):
        trainer = self.trainer
        trainer.folder, trainer.episodes = folder, []
        trainer._resume()
        rule = {f"rule.{name}": tensor.clone() for name, tensor in trainer.rule.state_dict().items()}
        states = trainer.optimizer.state_dict()["state"]
        moments = {f"{i}.{name}": value.clone() for i, s in states.items() for name, value in s.items()}
        episodes = {f"{i}.{n}": t.clone() for i, e in enumerate(trainer.episodes) for n, t in e.state_dict().items()}
        progress = [trainer.epoch, trainer.meta_step, trainer.window, trainer.best, trainer.log_history]
        numbers = [e.numbers() for e in trainer.episodes]
        return {**rule, **moments, **trainer.best_weights, **episodes, "progress": str([progress, numbers])}

    def reseal(self, folder):
        path = folder / "checkpoint.json"
        manifest = json.loads(path.read_text())
        if isinstance(manifest, dict):
            parts = {part.stem: checksum_of(part) for part in folder.glob("checkpoint-*/*.safetensors")}
            if isinstance(manifest.get("parts"), dict):
                manifest["parts"] = parts
            path.write_text(json.dumps({**manifest, "checksum": json_checksum(manifest)}))


KINDS = [ARule, ADenseBasis, ARandomBasis, Coefficients, ATrajectory, MetaTraining]


# What may happen


def outcome(kind, folder, good, sealed):
    """Reads the mutated folder; returns whether it was refused. `sealed`: its checksums are right."""
    try:
        found = kind.read(folder)
    except (ValueError, OSError) as error:  # nothing else may come out
        assert folder.name in str(error), f"names no file: {error}"
        assert not isinstance(error, UnicodeError)
        return True
    if not sealed:
        assert found.keys() == good.keys()
        for name, value in good.items():
            assert torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value, name
    else:
        for name, value in good.items():
            if torch.is_tensor(value) and name in found:
                assert found[name].dtype == value.dtype, name
                assert not value.is_floating_point() or found[name].isfinite().all(), name
    return False


@pytest.fixture
def saved(request, tmp_path):
    kind, whole = request.param(), tmp_path / "whole"
    whole.mkdir()
    kind.write(whole)
    return kind, whole, tmp_path / "fuzzed"


def mutations(saved, seed):
    """Yields (file, how many, draw, folder made anew) for each file of a kind."""
    kind, whole, folder = saved
    shutil.copytree(whole, folder)
    for name, number in kind.files.items():
        path = next(folder.glob(name.replace("checkpoint/", "checkpoint-*/")))
        data = path.read_bytes()
        draw = random.Random(f"{type(kind).__name__} {name} {seed}")
        yield path, 12 * number, draw
        path.write_bytes(data)


COUNT: Counter[str] = Counter()  # mutations of each file, and how many were refused


@pytest.mark.parametrize("saved", KINDS, indirect=True)
def test_bytes(saved):
    kind, whole, folder = saved
    good = kind.read(whole)
    for path, number, draw in mutations(saved, 0):
        data = path.read_bytes()
        for _ in range(2 * number):
            path.write_bytes(bytes_changed(data, draw))
            COUNT["refused"] += outcome(kind, folder, good, sealed=False)
            COUNT[f"{type(kind).__name__} {path.name}"] += 1
    kind.read(whole)


@pytest.mark.parametrize("saved", [kind for kind in KINDS if kind is not Coefficients], indirect=True)
def test_json(saved):
    kind, whole, folder = saved
    good = kind.read(whole)
    for path, number, draw in mutations(saved, 1):
        if path.suffix == ".json":
            text = path.read_text()
            for sealed in (False, True):
                for _ in range(number):
                    path.write_text(json_changed(json.loads(text), draw))
                    if sealed:
                        kind.reseal(folder)
                    COUNT["refused"] += outcome(kind, folder, good, sealed)
                    COUNT[f"{type(kind).__name__} {path.name}"] += 1


@pytest.mark.parametrize("saved", KINDS, indirect=True)
def test_tensors(saved):
    kind, whole, folder = saved
    good = kind.read(whole)
    for path, number, draw in mutations(saved, 2):
        if path.suffix == ".safetensors":
            tensors, metadata, others = load_file(path), load_metadata(path), {}
            for other in folder.rglob("*.json"):
                others[other] = other.read_bytes()
            for sealed in (False, True) if kind.checked_on_load else (False,):
                for _ in range(number // 2):
                    # runs that diverge hold NaN, so an episode may
                    changed = tensors_changed(tensors, draw, finite=sealed and "episode" in path.name)
                    if sealed:
                        save_tensors(path, changed, **{k: v for k, v in metadata.items() if k != "checksum"})
                        kind.reseal(folder)
                    else:
                        save_file(changed, path, metadata=metadata)
                    COUNT["refused"] += outcome(kind, folder, good, sealed)
                    COUNT[f"{type(kind).__name__} {path.name}"] += 1
                    for other, data in others.items():
                        other.write_bytes(data)


def test_there_were_two_thousand_of_every_file_and_nearly_all_were_refused():
    of_file = {name: number for name, number in COUNT.items() if name != "refused"}
    if len(of_file) < 12:  # pytest runs this test alone
        return
    assert min(of_file.values()) >= 2000, of_file
    assert COUNT["refused"] > 0.8 * sum(of_file.values())


def test_a_file_of_an_earlier_version_loads_and_the_checksum_is_what_refuses(tmp_path):
    kind = ADenseBasis()
    kind.write(tmp_path)
    good, weights, config = kind.read(tmp_path), tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file(load_file(weights), weights, metadata={"format": "pt"})  # as earlier versions did
    settings = {k: v for k, v in json.loads(config.read_text()).items() if k != "checksum"}
    save_json(config, {**settings, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()})
    assert not outcome(kind, tmp_path, good, sealed=False)


# Optimizer states


def optimizers():
    model = torch.nn.Linear(4, 3)
    rule = LSTMRule(RuleConfig(hidden_size=3))
    basis = random_dense(model.named_parameters(), dim=3)
    for make_one in (
        lambda: LearnedOptimizer(model.parameters(), rule, average=2.0),
        lambda: SubspaceOptimizer(model.named_parameters(), basis, lambda c: LearnedOptimizer(c, rule), average=2.0),
    ):
        optimizer = make_one()
        for _ in range(3):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield model, optimizer, make_one


def test_optimizer_states():
    """Each mutated state raises ValueError, or the optimizer holds finite numbers of the right shapes."""
    draw = random.Random(3)
    for model, optimizer, make_one in optimizers():
        state = copy.deepcopy(optimizer.state_dict())
        fresh = make_one()
        fresh.load_state_dict(copy.deepcopy(state))  # the good one loads
        for _ in range(2000):
            changed, loaded = state_changed(state, draw), make_one()
            try:
                loaded.load_state_dict(changed)
            except ValueError as error:
                assert str(error)
                continue
            for index, entries in loaded.state_dict()["state"].items():
                for name, value in entries.items():
                    good = state["state"].get(index, {}).get(name)
                    if torch.is_tensor(good):
                        assert torch.is_tensor(value) and value.shape == good.shape, name
                        assert value.isfinite().all() and value.dtype == good.dtype, name
        assert all(p.isfinite().all() for p in model.parameters())
