"""`hf-sl2o extract` and `inspect`: numbers from an oracle, refusals in one line, nothing half written."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from hf_sl2o import (
    Basis,
    DenseBasis,
    LSTMRule,
    RandomBasis,
    RuleConfig,
    SL2OTrainer,
    SL2OTrainingArguments,
    Trajectory,
)
from hf_sl2o.cli import main
from hf_sl2o.commands import folders
from hf_sl2o.foundation.files import save_json

from .conftest import Tokens, random_dense, tiny_gpt2

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trajectory(tmp_path):
    """12 snapshots of 86 numbers."""
    torch.manual_seed(3)
    model, recorded = torch.nn.Linear(16, 5), Trajectory(tmp_path / "run" / "trajectory")
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    for step in range(0, 60, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        recorded.write(step, model.named_parameters())
    return recorded


def printed(capsys, *words):
    """Exit code, and what went to the two outputs."""
    try:
        code = main(list(map(str, words)))
    except SystemExit as error:
        code = error.code
    out = capsys.readouterr()
    return code, out.out, out.err


def as_json(capsys, *words):
    code, out, err = printed(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def said(capsys, *words):
    """The line of a refusal; nothing else was printed."""
    code, out, err = printed(capsys, *words)
    assert code == 2 and not out and err.startswith("hf-sl2o: ") and err.count("\n") == 1, (code, out, err)
    return err


# extract


def test_extract_is_the_svd_of_the_snapshots(capsys, trajectory):
    code, text, err = printed(capsys, "extract", "run/trajectory", "made/basis", "--dim", "4")
    assert code == 0 and "fit_basis" in err
    files = [load_file(trajectory.path(step)) for step in trajectory.steps]
    snapshots = np.stack(
        [np.concatenate([f[name].reshape(-1) for name in trajectory.layout.names]) for f in files]
    ).astype(np.float64)  # fmt: skip
    _, values, directions = np.linalg.svd(snapshots - snapshots.mean(axis=0), full_matrices=False)
    share = (values[:4] ** 2).sum() / (values**2).sum()
    assert text.splitlines()[0].startswith("made/basis: 4 directions of 86 parameters in fp32, 1.38 kB, after ")
    assert f"They hold {100 * share:.4g} % of the variance of 12 snapshots (steps 0 to 55)." in text
    found = Basis.from_pretrained("made/basis").as_matrix().double().numpy()
    overlap = np.abs(np.sum(found * directions[:4], axis=1))
    assert np.allclose(overlap, 1, atol=1e-5) and not np.allclose(np.abs(np.sum(found * directions[1:5], axis=1)), 1)


def test_extract_takes_the_storage_that_fits(capsys, trajectory):
    words = ("extract", "run/trajectory", "basis", "--dim", "4", "--storage", "auto", "--budget", "0.7 kB")
    facts = as_json(capsys, *words)
    assert facts["storage"] == "bf16" and facts["bytes"] == 4 * 86 * 2
    assert facts["fingerprint"] == Basis.from_pretrained("basis").fingerprint
    layers = as_json(capsys, "extract", "run/trajectory", "layers", "--dim", "2", "--blocks", "layer")
    assert layers["dim"] == 2 * 3 or layers["dim"] == Basis.from_pretrained("layers").dim


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing", "basis"], "TRAJECTORY is nothing, which is not there; give a folder that TrajectoryCallback"),
        (["run", "basis"], r"TRAJECTORY is run, which has no trajectory\.json; did you mean run/trajectory\?"),
        (["run/trajectory", "full"], "OUTPUT is full, a folder that is not empty, and nothing is overwritten"),
        (["run/trajectory", "full/file"], "OUTPUT is full/file, a file"),
        (["run/trajectory", "full/file/basis"], "nothing can be written into .*full/file; give another folder"),
        (["run/trajectory", "basis", "--dim", "12"], "dim is 12, .* has numerical rank 11; choose dim <= 11"),
        (["run/trajectory", "basis", "--dim", "0"], "--dim is 0"),
        (["run/trajectory", "basis", "--storage", "int9"], r"did you mean 'int[48]'\?"),
        (["run/trajectory", "basis", "--storage", "auto"], "--budget is missing; give both"),
        (["run/trajectory", ".", "--dim", "4"], r"OUTPUT is \., a folder that is not empty"),
        (
            ["run/trajectory", "basis", "--dim", "86", "--budget", "9" * 400],
            "dim is 86, .* has numerical rank 11",
        ),
        (["run/trajectory", "basis", "--budget", "lots"], "'lots' is no size; write bytes, or a number with kB"),
        (
            ["run/trajectory", "basis", "--dim", "4", "--budget", "10"],
            "fp32 takes 1,376 bytes, and budget_bytes is 10",
        ),
        (["run/trajectory", "basis", "--blocks", "layers"], r"did you mean 'layer'\?"),
        (["run/trajectory", "basis", "--device", "cuda:99"], "--device is 'cuda:99', which is not there .*; use cpu"),
        (["run/trajectory", "basis", "--device", "gpu"], "--device is 'gpu', expected one of cpu, cuda"),
        (["run/trajectory", "basis", "--storag", "int8"], r"did you mean '--storage'\?"),
        (["run/trajectory"], "the following arguments are required: OUTPUT; see hf-sl2o extract --help"),
    ],
)
def test_extract_refuses_in_one_line(capsys, trajectory, tmp_path, words, expected):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, out, err = printed(capsys, "extract", *words)
    assert code == 2 and not out and re.search(expected, err.splitlines()[-1]), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_replaced_is_said_before_the_fit(capsys, trajectory, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sl2o.commands.extract.fit_basis", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ("extract", "../run/trajectory")
    assert "OUTPUT is ., the folder that you are in, which no other can replace" in said(capsys, *words, ".")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    assert "OUTPUT is ../volume, a mount point" in said(capsys, *words, "../volume")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (tmp_path / "empty").mkdir()
    assert f"nothing can be written into {tmp_path}; give another folder" in said(capsys, *words, "../empty")


@pytest.mark.skipif(sys.platform == "win32", reason="links, and names of 255 bytes")
def test_a_link_to_an_empty_folder_and_a_long_name_are_written(capsys, trajectory, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("link", "n" * 250):
        assert printed(capsys, "extract", "run/trajectory", name, "--dim", "4")[0] == 0
        assert Basis.from_pretrained(name).dim == 4
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()


def test_a_damaged_trajectory_costs_nothing(capsys, trajectory, tmp_path):
    path = trajectory.path(20)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, err = printed(capsys, "extract", "run/trajectory", "basis", "--dim", "4")
    assert code == 2 and "snapshot-000000020" in err and not (tmp_path / "basis").exists()


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 1)])
def test_an_interrupted_command_leaves_nothing(capsys, trajectory, tmp_path, monkeypatch, raised, code):
    save = DenseBasis.save_pretrained

    def half(self, folder):
        save(self, folder)
        assert Path(folder, "config.json").is_file() and not (tmp_path / "basis").exists()
        raise raised

    monkeypatch.setattr(DenseBasis, "save_pretrained", half)
    assert printed(capsys, "extract", "run/trajectory", "basis", "--dim", "4")[0] == code
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "extract", "run/trajectory", "basis", "--dim", "4")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_real_process_with_130():
    code = f"""if True:
        import signal, sys, time, types
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
        sys.path.insert(0, {str(ROOT)!r})
        import hf_sl2o_command
        def waits(name, words):
            print("on", flush=True)
            time.sleep(60)
        sys.modules["hf_sl2o"] = types.ModuleType("hf_sl2o")
        sys.modules["hf_sl2o.cli"] = types.ModuleType("hf_sl2o.cli")
        sys.modules["hf_sl2o.cli"].run_command = waits
        sys.exit(hf_sl2o_command.main(["inspect", "default"]))"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and not err


def test_a_folder_is_whole_or_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with folders.made_whole("OUTPUT", tmp_path / "empty") as inside:
        (inside / "a").write_text("1")
        assert not any((tmp_path / "empty").iterdir())
    assert (tmp_path / "empty" / "a").read_text() == "1"
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "plain"]


# inspect


def rows(text):
    """The two columns of the output."""
    return dict(re.match(r"( ?\S.*?)  +(.*)", line).groups() for line in text.splitlines() if line[0] != " ")


def test_inspect_says_what_a_basis_is(capsys, trajectory):
    made = as_json(capsys, "extract", "run/trajectory", "basis", "--dim", "4")
    code, text, _ = printed(capsys, "inspect", "basis")
    found, facts = rows(text), as_json(capsys, "inspect", "basis")
    assert code == 0 and max(map(len, text.splitlines())) <= 100
    assert found["what"] == "basis" and found["directions"] == "4, dense, float32, 1.38 kB"
    assert found["parameters"] == "86 in 3 tensors: weight 5x16, bias 5, scale 1"
    assert found["variance"].startswith(
        f"{100 * made['explained_variance']:.4g} % of the run's; the first directions:"
    )
    assert found["units"].startswith("std:") and found["checksum"] == "matches"
    assert found["made from"] == "12 snapshots, steps 0 to 55, about their mean"
    assert facts["provenance"] == made["provenance"] and facts["fingerprint"] == made["fingerprint"]
    assert (facts["dim"], facts["n"], facts["dtype"], facts["units"]) == (4, 86, "float32", "std")
    Basis.from_pretrained("basis").with_units("orthonormal").save_pretrained("other")
    assert as_json(capsys, "inspect", "other/config.json")["units"] == "orthonormal"
    RandomBasis(trajectory.layout, 3, seed=1).save_pretrained("random")
    found = rows(printed(capsys, "inspect", "random")[1])
    assert found["directions"].startswith("3, random") and "variance" not in found and "made from" not in found


def test_inspect_says_what_a_trajectory_is(capsys, trajectory):
    found = rows(printed(capsys, "inspect", "run/trajectory")[1])
    assert found["snapshots"] == "12, steps 0 to 55, every 5" and found["checksum"] == "matches"
    assert found["next"] == "hf-sl2o extract run/trajectory BASIS --dim D, D at most 11"
    trajectory.path(5).unlink()
    facts = as_json(capsys, "inspect", "run/trajectory/trajectory.json")
    assert facts["missing"] == [5] and facts["checksum"] is None and facts["n"] == 86 and facts["dtypes"] == ["F32"]
    assert "1 files are gone: steps [5]" in rows(printed(capsys, "inspect", "run/trajectory")[1])["checksum"]
    assert "look into run/trajectory" in said(capsys, "inspect", "run")


def test_inspect_says_what_a_rule_is(capsys):
    rule = LSTMRule(RuleConfig(hidden_size=4, output_scale=0.5))
    rule.save_pretrained("rule")
    found, facts = rows(printed(capsys, "inspect", "rule")[1]), as_json(capsys, "inspect", "rule")
    count = sum(p.numel() for p in rule.parameters())
    assert found["rule"] == f"LSTMRule, {count} weights" and found["choices"] == "hidden_size 4, output_scale 0.5"
    assert facts["fingerprint"] == rule.fingerprint == found["fingerprint"] and facts["weights"] == count
    found = rows(printed(capsys, "inspect", "default")[1])
    assert found["comes with"] == "the package" and found["trained on"].startswith("quadratic, teacher")


def test_inspect_says_what_a_checkpoint_is(capsys, tmp_path):
    model = tiny_gpt2()
    basis = random_dense(model.named_parameters(), dim=3)
    args = SL2OTrainingArguments(
        "out", max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = SL2OTrainer(model, args, basis=basis, train_dataset=Tokens(rows=16))
    trainer.train()
    capsys.readouterr()
    facts = as_json(capsys, "inspect", "out/checkpoint-2")
    c = trainer.subspace_optimizer.coefficients
    assert facts["kind"] == "checkpoint" and (facts["step"], facts["max_steps"]) == (2, 2) and facts["resumable"]
    assert facts["coefficients"] == {"dim": 3, "norm": pytest.approx(float(c.norm())), "basis": basis.fingerprint}
    assert facts["weights"]["numbers"] == sum(p.numel() for p in model.parameters())  # the head is tied, saved once
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    found = rows(printed(capsys, "inspect", "out/checkpoint-2")[1])
    assert found["step"] == "2 of 2" and found["resumable"].startswith("no optimizer state")
    save_file({"c": torch.zeros(3)}, "out/checkpoint-2/coefficients.safetensors")
    err = said(capsys, "inspect", "out/checkpoint-2")
    assert "the tensor 'coefficients' of out/checkpoint-2/coefficients.safetensors cannot be read" in err


def test_inspect_reads_any_safetensors(capsys):
    save_file(
        {"a": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(())}, "any.safetensors", {"format": "pt"}
    )
    facts = as_json(capsys, "inspect", "any.safetensors")
    assert facts["numbers"] == 13 and facts["checksum"] is None and facts["dtypes"] == ["BF16", "F32"]
    assert facts["tensors"]["a"] == {"shape": [3, 4], "dtype": "BF16"} and facts["metadata"] == {"format": "pt"}
    text = printed(capsys, "inspect", "any.safetensors")[1]
    assert "any.safetensors has none: an earlier version wrote it, or another program" in " ".join(text.split())
    data = Path("any.safetensors").read_bytes()
    Path("any.safetensors").write_bytes(data[:-2])
    assert "is truncated, damaged or not a safetensors file" in said(capsys, "inspect", "any.safetensors")


def test_inspect_reads_results(capsys):
    facts = as_json(capsys, "inspect", ROOT / "recipes" / "results" / "rule_default.json")
    assert facts["kind"] == "comparison" and facts["arms"]["cifar-resnet8"]["sl2o"]["learning_rate"] == 1
    run = {"learning_rate": 0.3, "final_eval_loss": 0.25}
    bad = {"learning_rate": 3.0, "final_eval_loss": None}
    save_json("own/comparison.json", {"recipe": {"dim": 4}, "runs": {"b": bad, "a": run}, "explained_variance": 0.5})
    code, text, err = printed(capsys, "inspect", "own")
    assert code == 0, err
    assert "  a       0.25 at rate 0.3\n  b       diverged at rate 3" in text and "50 % of the trajectory's" in text
    odd = {"recipe": {}, "runs": {"c": {**run, "final_eval_loss": 0.5}, "b": bad, "a": run}, "environment": None}
    odd["runs"]["b"]["final_eval_loss"] = float("nan")
    for value in (None, {"versions": [1]}):  # NaN is no loss that others are compared with
        Path("own/comparison.json").write_text(json.dumps({**odd, "environment": value}))
        text = printed(capsys, "inspect", "own")[1]
        assert re.findall(r"^  (\w) +(\S+)", text, flags=re.M) == [("a", "0.25"), ("c", "0.5"), ("b", "diverged")]
    save_json("own/comparison.json", {"recipe": {}, "runs": {"a": {"learning_rate": 1.0}}})
    assert "is no whole comparison (KeyError: 'final_eval_loss'); restore it" in said(capsys, "inspect", "own")


def test_inspect_refuses_in_one_line(capsys, tmp_path, trajectory):
    LSTMRule().save_pretrained("rule")
    shutil.copytree("rule", "changed")
    weights = Path("changed/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    Path("text.txt").write_text("x")
    save_json("list.json", [1])
    save_json("other.json", {"a": 1})
    (tmp_path / "empty").mkdir()
    save_json("meta/checkpoint.json", {"progress": {"epoch": 3}, "checksum": "0" * 64})
    for what, expected in {
        "changed": "changed/model.safetensors has sha256",
        "text.txt": "text.txt is a file of another kind; expected a rule, a basis",
        "list.json": "holds a JSON list, expected an object",
        "other.json": "other.json is a file of another kind",
        "empty": "empty is a folder of another kind; expected a rule, a basis",
        "./": "a comparison, or a .safetensors file; look into ",
        "meta": "meta/checkpoint.json says its checksum is 0000000000000000..., its content has",
        "defalt": "no file or folder here, no rule that ships (default, default-lora",
        "no/such.json": "no file or folder here",
        "no/such/folder": "no file or folder here",
    }.items():
        assert expected in said(capsys, "inspect", what)
    assert "--revision is of a Hub repository" in said(capsys, "inspect", "rule", "--revision", "main")
