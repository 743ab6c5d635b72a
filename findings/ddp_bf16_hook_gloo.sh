#!/usr/bin/env bash
# torch 2.13.0, its CPU build (on Linux: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu), Python 3.11.
# Expected: of DDP's communication hooks, bf16_compress_hook runs over gloo as fp16_compress_hook does; gloo sums both.
# Happens: it is refused: DDP looks at the name of the hook and at the build of torch, not at the backend. The same
# hook inside a function of another name runs, and gives the right gradient.
# What to do: over gloo take the fp16 hook, or call the bf16 one from a function of your own.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > both.py <<'PY'
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def own_hook(group, bucket):
    return bf16_compress_hook(group, bucket)


def work(rank):
    dist.init_process_group("gloo", init_method="file://" + __file__ + ".store", rank=rank, world_size=2)
    seen = {}
    for hook in (fp16_compress_hook, bf16_compress_hook, own_hook):
        model = DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
        try:
            model.register_comm_hook(None, hook)
            model((rank + 1) * torch.ones(1, 2)).sum().backward()
            seen[hook.__name__] = f"gradient {model.module.weight.grad.tolist()}"
        except TypeError as error:
            seen[hook.__name__] = f"TypeError: {str(error).splitlines()[0]}"
    if rank == 0:
        for name, value in seen.items():
            print(f"{name}: {value}", flush=True)
    assert seen["fp16_compress_hook"] == seen["own_hook"] == "gradient [[1.5, 1.5]]", seen
    assert seen["bf16_compress_hook"].startswith("TypeError: BF16 all reduce communication hook required"), seen
    dist.destroy_process_group()


if __name__ == "__main__":
    assert torch.version.cuda is None, f"this is the build for CUDA {torch.version.cuda}; take the CPU build"
    mp.spawn(work, nprocs=2)
PY
venv/bin/python both.py

# Expected output:
# fp16_compress_hook: gradient [[1.5, 1.5]]
# bf16_compress_hook: TypeError: BF16 all reduce communication hook required CUDA 11+ and NCCL 2.10+ or XPU and XCCL
# own_hook: gradient [[1.5, 1.5]]
