"""Runs and stages of the recipes between two starts: kills in a rotation, two at once, files that are gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_sl2o import IdentityBasis, Layout, LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments
from hf_sl2o.experiments.arms import Arm
from hf_sl2o.experiments.kept import files as kept_files
from hf_sl2o.experiments.kept import run as kept_run
from hf_sl2o.experiments.kept.files import (
    Busy,
    copy_checkpoints,
    keep,
    kept,
    made_once,
    only_writer,
    sweep,
    tensors_once,
)
from hf_sl2o.experiments.kept.stage import stage
from hf_sl2o.foundation.partials import temporary_name

from .conftest import Tokens, random_dense, tiny_gpt2


def arguments(folder, **options):
    settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"logging_steps": 2, "per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True}
    return SL2OTrainingArguments(str(folder), use_cpu=True, **{**settings, **options})


def run(folder, key="key"):
    objects = {"basis": random_dense(tiny_gpt2().named_parameters()), "eval_dataset": Tokens(8)}
    arm = Arm("sl2o", ())
    return kept_run.kept_run(
        folder, arguments(folder), key, arm, tiny_gpt2, lambda trainer: {}, train_dataset=Tokens(), **objects
    )


def in_a_child(work):
    """Exit code of `work` in a fork, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# Runs


def test_a_kill_at_any_deletion_of_a_rotation_changes_nothing(tmp_path, capfd):
    expected = run(tmp_path / "whole")["eval"]

    def killed_at(number, later, folder):
        seen = [0]

        def hook(event, args):
            if event in ("os.remove", "os.rmdir") and (folder / later / "trainer_state.json").exists():
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run(folder)

    kills = 0
    for first, later in enumerate(("checkpoint-4", "checkpoint-6"), 1):
        for number in range(first, 12, 2):
            folder = tmp_path / f"{later}-{number}"
            if in_a_child(lambda: killed_at(number, later, folder)) == 0:  # noqa: B023
                break
            kills += 1
            again = run(folder)
            assert again["eval"] == expected, (later, number)
            assert len(list(folder.glob("checkpoint-*"))) == 1
    assert kills >= 10


def test_a_damaged_result_is_made_anew(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    result, path = run(folder), folder / "run.json"
    monkeypatch.setattr(kept_run.ArmTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(folder)["eval"] == result["eval"]
    content = path.read_text()
    last = str(result["eval"][-1][1])
    damaged = [content[:-20], "[]", "", "3", "{}", content.replace(last, "0.5"), "\x00" * len(content)]
    for text in [*damaged, content.replace('"checksum"', '"other"')]:
        path.write_text(text)
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            run(folder)
        assert "run.json is not what was written" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(folder)["eval"] == result["eval"]


def test_an_unfinished_checkpoint_is_before_the_last_step_and_the_only_later_one(tmp_path):
    args = arguments(tmp_path, save_total_limit=None)
    SL2OTrainer(tiny_gpt2(), args, basis=random_dense(tiny_gpt2().named_parameters()), train_dataset=Tokens(),
                eval_dataset=Tokens(8)).train()  # fmt: skip
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-mine").mkdir()
    assert kept_run.unfinished_checkpoint(tmp_path, 6) == str(tmp_path / "checkpoint-4")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-mine"]
    assert kept_run.unfinished_checkpoint(tmp_path, 9) == str(tmp_path / "checkpoint-4")
    assert kept_run.unfinished_checkpoint(tmp_path, 4) is None and not list(tmp_path.glob("checkpoint-[0-9]*"))


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from hf_sl2o.experiments.kept.files import only_writer
with only_writer(Path({path!r})):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
    """A living process that writes tmp_path/run."""
    root = Path(__file__).parent.parent
    code = HOLD.format(root=str(root), path=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path, another):
    with pytest.raises(Busy, match=rf"run is being written by the process {another.pid} on .*; wait for it, end it"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = run(tmp_path / "other")
    another.kill()
    another.wait()
    assert run(tmp_path / "run")["eval"] == other["eval"]
    assert not list(tmp_path.glob(".*.lock"))


def test_a_lock_ends_with_its_block_and_with_an_error(tmp_path):
    with only_writer(tmp_path / "x"), pytest.raises(Busy, match=str(os.getpid())), only_writer(tmp_path / "x"):
        pytest.fail("two at once")
    with pytest.raises(KeyError), only_writer(tmp_path / "x"):
        raise KeyError
    with only_writer(tmp_path / "x"), only_writer(tmp_path / "y"):
        pass
    assert not list(tmp_path.iterdir())


def test_children_that_outlive_a_killed_process_do_not_hold_its_lock(tmp_path):
    def holder():
        with only_writer(tmp_path / "x"):
            child = os.fork()
            if child == 0:
                time.sleep(4)
                os._exit(0)
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(holder) == -signal.SIGKILL
    with only_writer(tmp_path / "x"):
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("optim", "lr", "options"),
    [
        ("sl2o", 1.0, {}),
        ("sl2o", 1.0, {"sl2o_average": 0.0}),
        ("sl2o", 0.3, {"max_grad_norm": 0.1, "sl2o_average": 4.0}),
        ("subspace_adamw", 0.3, {"adam_beta1": 0.8, "adam_epsilon": 1e-4}),
        ("subspace_sgd", 1.0, {"sl2o_momentum": 0.9, "max_grad_norm": 0.1}),
        ("subspace_sgd", 0.3, {"sl2o_average": 9.0}),
    ],
)
@pytest.mark.parametrize("identity", [False, True])
def test_arms_are_what_the_trainer_makes_of_the_same_arguments(tmp_path, optim, lr, options, identity):
    found = []
    for cls in (SL2OTrainer, kept_run.ArmTrainer):
        model = tiny_gpt2()
        layout = Layout.from_named_parameters(model.named_parameters())
        objects = {"basis": IdentityBasis(layout) if identity else random_dense(model.named_parameters())}
        if optim == "sl2o":
            torch.manual_seed(1)
            objects["rule"] = LSTMRule(RuleConfig(progress=True, average=9.0, output_scale=0.01 if identity else 1.0))
        args = arguments(tmp_path, optim=optim, learning_rate=lr, save_strategy="no", **options)
        trainer = cls(model, args, train_dataset=Tokens(), eval_dataset=Tokens(8), **objects)
        trainer.train()
        found.append((trainer.subspace_optimizer.coefficients, [*model.parameters()], trainer.state.log_history[:-1]))
    (c, weights, log), (other_c, other_weights, other_log) = found
    assert c.abs().max() > 0 and torch.equal(c, other_c)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert [entry.get("loss") for entry in log] == [entry.get("loss") for entry in other_log]


@pytest.mark.parametrize(("optim", "lr"), [("sl2o", 0.003), ("subspace_sgd", 0.003), ("subspace_adamw", 1e-4)])
def test_arms_have_exactly_the_rate_of_their_grid(tmp_path, optim, lr):
    args = arguments(tmp_path, optim=optim)
    args.learning_rate = lr
    model = tiny_gpt2()
    basis = random_dense(model.named_parameters())
    optimizer = kept_run.subspace_optimizer(model, args, basis, None)
    assert optimizer.param_groups[0]["lr"] == lr


# Stages and results


def test_a_stage_whose_files_are_gone_is_done_again(tmp_path, capsys):
    made, calls = tmp_path / "basis", []

    def work():
        calls.append(1)
        assert not made.exists()
        keep(made / "config.json", {"a": 1})
        (made / "README.md").write_text("x")
        return {"bytes": 3}

    def do(key="key"):
        return stage(tmp_path, "extract", key, work, made=made)

    first = do()
    assert do() == first and len(calls) == 1 and first["bytes"] == 3
    (made / "README.md").unlink()
    (made / "a folder").mkdir()
    assert do() == first and len(calls) == 1  # nothing that the stage needs
    for harm in (shutil.rmtree, lambda folder: (folder / "config.json").write_text("{}")):
        harm(made)
        assert do()["bytes"] == 3
        said = capsys.readouterr().out
        assert "extract.json: done before, but in" in said and "config.json" in said and "it is made anew" in said
    assert len(calls) == 3
    path = tmp_path / "stages" / "extract.json"
    for text in ("", "[]", "{", path.read_text().replace('"bytes": 3', '"bytes": 4')):
        shutil.rmtree(made)
        path.write_text(text)
        assert do()["bytes"] == 3
        assert "extract.json is not what was written" in capsys.readouterr().out
    shutil.rmtree(made)
    assert do("another key")["key"] == "another key" and len(calls) == 8


def test_what_is_kept_comes_back_and_nothing_else(tmp_path):
    data = {"key": "k", "loss": float("nan"), "curve": [(1, 2.5), (2, 1e-30)], "text": "é"}
    keep(tmp_path / "x.json", data)
    again = kept(tmp_path / "x.json")
    assert json.dumps(again) == json.dumps(data) and kept(tmp_path / "nothing.json") == {}
    content = (tmp_path / "x.json").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        place, value = (int(torch.randint(high, (), generator=generator)) for high in (len(content), 256))
        harmed = content[:place] + bytes([value]) + content[place + 1 :]
        (tmp_path / "x.json").write_bytes(harmed)
        assert json.dumps(kept(tmp_path / "x.json")) in (json.dumps(data), "{}")
    keep(tmp_path / "x.json", data)
    assert "key" in kept_files.read_object(tmp_path / "x.json", "key")
    with pytest.raises(ValueError, match="lacks 'runs'"):
        kept_files.read_object(tmp_path / "x.json", "runs")


def test_things_are_made_once_and_again_when_they_are_gone(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"w": torch.ones(3)}

    path = tmp_path / "base.safetensors"
    for harm in (lambda: None, path.unlink, lambda: path.write_bytes(path.read_bytes()[:-2])):
        assert torch.equal(tensors_once(path, make)["w"], torch.ones(3))
        harm()
    assert torch.equal(tensors_once(path, make)["w"], torch.ones(3)) and len(calls) == 3

    def work():
        keep(tmp_path / "made" / "config.json", {"a": 1})
        calls.append(2)
        return {"loss": 0.5}

    for harm in (lambda: None, lambda: shutil.rmtree(tmp_path / "made"), (tmp_path / "done.json").unlink):
        assert made_once(tmp_path / "done.json", "key", work, tmp_path / "made")["loss"] == 0.5
        harm()
    made_once(tmp_path / "done.json", "key", work, tmp_path / "made")
    assert calls.count(2) == 3


def test_what_a_kill_left_is_swept(tmp_path):
    abandoned = [tmp_path / "a" / temporary_name("x.json").replace(str(os.getpid()), "4194399")]
    abandoned += [tmp_path / "a" / "b" / ".y.safetensors.4194399.partial"]
    for path in abandoned:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    (tmp_path / "a" / ".checkpoint-4.partial" / "deep").mkdir(parents=True)
    good = tmp_path / "a" / "b" / "x.json"
    good.write_text("{}")
    sweep(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [good] and not list(tmp_path.glob("*/.check*"))


def test_checkpoints_are_shown_whole(tmp_path):
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "x").write_text(name)
    (tmp_path / "shown" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "shown" / "checkpoint-9").mkdir()
    (tmp_path / "shown" / ".checkpoint-4.partial").mkdir()
    copy_checkpoints(tmp_path / "run", tmp_path / "shown")
    shown = {path.name: (path / "x").read_text() for path in (tmp_path / "shown").iterdir()}
    assert shown == {"checkpoint-2": "checkpoint-2", "checkpoint-4": "checkpoint-4"}
