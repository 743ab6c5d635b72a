"""What the processes of test_launch run: a short streamed run, and one in which a rank dies, hangs or raises.

python -m tests.launch_worker train FOLDER [dies|gpu]   in each process of a launcher
python -m tests.launch_worker deaths FOLDER             starts all ranks of all cases itself
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_sl2o import LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments, SubspaceOptimizer
from hf_sl2o.foundation.watch import watched_ranks
from tests.conftest import Tokens, random_dense, tiny_gpt2

DDP_TIMEOUT = 12  # seconds, of the run in which a rank dies
TIMEOUT = 6.0  # seconds, of the cases
ENVIRONMENT = ("WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "GLOO_SOCKET_IFNAME")
RANKS = 3
#: What one rank does in its fourth step: (rank, action, whether the ranks are watched).
CASES = {
    "fine": (1, "nothing", True),
    "killed": (1, "SIGKILL", True),
    "stopped": (1, "SIGSTOP", True),
    "elsewhere": (2, "waits", True),
    "raised": (1, "raises", True),
    "store": (0, "SIGKILL", True),
    "unwatched": (1, "SIGKILL", False),
}


class Dies(TrainerCallback):
    """Of a run with that time-out the process of rank 1 is killed in its fourth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1 and args.ddp_timeout == DDP_TIMEOUT:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(folder, batch, **more):
    """Weights and coefficients after five steps with streamed gradients."""
    model = tiny_gpt2()
    options = {"max_steps": 5, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 9}
    options |= {"per_device_train_batch_size": batch, "max_grad_norm": 0.05, "lr_scheduler_type": "constant"}
    options |= {"sl2o_stream_gradients": True, "use_cpu": True, **more}
    torch.manual_seed(2)
    objects = {"basis": random_dense(model.named_parameters()), "rule": LSTMRule(RuleConfig(output_scale=0.3))}
    args = SL2OTrainingArguments(str(folder), **options)
    trainer = SL2OTrainer(model, args, train_dataset=Tokens(), callbacks=[Dies()], **objects)
    trainer.train()
    tensors = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return {**tensors, "c": trainer.subspace_optimizer.coefficients.cpu()}


def train(folder, then=""):
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tensors = trained(folder / "out", 8 // world, use_cpu=then != "gpu")
    facts = {name: os.environ.get(name, "") for name in ENVIRONMENT}
    facts["backend"] = dist.get_backend() if dist.is_initialized() else ""
    save_file(tensors, folder / f"rank-{rank}.safetensors", facts)
    if then == "dies":
        trained(folder / "again", 8 // world, ddp_timeout=DDP_TIMEOUT)
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


# Ranks that go


def slow_data():
    time.sleep(10 * TIMEOUT)


def act(action):
    if action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    elif action == "waits":
        slow_data()
    elif action == "raises":
        raise ValueError("row 17 holds no text")


def steps(rank, who=None, action=""):
    """Six steps of a plain loop with streamed gradients."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    basis = random_dense(model.named_parameters(), dim=2)
    optimizer = SubspaceOptimizer(model, basis, lambda c: torch.optim.SGD(c, lr=0.1), stream_gradients=True)
    for step in range(6):
        if step == 3 and rank == who:
            act(action)
        model(torch.ones(2, 4) * (rank + 1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def one_rank(folder, name, rank, port):
    """Of one case, in a process of its own, which does not come back."""
    who, action, watched = CASES[name]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = open(folder / f"{name}-{rank}.log", "w")  # noqa: SIM115
    dist.init_process_group("gloo")
    with watched_ranks(TIMEOUT) if watched else contextlib.nullcontext():
        steps(rank)  # blocks may follow each other, as epochs do
    said, start = ["", ""], time.monotonic()
    try:
        with watched_ranks(TIMEOUT) if watched else contextlib.nullcontext():
            with watched_ranks(TIMEOUT / 60) if watched else contextlib.nullcontext():  # does nothing inside another
                steps(rank, who, action)
    except Exception as error:
        said = [type(error).__name__, str(error)]
    (folder / f"{name}-{rank}.json").write_text(json.dumps([*said, time.monotonic() - start]))
    sys.stderr.flush()
    os._exit(0)


def deaths(folder):
    """All cases at once: their ranks mostly wait."""
    children = {}
    for name in CASES:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(RANKS):
            child = os.fork()
            if not child:
                one_rank(folder, name, rank, port)
            children[child] = CASES[name][0] != rank or CASES[name][1] not in ("SIGSTOP", "waits")
    end = time.monotonic() + 6 * TIMEOUT
    while any(children.values()) and time.monotonic() < end:
        for child in [child for child, ends in children.items() if ends and os.waitpid(child, os.WNOHANG)[0]]:
            children.pop(child)
        time.sleep(0.1)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "deaths": deaths}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
