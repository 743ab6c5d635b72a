"""Training of two processes at the ends of a thin wire: namespaces, a veth pair, traffic control (Linux, root).

Each end sends through a token bucket (`tc ... tbf`). That limits the rate; it adds no delay, as a long wire would.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import find_batch_size, slice_tensors
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ..meta import Task
from ..meta.task import InnerRun, schedule_factor
from ..optim import LearnedOptimizer
from ..rules import Rule

NAMESPACE = "sl2o-wire"  # then the process that made it, and the end
INTERFACE = "wire"
ADDRESSES = ("10.255.255.1", "10.255.255.2")
BURST, LATENCY = "32kbit", "400ms"  # of the token bucket: what may go at once, and how long a packet may wait
PATIENCE = 10.0  # seconds that one process has to end after the other one failed
MEASURED_SECONDS = 1.5
RANK = 2  # of PowerSGD
LOOKS = 30  # held-out losses of a run


@dataclass(frozen=True)
class Wire:
    """What joins two processes; make one by [`joined`].

    Args:
        mbit (`float`, *optional*): Rate of each direction in 10^6 bits a second; None: loopback, without a limit.
        namespaces (`tuple[str, ...]`, *optional*): Of the two ends; none on loopback.
    """

    mbit: float | None
    namespaces: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "no limit" if self.mbit is None else f"{self.mbit:g} Mbit/s"

    def command(self, rank: int, words: Sequence[str]) -> list[str]:
        """What runs `words` at one end."""
        return [*(("ip", "netns", "exec", self.namespaces[rank]) if self.namespaces else ()), *words]

    def environment(self) -> dict[str, str]:
        """Where the processes find each other."""
        if self.namespaces:
            return {"GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


# The wire


@contextlib.contextmanager
def joined(mbit: float | None) -> Iterator[Wire]:
    """Lays a wire and takes it away at the end of the block, also after an error, Ctrl-C, SIGTERM or SIGHUP.

    What a process that was killed could not take away is removed when the next wire is laid.

    Args:
        mbit (`float`, *optional*): Rate in Mbit/s; None: loopback, for which no rights are needed.

    Raises:
        `RuntimeError`: there are no namespaces or no traffic control here, or no right to them.
    """
    with _leaving_when_told():
        if mbit is None:
            yield Wire(None)
            return
        names = tuple(f"{NAMESPACE}-{os.getpid()}-{end}" for end in range(2))
        _remove_abandoned()
        try:
            _lay(names, mbit)
            yield Wire(mbit, names)
        finally:
            with _undisturbed():
                _remove(names)


def why_not() -> str:
    """Why no wire can be laid here, in words; "" where it can: one is laid and taken away."""
    try:
        with joined(10):
            return ""
    except RuntimeError as error:
        return str(error)


def _lay(names: Sequence[str], mbit: float) -> None:
    for name in names:
        _system("ip", "netns", "add", name)
    pair = ("ip", "link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE)
    _system(*pair, "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        _system("ip", "-n", name, "addr", "add", f"{address}/30", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _system("ip", "-n", name, "link", "set", interface, "up")
        limit = ("rate", f"{round(mbit * 1e6)}bit", "burst", BURST, "latency", LATENCY)
        _system("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)


def _system(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{_refused(words)} ({error}); {_REMEDY}") from error
    if done.returncode:
        raise RuntimeError(f"{_refused(words)} ({' '.join(done.stderr.split()) or done.returncode}); {_REMEDY}")
    return done.stdout


def _refused(words: Sequence[str]) -> str:
    return f"a wire with a limited rate cannot be laid here: `{' '.join(words)}` failed"


_REMEDY = "it needs Linux, iproute2 (ip, tc) and root; --link none runs on loopback, without a limit"


def _namespaces() -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir("/run/netns") if name.startswith(f"{NAMESPACE}-")]
    return []


def _remove(names: Sequence[str]) -> None:
    """The veth pair goes with its namespaces."""
    for name in set(names) & set(_namespaces()):
        _system("ip", "netns", "del", name)


def _remove_abandoned() -> None:
    for name in _namespaces():
        match = re.fullmatch(rf"{NAMESPACE}-(\d+)-\d", name)
        if match is not None and not Path("/proc", match[1]).exists():
            with contextlib.suppress(RuntimeError):  # another study removes it at the same time
                _system("ip", "netns", "del", name)


@contextlib.contextmanager
def _handled(numbers: Sequence[int], handler: Any) -> Iterator[None]:
    """Only the main thread may say what becomes of a signal."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if here}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _leaving_when_told() -> Iterator[None]:
    """Turns signals that would end the process at once into `SystemExit`, so that blocks end as they should."""

    def leave(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not disturb what ends
        raise SystemExit(128 + number)

    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    with _handled([number for number in ending if signal.getsignal(number) is signal.SIG_DFL], leave):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    with _handled(ending, signal.SIG_IGN):
        yield


# Its two processes


def run_both(wire: Wire, words: Sequence[str], logs: Path) -> None:
    """Runs a command at both ends until both are done; each knows its rank from the environment, as under torchrun.

    Args:
        wire ([`Wire`]): What joins them.
        words (`Sequence[str]`): The command, such as `[sys.executable, "script.py"]`.
        logs (`Path`): A folder for what they write on stderr.

    Raises:
        `RuntimeError`: one of them failed; says the last line of each.
    """
    logs.mkdir(parents=True, exist_ok=True)
    paths = [logs / f"rank-{rank}.log" for rank in range(2)]
    everyone = {**os.environ, **wire.environment(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, path in enumerate(paths):
            own = {**everyone, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(path, "w", encoding="utf-8") as log:
                processes.append(subprocess.Popen(wire.command(rank, words), env=own, stderr=log))
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                _wait(processes, PATIENCE)
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        said = [f"process {rank} ended with {p.returncode} ({_last_line(paths[rank])})"
                for rank, p in enumerate(processes)]  # fmt: skip
        raise RuntimeError(f"over {wire.name} {', '.join(said)}; all they wrote is in {logs}")


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.1)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"


# What a process at one end sees


def mean_of_both(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a tensor over the processes, the same to the bit on each."""
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sent_bytes() -> int | None:
    """Bytes that went into the wire from this end so far, with all headers; None on loopback, which others use too."""
    path = Path("/sys/class/net", INTERFACE, "statistics/tx_bytes")
    return int(path.read_text()) if os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE else None


def measured_rate(mbit: float | None) -> dict[str, float | None]:
    """Times the sending of what takes about 1.5 s at the nominal rate; both processes call it, the first one sends.

    Returns:
        `payload_mbit`, the numbers by the seconds until the other end has them; `measured_mbit`, the same with all
        headers, as the interface counts them (None on loopback).
    """
    values = torch.zeros(max(1, round((mbit or 100.0) * 1e6 / 32 * MEASURED_SECONDS)))
    dist.broadcast(values[:1000], 0)  # connections are made
    dist.barrier()
    before, start = sent_bytes(), time.perf_counter()
    dist.broadcast(values, 0)
    dist.barrier()  # the answer of the other end
    seconds, after = time.perf_counter() - start, sent_bytes()
    counted = None if before is None or after is None else (after - before) * 8e-6 / seconds
    return {"payload_mbit": values.nbytes * 8e-6 / seconds, "measured_mbit": counted}


# Training at one end


def half(batch: Any, rank: int) -> Any:
    """The rows of a batch that one of the two processes has."""
    rows = (find_batch_size(batch) or 0) // 2
    return slice_tensors(batch, slice(rank * rows, (rank + 1) * rows))


def halved(task: Task, rank: int) -> Task:
    return replace(task, batches=lambda seed: (half(batch, rank) for batch in task.batches(seed)))


def adamw(lr: float) -> Any:
    return lambda c: torch.optim.AdamW(c, lr=lr, weight_decay=0.0)


class InSubspace:
    """Moves the coefficients: the gradient's d numbers cross the wire, and both ends make the same step."""

    def __init__(self, task: Task, job: Mapping[str, Any], rule: Rule) -> None:
        self.run = InnerRun(task, job["seed"])
        self.c = nn.Parameter(torch.zeros(task.basis.dim, dtype=task.basis.compute_dtype))
        self.optimizer: torch.optim.Optimizer = adamw(job["rate"])([self.c])
        if job["arm"] == "sl2o":
            average = rule.config.average
            self.optimizer = LearnedOptimizer([self.c], rule, job["rate"], total_steps=job["steps"], average=average)
        self.payload, self.trained = 4.0 * task.basis.dim, [self.c]

    def step(self) -> None:
        _, g = self.run.gradient()
        self.c.grad = mean_of_both(g)
        before = self.c.detach().clone()
        self.optimizer.step()
        self.run.move(self.c.detach() - before)

    def evaluate(self) -> float:
        """At the running average of a rule that has one; coefficients and weights stay as they are, to the bit."""
        tensors = [self.c, *self.run.parameters]
        before = [tensor.detach().clone() for tensor in tensors]
        if isinstance(self.optimizer, LearnedOptimizer):
            self.optimizer.use_average()
            self.run.move(self.c.detach() - before[0])
            self.optimizer.use_last()
        loss = float(self.run.evaluate())
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return loss


class Parallel:
    """DistributedDataParallel with AdamW on whatever the task trains."""

    def __init__(self, task: Task, job: Mapping[str, Any]) -> None:
        self.run = InnerRun(task, job["seed"])
        self.model = DistributedDataParallel(self.run.model)
        self.trained = self.run.parameters
        self.payload = 4.0 * sum(p.numel() for p in self.trained)
        if job["arm"] == "ddp_adamw_fp16":
            self.model.register_comm_hook(None, fp16_compress_hook)
            self.payload /= 2
        elif job["arm"] == "ddp_adamw_powersgd":
            state = PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2)  # its earliest
            self.model.register_comm_hook(state, powerSGD_hook)
            self.payload = 4.0 * sum(compressed(p.shape) for p in self.trained)
        self.optimizer = adamw(job["rate"])(self.trained)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.run.own_randomness():
            self.run.task.loss(self.model, self.run.next_batch()).backward()
        self.optimizer.step()

    def evaluate(self) -> float:
        return float(self.run.evaluate())


def compressed(shape: Sequence[int]) -> int:
    """Numbers that PowerSGD sends of a tensor: two factors of a matrix if they are half of it or less, else all."""
    rows = shape[0] if shape else 1
    columns = math.prod(shape) // max(rows, 1)
    factors = RANK * (rows + columns)
    return factors if len(shape) > 1 and 2 * factors < rows * columns else rows * columns


def timed(end: InSubspace | Parallel, job: Mapping[str, Any], parent: int) -> dict[str, Any]:
    """Trains with linear decay to the job's target and one look more, or to its last step.

    The clock runs in steps only: process 0 looks at the held-out loss while the other one waits.

    Returns:
        `curve` (step, seconds, held-out loss), `sent_bytes_a_step` (None on loopback) and `seconds_a_step`.
    """
    steps, spent, sent, there = job["steps"], 0.0, 0, False
    looks, at, curve = {*range(0, steps, max(1, steps // LOOKS)), steps}, sent_bytes(), []
    for step in range(steps + 1):
        if step in looks:
            if step and at is not None:
                sent += (sent_bytes() or 0) - at
            if os.getppid() != parent:
                raise RuntimeError("the study that started this process is gone, so it ends too; start it again")
            stop = torch.tensor([float(there or step == steps)])
            if dist.get_rank() == 0:
                loss = end.evaluate()
                curve.append([step, spent, loss if math.isfinite(loss) else None])  # JSON has no NaN
                there = job["target"] is not None and loss <= job["target"] or there
            dist.broadcast(stop, 0)
            if stop:
                break
            dist.barrier()
            at = sent_bytes()
        start = time.perf_counter()
        for group in end.optimizer.param_groups:
            group["lr"] = job["rate"] * schedule_factor("linear", step, steps)
        end.step()
        spent += time.perf_counter() - start
    counted = None if at is None else sent / step
    return {"curve": curve, "seconds_a_step": spent / step, "sent_bytes_a_step": counted}
