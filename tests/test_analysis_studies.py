"""The studies of what a rule does, at toy size."""

import dataclasses
import json

import numpy as np
import pytest

from hf_sl2o.experiments.supplement import first_three, updates_of
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
        assert len(run["coefficients"]) == 21 and len(run["coefficients"][0]) == 40
        updates = np.diff(np.array(run["coefficients"]), axis=0)
        assert np.allclose(updates, -np.array(updates_of(run["coefficients"])))
        squares = np.square(updates).sum(axis=0)
        np.testing.assert_allclose(run["share_of_direction"], squares / squares.sum(), atol=1e-2)
        lengths = np.linalg.norm(updates, axis=1)
        assert run["last_over_first_quarter"] == pytest.approx(lengths[-5:].mean() / lengths[:5].mean(), rel=2e-2)
        three = np.square(updates[:, :3])
        expected = (three[-5:].mean() / three[:5].mean()) ** 0.5
        assert first_three(run["coefficients"]) == pytest.approx(expected, rel=1e-6)
    assert runs["momentum"]["coefficients"] != runs["SL2O (default)"]["coefficients"]
    assert len(result["response"]["SL2O (paper-cnn)"]) == 31
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
