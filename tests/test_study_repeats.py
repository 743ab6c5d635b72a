"""The studies of the repeat and of what carries over, at toy size; and what both are made of."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch

from hf_sl2o import Basis
from hf_sl2o.experiments.tasks import adaptation as of
from hf_sl2o.experiments.tasks import problems
from hf_sl2o.experiments.tasks.networks import small_vit
from hf_sl2o.experiments.tasks.problem import seeded
from recipes.studies import carry, repeat


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Networks of one layer, bases of three steps, 130 images of each split, short runs, one rate."""

    def small(name, **changes):
        make = problems.PROBLEMS[name]
        monkeypatch.setitem(problems.PROBLEMS, name, lambda data: dataclasses.replace(make(data), steps=3, **changes))

    small("e2e-gpt2")
    small("cifar-vit", build_model=seeded(functools.partial(small_vit, width=16, layers=1, heads=2, patch=8)))
    load = problems.cached_cifar
    monkeypatch.setattr(problems, "cached_cifar", lambda *args: tuple(column[:130] for column in load(*args)))
    monkeypatch.setattr(of, "SIZE", 33)
    for study in (repeat, carry):
        monkeypatch.setattr(study, "DIM", 4)
    monkeypatch.setattr(repeat, "SHORT", (4, 8))
    monkeypatch.setattr(repeat, "LONG", (4,))
    monkeypatch.setattr(repeat, "ROUNDS", 1)
    monkeypatch.setattr(repeat, "RATES", {arm: rates[-1:] for arm, rates in repeat.RATES.items()})
    monkeypatch.setattr(carry, "RECORDED", 8)
    monkeypatch.setattr(carry, "SOURCES", {"cifar-vit": ("rotated", "negative")})
    monkeypatch.setattr(carry, "TARGETS", {"cifar-vit": ("upright", of.FIGURES)})
    for grid in ("SUBSPACE", "ORTHONORMAL", "FULL", "FACTORS"):
        monkeypatch.setattr(carry, grid, getattr(carry, grid)[-1:])


def words(tmp_path, name):
    return [
        "--tasks", "cifar-vit", "--seeds", "2", "--output_dir", str(tmp_path / name),
        "--tasks_dir", str(tmp_path / "tasks"), "--json", str(tmp_path / f"{name}.json"),
    ]  # fmt: skip


def test_rows_of_the_kinds(tmp_path):
    """Folds overlap, halves do not; noise changes labels of the repeat, or of both runs, and images of none."""
    text = of.adaptation("e2e-gpt2", "embedded", tmp_path)
    kinds = {kind.name: kind for kind in repeat.kinds_of(text)}
    assert text.relabelled is None and list(kinds) == ["seed", "fold", "sample"]
    fold, sample = kinds["fold"], kinds["sample"]
    assert len(fold.first_rows) == len(fold.rows) == text.count * 4 // 5
    assert 0.55 < len({*fold.first_rows} & {*fold.rows}) / text.count < 0.65
    assert not {*sample.first_rows} & {*sample.rows} and len(sample.first_rows) == text.count // 2

    images = of.adaptation("cifar-vit", "embedded", tmp_path)
    kinds = {kind.name: kind for kind in repeat.kinds_of(images)}
    assert list(kinds) == ["seed", "noise", "noise, both"]

    def labels(adaptation):
        drawn = itertools.islice(adaptation.batches(range(images.count), 0), 3)
        return torch.cat([y for _, y in drawn])

    clean = labels(images)
    one, two = labels(kinds["noise"].again), labels(kinds["noise, both"].first)
    assert labels(kinds["noise"].first).equal(clean)
    for noisy in (one, two):
        assert 0.03 < float((noisy != clean).float().mean()) < 0.3  # a fifth, of which a third stays as it was
    assert not one.equal(two)
    first, again = (next(kind.batches([3, 5] * 32, 0))[0] for kind in (images, kinds["noise"].again))
    assert first.equal(again)


def test_slices(tmp_path):
    kitchens = [of.adaptation("e2e-gpt2", "embedded", tmp_path, food).count for food in ("English", "Chinese")]
    assert all(0 < count < of.adaptation("e2e-gpt2", "embedded", tmp_path).count for count in kitchens)
    upright, negative, turned = (
        of.adaptation("cifar-vit", "embedded", tmp_path, name).eval_batches[0][0]
        for name in ("upright", "negative", "upside down")
    )
    assert turned.flip(2).equal(upright) and not turned.equal(upright)
    assert torch.allclose(
        negative + upright, (negative + upright)[:1, :, :1, :1]
    )  # normalised: their sum is one number
    with pytest.raises(ValueError, match="no slice 'sideways', expected one of upright"):
        of.adaptation("cifar-vit", "embedded", tmp_path, "sideways")
    with pytest.raises(ValueError, match="no adaptation 'teacher', expected one of e2e-gpt2"):
        of.adaptation("teacher", "embedded", tmp_path)


def test_steps_to_a_loss_are_the_fewest_of_all_lengths():
    def run(*curves):
        return {"eval_per_seed": [[list(point) for point in curve] for curve in curves]}

    arm = {
        "runs": {
            "100": run([(0, 9), (20, 3), (50, 2), (100, 1)], [(0, 9), (20, 5), (50, 2), (100, 1)]),
            "30": run([(0, 9), (20, 4), (30, 2.2)], [(0, 9), (20, 4), (30, 1.8)]),
        }
    }
    assert repeat.steps_to(4, arm) == 20
    assert repeat.steps_to(2, arm) == 30  # the mean over seeds; the longer run needs 50
    assert repeat.steps_to(1, arm) == 100 and repeat.steps_to(0.5, arm) is None


def test_the_first_run_has_paid_when_what_was_saved_is_what_it_took():
    def arm(step):
        return {"runs": {"9": {"eval_per_seed": [[[0, 3.0], [step, 1.0]]]}}, "best_eval_loss": 1.0}

    arms = {"sl2o": arm(10), "adamw": arm(110), "lora_adamw": arm(60)}
    entry = repeat.judged(arms, {"sl2o": 2.0, "adamw": 1.0, "lora_adamw": 0.5}, first_seconds=180.0)["adamw, 1 %"]
    assert entry["steps_over_sl2o"] == {"sl2o": 1, "adamw": 11, "lora_adamw": 6}
    assert entry["seconds"] == {"sl2o": 20, "adamw": 110, "lora_adamw": 30}
    assert entry["repeats_until_paid"] == {"adamw": 2, "lora_adamw": 18}


def test_repeat(tmp_path, monkeypatch):
    kinds = repeat.kinds_of
    monkeypatch.setattr(repeat, "kinds_of", lambda images: [kinds(images)[0], kinds(images)[2]])
    result = repeat.main([*words(tmp_path, "r"), "--steps", "8"])
    assert list(result["tasks"]["cifar-vit"]) == ["seed", "noise, both"]
    for entry in result["tasks"]["cifar-vit"].values():
        arms = entry["arms"]
        assert set(arms) == set(repeat.LABELS)
        n = arms["adamw"]["numbers"]
        assert arms["sl2o"]["bytes"] == 16 and arms["adamw"]["bytes"] == 4 * n == entry["first_run"]["basis_bytes"] / 4
        assert 16 < arms["lora_adamw"]["numbers"] < n
        starts = {arm: arms[arm]["runs"]["4"]["eval_per_seed"][0][0][1] for arm in arms}
        assert starts["sl2o"] == starts["adamw"] == pytest.approx(starts["lora_adamw"]) != starts["warm_start"]
        assert all(0 <= value <= 1 for value in arms["sl2o"]["accuracy_per_seed"])
        target = entry["targets"]["adamw, 1 %"]
        assert target["loss"] == pytest.approx(1.01 * arms["adamw"]["best_eval_loss"])
        assert target["steps"]["adamw"] in (4, 5, 8)
        assert target["seconds"]["adamw"] == target["steps"]["adamw"] * entry["seconds_a_step"]["adamw"] > 0
    losses = [entry["arms"]["adamw"]["best_eval_loss"] for entry in result["tasks"]["cifar-vit"].values()]
    assert losses[0] != losses[1]
    assert (tmp_path / "r.png").stat().st_size > 5000
    before = json.loads((tmp_path / "r.json").read_text())["tasks"]
    monkeypatch.setattr(of, "record", lambda *args, **kwargs: pytest.fail("it is trained again"))
    assert repeat.main([*words(tmp_path, "r"), "--steps", "8"])["tasks"] == before
    with pytest.raises(ValueError, match="--steps is 3, expected more than 4"):
        repeat.main([*words(tmp_path, "r"), "--steps", "3"])


def test_carry(tmp_path):
    result = carry.main([*words(tmp_path, "c"), "--steps", "4"])
    targets = result["tasks"]["cifar-vit"]["targets"]
    assert list(targets) == ["upright", "figures"]
    for arms in targets.values():
        sources = ["its own earlier run", "one source", "2 sources", "2 sources, d = 8"]
        assert [name for name in arms if name.startswith("SL2O")] == [f"SL2O, basis of {name}" for name in sources]
        assert [arms[f"SL2O, basis of {name}"]["numbers"] for name in sources] == [4, 4, 4, 8]
        assert arms["AdamW, all weights"]["share_of_the_way"] == pytest.approx(1)
        assert len({entry["eval"][0][1] for entry in arms.values()}) <= 2  # one start; LoRA's to rounding
        assert len({entry["final_eval_loss"] for entry in arms.values()}) == len(arms)
    (bases,) = (tmp_path / "c").glob("*/bases")  # below a folder of the data, so that no other data takes them
    one, several = (Basis.from_pretrained(bases / "cifar-vit-sources/made" / name) for name in "01")
    own = Basis.from_pretrained(bases / "cifar-vit-upright/made")
    assert one.provenance["snapshots"] * 2 == several.provenance["snapshots"]
    assert len({one.fingerprint, several.fingerprint, own.fingerprint}) == 3
    assert (tmp_path / "c.png").stat().st_size > 5000
