"""A server that runs small programs in forked children and kills them at file-system events; see test_kills.py.

Reads lines of JSON (program, folder, kill_at) and answers each with one: how the child ended, what it printed, and the
events it met.
"""

import gc
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from hf_sl2o import LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments, Trajectory, TrajectoryCallback
from hf_sl2o.foundation.files import load_json, load_tensors

from .conftest import Tokens, random_dense, tiny_gpt2
from .meta_cases import end_of, make
from .test_meta import comparable

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def digest(named):
    found = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        found.update(name.encode() + tensor.detach().contiguous().double().numpy().tobytes())
    return found.hexdigest()[:16]


def train(folder):
    """A run with a basis, an average, a recorder and rotating checkpoints, gone on with where there is one."""
    model = tiny_gpt2()
    torch.manual_seed(1)
    args = SL2OTrainingArguments(
        str(folder), max_steps=6, save_steps=2, save_total_limit=1, logging_steps=1, per_device_train_batch_size=2,
        sl2o_average=4.0, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SL2OTrainer(
        model, args, basis=random_dense(model.named_parameters()), rule=LSTMRule(RuleConfig(hidden_size=4)),
        train_dataset=Tokens(16), callbacks=[TrajectoryCallback(folder / "trajectory", every_steps=1, overwrite=True)],
    )  # fmt: skip
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "no complete checkpoint" not in str(error):
            raise
        trainer.train()
    recorded = Trajectory(folder / "trajectory")
    snapshots = [digest(load_tensors(recorded.path(step))) for step in recorded.steps]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer = trainer.subspace_optimizer
    return [digest(model.state_dict()), digest({"c": optimizer.coefficients}), recorded.steps, snapshots, losses]


def meta(folder):
    """A meta-training with a checkpoint after each meta-step."""
    trainer = make(folder, save_steps=1, inner_steps=10)
    trainer.train()
    return [digest(end_of(folder)), trainer.rule.fingerprint, comparable(load_json(folder / "log.json"))]


def child(program, folder, kill_at, answer):
    """Runs a program, and writes what it returned and the events; the process ends here."""
    events = []

    def hook(event, args):
        if event in EVENTS and isinstance(args[0], str | os.PathLike) and str(folder) in os.fspath(args[0]):
            if event != "open" or (isinstance(args[1], str) and set(args[1]) & set("wax+")):
                events.append([event, os.path.relpath(args[0], folder)])
                if len(events) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        result = {"result": program(folder)}
    except BaseException:
        result = {"error": traceback.format_exc()}
    Path(answer).write_text(json.dumps({**result, "events": events}), encoding="utf-8")
    os._exit(0)


def serve():
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    for program in (train, meta):  # what is imported and compiled once is so before the forks
        with tempfile.TemporaryDirectory() as folder:
            program(Path(folder))
    gc.collect()
    gc.freeze()  # a child collects only what it made
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written; a power cut is not tried here
    print(json.dumps("ready"), file=sys.__stderr__, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as scratch:
            answer = Path(scratch) / "answer.json"
            pid = os.fork()
            if pid == 0:
                child({"train": train, "meta": meta}[job["program"]], Path(job["folder"]), job["kill_at"], answer)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            found = json.loads(answer.read_text(encoding="utf-8")) if status == 0 else {}
        print(json.dumps({"status": status, **found}), file=sys.__stderr__, flush=True)


if __name__ == "__main__":
    sys.stdout = open(os.devnull, "w")
    serve()
