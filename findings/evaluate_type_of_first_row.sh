#!/usr/bin/env bash
# evaluate 0.4.6, datasets 5.2.0, Python 3.11 or newer.
# Expected: a metric whose features say text refuses a number among its predictions, in whichever row it stands.
# Happens: the first row alone is checked. A number or None in a later one is taken: 5 becomes the text "5", and is scored.
# What to do: check the type of every row before compute().
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q evaluate==0.4.6 datasets==5.2.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import datasets
import evaluate


class Seen(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"predictions": predictions}


def given(predictions):
    try:
        return Seen().compute(predictions=predictions, references=["x"] * len(predictions))["predictions"]
    except ValueError:
        return "ValueError"


first, second, nothing = given([5, "a"]), given(["a", 5]), given(["a", None])
print("predictions [5, 'a']:   ", first)
print("predictions ['a', 5]:   ", second)
print("predictions ['a', None]:", nothing)
assert first == "ValueError", first
assert second == ["a", "5"], second
PY

# Expected output:
# predictions [5, 'a']:    ValueError
# predictions ['a', 5]:    ['a', '5']
# predictions ['a', None]: ['a', None]
