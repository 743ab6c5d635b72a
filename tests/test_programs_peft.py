"""The table of PEFT's tuners: its command runs, and each kind of the installed release is in it."""

import json

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_sl2o.foundation.files import load_json

from .programs import by_hand

if Version(peft.__version__) < Version("0.21"):
    pytest.skip(f"PEFT {peft.__version__} has not all tuners of the table", allow_module_level=True)

import benchmarks.peft_tuners as peft_tuners  # noqa: E402
from benchmarks.peft_tuners import TUNERS, Tuner  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the tuners
RESULT = by_hand.ROOT / "benchmarks" / "results" / "peft_tuners.json"
KINDS = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.fixture(autouse=True)
def settings():
    """The command's own settings, and one thread, are taken back."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.slow
def test_the_command_and_a_loop_that_is_written_by_hand(tmp_path):
    result = peft_tuners.main(["--quick", "--json", str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())["tuners"]
    assert list(rows) == list(peft_tuners.QUICK) and result["not_tried"] == []
    assert rows["LoRA"]["trainable"] == 2 * 8 * (4 * (64 + 64) + 2 * (64 + 128))
    assert rows["LayerNorm tuning"]["trainable"] == 2 * 2 * 64
    starts = [row["start"] for row in rows.values()]
    assert starts == pytest.approx([starts[0]] * 3)  # tuners that begin where the model is
    assert "task_ids" in rows["Poly"]["without"] and rows["Poly"]["error"] is None
    for row in rows.values():
        assert row["trains"]["sl2o"] == (row["sl2o"] < (1 - peft_tuners.LEAST) * row["start"])
    assert rows["LoRA"]["trains"] == {"sl2o": True, "adamw": True}

    def loss_of(**changed):
        model = peft_tuners.tuned(peft_tuners.base_model(60), TUNERS["LoRA"], tmp_path)
        ids = torch.stack([row["input_ids"] for row in peft_tuners.examples(5)])
        orders = by_hand.orders(len(ids), peft_tuners.BATCH, 10)
        by_hand.train(model, by_hand.next_tokens, [ids[order] for order in orders], **changed)
        with torch.no_grad():
            return by_hand.next_tokens(model.eval(), ids[::8]).item()

    assert rows["LoRA"]["sl2o"] == pytest.approx(loss_of(), rel=1e-5)
    assert rows["LoRA"]["sl2o"] != pytest.approx(loss_of(lr=0.9), rel=1e-3)


def test_what_does_not_run_or_does_not_move_is_said(tmp_path, monkeypatch):
    base = peft_tuners.base_model(1)
    absent = peft_tuners.run_tuner(base, Tuner({"target_modules": ["nowhere"]}), 1)
    assert "Error: Target modules {'nowhere'} not found in the base model" in absent["error"]
    assert absent["trains"] == {"sl2o": False, "adamw": False}
    monkeypatch.setattr(peft_tuners, "RATES", (1e-9,))
    still = peft_tuners.run_tuner(base, TUNERS["LoRA"], 1)
    assert still["error"] is None and still["trains"]["adamw"] is False


def test_a_kind_that_is_not_in_the_table_is_named(monkeypatch):
    assert {tuner.config for tuner in TUNERS.values()} <= KINDS
    monkeypatch.setattr(peft_tuners, "QUICK", ())
    monkeypatch.setattr(peft_tuners, "base_model", lambda steps: None)
    assert peft_tuners.main(["--quick"])["not_tried"] == []
    monkeypatch.delitem(TUNERS, "VeRA")
    assert peft_tuners.main(["--quick"])["not_tried"] == ["VERA"]


def test_the_result_is_that_of_this_list():
    result = load_json(RESULT)
    assert set(result["tuners"]) == set(TUNERS)
    assert {row["type"] for row in result["tuners"].values()} | set(result["not_tried"]) >= KINDS
    for name, row in result["tuners"].items():
        assert row["needs"] == TUNERS[name].needs
        assert (row["error"] is None) == (row.get("adamw") is not None or row.get("adamw_rate") is not None), name
