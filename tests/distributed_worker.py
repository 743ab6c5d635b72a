"""What each process of test_distributed runs: a short SL2OTrainer run whose end is written per rank."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file

from hf_sl2o import LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments, TrajectoryCallback
from tests.conftest import Tokens, random_dense, tiny_gpt2

SENT = []  # numbers of each all-reduce of a streaming optimizer


def counted(all_reduce):
    def count(tensor, *args, **kwargs):
        if sys._getframe(1).f_globals["__name__"] == "hf_sl2o.optim._streaming":
            SENT.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    return count


def main(folder: str, batch: int, mode: str) -> None:
    torch.distributed.all_reduce = counted(torch.distributed.all_reduce)
    rank = int(os.environ.get("RANK", "0"))
    # streaming: DDP leaves the weights alone, and the optimizer gives all ranks those of the first
    model = tiny_gpt2(seed=rank if mode.startswith("stream") else 0)
    options = {"max_steps": 6, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    options |= {"per_device_train_batch_size": batch, "logging_steps": 1, "max_grad_norm": 0.05}
    options |= {"lr_scheduler_type": "constant"}
    objects, callbacks = {}, []
    if mode == "warmup":
        options |= {"sl2o_warmup_steps": 12, "sl2o_snapshots": 7, "sl2o_dim": 4}
    else:
        options["sl2o_stream_gradients"] = mode.startswith("stream")
        options["gradient_accumulation_steps"] = 2 if mode == "stream-accumulated" else 1
        objects["basis"] = random_dense(model.named_parameters())
    torch.manual_seed(2)
    objects["rule"] = LSTMRule(RuleConfig(output_scale=0.3))
    if mode == "record":
        callbacks = [TrajectoryCallback(Path(folder) / "trajectory", every_steps=3)]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        options["ddp_backend"] = "gloo"
    args = SL2OTrainingArguments(str(Path(folder) / "out"), **options)
    trainer = SL2OTrainer(model, args, train_dataset=Tokens(), callbacks=callbacks, **objects)
    trainer.train()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors["c"] = trainer.subspace_optimizer.coefficients
    if mode.startswith("stream") and os.environ.get("WORLD_SIZE", "1") != "1":
        ddp = trainer.model_wrapped
        left = [p.numel() for name, p in model.named_parameters() if name not in ddp.parameters_to_ignore]
        tensors["left to DDP"], tensors["sent"] = torch.tensor(left), torch.tensor(SENT)
    tensors["losses"] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    save_file(tensors, Path(folder) / f"rank-{rank}.safetensors")
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
