"""Two processes over a thin wire train as one does; the wire holds its limit and is taken away, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _should_compress

from hf_sl2o import LearnedOptimizer, Rule
from hf_sl2o.experiments import wire as ends
from hf_sl2o.foundation.files import save_json
from hf_sl2o.meta.task import InnerRun, train_on
from hf_sl2o.rules import SHIPPED_RULES
from recipes.studies import wire

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

ROOT = Path(__file__).parent.parent
STEPS, FULL = 20, 60
MEASURE = """
import os, sys, time
from accelerate import PartialState
from hf_sl2o.experiments import wire
from hf_sl2o.foundation.files import save_json
PartialState(cpu=True, backend="gloo")
rate = wire.measured_rate(float(sys.argv[1]))
if os.environ["RANK"] == "0":
    save_json(sys.argv[2], {**rate, "interfaces": os.listdir("/sys/class/net")})
time.sleep(0.5)  # gloo's threads are done with the last collective
"""
APART = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from hf_sl2o.experiments import wire as ends
from hf_sl2o.foundation.files import load_json
from recipes.studies import wire
ends.mean_of_both = lambda values: values
wire.work(load_json(Path(sys.argv[1])))
"""
LAID = """
import signal
import time
from hf_sl2o.experiments import wire
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with wire.joined(10):
    print("laid", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The study on digits, without a limit: its result, and where its files are."""
    folder = tmp_path_factory.mktemp("wire")
    words = ["--task", "digits-mlp", "--link", "none", "--steps", str(STEPS), "--trajectory_steps", str(FULL)]
    words += ["--seeds", "1", "--output_dir", str(folder / "out"), "--tasks_dir", str(folder / "tasks")]
    words += ["--json", str(folder / "wire.json")]
    return wire.main(words), folder, words


def setting_of(studied):
    result, folder, _ = studied
    rate = result["links"]["no limit"]["arms"]["ddp_adamw"]["learning_rate"]
    return wire.Setting("digits-mlp", "embedded", str(folder / "tasks"), FULL, rate)


def job_of(arm, rate=1.0, steps=STEPS):
    return {"arm": arm, "rate": rate, "seed": wire.FIRST_SEED, "target": None, "steps": steps}


def test_result(studied):
    result, folder, words = studied
    written = json.loads((folder / "wire.json").read_text())
    assert (folder / "wire.png").stat().st_size > 5000 and written["environment"]["commit"]
    assert result["n"] == 64 * 48 + 48 + 48 * 48 + 48 + 48 * 10 + 10 and result["d"] == 40
    assert result["basis_bytes"] == 4 * result["n"] * 40 and result["target"] == 1.01 * result["full_adamw"]
    (link,) = result["links"].values()
    assert link["nominal_mbit"] is None and link["measured_mbit"] is None and link["payload_mbit"] > 100
    assert link["sending_the_basis_seconds"] == pytest.approx(
        8e-6 * result["basis_bytes"] / link["payload_mbit"], rel=1e-9
    )
    arms = link["arms"]
    assert set(arms) == {"sl2o", "subspace_adamw", *wire.RIVALS}
    assert arms["sl2o"]["payload_bytes_a_step"] == 160 and arms["ddp_adamw"]["payload_bytes_a_step"] == 4 * result["n"]
    assert arms["ddp_adamw_fp16"]["payload_bytes_a_step"] == 2 * result["n"]
    assert arms["ddp_lora"]["payload_bytes_a_step"] == 4 * 8 * (64 + 48 + 48 + 48 + 48 + 10)
    for arm, run in arms.items():
        (curve,) = run["curve_per_seed"]
        assert curve[0][:2] == [0, 0.0] and curve[-1][0] <= (FULL if arm in wire.RIVALS else STEPS)
        assert curve[-1][2] < curve[0][2] and curve[-1][1] == pytest.approx(
            run["seconds_a_step"] * curve[-1][0], abs=1e-3
        )
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "out").rglob("*.json"))
    again = wire.main(words)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (folder / "out").rglob("*.json"))
    assert again["links"] == result["links"]


def one_process(setting, averaged):
    """Coefficients and held-out loss of the shipped rule, the gradients of both halves taken by one process."""
    rule, both = Rule.from_pretrained(SHIPPED_RULES / "default"), []
    for rank in range(2):
        both.append(InnerRun(ends.halved(setting.subspace, rank), wire.FIRST_SEED))
    c = torch.nn.Parameter(torch.zeros(setting.subspace.basis.dim))
    optimizer = LearnedOptimizer([c], rule, 1.0, total_steps=STEPS)
    mean = torch.zeros_like(c)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = (STEPS - step) / STEPS
        gradients = [run.gradient()[1] for run in both]
        c.grad = sum(gradients) / 2 if averaged else gradients[0]
        before = c.detach().clone()
        optimizer.step()
        for run in both:
            run.move(c.detach() - before)
        mean.lerp_(c.detach(), (rule.config.average + 1) / (step + 1 + rule.config.average))
    both[0].move(mean - c.detach())
    return c.detach(), float(both[0].evaluate())


@pytest.fixture(scope="module")
def pair(studied, tmp_path_factory):
    """What two processes make of the shipped rule, and of AdamW on all weights."""
    jobs = [job_of("sl2o"), job_of("ddp_adamw", 1e-3)]
    return wire.run_jobs(setting_of(studied), jobs, None, tmp_path_factory.mktemp("pair"))


def test_two_processes_train_as_one(studied, pair):
    setting, (result, _) = setting_of(studied), pair
    c, loss = one_process(setting, averaged=True)
    torch.testing.assert_close(torch.tensor(result["coefficients"]), c, rtol=0, atol=1e-5)
    assert result["curve"][-1][2] == pytest.approx(loss, rel=1e-5)
    apart, other = one_process(setting, averaged=False)
    assert float((apart - c).abs().max()) > 1e-2 and float(c.abs().max()) > 0.1
    assert other != pytest.approx(loss, rel=1e-4)


def test_ends_that_do_not_average_are_refused(studied, tmp_path):
    setting, jobs = setting_of(studied), [(job_of("sl2o"), str(tmp_path / "kept.json"))]
    save_json(tmp_path / "spec.json", {"setting": vars_of(setting), "mbit": None, "jobs": jobs})
    words = [sys.executable, "-c", APART, str(tmp_path / "spec.json"), str(ROOT)]
    with ends.joined(None) as loopback, pytest.raises(RuntimeError, match="trained numbers is .* on rank 0 and .* on"):
        ends.run_both(loopback, words, tmp_path)
    assert not (tmp_path / "kept.json").exists()


def vars_of(setting):
    return {name: getattr(setting, name) for name in ("task", "data", "tasks_dir", "trajectory_steps", "full_rate")}


def test_all_weights_over_two_processes_are_those_of_one(studied, pair):
    setting, (_, result) = setting_of(studied), pair
    steps = [step for step, *_ in result["curve"]]
    one = train_on(
        setting.full, wire.adamw(1e-3), STEPS, seed=wire.FIRST_SEED, schedule="linear", evaluate_at=steps
    )  # fmt: skip
    assert [loss for *_, loss in result["curve"]] == pytest.approx([loss for _, loss in one["eval"]], rel=1e-4)
    half = train_on(
        ends.halved(setting.full, 0), wire.adamw(1e-3), STEPS, seed=wire.FIRST_SEED, schedule="linear",
        evaluate_at=steps,
    )  # fmt: skip
    assert abs(half["eval"][-1][1] - one["eval"][-1][1]) > 1e-3 * one["eval"][-1][1]


def test_halves_make_the_batch():
    batch = {"x": torch.arange(12).view(6, 2), "y": [torch.arange(6)]}
    first, second = (ends.half(batch, rank) for rank in range(2))
    assert torch.equal(torch.cat([first["x"], second["x"]]), batch["x"]) and first["y"][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(1000, 64), (64, 192), (64,), (5, 3), (8, 8), (9, 9), (10, 10), (3, 4, 5), ()])
def test_what_powersgd_sends(shape):
    numel = torch.empty(shape).numel()
    compresses = False
    if len(shape) > 1:
        compresses = _should_compress(shape[0], numel // shape[0], ends.RANK, 2)[0]
    expected = ends.RANK * (shape[0] + numel // shape[0]) if compresses else numel
    assert ends.compressed(shape) == expected


def test_summary_and_speedups():
    def run(*curve):
        return {"curve": curve, "seconds_a_step": 0.5, "sent_bytes_a_step": None, "payload_bytes_a_step": 4.0,
                "measured_mbit": None, "payload_mbit": 8.0, "backward_seconds": 0.1}  # fmt: skip

    there = wire.summary(0.1, 20, [run([0, 0, 3.0], [10, 5.0, 2.05], [20, 10.0, 2.0])], 2.0)
    assert (there["steps_to_target"], there["seconds_to_target"], there["share_of_compute"]) == (20, 10.0, 0.2)
    assert there["above"]["5%"] == {"steps": 10, "seconds": 5.0}
    diverged = wire.summary(0.1, 20, [run([0, 0, 1.0]), run([0, 0, None])], 2.0)
    assert diverged["seconds_to_target"] is None and diverged["last_loss"] is None
    slow = {**there, "seconds_to_target": 60.0}
    link = wire.with_speedups({"sl2o": there, "ddp_lora": diverged, **dict.fromkeys(wire.RIVALS[:3], slow)}, 10**7)
    assert link["sending_the_basis_seconds"] == pytest.approx(10.0)
    ours = link["arms"]["sl2o"]
    assert ours["speedup_over_ddp_adamw"] == pytest.approx(6.0)
    assert ours["speedup_over_ddp_adamw_with_basis"] == pytest.approx(3.0)
    assert ours["speedup_over_ddp_lora"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link", "0"], "--link has '0', expected none, or Mbit/s above 0"),
        (["--link", "10", "10.0"], "--link has '10.0'"),
        (["--link", "fast"], "--link has 'fast'"),
        (["--task", "nonsense"], "--task: there is no task 'nonsense'"),
        (["--task", "digits-mlp@8"], "--task is 'digits-mlp@8', expected one that has a base of its own"),
        (["--task", "cifar-resnet8"], "'cifar-resnet8' cannot be adapted"),
        (["--trajectory_steps", "59"], "--trajectory_steps is 59, expected at least 60"),
    ],
)
def test_bad_input_is_refused_before_work(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "tune", lambda *args: pytest.fail("it tunes"))
    places = ["--output_dir", str(tmp_path / "out"), "--tasks_dir", str(tmp_path / "tasks")]
    with pytest.raises(ValueError, match=message):
        wire.main([*places, "--task", "digits-mlp", "--link", "none", *words])


def test_without_a_right_to_a_wire_it_says_so_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ip, no tc
    monkeypatch.setattr(wire, "tune", lambda *args: pytest.fail("it tunes"))
    with pytest.raises(RuntimeError, match="cannot be laid here: `ip netns add .*--link none runs on loopback"):
        wire.main(["--task", "digits-mlp", "--output_dir", str(tmp_path / "o"), "--tasks_dir", str(tmp_path / "t")])
    assert "cannot be laid here" in ends.why_not()


def test_a_process_that_fails_is_named_with_its_last_line(tmp_path):
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('no luck'); time.sleep(60)"
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, ends.joined(None) as loopback:
        patch.setattr(ends, "PATIENCE", 0.5)
        with pytest.raises(
            RuntimeError, match="over no limit process 0 ended with -9 .*process 1 ended with 1 .no luck"
        ):
            ends.run_both(loopback, [sys.executable, "-c", code], tmp_path)
    assert time.monotonic() - start < 30


# Real wires


@pytest.fixture
def may_lay():
    if reason := ends.why_not():
        pytest.skip(reason)


def namespaces_of(pid):
    return [name for name in ends._namespaces() if f"-{pid}-" in name]


def test_the_wire_holds_its_limit_and_is_gone(may_lay, tmp_path):
    with ends.joined(20) as laid:
        assert sorted(namespaces_of(os.getpid())) == sorted(laid.namespaces)
        ends.run_both(laid, [sys.executable, "-c", MEASURE, "20", str(tmp_path / "rate.json")], tmp_path)
    found = json.loads((tmp_path / "rate.json").read_text())
    assert "wire" in found["interfaces"] and 10 < found["payload_mbit"] < found["measured_mbit"] < 21
    assert namespaces_of(os.getpid()) == []  # without a limit it is faster: see test_result


def test_the_wire_is_gone_after_an_error(may_lay):
    with pytest.raises(ZeroDivisionError), ends.joined(10):
        raise ZeroDivisionError
    assert namespaces_of(os.getpid()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_wire_is_gone_after_a_signal(number, may_lay):
    process = subprocess.Popen([sys.executable, "-c", LAID], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        assert process.stdout.readline() == "laid\n" and len(namespaces_of(process.pid)) == 2
        process.send_signal(number)
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    if number == signal.SIGKILL:  # nobody can take it away then; the next one does
        assert len(namespaces_of(process.pid)) == 2 and ends.why_not() == ""
    elif number != signal.SIGINT:
        assert code == 128 + number
    assert namespaces_of(process.pid) == []
