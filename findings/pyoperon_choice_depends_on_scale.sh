#!/usr/bin/env bash
# pyoperon 0.6.2, numpy 2.4.6, scikit-learn 1.9.1, Python 3.11.
# Expected: a regressor with objectives r2 and length chooses the same expression for y and for 100 y, as scikit-learn's
# do and as its own objective, which knows no scale, suggests.
# Happens: the model that predict() uses is chosen from the Pareto front by minimum description length, which takes
# the noise of y to have standard deviation 1 (`uncertainty`). For a target of small scale, such as the updates of an
# optimizer, any improvement is "within the noise": of y = 0.2 tanh(x), without noise, it keeps a straight line
# (R2 0.925), though the front holds the exact expression with one node more. For 100 y it takes that.
# What to do: give `uncertainty=[SIGMA]` in units of y, or read `pareto_front_` yourself.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pyoperon==0.6.2 numpy==2.4.6 scikit-learn==1.9.1

venv/bin/python - <<'PY'
import numpy as np
from pyoperon.sklearn import SymbolicRegressor
from sklearn.metrics import r2_score

x = np.random.default_rng(0).normal(size=(400, 2))


def chosen(scale, **settings):
    y = scale * 0.2 * np.tanh(x[:, 1])
    model = SymbolicRegressor(
        allowed_symbols="add,sub,mul,div,tanh,constant,variable", objectives=["r2", "length"], population_size=200,
        max_evaluations=50_000, random_state=1, n_threads=1, **settings,
    )
    model.fit(x, y)
    return r2_score(y, model.predict(x)), any("tanh" in entry["model"] for entry in model.pareto_front_)


found = {}
for name, scale, settings in (
    ("y", 1, {}),
    ("100 y", 100, {}),
    ("y, uncertainty=[0.01]", 1, {"uncertainty": [0.01]}),
):
    found[name], in_front = chosen(scale, **settings)
    print(f"{name:22} R2 of predict {found[name]:.3f}, tanh in the front: {in_front}")
    assert in_front, name

assert found["y"] < 0.95, found
assert found["100 y"] > 0.999 and found["y, uncertainty=[0.01]"] > 0.999, found
PY

# Expected output:
# y                      R2 of predict 0.925, tanh in the front: True
# 100 y                  R2 of predict 1.000, tanh in the front: True
# y, uncertainty=[0.01]  R2 of predict 1.000, tanh in the front: True
