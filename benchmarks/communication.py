"""Bytes on the wire of a training step in two processes: plain DDP, LoRA, and SL2O with gradients kept and streamed.

    python benchmarks/communication.py --json benchmarks/results/communication.json

Trainers of two gloo processes, started by torchrun, train a GPT-2 of 10 million parameters on a CPU. Each arm runs
for a few steps and for more, and the difference of the bytes on the loopback device is that of the steps between: what
is sent at the start cancels. Bytes are those of both processes, with headers, acknowledgements and what a Trainer
sends by itself. The device is that of a network namespace of their own where one can be made, so that nothing else is
counted (unshare and ip, with the right to use them); elsewhere that of the machine. Payload is what our own
collectives are given. The processes begin with different weights, and must end with the same, to the bit; one process
then does the same steps with twice the batch.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from memory import entry, random_basis
from optimizer_step import DIM
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_sl2o import Layout, SL2OTrainer, SL2OTrainingArguments
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import leave_processes, run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.foundation.files import load_json, save_json

ROOT = Path(__file__).resolve().parent.parent
COUNTERS = Path("/proc/net/dev")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 1000, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 32},
    "10M": {"vocab_size": 26_000, "n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 32},
}
SHORT, LONG = 3, 11  # steps of the two runs
BATCH, LENGTH = 4, 32  # of each of two processes
ARMS = ("ddp_adamw", "ddp_lora", "sl2o_kept", "sl2o_streamed")


# What each process does


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random sentences, as many as the long run sees."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (LONG * BATCH * 2, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def build(arm: str, size: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(**SIZES[size], bos_token_id=0, eos_token_id=0)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model: Any = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the Trainer then divides by the tokens of all processes
    if arm == "ddp_lora":
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True))
    return model


def trainer_of(arm: str, size: str, steps: int, folder: Path) -> Trainer:
    """A Trainer of one arm; each process begins with other weights, and takes those of the first one."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = build(arm, size, seed=rank)
    options: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": steps, "per_device_train_batch_size": BATCH * 2 // world,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    options |= {"ddp_backend": "gloo"} if world > 1 else {}
    data = Tokens(SIZES[size]["vocab_size"])
    if not arm.startswith("sl2o"):
        return Trainer(model, TrainingArguments(**options, learning_rate=1e-4), train_dataset=data)
    layout = Layout.from_named_parameters(model.named_parameters())
    basis = random_basis(layout, "bf16", DIM, torch.device("cpu"))
    args = SL2OTrainingArguments(**options, sl2o_stream_gradients=arm == "sl2o_streamed")
    return SL2OTrainer(model, args, train_dataset=data, basis=basis)


class Payload:
    """Counts the bytes that the all-reduces of hf_sl2o are given in this process."""

    def __init__(self) -> None:
        self.total = 0
        self._all_reduce: Callable[..., Any] = dist.all_reduce
        dist.all_reduce = self._counted  # type: ignore[assignment]

    def _counted(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("hf_sl2o."):
            self.total += tensor.nbytes
        return self._all_reduce(tensor, *args, **options)


def loopback_bytes(path: Path = COUNTERS) -> int:
    """Bytes that were sent over the loopback device of this network namespace.

    Raises:
        `RuntimeError`: there is no such file, or no such device in it.
    """
    try:
        found = re.search(r"^\s*lo:(.*)$", path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError as error:
        raise RuntimeError(
            f"bytes on the wire are counted in {path}, which cannot be read ({error.strerror}); run on Linux, with "
            "/proc mounted"
        ) from error
    if found is None:
        raise RuntimeError(f"{path} has no device lo, over which two processes of one machine talk; bring it up")
    return int(found[1].split()[8])  # the first of the second half: transmitted


def counted_bytes() -> int:
    """The counter while no process sends."""
    dist.barrier()
    time.sleep(0.1)
    found = loopback_bytes()
    dist.barrier()
    return found


def run(arm: str, size: str, steps: int, folder: Path, payload: Payload) -> tuple[Any, float, list[int]]:
    """Trains one arm; returns its model, how far a weight moved at most, and bytes on the wire and of our payload."""
    trainer = trainer_of(arm, size, steps, folder)
    start, several = weights_of(trainer.model), dist.is_initialized()
    before = [counted_bytes() if several else 0, payload.total]
    trainer.train()
    after = [counted_bytes() if several else 0, payload.total]
    sent = [last - first for first, last in zip(before, after, strict=True)]
    return trainer.model, distance(start, weights_of(trainer.model)), sent


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def work(folder: Path, size: str) -> None:
    """One process: trains all arms, and writes their last weights; the first of two also writes what was sent."""
    payload, found = Payload(), {}
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for arm in ARMS:
        at_start = [0, 0] if world == 1 else run(arm, size, SHORT, folder, payload)[2]
        gc.collect()  # a Trainer that is done, and its basis
        model, moved, sent = run(arm, size, LONG, folder, payload)
        save_file(weights_of(model), folder / f"{arm}-{world}-{rank}.safetensors")
        found[arm] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "moved": moved}
        if world > 1:
            wire, own = ((last - first) / (LONG - SHORT) for first, last in zip(at_start, sent, strict=True))
            found[arm] |= {"wire": wire, "payload": own}
        del model
        gc.collect()
    if rank == 0:
        save_json(folder / f"found-{world}.json", found)
    if world > 1:
        leave_processes()


# Launches


def own_namespace() -> list[str]:
    """Words before a command that run it in a network namespace of its own; none where that is not allowed."""
    for words in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        try:
            if not subprocess.run([*words, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
                return [*words, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        except OSError:
            continue
    return []


def launch(processes: int, folder: Path, size: str, namespace: Sequence[str]) -> dict[str, Any]:
    """Trains all arms; returns what the first process found."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    words = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words += ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
        words += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    words += [__file__, "--worker", str(folder), "--size", size]
    out = subprocess.run([*namespace, *words], env=env, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{processes} processes ended with {out.returncode}: {out.stderr.strip()[-3000:]}")
    return load_json(folder / f"found-{processes}.json")


def background() -> float:
    """Bytes a second that others send over this machine's loopback device."""
    before = loopback_bytes()
    time.sleep(2)
    return (loopback_bytes() - before) / 2


# What is made of it


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight; NaN counts as infinite."""
    most = [float((first[name] - second[name]).abs().nan_to_num(nan=float("inf")).max()) for name in first]
    return max(most)


def check_alike(arm: str, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Raises `RuntimeError` unless two processes have the same weights, to the bit."""
    for name, weights in first.items():
        if not torch.equal(weights, second[name]):
            raise RuntimeError(
                f"{arm}: {name} differs between the two processes by up to {distance(first, second):.3g} after {LONG} "
                "steps; expected the same weights to the bit"
            )


def difference_from_one(arm: str, folder: Path) -> float:
    """The largest difference of weights of two processes and of one, over the largest weight."""
    one, first, second = (load_file(folder / f"{arm}-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    check_alike(arm, first, second)
    return distance(one, first) / max(float(weights.abs().max()) for weights in one.values())


def rows_of(found: dict[str, dict[str, Any]], differences: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of bytes a step on the wire, beside plain DDP's; of payload a step and process; and of differences.

    `least_bytes` is what two processes must send to average: each the whole payload once.
    """
    plain, streamed = found["ddp_adamw"], found["sl2o_streamed"]
    for arm, one in found.items():
        if not one["moved"] > 0:
            raise RuntimeError(f"{arm} left the weights as they were, so that nothing was compared; see its rate")
    least = {arm: 8 * one["trained"] for arm, one in found.items()} | {"sl2o_streamed": 8 * DIM}
    rows = [entry("wire_bytes_ddp_adamw", plain["wire"], "bytes/step", least_bytes=least["ddp_adamw"])]
    named = {"sl2o_streamed": "wire_bytes_vs_ddp", "sl2o_kept": "wire_bytes_vs_ddp_sl2o_kept",
             "ddp_lora": "wire_bytes_vs_ddp_lora"}  # fmt: skip
    for arm, name in named.items():
        rows.append(entry(name, found[arm]["wire"], "bytes/step", plain["wire"], least_bytes=least[arm]))
    beside = streamed["payload"] / 4 - DIM
    rows.append(entry("payload_bytes", streamed["payload"], "bytes/step", 4 * DIM, dim=DIM, numbers_beside_d=beside))
    for arm, value in differences.items():
        name = f"difference_from_one_process_{arm}"
        rows.append(entry(name, value, "of the largest weight", moved=found[arm]["moved"], steps=LONG))
    return [{**row, "n": plain["trained"]} for row in rows]


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=list(SIZES), default="10M", help=argparse.SUPPRESS)
    options = parse_options(parser, argv)
    if options.worker is not None:
        work(options.worker, options.size)
        return None
    loopback_bytes()
    size, namespace = "tiny" if options.quick else "10M", own_namespace()
    counted = "lo of a network namespace of their own"
    if not namespace:
        counted = f"lo of the machine, over which others sent {background():.0f} bytes a second before"
        print(f"no network namespace could be made (unshare and ip, with the right to use them): counted is {counted}")
    with tempfile.TemporaryDirectory(prefix="hf_sl2o_communication_") as folder:
        found = launch(2, Path(folder), size, namespace)
        launch(1, Path(folder), size, [])
        rows = rows_of(found, {arm: difference_from_one(arm, Path(folder)) for arm in ARMS})
    rows = [{**row, "counted": counted, "threads": 1} for row in rows]  # of each process
    result = {"benchmark": "communication", "rows": rows, "environment": environment()}
    for row in rows:
        ratio = "" if row["ratio"] is None else f"  {row['ratio']:.4g} x baseline"
        print(f"{row['name']:42} {row['value']:.5g} {row['unit']}{ratio}")
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
