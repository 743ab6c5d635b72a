#!/usr/bin/env bash
# pyoperon 0.6.2, numpy 2.4.6, scikit-learn 1.9.1, Python 3.11.
# Expected: predict() of an array in float32 gives what it gives in float64, to fp32's digits, or an error.
# Happens: in C order, as numpy makes arrays, it returns numbers that have nothing to do with the model, without a
# word; in Fortran order the same array is right, and so is float64 in both orders.
# What to do: pass float64.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pyoperon==0.6.2 numpy==2.4.6 scikit-learn==1.9.1

venv/bin/python - <<'PY'
import numpy as np
from pyoperon.sklearn import SymbolicRegressor

x = np.random.default_rng(0).normal(size=(400, 2))
y = 20 * np.tanh(x[:, 1])
model = SymbolicRegressor(
    allowed_symbols="add,sub,mul,div,tanh,constant,variable", objectives=["r2", "length"], population_size=200,
    max_evaluations=50_000, random_state=1, n_threads=1,
)
model.fit(x, y)


def close(inputs):
    return bool(np.allclose(model.predict(inputs), y, atol=0.1))


right = {
    f"{dtype.__name__}, {order} order": close(np.asarray(x, dtype=dtype, order=order))
    for dtype in (np.float64, np.float32)
    for order in "CF"
}
for name, value in right.items():
    print(f"{name:18} {'right' if value else 'wrong'}")
assert right == {
    "float64, C order": True, "float64, F order": True, "float32, C order": False, "float32, F order": True,
}, right
PY

# Expected output:
# float64, C order   right
# float64, F order   right
# float32, C order   wrong
# float32, F order   right
