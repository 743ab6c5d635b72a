"""The files for `accelerate launch` and the page on launching, really launched; ranks that die or hang are named."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from hf_sl2o.experiments import wire
from hf_sl2o.foundation.watch import _replace_default_timeout, _Watch, watched_ranks

from .launch_worker import CASES, DDP_TIMEOUT, RANKS, TIMEOUT, trained
from .test_docs import flags_of

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in (ROOT / "accelerate_configs").iterdir()}
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
WORKER = ["-m", "tests.launch_worker", "train"]


# The files


def parsed(name, *words):
    """What the launcher makes of a file and of further words: its arguments, and the environment of the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), *words, "train.py"])
    args, _, _ = _validate_launch_command(args)
    several = args.multi_gpu or args.use_fsdp
    return args, prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize(
    ("name", "kind", "precision"),
    [
        ("cpu", "NO", "no"),
        ("single_gpu", "NO", "bf16"),
        ("multi_gpu", "MULTI_GPU", "bf16"),
        ("fsdp2", "FSDP", "bf16"),
        ("multi_node", "MULTI_GPU", "bf16"),
    ],
)
def test_a_file_is_what_its_name_says(name, kind, precision, tmp_path):
    config = load_config_from_file(str(CONFIGS[name]))
    assert config.distributed_type == kind and config.use_cpu == (name == "cpu")
    args, environment = parsed(name, "--main_process_port", "0")
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    assert environment.get("ACCELERATE_USE_CPU", "False") == str(name == "cpu")
    assert (args.multi_gpu, args.use_fsdp) == (kind == "MULTI_GPU", kind == "FSDP")
    # accelerate refuses a key that it does not know, but not one of fsdp_config
    known = set(vars(launch_command_parser().parse_args(["train.py"])))
    assert set(config.fsdp_config) <= known and "fsdp_versoin" not in known
    broken = tmp_path / "broken.yaml"
    broken.write_text(CONFIGS[name].read_text() + "num_procesess: 2\n")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(broken))


def test_every_file_is_tested_and_on_the_page():
    assert set(CONFIGS) == {"cpu", "single_gpu", "multi_gpu", "fsdp2", "multi_node"}
    assert all(f"accelerate_configs/{path.name}" in PAGE for path in CONFIGS.values())


def test_hosts_of_the_file_and_of_the_command_line():
    args, _ = parsed("multi_node", "--machine_rank", "1")
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert args.rdzv_endpoint == "10.0.0.1:29500" and args.rdzv_backend == "static"
    words = ["--num_machines", "4", "--num_processes", "8", "--machine_rank", "3", "--main_process_ip", "10.9.9.9"]
    args, _ = parsed("multi_node", *words)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("4", 3, "2")
    assert args.rdzv_endpoint == "10.9.9.9:29500"


def test_fsdp2_reaches_accelerate_in_the_processes(monkeypatch):
    _, environment = parsed("fsdp2", "--main_process_port", "0")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for key, value in environment.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and plugin.cpu_ram_efficient_loading
    assert plugin.transformer_cls_names_to_wrap is None and "transformer" in str(plugin.auto_wrap_policy)


# Launched


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in this process, with the batch of all, and with half of it."""
    folder = tmp_path_factory.mktemp("one")
    return trained(folder / "all", 8), trained(folder / "half", 4)


def launched(commands, environment=None, timeout=200):
    """Runs commands side by side; returns exit codes and what each wrote."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, **streams) for command in commands]
    end, said = time.monotonic() + timeout, []
    try:
        for process in processes:
            said.append(process.communicate(timeout=max(1.0, end - time.monotonic()))[0])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], said


def ranks_of(folder):
    """What each rank saved, and the facts that it wrote with it."""
    both = []
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            both.append((load_file(path), file.metadata()))
    return both


def check_trained_as_one(ranks, one):
    """Ranks are equal to the bit, and equal to one process to rounding; half the batch ends elsewhere."""

    def distance(a, b):
        return max(float((a[name] - b[name]).abs().max()) for name in b)

    whole, half = one
    for tensors, _ in ranks:
        assert all(torch.equal(tensors[name], value) for name, value in ranks[0][0].items())
    assert distance(ranks[0][0], whole) < 1e-6 and float(whole["c"].abs().max()) > 0.1
    assert distance(ranks[0][0], half) > 1e-3


def test_the_file_for_a_cpu(tmp_path, one):
    codes, said = launched([[*LAUNCH, str(CONFIGS["cpu"]), *WORKER, str(tmp_path)]])
    assert codes == [0], said[0][-3000:]
    ((tensors, facts),) = ranks = ranks_of(tmp_path)
    check_trained_as_one(ranks, one)
    assert (facts["WORLD_SIZE"], facts["backend"], facts["ACCELERATE_MIXED_PRECISION"]) == ("", "", "no")


@pytest.mark.slow
def test_the_file_for_several_gpus_without_them_and_the_rank_that_torchrun_names(tmp_path, one):
    words = ["--main_process_port", "0", "--mixed_precision", "no", *WORKER, str(tmp_path), "dies"]
    codes, said = launched([[*LAUNCH, str(CONFIGS["multi_gpu"]), *words]])
    ranks = ranks_of(tmp_path)
    assert len(ranks) == 2, said[0][-3000:]
    check_trained_as_one(ranks, one)
    assert [facts["WORLD_SIZE"] for _, facts in ranks] == ["2", "2"] and ranks[0][1]["backend"] == "gloo"
    root = said[0].partition("Root Cause")[2]
    assert codes == [1] and "rank      : 1 (local_rank: 1)" in root and "SIGKILL" in root, said[0][-3000:]


@contextlib.contextmanager
def two_hosts():
    """Words before a command on each of two hosts, and their addresses: network namespaces, or all on loopback."""
    if wire.why_not():
        yield [[], []], ("127.0.0.2", "127.0.0.3"), {}
        return
    with wire.joined(100) as joined:
        yield [joined.command(rank, []) for rank in range(2)], wire.ADDRESSES, {"GLOO_SOCKET_IFNAME": wire.INTERFACE}


@pytest.mark.slow
def test_two_hosts_of_the_file_and_the_rank_that_the_other_host_names(tmp_path, one):
    with two_hosts() as (heads, addresses, environment):
        words = [*LAUNCH, str(CONFIGS["multi_node"]), "--main_process_ip", addresses[0], "--num_processes", "2"]
        words += ["--mixed_precision", "no", "--machine_rank"]
        commands = [[*heads[host], *words, str(host), *WORKER, str(tmp_path), "dies"] for host in range(2)]
        codes, said = launched(commands, environment)
    ranks = ranks_of(tmp_path)
    assert len(ranks) == 2, said[0][-3000:] + said[1][-3000:]
    check_trained_as_one(ranks, one)
    assert [facts["GROUP_RANK"] for _, facts in ranks] == ["0", "1"]
    assert {facts["MASTER_ADDR"] for _, facts in ranks} == {addresses[0]}
    silence = f"rank 1 has not answered for {DDP_TIMEOUT / 2:g} s"
    assert codes == [1, 1] and f"rank 0 cannot go on, since a collective failed: {silence}" in said[0], said[0][-3000:]
    # torchrun of the first host, alone, would blame the rank that is left
    assert "rank      : 0 (local_rank: 0)" in said[0].partition("Root Cause")[2] and "SIGKILL" in said[1]


SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 2
shift
SLURM_NODEID=0 {0} "$@" & first=$!
SLURM_NODEID=1 {1} "$@"
status=$?
wait $first && exit $status
"""


def commands_for(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_script_for_slurm_on_two_hosts(tmp_path, one):
    (script,) = [block for block in blocks("bash") if "#SBATCH" in block]
    for written, here in (
        ("--nproc_per_node 8", "--nproc_per_node 1"),
        ("recipes/gpt2_e2e.py --model gpt2 --data hub --bf16", f"{shlex.join(WORKER)} {tmp_path}"),
    ):
        assert script.count(written) == 1
        script = script.replace(written, here)
    with two_hosts() as (heads, addresses, environment):
        environment |= commands_for(
            tmp_path / "bin",
            scontrol=f'#!/bin/bash\n[ "$*" = "show hostnames a[1-2]" ] && printf "%s\\n" {" ".join(addresses)}\n',
            srun=SRUN.format(*map(shlex.join, heads)),
            torchrun=f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        )
        environment |= {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NNODES": "2"}
        codes, said = launched([["bash", "-c", script]], environment)
    assert codes == [0], said[0][-3000:]
    ranks = ranks_of(tmp_path)
    check_trained_as_one(ranks, one)
    assert [facts["GROUP_RANK"] for _, facts in ranks] == ["0", "1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_file_for_one_gpu(tmp_path, one):
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    codes, said = launched([[*LAUNCH, str(CONFIGS["single_gpu"]), *WORKER, str(tmp_path), "gpu"]], environment)
    assert codes == [0], said[0][-3000:]
    ((tensors, facts),) = ranks_of(tmp_path)
    assert facts["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert 0 < float((tensors["c"] - one[0]["c"]).abs().max()) < 0.1 * float(one[0]["c"].abs().max())


# Ranks that go


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """What each rank raised in each case, and how long that took; ranks that cannot say anything are left out."""
    folder = tmp_path_factory.mktemp("deaths")
    codes, said = launched([[sys.executable, "-m", "tests.launch_worker", "deaths", str(folder)]])
    assert codes == [0], said[0][-3000:]
    found = {name: {} for name in CASES}
    for path in folder.glob("*.json"):
        name, _, rank = path.stem.rpartition("-")
        found[name][int(rank)] = json.loads(path.read_text())
    return found, folder


SILENT = f"rank 1 has not answered for {TIMEOUT / 2:g} s: killed, stopped, or cut off from the network"
PLACE = r'"slow_data \(launch_worker\.py, line \d+\)" on rank 2'


@pytest.mark.parametrize(
    ("name", "cause", "slowest"),
    [
        ("killed", SILENT, TIMEOUT),
        ("stopped", SILENT, 2 * TIMEOUT),
        ("raised", "rank 1 ended with ValueError: row 17 holds no text; see", TIMEOUT),
        ("elsewhere", rf"no rank is missing, but .*\"all_reduce \(.*\)\" on ranks 0 and 1 and {PLACE}", 2 * TIMEOUT),
        ("store", r"rank 0 \(127\.0\.0\.1:\d+\), which holds the process group's store, does not answer", TIMEOUT),
    ],
)
def test_ranks_that_are_left_name_the_one_that_is_not(deaths, name, cause, slowest):
    left = deaths[0][name]
    assert len(left) == (RANKS if name == "raised" else RANKS - 1), left
    for rank, (kind, said, seconds) in left.items():
        if rank == CASES[name][0]:
            assert (kind, said) == ("ValueError", "row 17 holds no text")
            continue
        assert kind == "RuntimeError" and seconds < slowest + 5, (rank, said, seconds)
        assert re.match(rf"rank {rank} cannot go on, since a collective failed: {cause}", said), said


def test_without_the_watch_no_rank_is_named(deaths):
    found, _ = deaths
    assert [said[:2] for said in found["fine"].values()] == [["", ""]] * RANKS
    for kind, said, _ in found["unwatched"].values():
        assert kind == "RuntimeError" and "127.0.0.1" in said and "rank 1" not in said
    assert len(found["unwatched"]) == RANKS - 1


@pytest.mark.parametrize(("name", "cause"), [("stopped", SILENT), ("elsewhere", "slow_data")])
def test_a_rank_that_waits_warns_before_the_time_out(deaths, name, cause):
    """Collectives of NCCL end without an exception: the warning is all there is."""
    for rank in range(RANKS):
        log = (deaths[1] / f"{name}-{rank}.log").read_text()
        if rank == CASES[name][0] and name == "stopped":
            continue
        assert log.count("may wait in vain") == 1 and cause in log, log
    assert (deaths[1] / "fine-0.log").read_text() == ""


def test_one_process_watches_nothing(monkeypatch):
    monkeypatch.setattr(_Watch, "__init__", lambda *args: pytest.fail("a thread was started"))
    with pytest.raises(RuntimeError, match="^mine$"), watched_ranks(1.0):
        raise RuntimeError("mine")


@pytest.mark.parametrize(("chosen", "then"), [(None, 7), (50, 50), (1800, 7)])
def test_only_torchs_default_time_out_is_replaced(chosen, then):
    given = {} if chosen is None else {"timeout": timedelta(seconds=chosen)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, **given)
    try:
        _replace_default_timeout(7.0)
        options = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=then)
    finally:
        dist.destroy_process_group()


# The page


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_commands_of_the_page_are_understood():
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    commands = re.findall(r"^(?:accelerate|torchrun) .*$|(?<=bash -c ')torchrun [^']*", text, flags=re.MULTILINE)
    assert len(commands) == 8 == len(re.findall(r"\b(?:accelerate launch|torchrun) --", text))
    for command in commands:
        words = shlex.split(command.replace('"$SLURM_NNODES"', "2").replace('"$SLURM_NODEID"', "1"))
        if words[0] == "accelerate":
            assert words[1] == "launch"
            args = launch_command_parser().parse_args(words[2:])
            assert (ROOT / args.config_file).is_file()
        else:
            args = get_args_parser().parse_args(words[1:])
            assert args.standalone or args.master_addr
        if getattr(args, "module", False):  # a script of the reader's own
            assert args.training_script == "hf_sl2o.run" and args.training_script_args[0] == "train.py"
            continue
        assert (ROOT / args.training_script).is_file()
        unknown = {word[2:] for word in args.training_script_args if word.startswith("--")}
        unknown -= flags_of(args.training_script)
        assert not unknown, (command, unknown)
    for block in blocks("bash"):
        assert subprocess.run(["bash", "-n", "-c", block]).returncode == 0
    assert {"ddp_timeout"} <= flags_of("recipes/gpt2_e2e.py")


def test_the_loop_of_the_page_runs():
    (code,) = blocks("python")
    exec(code, {})


def test_words_and_links_of_the_page_are_true(deaths):
    messages = [text for ranks in deaths[0].values() for _, text, _ in ranks.values()]
    messages = [re.sub(r"127\.0\.0\.1:\d+", "10.0.0.1:29500", text) for text in messages]
    phrases = re.findall(r"`(\w[^`]* [^`]*)`", "".join(re.findall(r"^\|.*\n", PAGE, flags=re.MULTILINE)))
    assert len(phrases) == 5
    for phrase in phrases:
        parts = phrase.replace("10 s", f"{TIMEOUT / 2:g} s").split("...")
        assert any(all(part in text for part in parts) for text in messages), phrase
    config = yaml.safe_load(CONFIGS["multi_node"].read_text())
    assert f"--num_machines {config['num_machines']}" in PAGE and f"--num_processes {config['num_processes']}" in PAGE
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
