"""What happens in the subspace, read back from tensorboard's event file and from trackio's database."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from hf_sl2o import SubspaceLogCallback

from .conftest import Tokens, random_dense, tiny_gpt2

ROOT = Path(__file__).parent.parent
NAMES = {f"sl2o_{name}" for name in ("coefficients_norm", "delta_norm", "gradient_share", "skipped_steps")}


def trained(folder, report_to, how="attached", **options):
    """Three steps of a plain Trainer with a basis; returns what it logged in them."""
    model = tiny_gpt2()
    random_dense(model.named_parameters()).save_pretrained(folder / "basis")
    args = TrainingArguments(
        str(folder / "out"), optim="sl2o", optim_args=f"basis={folder}/basis", max_steps=3, logging_steps=1,
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=report_to,
        **options,
    )  # fmt: skip
    listed = [SubspaceLogCallback()] if how == "listed" else []
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=listed)
    if how == "attached":
        SubspaceLogCallback.attach(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("how", ["attached", "listed", "without"])
def test_tensorboard_has_the_values_that_were_logged(tmp_path, how):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = trained(tmp_path, "tensorboard", how)
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    reader = accumulator.EventAccumulator(str(events))
    reader.Reload()
    found = {tag.removeprefix("train/") for tag in reader.Tags()["scalars"]} & NAMES
    assert found == (NAMES if how == "attached" else set())  # a listed callback comes after the trackers
    assert ("sl2o_delta_norm" in logged[0]) == (how != "without")
    for name in found:
        points = [(event.step, event.value) for event in reader.Scalars(f"train/{name}")]
        assert points == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logged], name
    if how == "attached":  # numbers that a run has, and not one number thrice
        assert len({entry["sl2o_coefficients_norm"] for entry in logged}) == 3
        assert all(0 < entry["sl2o_gradient_share"] < 1 for entry in logged)


# trackio takes its folder from the environment when it is imported, so that the run needs a process of its own.
RUN = """
import json, sys
from pathlib import Path
from tests.test_trackers import trained
logged = trained(Path(sys.argv[1]), "trackio", project="subspace", run_name="tiny")
Path(sys.argv[1], "logged.json").write_text(json.dumps(logged))
"""


@pytest.mark.slow
def test_trackio_has_the_values_that_were_logged(tmp_path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed: pip install trackio")
    own = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRACKIO_", "HF_TOKEN"))}
    out = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=tmp_path, env={**kept, **own}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    logged = json.loads((tmp_path / "logged.json").read_text())
    database = sqlite3.connect(tmp_path / "trackio" / "subspace.db")
    try:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    finally:
        database.close()
    values = [json.loads(metrics) for name, metrics in rows if name == "tiny"]
    values = [entry for entry in values if "train/sl2o_delta_norm" in entry]
    assert [entry["train/global_step"] for entry in values] == [1, 2, 3]
    for entry, expected in zip(values, logged, strict=True):
        assert {name: entry[f"train/{name}"] for name in NAMES} == {name: expected[name] for name in NAMES}
    assert len({entry["train/sl2o_coefficients_norm"] for entry in values}) == 3
