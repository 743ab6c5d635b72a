"""The studies of what a rule does, at toy size."""

import dataclasses
import json

import pytest

from hf_sl2o.experiments.tasks import problems
from recipes.studies import directions, symbolic

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    make = problems.PROBLEMS["digits-mlp"]
    monkeypatch.setitem(problems.PROBLEMS, "digits-mlp", lambda data: dataclasses.replace(make(data), steps=120))


def words(tmp_path, name):
    return [
        "--tasks", "digits-mlp", "--steps", "20", "--seeds", "1", "--output_dir", str(tmp_path / name),
        "--tasks_dir", str(tmp_path / "tasks"), "--json", str(tmp_path / f"{name}.json"),
    ]  # fmt: skip


def test_directions(tmp_path):
    result = directions.main(words(tmp_path, "d"))
    runs = result["tasks"]["digits-mlp"]["runs"]
    assert list(runs) == ["momentum", "SL2O (paper-cnn)", "SL2O (default)"]
    for run in runs.values():
        assert len(run["coefficients"]) == 21 and len(run["updates"]) == len(run["length"]) == 20
        assert sum(run["share_of_direction"]) == pytest.approx(1, abs=1e-2)
        moved = [a - b for a, b in zip(run["coefficients"][3], run["coefficients"][4], strict=True)]
        assert moved == pytest.approx(run["updates"][3], abs=1e-3)
        assert run["length"][3] == pytest.approx(sum(x * x for x in run["updates"][3]) ** 0.5, rel=1e-2)
    assert runs["momentum"]["updates"] != runs["SL2O (default)"]["updates"]
    assert len(result["response"]["SL2O (paper-cnn)"]) == 61
    assert (tmp_path / "d.png").stat().st_size > 5000
    assert json.loads((tmp_path / "d.json").read_text())["environment"]["commit"]


def test_symbolic(tmp_path, monkeypatch):
    monkeypatch.setattr(symbolic, "FIT", 600)
    monkeypatch.setattr(symbolic, "TEST", 100)
    small = ["--meta_epochs", "1", "--generations", "3", "--population", "20"]
    result = symbolic.main([*words(tmp_path, "s"), *small])
    found = [row for row in result["table"] if row["from"] == "found"]
    errors = [row["mse_fit"] for row in found]
    assert errors == sorted(errors, reverse=True) and len(found) > 1
    assert [row["complexity"] for row in result["table"] if row["from"] == "paper"] == [6, 7, 9]
    assert set(result["expressions"]) >= {"found, closest", "found, at most 9", "paper, tanh"}
    runs = result["runs"]["digits-mlp"]
    assert {"LSTM", "adamw", "momentum", *result["expressions"]} == set(runs)
    assert runs["LSTM"]["final_eval_loss"] != runs["found, closest"]["final_eval_loss"]
    assert (tmp_path / "s.png").stat().st_size > 5000
