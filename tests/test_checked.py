"""Configurations, bases and checkpoints from elsewhere: what they say is checked before anything is made of it."""

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sl2o import Basis, DenseBasis, Layout, LSTMRule, MetaTrainingArguments, RandomBasis, Rule, RuleConfig
from hf_sl2o.foundation.files import json_checksum, load_json, load_tensors, save_json, save_tensors, sealed, sha256_of
from hf_sl2o.meta.checkpoints import MANIFEST
from hf_sl2o.rules import SHIPPED_RULES
from hf_sl2o.rules.config import check_average

from .conftest import random_dense
from .meta_cases import end_of, make, same

NAN, INF = math.nan, math.inf


def edited(source, target, **changes):
    """A copy of a saved folder whose config.json says something else; `rule__x` is x of its rule."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        holder = config
        for key in path:
            holder = holder[key]
        holder[last] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


def resealed(folder):
    """Makes the checksums of a folder right, as an attacker could."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = sha256_of(folder / "model.safetensors")
    save_json(folder / "config.json", {**config, "checksum": json_checksum(config)})
    return folder


# Numbers

RULES = [
    ("hidden_size", 8.0, "hidden_size is 8.0, expected an integer from 1"),
    ("hidden_size", True, "hidden_size is True, expected an integer"),
    ("hidden_size", 10**30, "hidden_size is 1000.*expected an integer from 1"),
    ("embed_size", "4", "embed_size is '4', expected an integer"),
    ("num_layers", None, "num_layers is None, expected an integer"),
    ("per_tensor", 1e308, "per_tensor is 1e.308, expected an integer"),
    ("per_tensor", -1, "per_tensor is -1, expected an integer"),
    ("distance", 1, "distance is 1, expected True or False"),
    ("reset_cell_every", 0.5, "reset_cell_every is 0.5, expected an integer"),
    ("bias_correction_offset", NAN, "bias_correction_offset is nan, expected an integer"),
    ("progress", "no", "progress is 'no', expected True or False"),
    ("squash", 1, "squash is 1, expected True or False"),
    ("tensor_scale", None, "tensor_scale is None, expected True or False"),
    ("agreement", "yes", "agreement is 'yes', expected True or False"),
    ("beta1", NAN, "beta1 is nan, expected a finite number"),
    ("beta2", True, "beta2 is True, expected a finite number"),
    ("beta2", "0.9", "beta2 is '0.9', expected a finite number"),
    ("momenta", (NAN,), "one of the momenta is nan"),
    ("momenta", "ab", "momenta are 'ab', expected a list"),
    ("momenta", 5, "momenta are 5, expected a list"),
    ("eps", INF, "eps is inf, expected a finite number"),
    ("eps", 0, "eps is 0, expected a finite number at least"),
    ("output_scale", NAN, "output_scale is nan, expected a finite number"),
    ("output_scale", 10**400, "output_scale is 1000.*expected a finite number"),
    ("log_sign", NAN, "log_sign is nan, expected a finite number above 0"),
    ("log_sign", 1e308, "log_sign is 1e.308, expected a finite number above 0 and at most 80"),
    ("average", INF, "average is inf, expected a finite number at least 0"),
    ("average", -1.0, "average is -1.0, expected a finite number at least 0"),
    ("average", True, "average is True, expected a finite number"),
    ("inputs", ["normalized"], "inputs is .'normalized'., expected a string"),
    ("expression", 3, "expression is 3, expected a string"),
]


@pytest.mark.parametrize(("name", "value", "message"), RULES)
def test_a_rules_numbers_are_of_their_type_in_python_and_in_a_file(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        RuleConfig(**{name: value})
    with pytest.raises(ValueError, match=f"config.json in .* is malformed: {message}"):
        Rule.from_pretrained(edited(SHIPPED_RULES / "default", tmp_path / "x", **{f"rule__{name}": value}))


def test_an_integer_is_a_float_and_the_shipped_rules_load(tmp_path):
    config = RuleConfig(beta1=0, eps=1, output_scale=2, log_sign=10, average=4, momenta=[0])
    rule = LSTMRule(config)
    rule.save_pretrained(tmp_path)
    assert Rule.from_pretrained(tmp_path).config == config
    for folder in SHIPPED_RULES.iterdir():
        if folder.is_dir():
            assert Rule.from_pretrained(folder).config.hidden_size == 8
    for average in (0, 0.0, 3, 9.5):
        check_average(average)
    for average in (NAN, INF, -1, True, "4", None):
        with pytest.raises(ValueError, match="average is .*expected a finite number at least 0"):
            check_average(average)


META = [
    ("learning_rate", (NAN, INF, -1.0, 0.0, "1", True)),
    ("meta_learning_rate", (NAN, INF, -1e-3, 0)),
    ("max_grad_norm", (NAN, INF, -1.0)),
    ("divergence_factor", (NAN, INF, 0.0, -4.0)),
    ("random_scaling", (NAN, INF, -1.0, 100.0)),
    ("max_seconds", (NAN, INF, -1.0, "5")),
    ("process_timeout", (NAN, INF, 0.0)),
    ("seed", (-1, 1.5, 2**32, None)),
    ("inner_steps", (100.0, NAN, -10, True)),
    ("unroll_length", (10.0, "10", -5)),
    ("meta_epochs", (0, -1, 2.5)),
    ("save_steps", (0, 0.5)),
    ("curriculum", ((10.0,), 5, ("10",))),
]


@pytest.mark.parametrize(("name", "values"), META, ids=[name for name, _ in META])
def test_numbers_of_a_meta_training(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name.replace("curriculum", "curriculum|inner_steps")):
            MetaTrainingArguments("x", **{name: value})
    good = {"learning_rate": 1, "max_grad_norm": 0, "max_seconds": 0.0, "seed": 2**32 - 1, "curriculum": (100, 200)}
    args = MetaTrainingArguments("x", random_scaling=3, **good)
    assert args.max_seconds == 0 and args.steps_at(0) == 100


# Rules and bases from elsewhere


@pytest.mark.parametrize(
    "changes",
    [
        {"rule__hidden_size": 12_000},
        {"rule__hidden_size": 10**6},
        {"rule__num_layers": 10**6},
        {"rule__embed_size": 10**7},
        {"rule__momenta": [0.5] * 1000},
    ],
)
def test_a_config_is_compared_with_its_tensors_before_anything_is_made(tmp_path, changes):
    folder, start = edited(SHIPPED_RULES / "default", tmp_path / "x", **changes), time.perf_counter()
    with pytest.raises(ValueError, match="model.safetensors in .*(has shape|lacks tensor)"):
        Rule.from_pretrained(folder)
    assert time.perf_counter() - start < 1


def test_what_a_config_says_is_sealed_and_what_it_may_leave_out_is_not(tmp_path):
    rule = LSTMRule(RuleConfig(average=2.0))
    rule.save_pretrained(tmp_path / "rule")
    whole = json.loads((tmp_path / "rule" / "config.json").read_text())
    for changes in ({"rule__average": 3.0}, {"rule__beta1": 0.8}, {"rule__output_scale": 2.0}, {"checksum": None}):
        with pytest.raises(ValueError, match="config.json says its checksum is .*damaged or changed"):
            Rule.from_pretrained(edited(tmp_path / "rule", tmp_path / "x", **changes))
    for changes in ({"sha256": None}, {"sha256": 5}, {"sha256": "abc"}, {"sha256": ["a"]}):
        with pytest.raises(ValueError, match='"sha256": .*expected the 64 hexadecimal digits of model.safetensors'):
            Rule.from_pretrained(edited(tmp_path / "rule", tmp_path / "x", **changes))
    for key in ("sha256", "checksum"):
        save_json(tmp_path / "rule" / "config.json", {k: v for k, v in whole.items() if k != key})
        with pytest.raises(ValueError, match=f"config.json (lacks the key '{key}'|says its checksum)"):
            Rule.from_pretrained(tmp_path / "rule")
    save_json(tmp_path / "rule" / "config.json", dict(sorted(whole.items())))  # the order is nobody's business
    assert Rule.from_pretrained(tmp_path / "rule").config == rule.config


def test_a_rules_tensors_are_finite_floats(tmp_path):
    rule = LSTMRule()
    rule.double().save_pretrained(tmp_path)
    assert Rule.from_pretrained(tmp_path).head.weight.dtype == torch.float32
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["head.weight"]
    for bad, message in (
        (head.int(), "dtype torch.int32"),
        (head.cfloat(), "complex64"),
        (head * 1e300, "NaN or Inf"),
    ):
        save_tensors(tmp_path / "model.safetensors", {**tensors, "head.weight": bad})
        with pytest.raises(ValueError, match=f"'head.weight' in .*{message}"):
            Rule.from_pretrained(resealed(tmp_path))


def test_a_basis_is_checked_against_its_tensors(tmp_path):
    parameters = [("a", torch.nn.Parameter(torch.zeros(3, 4))), ("b", torch.nn.Parameter(torch.zeros(5)))]
    basis = random_dense(parameters, dim=4)
    basis.save_pretrained(tmp_path / "good")
    assert torch.equal(Basis.from_pretrained(tmp_path / "good").as_matrix(), basis.as_matrix())
    whole = load_file(tmp_path / "good" / "model.safetensors")
    a, units = whole["basis.a"], whole["units"]
    for tensors, message in (
        ({"basis.a": (a * 100).int()}, "'basis.a' in .*dtype torch.int32"),
        ({"basis.a": a.cfloat()}, "'basis.a' in .*dtype torch.complex64"),
        ({"basis.a": a.bfloat16()}, "expected matrices of one dtype"),
        ({"basis.a": a.T.contiguous()}, "directions of 'a' have shape"),
        ({"basis.a": a.clone().fill_diagonal_(NAN)}, "'basis.a' in .* holds NaN or Inf"),
        ({"units": -units}, "finite and positive"),
        ({"units": units[:2]}, "says dim 4, the file has 2"),
        ({"natural_units": units.int()}, "'natural_units' in .*dtype torch.int32"),
        ({"natural_units": units[:2]}, "units must have shape"),
        ({"start": torch.zeros(2, 3, 16)}, "start has shape"),
        ({"further": units}, "has an unknown tensor 'further'"),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / "x", dirs_exist_ok=True)
        save_tensors(tmp_path / "x" / "model.safetensors", {**whole, **tensors})
        with pytest.raises(ValueError, match=message) as caught:
            Basis.from_pretrained(resealed(tmp_path / "x"))
        assert "x" in str(caught.value)
    for changes, message in (
        ({"dtype": "bfloat16"}, "\"dtype\": 'bfloat16', its tensors are float32"),
        ({"dtype": None}, '"dtype": None'),
        ({"dim": 4.0}, "dim in .* is 4.0, expected an integer"),
        ({"spans": [[0, 9]] * 2}, "spans are"),
        ({"spans": [[0.0, 4]] * 2}, "spans are"),
        ({"spans": [[0, 4]]}, "spans must give each parameter"),
        ({"basis": ["dense"]}, "expected one of"),
        ({"basis": "identity"}, "the basis in .* is malformed"),
        ({"provenance": [1]}, "provenance is"),
        ({"layout__names": ["a", 2]}, "expected a list of strings"),
        ({"layout__names": ["a", "a"]}, "malformed"),
        ({"layout__shapes": [[3, 4], [-5]]}, "lists of integers of at least 0"),
        ({"layout__shapes": [[3, 4], [5.0]]}, "lists of integers of at least 0"),
        ({"layout__shapes": [[1 << 60, 4], [5]]}, "lists of integers of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Basis.from_pretrained(resealed(edited(tmp_path / "good", tmp_path / "x", **changes)))


def test_a_basis_of_stored_directions_is_made_of_float_matrices_of_one_dtype():
    layout = Layout.from_named_parameters(torch.nn.Linear(3, 2).named_parameters())
    eye = torch.eye(8)
    parts = [eye[:2, :6], eye[:2, 6:]]
    assert DenseBasis(layout, parts, torch.ones(2).double()).units.dtype == torch.float32
    for bad in ([p.int() for p in parts], [parts[0].cfloat(), parts[1]], [parts[0], parts[1].half()], [eye[0], eye]):
        with pytest.raises(ValueError, match="expected matrices of one dtype among"):
            DenseBasis(layout, bad)
    with pytest.raises(ValueError, match="expected float ones"):
        DenseBasis(layout, parts, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite and positive"):
        DenseBasis(layout, parts, torch.ones(2), torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match="start has shape"):
        DenseBasis(layout, parts, start=torch.zeros(2, 2, 3))


def test_a_random_basis_of_another_seed_or_layout_is_refused_old_files_too(tmp_path):
    layout = Layout.from_named_parameters(torch.nn.Linear(300, 20).named_parameters())
    basis = RandomBasis(layout, 6, seed=4)
    basis.save_pretrained(tmp_path / "good")
    assert torch.equal(Basis.from_pretrained(tmp_path / "good").as_matrix(), basis.as_matrix())
    old = {"seed": 5, "provenance": {"seed": 5}}
    for changes, message in (
        ({"seed": 5}, 'has "provenance": .*beside "seed": 5'),
        (old, "does not make the directions of seed 5 orthonormal"),
        ({"dim": 10**9}, r"one fp32 \(1000000000, 1000000000\) tensor 'mix'"),
        ({"dim": True}, "dim in .* is True"),
        ({"seed": 4.0}, "seed is 4.0, expected an integer"),
        ({"spans": [[0, 5]] * 2}, "spans other than"),
        ({"dtype": "bfloat16"}, "\"dtype\": 'bfloat16', its tensors are float32"),
        ({"layout__shapes": [[20, 10**9], [20]]}, "belongs to fewer parameters"),
        ({"layout__shapes": [[20, 301], [20]]}, "orthonormal"),
    ):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=message):
            Basis.from_pretrained(resealed(edited(tmp_path / "good", tmp_path / "x", **changes)))
        assert time.perf_counter() - start < 5
    with pytest.raises(ValueError, match="damaged or changed|orthonormal"):
        Basis.from_pretrained(edited(tmp_path / "good", tmp_path / "x", **old))
    mix = load_file(tmp_path / "good" / "model.safetensors")["mix"]
    for bad in (mix * 1.001, mix.T.contiguous(), mix.double(), mix.clone().fill_diagonal_(NAN)):
        save_tensors(tmp_path / "good" / "model.safetensors", {"mix": bad})
        with pytest.raises(ValueError, match="mix"):
            Basis.from_pretrained(resealed(tmp_path / "good"))
    for dim in (1, layout.n // 100, 40):
        square = RandomBasis(layout, dim, seed=7)
        square.save_pretrained(tmp_path / "again")
        assert Basis.from_pretrained(tmp_path / "again").fingerprint == square.fingerprint
    small = Layout.from_named_parameters(torch.nn.Linear(4, 3).named_parameters())
    RandomBasis(small, small.n).save_pretrained(tmp_path / "whole")  # as many directions as parameters
    assert Basis.from_pretrained(tmp_path / "whole").dim == small.n


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    basis = random_dense([("a", torch.nn.Parameter(torch.zeros(3, 4)))], dim=2)
    basis.provenance["share"] = [0.5, NAN]
    with pytest.raises(ValueError, match="config.json has nan at 'provenance.share.1'"):
        basis.save_pretrained(tmp_path)
    basis.provenance["share"] = [0.5, 0.25]
    basis.save_pretrained(tmp_path)
    assert Basis.from_pretrained(tmp_path).provenance == {"share": [0.5, 0.25]}


def test_a_card_is_written_anew_unless_somebody_changed_it(tmp_path):
    card = tmp_path / "README.md"
    LSTMRule().save_pretrained(tmp_path)
    assert "# A learned optimizer" in card.read_text()
    basis = random_dense([("a", torch.nn.Parameter(torch.zeros(3, 4)))], dim=2)
    basis.save_pretrained(tmp_path)
    assert "# A 2-dimensional subspace" in card.read_text() and "learned optimizer\n" not in card.read_text()
    card.write_text(card.read_text() + "\nOur results.\n")
    LSTMRule().save_pretrained(tmp_path)
    assert card.read_text().endswith("Our results.\n")
    card.write_text("# My notes\n")
    LSTMRule().save_pretrained(tmp_path)
    assert card.read_text() == "# My notes\n"


# Checkpoints of meta-training


def test_parts_of_another_checkpoint_and_damaged_manifests_are_refused(tmp_path):
    make(tmp_path / "run", max_seconds=0.0).train()
    manifest = load_json(tmp_path / "run" / MANIFEST)
    here = tmp_path / "run" / manifest["folder"]
    make(tmp_path / "other", max_seconds=0.0, save_steps=1, meta_learning_rate=0.5).train()
    there = tmp_path / "other" / load_json(tmp_path / "other" / MANIFEST)["folder"]
    for part in ("meta", "episode-0"):
        path = here / f"{part}.safetensors"
        whole = path.read_bytes()
        shutil.copy(there / path.name, path)
        if path.read_bytes() != whole:
            with pytest.raises(ValueError, match=f"{part}.safetensors belongs to another checkpoint than"):
                make(tmp_path / "run").train()
        path.unlink()
        with pytest.raises(ValueError, match=f"{part}.safetensors, and that file is gone; restore the folder"):
            make(tmp_path / "run").train()
        path.write_bytes(whole)
    for changed, message in (
        ([], "holds a JSON list"),
        ({**manifest, "progress": None}, "'progress': None, expected an object"),
        ({**manifest, "stamp": []}, "'stamp': .*expected an object"),
        ({**manifest, "parts": None}, '"parts": None'),
        ({**manifest, "folder": 3}, "expected checkpoint-NUMBER"),
        ({**manifest, "progress": {**manifest["progress"], "epoch": 1}}, "damaged or changed"),
        (sealed({**manifest, "progress": {**manifest["progress"], "epoch": -1}}), "'epoch': -1, expected int"),
        (sealed({**manifest, "progress": {**manifest["progress"], "best": NAN}}), "'best': nan"),
        (sealed({**manifest, "progress": {}}), "'epoch': None"),
        ({}, "expected checkpoint-NUMBER"),
    ):
        save_json(tmp_path / "run" / MANIFEST, changed)
        with pytest.raises(ValueError, match=f"checkpoint.json .*{message}"):
            make(tmp_path / "run").train()
    older = {key: value for key, value in manifest.items() if key not in ("checksum", "parts")}
    save_json(tmp_path / "run" / MANIFEST, older)  # of an earlier version
    make(tmp_path / "run").train()
    make(tmp_path / "whole").train()
    assert same(end_of(tmp_path / "run"), end_of(tmp_path / "whole"))


def test_what_a_kill_left_is_removed_at_the_next_start_and_nothing_else(tmp_path):
    make(tmp_path, max_seconds=0.0).train()
    newest = load_json(tmp_path / MANIFEST)["folder"]
    for name in ("checkpoint-0000001", "checkpoint-0000009", "checkpoint-0000009-again"):
        if name != newest:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "meta.safetensors").write_bytes(b"half")
    (tmp_path / ".log.json.999999999.partial").write_text("half")
    (tmp_path / newest / ".meta.safetensors.999999999.partial").write_text("half")
    (tmp_path / "checkpoint-notes").mkdir()
    make(tmp_path, max_seconds=0.0).train()
    left = {path.name for path in tmp_path.iterdir() if "checkpoint-" in path.name or "partial" in path.name}
    assert left == {load_json(tmp_path / MANIFEST)["folder"], "checkpoint-notes"}
    assert not list(tmp_path.rglob("*.partial"))


def test_the_newest_checkpoint_stays_whole_while_another_one_of_its_step_is_written(tmp_path):
    trainer = make(tmp_path, max_seconds=0.0)
    trainer.train()
    first = load_json(tmp_path / MANIFEST)["folder"]
    checkpoints, step = trainer._checkpoints(), trainer.meta_step
    checkpoints.write(step, "meta", {"a": torch.zeros(1)})
    assert "rule.head.weight" in load_tensors(tmp_path / first / "meta.safetensors")
    checkpoints.complete(step, {})
    assert load_json(tmp_path / MANIFEST)["folder"] == f"{first}-again" and not (tmp_path / first).exists()
    checkpoints.write(step, "meta", {"a": torch.zeros(1)})
    checkpoints.complete(step, {})
    assert load_json(tmp_path / MANIFEST)["folder"] == first


def test_files_of_an_earlier_version_load(tmp_path):
    """No checksum in the weights nor in config.json: as every folder was until now."""
    basis = random_dense([("a", torch.nn.Parameter(torch.zeros(3, 4)))], dim=2)
    for thing in (basis, RandomBasis(basis.layout, 2, seed=3), LSTMRule(dataclasses.replace(RuleConfig(), eps=1e-6))):
        thing.save_pretrained(tmp_path)
        weights, config = tmp_path / "model.safetensors", load_json(tmp_path / "config.json")
        save_file(load_file(weights), weights, metadata={"format": "pt"})
        old = {key: value for key, value in config.items() if key != "checksum"}
        save_json(tmp_path / "config.json", {**old, "sha256": sha256_of(weights)})
        loaded = (Rule if isinstance(thing, Rule) else Basis).from_pretrained(tmp_path)
        assert loaded.fingerprint == thing.fingerprint
        weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
        with pytest.raises(ValueError, match="has sha256 .*damaged or changed"):
            type(thing).from_pretrained(tmp_path)
